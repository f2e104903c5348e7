"""`Diagnosis`: what `convscope.diagnose` returns."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Self

import numpy as np

from convscope.diagnosis.changed_images import ChangedImages
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.flat import flatten, to_json
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.overview import Overview, confidences
from convscope.diagnosis.search import Search
from convscope.engine.model import Model
from convscope.formatting import count_of, terminal_width
from convscope.images.failures import Failure
from convscope.results import Result, format_csv

MAX_EXAMPLES = 24  # images of a finding whose thumbnails are saved
OVERVIEW, CHANGED = "overview.", "changed."  # beginnings of the names of their arrays


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Result):
    """Reasons for the errors of a classifier on a labelled data set.

    Attributes
    ----------
    image_names : tuple of str
        The N images that could be used.
    labels, predictions : ndarray of shape (N,), int64
        The right class, -1 if unknown, and the predicted one.
    confidence : ndarray of shape (N,), float32
        Probability of the predicted class.
    label_quality : ndarray of shape (N,), float32
        How well each image's label fits, in [0, 1]: low is suspicious; NaN without a label.
    findings : list of Finding
        The most important first.
    searches : tuple of Search
        What each analysis tested, with what it would have been able to find.
    overview : Overview
        Accuracy, scores of classes, confusion matrix, calibration and risk by coverage.
    examples : ndarray of shape (M,), int64
        The images of which the report shows a thumbnail: the first 24 of each finding.
    thumbnails : ndarray of shape (M, s, s, 3), uint8
    evidence : ndarray of shape (M, h, w), float16
        Grad-CAM of the predicted class for these images.
    changed_images : ChangedImages
        Images before and after a shortcut is inserted or removed.
    observations : Observations or None
        All that was recorded about each image; None in a diagnosis that was saved and opened again.
    layer, layer_reason : str
        The layer whose activations were recorded, and why.
    data_name : str
        The data set.
    store_address : str
        The store of the same images, if one was used.
    seed : int
    folds : int
        Parts of the cross-validation of label quality; 0 where it rests on the network's own probabilities.
    """

    image_names: tuple[str, ...] = field(kw_only=True)
    labels: np.ndarray = field(kw_only=True)
    predictions: np.ndarray = field(kw_only=True)
    confidence: np.ndarray = field(kw_only=True)
    label_quality: np.ndarray = field(kw_only=True)
    findings: list[Finding] = field(kw_only=True)
    searches: tuple[Search, ...] = field(kw_only=True)
    overview: Overview = field(kw_only=True)
    examples: np.ndarray = field(kw_only=True)
    thumbnails: np.ndarray = field(kw_only=True)
    evidence: np.ndarray = field(kw_only=True)
    changed_images: ChangedImages = field(kw_only=True)
    observations: Observations | None = field(default=None, kw_only=True)
    layer: str = field(kw_only=True)
    layer_reason: str = field(kw_only=True)
    data_name: str = field(kw_only=True)
    store_address: str = field(default="", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    folds: int = field(default=0, kw_only=True)

    @classmethod
    def of(
        cls,
        model: Model,
        observations: Observations,
        findings: list[Finding],
        *,
        notes: tuple[str, ...] = (),
        failed: tuple[Failure, ...] = (),
        **settings: Any,
    ) -> Self:
        """Make the diagnosis of observations; `settings` are the other fields."""
        listed = [i for finding in findings for i in finding.images[:MAX_EXAMPLES]]
        examples = np.unique(np.array(listed, np.int64))
        return cls(
            model,
            image_names=observations.image_names,
            labels=np.asarray(observations.labels),
            predictions=observations.predictions,
            confidence=confidences(observations.logits).astype(np.float32),
            findings=findings,
            examples=examples,
            thumbnails=np.asarray(observations.thumbnails[examples]),
            evidence=np.asarray(observations.evidence[examples]),
            observations=observations,
            notes=notes,
            failed=failed,
            **settings,
        )

    def findings_of(self, image: int) -> list[int]:
        """Return the numbers, from 1, of the findings that list an image."""
        return [n for n, finding in enumerate(self.findings, 1) if image in finding.images]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per finding, the most important first."""
        return [
            {
                "number": number,
                "kind": finding.kind,
                "summary": finding.summary,
                "effect": finding.effect,
                "low": finding.interval[0],
                "high": finding.interval[1],
                "p_value": finding.p_value,
                "images": len(finding.images),
                "classes": "; ".join(self.model.class_name(k) for k in finding.classes),
                "recommendation": finding.recommendation,
            }
            for number, finding in enumerate(self.findings, 1)
        ]

    def text_files(self) -> dict[str, str]:
        """Return ``findings.json`` and ``images.csv``: one row for each image."""
        listed = [[] for _ in self.image_names]  # type: list[list[int]]
        for number, finding in enumerate(self.findings, 1):
            for image in finding.images:
                listed[image].append(number)
        images = {
            "image": self.image_names,
            "label": [self._class_text(k) for k in self.labels],
            "prediction": [self._class_text(k) for k in self.predictions],
            "confidence": [f"{value:.4f}" for value in self.confidence],
            "label_quality": ["" if np.isnan(value) else f"{value:.4f}" for value in self.label_quality],
            "findings": [" ".join(map(str, numbers)) for numbers in listed],
        }
        findings = [
            {"number": number, **to_json(asdict(finding)), "image_names": [self.image_names[i] for i in finding.images]}
            for number, finding in enumerate(self.findings, 1)
        ]
        content = {"findings": findings, "searches": self._searches(), "overview": self._overview()[1]}
        return {
            "findings.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
            "images.csv": format_csv(images),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all data, under the names by which they are saved."""
        return {**super().arrays(), **self._overview()[0], **flatten(self.changed_images, CHANGED)[0]}

    def parameters(self) -> dict[str, object]:
        """Return settings, findings, searches and the numbers of the overview, as JSON values."""
        findings = [to_json(asdict(finding)) for finding in self.findings]
        searches, overview = self._searches(), self._overview()[1]
        return {**super().parameters(), "findings": findings, "searches": searches, "overview": overview}

    def class_indices(self) -> list[int]:
        """Return the classes whose names the result needs."""
        named = [k for finding in self.findings for k in finding.classes]
        classes = np.unique(np.concatenate([self.labels, self.predictions, self.changed_images.prediction_after]))
        return [*classes.tolist(), *named]

    def _searches(self) -> list[dict[str, Any]]:
        """Return the searches without their findings, as JSON values."""
        return [{k: v for k, v in to_json(asdict(s)).items() if k != "findings"} for s in self.searches]

    def _overview(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays of the overview, and its numbers."""
        return flatten(self.overview, OVERVIEW)

    def _class_text(self, index: int) -> str:
        return self.model.class_name(int(index)) if index >= 0 else ""

    def _title(self) -> str:
        images = count_of(len(self.image_names), "image")
        return f"{count_of(len(self.findings), 'finding')} on {images}, accuracy {self.overview.accuracy:.1%}"

    def _remarks(self) -> list[str]:
        kinds = {finding.kind for finding in self.findings}
        empty = [s for s in self.searches if s.kind not in kinds]
        return [*(f"no {s.kind}: {s.detectable or s.question}" for s in empty), *super()._remarks()]

    def _repr_html_(self) -> str:
        """Return the figure, and below it each finding with what to do about it."""
        items = "".join(
            f"<li><b>{escape(finding.summary)}</b> {escape(finding.recommendation)}</li>" for finding in self.findings
        )
        return f"<div>{super()._repr_html_()}{f'<ol>{items}</ol>' if items else ''}</div>"

    def __str__(self) -> str:
        width = terminal_width()
        lines = [f"Diagnosis: {self._title()}"]
        for number, finding in enumerate(self.findings, 1):
            text = f"{finding.summary} {finding.recommendation}"
            lines += _wrapped(f"{number}. {finding.kind}: ", text, width)
        return "\n".join([*lines, *self._remarks()])


def _wrapped(beginning: str, text: str, width: int) -> Sequence[str]:
    """Break a text into lines, indented below its number."""
    return textwrap.wrap(beginning + text, width, subsequent_indent="   ")
