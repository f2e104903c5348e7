"""Shortcuts: evidence that gives a class away and is not the object, proven by removing and inserting it."""

from __future__ import annotations

import numpy as np

from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.forward import scoring_forward
from convscope.diagnosis.search import Search
from convscope.diagnosis.shortcut_candidates import propose
from convscope.diagnosis.shortcut_findings import causal_findings
from convscope.diagnosis.shortcut_tests import MIN_EFFECT, TESTED_IMAGES, Outcome, ShortcutTests, searched_classes
from convscope.diagnosis.statistics import benjamini_hochberg
from convscope.diagnosis.unit_shortcuts import UnitOutcome, measure_units

MIN_CANDIDATES, MAX_CANDIDATES = 12, 40  # that are tested, those that separate best
IMAGES_PER_CANDIDATE = 24
PURPOSE = (
    "Marks that recur with equal pixels, borders, backgrounds, overall colors and blur that set the images of a class "
    "apart: each was removed from images of the class and inserted into images of other classes. Units of the layer "
    "that are high where images are wrongly taken for a class: each was set to its mean. The change of the answers was "
    "compared with that by matched random changes."
)


def find_shortcuts(context: DiagnosisContext) -> Search:
    """Find features that the network takes for a class and that are not the object.

    Candidates come from the recorded thumbnails, evidence and facts: patches that recur with nearly equal pixels where
    the evidence is, borders and backgrounds at the rim, colors, and detail, each where it separates the images of a
    class from the others. A candidate is reported if inserting it into images of other classes makes the network
    answer with the class more than matched random changes do, by a permutation test that is corrected for the number
    of candidates (Benjamini-Hochberg), and if removing it, where that is possible, takes the answer away. Units of the
    layer are candidates as well, where there are images of other classes that are taken for the class; they are set to
    their means.

    Parameters
    ----------
    context : DiagnosisContext

    Returns
    -------
    Search
        Findings of the kind "shortcut", those with the largest effect first. The effect is the change of the class's
        probability beyond that by random changes.

    References
    ----------
    Lapuschkin et al., Unmasking Clever Hans predictors and assessing what machines really learn, Nature
    Communications 2019.
    Rong et al., A Consistent and Efficient Evaluation Strategy for Attribution Methods, ICML 2022.
    """
    observations = context.observations
    rng = np.random.default_rng(context.seed)
    if context.model.preprocessing.axes != 2:
        return Search("shortcut", PURPOSE, 0, notes=("Shortcuts are searched in images only.",))
    classes = searched_classes(observations)
    most = max_candidates(len(observations))
    steps = len(classes) + most
    candidates = propose(observations, classes, rng, lambda done: context.report_progress(done, steps))
    candidates = sorted(candidates, key=lambda c: -c.separation)[:most]
    candidates.sort(key=lambda c: c.label)  # those of a class share images
    tested: list[Outcome | UnitOutcome] = []
    with scoring_forward(context.model, context.memory) as scores:
        tests = ShortcutTests(context, scores)
        for done, candidate in enumerate(candidates):
            context.report_progress(len(classes) + done, steps)
            tested += tests.outcomes(candidate)
    for unit in measure_units(context, classes):
        context.report_progress(len(classes) + len(candidates), steps)
        tested.append(unit)
    p_values = benjamini_hochberg([outcome.p_value for outcome in tested]).tolist() if tested else []
    findings = causal_findings(context, tested, p_values)
    context.report_progress(steps, steps)
    detectable = f"Changes of the probability by {MIN_EFFECT} or more, with {TESTED_IMAGES} images on each side."
    return Search("shortcut", PURPOSE, len(tested), detectable, findings)


def max_candidates(num_images: int) -> int:
    """Return how many candidates are tested: few images do not support many tests."""
    return min(max(num_images // IMAGES_PER_CANDIDATE, MIN_CANDIDATES), MAX_CANDIDATES)
