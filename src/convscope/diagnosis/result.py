"""`Diagnosis`: what `convscope.diagnose` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.observations import Observations
from convscope.diagnosis.overview import Overview
from convscope.diagnosis.search import Search
from convscope.formatting import count_of
from convscope.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Result):
    """Reasons for the errors of a classifier on a labelled data set.

    Attributes
    ----------
    findings : list of Finding
        The most important first.
    searches : tuple of Search
        What each analysis tested, with what it would have been able to find.
    overview : Overview
        Accuracy, scores of classes, confusion matrix, calibration and risk by coverage.
    label_quality : ndarray of shape (N,), float32
        How well each image's label fits, in [0, 1]: low is suspicious; NaN without a label.
    observations : Observations
        What was recorded about each image.
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

    findings: list[Finding] = field(kw_only=True)
    searches: tuple[Search, ...] = field(kw_only=True)
    overview: Overview = field(kw_only=True)
    label_quality: np.ndarray = field(kw_only=True)
    observations: Observations = field(kw_only=True)
    layer: str = field(kw_only=True)
    layer_reason: str = field(kw_only=True)
    data_name: str = field(kw_only=True)
    store_address: str = field(default="", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    folds: int = field(default=0, kw_only=True)

    @property
    def image_names(self) -> tuple[str, ...]:
        """The names of the N images that could be used."""
        return self.observations.image_names

    def _title(self) -> str:
        images = count_of(len(self.observations), "image")
        return f"{count_of(len(self.findings), 'finding')} on {images}, accuracy {self.overview.accuracy:.1%}"
