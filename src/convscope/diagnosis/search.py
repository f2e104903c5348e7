"""`Search`: what one analysis of a diagnosis looked for, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.diagnosis.finding import Finding


@dataclass(frozen=True)
class Search:
    """The outcome of one analysis: its findings, and what their absence means.

    Attributes
    ----------
    kind : str
        The kind of its findings, as in `Finding.kind`.
    question : str
        What was looked for and how it was tested, in one sentence.
    num_candidates : int
        The number of candidates that were tested, which the p-values are corrected for.
    detectable : str
        The size of the effect that would have been found, in one sentence; empty if that is not known.
    findings : tuple of Finding
        The most important first.
    notes : tuple of str
        What the findings alone do not show, such as assumptions.
    """

    kind: str
    question: str
    num_candidates: int
    detectable: str = ""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
