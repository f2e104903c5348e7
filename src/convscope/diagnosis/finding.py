"""`Finding`: one reason for errors, with its size, its uncertainty and its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("shortcut", "slice", "label-error", "confusion", "duplicate", "calibration")


@dataclass(frozen=True)
class Finding:
    """One finding about a classifier and its data.

    Attributes
    ----------
    kind : {"shortcut", "slice", "label-error", "confusion", "duplicate", "calibration"}
    summary : str
        One sentence in plain words, with numbers.
    recommendation : str
        What to do about it, in one sentence.
    images : tuple of int
        Indices into the report's `image_names`, the most typical first.
    classes : tuple of int
        Indices of the classes concerned, the main one first.
    effect : float
        The size of the effect; `evidence["effect"]` says what it measures.
    interval : tuple of float
        Its 95 % interval.
    p_value : float
        Corrected for the number of candidates (Benjamini-Hochberg); NaN where nothing was tested.
    evidence : mapping
        What the finding rests on, by name: numbers, units of the layer, boxes, facts about images. JSON values only.
    """

    kind: str
    summary: str
    recommendation: str
    images: tuple[int, ...]
    classes: tuple[int, ...]
    effect: float
    interval: tuple[float, float]
    p_value: float
    evidence: Mapping[str, Any] = field(default_factory=dict)
