"""The table of metrics: one row each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convscope.errors import ConvscopeError, nearest
from convscope.evaluation import curves, faithfulness, localisation, sanity
from convscope.evaluation.context import Scores


@dataclass(frozen=True)
class Metric:
    """A function of a `Subject`, and how to read what it gives.

    better: "lower" or "higher". says: what the figure is, in a line. limit: a mean on the wrong side of it is worth the
    words in `warning`; where the metric knows what chance gives, that is the limit. needs: "masks", "heatmaps" (made by
    convscope, so that they can be made again) or "classes" (as targets). axis: what a curve is drawn over.
    """

    function: Callable[..., Scores]
    better: str
    description: str
    limit: float | None = None
    warning: str = ""
    needs: tuple[str, ...] = ()
    axis: str = "share of pixels taken away"

    def warns(self, mean: float, chance: float | None = None) -> bool:
        """Whether a mean is on the wrong side of the limit."""
        limit = self.limit if chance is None else chance
        if limit is None:
            return False
        return mean >= limit if self.better == "lower" else mean <= limit


METRICS: dict[str, Metric] = {
    "deletion": Metric(
        curves.deletion,
        "lower",
        "area under the target's probability while the hottest pixels are taken away first",
    ),
    "insertion": Metric(
        curves.insertion,
        "higher",
        "area under the target's probability while the hottest pixels are shown first",
        axis="share of pixels shown",
    ),
    "road": Metric(
        curves.road,
        "higher",
        "probability left without the coldest pixels, less that left without the hottest, over all steps",
        0.0,
        "without the pixels that the map marks the target keeps as much as without the others",
    ),
    "average-drop": Metric(
        faithfulness.average_drop,
        "lower",
        "share of its probability that the target loses where the map dims the picture",
        needs=("classes",),
    ),
    "average-gain": Metric(
        faithfulness.average_gain,
        "higher",
        "share of what its probability lacks that the target gains where the map dims the picture",
        needs=("classes",),
    ),
    "average-increase": Metric(
        faithfulness.average_increase,
        "higher",
        "share of targets that are more probable where the map dims the picture",
        needs=("classes",),
    ),
    "mu-fidelity": Metric(
        faithfulness.mu_fidelity,
        "higher",
        "correlation of the heat in a random subset with the score that goes with it",
        0.0,
        "taking away what the map marks costs the target no more than taking away anything else",
    ),
    "infidelity": Metric(
        faithfulness.infidelity,
        "lower",
        "mean squared error of the heat in a random subset as a forecast of the score that goes with it",
    ),
    "max-sensitivity": Metric(
        sanity.max_sensitivity,
        "lower",
        "largest relative change of the map under noise too weak to be seen",
        1.0,
        "noise that nobody sees changes the map by as much as there is of it",
        needs=("heatmaps",),
    ),
    "sparseness": Metric(
        faithfulness.sparseness,
        "higher",
        "Gini index of the map: 0 is even, 1 a single pixel; says how concise it is, not whether it is true",
    ),
    "complexity": Metric(
        faithfulness.complexity,
        "lower",
        "entropy of the map in nats; says how concise it is, not whether it is true",
    ),
    "pointing": Metric(
        localisation.pointing,
        "higher",
        "share of maps whose hottest pixel lies on the target",
        warning="the hottest pixel finds the target no more often than chance would",
        needs=("masks",),
    ),
    "energy": Metric(
        localisation.energy,
        "higher",
        "share of the positive heat that lies on the target",
        warning="there is no more heat on the target than on as large a part of anything else",
        needs=("masks",),
    ),
    "iou": Metric(
        localisation.iou,
        "higher",
        "intersection over union of the target with as many of the hottest pixels",
        warning="the hottest pixels meet the target no more than pixels at random would",
        needs=("masks",),
    ),
    "randomisation": Metric(
        sanity.randomisation,
        "lower",
        "rank correlation of the map with the one of the same network without its learned weights",
        0.5,
        "the map hardly changes when the weights are drawn anew: it shows edges of the picture, not evidence",
        needs=("heatmaps",),
        axis="stages of redrawing, from the top layer to all",
    ),
    "random-logit": Metric(
        sanity.random_logit,
        "lower",
        "rank correlation of the map with the one for another class",
        0.9,
        "the map is nearly the same for another class: it shows what is there, not what speaks for the class",
        needs=("heatmaps", "classes"),
    ),
}


def find(name: str) -> Metric:
    """The metric of that name. Raises ConvscopeError, with the nearest names, when there is none."""
    if name not in METRICS:
        raise ConvscopeError(f"metric {name!r} is not known; nearest: {nearest(str(name), list(METRICS))}")
    return METRICS[name]


def options(names: Iterable[str], given: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each metric all its options: the given and shared ones that it has, and the others' defaults.

    Raises ConvscopeError for a given one that none of the metrics has.
    """
    known = {
        name: {
            key: parameter.default
            for key, parameter in inspect.signature(find(name).function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name in names
    }
    every = {key: None for own in known.values() for key in own if key not in shared}
    for key in given:
        if key not in every:
            has = f"their options: {', '.join(every)}" if every else "they have no options of their own"
            raise ConvscopeError(f"option {key!r} is known to none of {', '.join(known)}; {has}")
    return {
        name: {key: given.get(key, shared.get(key, default)) for key, default in own.items()}
        for name, own in known.items()
    }
