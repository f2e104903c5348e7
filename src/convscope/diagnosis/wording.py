"""Words for findings: what a fact's low and high values mean, names of classes, percentages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

NO_LABELS = "Nothing would have been found: no image has a label."

ADJECTIVES = {
    "brightness": ("dark", "bright"),
    "contrast": ("low-contrast", "high-contrast"),
    "saturation": ("pale", "colorful"),
    "redness": ("greenish", "reddish"),
    "yellowness": ("bluish", "yellowish"),
    "sharpness": ("blurred", "sharp"),
    "edge density": ("smooth", "busy"),
    "width": ("narrow", "wide"),
    "height": ("low", "high"),
    "megapixels": ("small", "large"),
    "aspect ratio": ("upright", "wide"),
    "JPEG quality": ("strongly compressed", "weakly compressed"),
}
"""For facts by name: an adjective for images of which the fact is low, and one for high."""


CLAUSES = {
    "shadows": ("with few black areas", "with large black areas"),
    "highlights": ("with few white areas", "with large white areas"),
    "margin": ("without uniform margins", "with uniform margins"),
    "bits per pixel": ("with small files for their size", "with large files for their size"),
}
"""The same as clauses. A file without losses is small because its image has little detail, not by compression."""


def describe_fact(name: str, is_high: bool) -> tuple[str, str]:
    """Return an adjective, if there is one, and a clause: ("dark", "") or ("", "with few black areas")."""
    if name in ADJECTIVES:
        return ADJECTIVES[name][is_high], ""
    if name in CLAUSES:
        return "", CLAUSES[name][is_high]
    return "", f"with {'high' if is_high else 'low'} {name}"


def describe_images(facts: Sequence[tuple[str, bool]], class_name: str | None, units: Sequence[int] = ()) -> str:
    """Describe a group of images: "dark images of `cat`", "images of `cat` that share units 12 and 40"."""
    parts = [describe_fact(name, is_high) for name, is_high in facts]
    adjectives = list(dict.fromkeys(adjective for adjective, _ in parts if adjective))
    clauses = [clause for _, clause in parts if clause]
    text = ", ".join(adjectives) + (" " if adjectives else "") + "images"
    text += f" of `{class_name}`" if class_name is not None else ""
    text += " " + " and ".join(clauses) if clauses else ""
    if not parts and len(units):
        text += f" that share {list_units(units)}"
    return text


def list_units(units: Sequence[int], names: Mapping[int, str] | None = None) -> str:
    """Return "unit 3", or "units 3, 5 and 8", with their names, if they are known: "unit 3 (striped fur)"."""
    words = [f"{unit} ({names[unit]})" if names and unit in names else str(unit) for unit in units]
    if len(words) == 1:
        return f"unit {words[0]}"
    return f"units {', '.join(words[:-1])} and {words[-1]}"


def percent(value: float, digits: int = 0) -> str:
    """Return 0.614 as "61 %", with `digits` after the point."""
    return f"{100 * value:.{digits}f} %"


def separation(values: npt.NDArray[np.floating], members: npt.NDArray[np.bool_]) -> float:
    """Return the probability that a member's value is larger than another's, ties halved: the area under the ROC curve.

    Missing values are left out; 0.5 where members or others have none.
    """
    is_known = np.isfinite(values)
    inside, outside = np.sort(values[is_known & members]), np.sort(values[is_known & ~members])
    if not len(inside) or not len(outside):
        return 0.5
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / 2 / len(outside))
