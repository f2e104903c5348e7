"""The report of a diagnosis: one HTML page that opens without a server and prints well."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.result import MAX_EXAMPLES, Diagnosis
from convscope.formatting import base_name, format_cell
from convscope.images.colormap import lookup_table

FIRST = 8  # images of a finding that are visible at once, and printed
MARKS = 24  # images that a recurring mark is averaged over
MARK_MARGIN = 0.25  # of its side, around a mark
MAX_CLASSES = 10  # in the table of the classes with the lowest recall
MAX_LISTED = 200  # names of images that are listed on the page; all are in findings.json
MAX_FACTS = 16  # numbers of a finding
MAX_TEXT = 300  # characters of one of them
MIN_PRINTED_P = 1e-4
QUALITY = 88  # of JPEG thumbnails

DIFFERENCES = ("shortcut", "slice", "calibration")
"""Kinds whose effect is the difference of two shares or probabilities."""

HEATMAP_KINDS = ("shortcut", "slice", "label-error", "confusion")
"""Kinds of findings about the network's answers to images, for which the evidence is shown."""

KIND_TITLES = {
    "shortcut": "Shortcut",
    "slice": "Group of images with more errors",
    "label-error": "Wrong labels",
    "confusion": "Classes that are confused",
    "duplicate": "Near duplicates",
    "calibration": "Confidence that cannot be trusted",
}


@dataclass(frozen=True)
class _Card:
    """An image on the page."""

    name: str
    photo: str
    overlay: str
    label: str
    prediction: str
    confidence: str
    quality: str
    is_right: bool


@dataclass(frozen=True)
class _Change:
    """An image before and after a change, with the network's answers."""

    name: str
    before: str
    after: str
    answer_before: str
    answer_after: str
    is_changed: bool


@dataclass(frozen=True)
class _Section:
    """A finding on the page."""

    number: int
    title: str
    finding: Finding
    effect: str
    p_value: str
    cards: list[_Card]
    mark: str
    inserted: list[_Change]
    removed: list[_Change]
    names: list[str]
    facts: list[tuple[str, str]]


