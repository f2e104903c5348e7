"""The table of metrics: one row per metric."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from convscope.errors import ConvscopeError, find_name
from convscope.evaluation import curves, faithfulness, localisation, sanity
from convscope.evaluation.context import Scores

MetricOptions: TypeAlias = dict[str, Any]  # keyword arguments of a metric's function


@dataclass(frozen=True)
class Metric:
    """A metric and how to read its values.

    Attributes
    ----------
    function : callable
        ``function(context, **options) -> Scores``.
    better : {"lower", "higher"}
        Which direction is better.
    description : str
        One line.
    limit : float or None
        A mean on the wrong side of it causes `warning`; the chance level takes its place where it is known.
    needs : tuple of str
        "masks", "heatmaps" (computed by convscope, so that they can be computed again) or "classes" (as targets).
    curve_axis : str
        Label of the horizontal axis of curves.
    """

    function: Callable[..., Scores]
    better: str
    description: str
    limit: float | None = None
    warning: str = ""
    needs: tuple[str, ...] = ()
    curve_axis: str = "fraction of pixels removed"

    def is_suspect(self, mean: float, chance: float | None = None) -> bool:
        """Return whether a mean is on the wrong side of the limit."""
        limit = self.limit if chance is None else chance
        if limit is None:
            return False
        return mean >= limit if self.better == "lower" else mean <= limit


METRICS: dict[str, Metric] = {
    "deletion": Metric(
        curves.deletion,
        "lower",
        "area under the target's probability while the most relevant pixels are removed first",
    ),
    "insertion": Metric(
        curves.insertion,
        "higher",
        "area under the target's probability while the most relevant pixels are inserted first",
        curve_axis="fraction of pixels inserted",
    ),
    "road": Metric(
        curves.road,
        "higher",
        "probability without the least relevant pixels minus probability without the most relevant, over all steps",
        0.0,
        "removing the relevant pixels costs the target no more than removing the others",
    ),
    "average-drop": Metric(
        faithfulness.average_drop,
        "lower",
        "relative loss of the target's probability on the image multiplied by the map",
        needs=("classes",),
    ),
    "average-gain": Metric(
        faithfulness.average_gain,
        "higher",
        "gain of the target's probability on the image multiplied by the map, relative to 1 - probability",
        needs=("classes",),
    ),
    "average-increase": Metric(
        faithfulness.average_increase,
        "higher",
        "fraction of targets that are more probable on the image multiplied by the map",
        needs=("classes",),
    ),
    "mu-fidelity": Metric(
        faithfulness.mu_fidelity,
        "higher",
        "correlation of the relevance of random subsets with the drop of the score without them",
        0.0,
        "removing relevant subsets costs the target no more than removing others",
    ),
    "infidelity": Metric(
        faithfulness.infidelity,
        "lower",
        "mean squared error of the relevance of random subsets as a prediction of the drop of the score",
    ),
    "max-sensitivity": Metric(
        sanity.max_sensitivity,
        "lower",
        "largest relative change of the map under imperceptible noise",
        1.0,
        "imperceptible noise changes the map by as much as its own norm",
        needs=("heatmaps",),
    ),
    "sparseness": Metric(
        faithfulness.sparseness,
        "higher",
        "Gini index of the map: 0 is even, 1 a single pixel; measures how concise it is, not whether it is right",
    ),
    "complexity": Metric(
        faithfulness.complexity,
        "lower",
        "entropy of the map in nats; measures how concise it is, not whether it is right",
    ),
    "pointing": Metric(
        localisation.pointing,
        "higher",
        "fraction of maps whose maximum lies on the target",
        warning="the maximum lies on the target no more often than by chance",
        needs=("masks",),
    ),
    "energy": Metric(
        localisation.energy,
        "higher",
        "fraction of the positive relevance that lies on the target",
        warning="there is no more relevance on the target than on an equally large random region",
        needs=("masks",),
    ),
    "iou": Metric(
        localisation.iou,
        "higher",
        "intersection over union of the target with as many of the most relevant pixels",
        warning="the most relevant pixels overlap the target no more than random pixels",
        needs=("masks",),
    ),
    "randomisation": Metric(
        sanity.randomisation,
        "lower",
        "rank correlation of the map with that of the same network with random weights",
        0.5,
        "the map hardly changes when the weights are randomised: it shows edges of the image, not evidence",
        needs=("heatmaps",),
        curve_axis="stages of randomisation, from the top layer to all",
    ),
    "random-logit": Metric(
        sanity.random_logit,
        "lower",
        "rank correlation of the map with that of another class",
        0.9,
        "the map is nearly the same for another class: it shows what is in the image, not evidence for the class",
        needs=("heatmaps", "classes"),
    ),
}


def metric_name(name: str) -> str:
    """Return the key of a metric that is given in any case, with or without hyphens; raise ConvscopeError."""
    return find_name("metric", name, list(METRICS))


def get_metric(name: str) -> Metric:
    """Return the metric of this name."""
    return METRICS[metric_name(name)]


def resolve_options(
    names: Iterable[str], options: Mapping[str, object], shared: Mapping[str, object]
) -> dict[str, MetricOptions]:
    """Return all options of each metric: values of `options` and `shared` where it has them, else its defaults.

    Raises
    ------
    ConvscopeError
        For an option that none of the metrics has.
    """
    known = {
        name: {
            key: parameter.default
            for key, parameter in inspect.signature(get_metric(name).function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name in names
    }
    available = {key: None for defaults in known.values() for key in defaults if key not in shared}
    for key in options:
        if key not in available:
            has = f"their options: {', '.join(available)}" if available else "they have no options"
            raise ConvscopeError(f"option {key!r} is known to none of {', '.join(known)}; {has}")
    return {
        name: {key: options.get(key, shared.get(key, default)) for key, default in defaults.items()}
        for name, defaults in known.items()
    }
