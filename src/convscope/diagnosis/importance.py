"""The order of findings: by the number of images that each explains."""

from __future__ import annotations

from collections.abc import Iterable

from convscope.diagnosis.finding import KINDS, Finding


def importance(finding: Finding, num_labelled: int) -> float:
    """Return the number of images that a finding explains.

    A slice or shortcut: its number of images times its effect, which is a share of them. A confusion: images beyond the
    expected number. Wrong labels: their estimated number, which is the effect. Miscalibration: the mean difference
    between confidence and accuracy, times all labelled images. Duplicates change no prediction; they come last, by
    their number of images.

    Parameters
    ----------
    finding : Finding
    num_labelled : int
        Labelled images of the data set.
    """
    if finding.kind == "confusion":
        return float(finding.evidence["count"] - finding.evidence["expected"])
    if finding.kind == "label-error":
        return finding.effect
    if finding.kind == "calibration":
        return abs(finding.effect) * num_labelled
    return len(finding.images) * abs(finding.effect)


def sort_findings(findings: Iterable[Finding], num_labelled: int) -> list[Finding]:
    """Sort findings by `importance`, duplicates last; equal ones in the order of their kinds."""
    return sorted(
        findings, key=lambda f: (f.kind == "duplicate", -importance(f, num_labelled), KINDS.index(f.kind), f.images)
    )