def diagnosis_page(result: Diagnosis, overlays: Mapping[int, np.ndarray]) -> str:
    """Render the page; `overlays` are the thumbnails of the examples with their evidence, by image."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("convscope.plotting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = quoted
    colors = ", ".join(f"rgb({r} {g} {b})" for r, g, b in lookup_table("jet")[::32].tolist())
    kinds, names = {finding.kind for finding in result.findings}, display_names(result)
    html: str = environment.get_template("diagnosis.html").render(
        result=result,
        overview=result.overview,
        data_name=base_name(result.data_name.rstrip("/")),
        sections=[_section(result, names, n, finding, overlays) for n, finding in enumerate(result.findings, 1)],
        searches=[(KIND_TITLES.get(s.kind, s.kind), s) for s in result.searches],
        empty=[(KIND_TITLES.get(s.kind, s.kind), s) for s in result.searches if s.kind not in kinds],
        kinds=kinds,
        classes=_lowest_recall(result),
        first=FIRST,
        max_listed=MAX_LISTED,
        scale_colors=colors,
        percent=_percent,
    )
    return html


def _section(
    result: Diagnosis, names: Sequence[str], number: int, finding: Finding, overlays: Mapping[int, np.ndarray]
) -> _Section:
    has_heatmaps = finding.kind in HEATMAP_KINDS
    return _Section(
        number,
        KIND_TITLES.get(finding.kind, finding.kind),
        finding,
        format_effect(finding),
        format_p_value(finding.p_value),
        [_card(result, names, image, overlays if has_heatmaps else {}) for image in finding.images[:MAX_EXAMPLES]],
        "" if (mark := mean_mark(result, finding)) is None else _data_url(mark),
        _changes(result, names, number, inserted=True),
        _changes(result, names, number, inserted=False),
        [names[image] for image in finding.images[:MAX_LISTED]],
        _facts(finding),
    )


def _card(result: Diagnosis, names: Sequence[str], image: int, overlays: Mapping[int, np.ndarray]) -> _Card:
    label, quality = int(result.labels[image]), float(result.label_quality[image])
    return _Card(
        names[image],
        _data_url(result.thumbnails[int(np.searchsorted(result.examples, image))]),
        _data_url(overlays[image]) if image in overlays else "",
        result.model.class_name(label) if label >= 0 else "unknown",
        result.model.class_name(int(result.predictions[image])),
        _percent(float(result.confidence[image])),
        "" if math.isnan(quality) else f"{quality:.3f}",
        label == int(result.predictions[image]),
    )


def _changes(result: Diagnosis, names: Sequence[str], number: int, *, inserted: bool) -> list[_Change]:
    """Return the images into which the shortcut of a finding was inserted, or from which it was removed."""
    changed = result.changed_images
    rows = np.flatnonzero((changed.finding == number) & (changed.inserted == inserted))

    def answer(predictions: np.ndarray, confidence: np.ndarray, row: int) -> str:
        return f"{result.model.class_name(int(predictions[row]))}, {_percent(float(confidence[row]))} sure"

    return [
        _Change(
            names[changed.image[row]],
            _data_url(changed.before[row]),
            _data_url(changed.after[row]),
            answer(changed.prediction_before, changed.confidence_before, row),
            answer(changed.prediction_after, changed.confidence_after, row),
            bool(changed.prediction_before[row] != changed.prediction_after[row]),
        )
        for row in rows.tolist()
    ]


def mean_mark(result: Diagnosis, finding: Finding) -> np.ndarray | None:
    """Return the mean of a recurring mark, with a margin, over the first images of a finding, uint8 (h, w, 3).

    None if the finding is about no mark.
    """
    boxes = finding.evidence.get("boxes")
    if not boxes:
        return None
    height, width = result.thumbnails.shape[1:3]
    size = np.array([width, height])
    extent = np.rint((np.array(boxes[0][2:]) - boxes[0][:2]) * size)
    sides = np.minimum((1 + 2 * MARK_MARGIN) * extent, size).astype(int)
    corners = (np.array(boxes)[: min(MARKS, MAX_EXAMPLES), :2] * size - MARK_MARGIN * extent).round().astype(int)
    patches = []
    for image, (left, top) in zip(finding.images, corners.clip(0, size - sides).tolist(), strict=False):
        thumbnail = result.thumbnails[int(np.searchsorted(result.examples, image))]
        patches.append(thumbnail[top : top + sides[1], left : left + sides[0]])
    return np.asarray(np.mean(patches, axis=0).round(), np.uint8)


def display_names(result: Diagnosis) -> list[str]:
    """Return the names of images without the folder that all have in common."""
    folders = [name.rpartition("/")[0].split("/") for name in result.image_names]
    low, high = min(folders), max(folders)
    common = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return ["/".join(name.split("/")[common:]) for name in result.image_names]


def quoted(text: str) -> str:
    """Put names in quotation marks instead of backticks."""
    return re.sub("`(.+?)`", "“\\1”", text)


def format_effect(finding: Finding) -> str:
    """Format the effect with its interval: shares as percentages, their differences as percentage points."""
    values = (finding.effect, *finding.interval)
    if finding.kind in DIFFERENCES:
        effect, low, high = (f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}") for value in values)
        return f"{effect} percentage points (95 % interval {low} to {high})"
    if all(abs(value) <= 1 for value in values):
        low, high = (f"{100 * value:.1f}" for value in finding.interval)
        return f"{100 * finding.effect:.1f} % (95 % interval {low} % to {high} %)"
    low, high = (f"{value:,.0f}" for value in finding.interval)
    return f"{finding.effect:,.0f} (95 % interval {low} to {high})"


def format_p_value(p_value: float) -> str:
    """Say how probable such a result would be by chance; nothing if that was not tested."""
    if math.isnan(p_value):
        return ""
    return f"p < {MIN_PRINTED_P:g}" if p_value < MIN_PRINTED_P else f"p = {p_value:.2g}"


def _facts(finding: Finding) -> list[tuple[str, str]]:
    """Return the numbers that a finding rests on, with readable names; long lists are left out."""
    facts = []
    for name, value in finding.evidence.items():
        text = _format_value(value)
        if name not in ("effect", "boxes", "description") and text and len(text) <= MAX_TEXT:
            facts.append((name.replace("_", " "), text))
    return facts[:MAX_FACTS]


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        if "unit" in value:
            name = f" ({value['name']})" if "name" in value else ""
            return f"{value['unit']}{name}: {value['difference']:+.1f} standard deviations"
        return "; ".join(f"{key}: {_format_value(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return (
            " | ".join(map(_format_value, value))
            if value and isinstance(value[0], Mapping)
            else ", ".join(map(_format_value, value))
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else format_cell(value)


def _lowest_recall(result: Diagnosis) -> list[dict[str, str]]:
    """Return the classes with the lowest recall."""
    scores = result.overview.class_scores
    order = [int(k) for k in np.argsort(scores.recall, kind="stable") if not np.isnan(scores.recall[k])]
    return [
        {
            "name": result.model.class_name(int(scores.classes[k])),
            "images": f"{int(scores.num_labelled[k]):,}",
            "recall": _with_interval(scores.recall[k], scores.recall_interval[k]),
            "precision": _with_interval(scores.precision[k], scores.precision_interval[k]),
        }
        for k in order[:MAX_CLASSES]
    ]


def _with_interval(value: float, interval: np.ndarray) -> str:
    return (
        "never predicted"
        if math.isnan(value)
        else f"{_percent(value)} ({_percent(interval[0])} to {_percent(interval[1])})"
    )


def _percent(value: float) -> str:
    return f"{100 * float(value):.1f} %"


def _data_url(image: np.ndarray) -> str:
    """Encode an image as a JPEG data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
