"""Find out whether the network is over- or under-confident, and which temperature would mend it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from convscope.diagnosis.calibration import (
    Classes,
    bins_of,
    debiased_calibration_error,
    debiased_squared_error,
    fit_temperature,
    reliability_curve,
    softmax,
)
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.overview import Overview, confidences, sample_rows
from convscope.diagnosis.search import Search
from convscope.diagnosis.statistics import LEVEL, Floats, normal_quantile
from convscope.diagnosis.wording import percent

MIN_ERROR = 0.01  # calibration errors below are of no consequence
MIN_LABELLED = 20
MAX_IMAGES = 100  # that a finding lists
RESAMPLES = 999
MAX_TESTED = 20_000  # images that the resampling takes
MAX_SIMULATED = 1 << 20  # random numbers at a time
POWER = 0.8
QUESTION = (
    "Whether the probability of the predicted class is how often it is right: the calibration error over bins of equal "
    "numbers of images, against that of simulated labels that follow the probabilities."
)


def find_miscalibration(context: DiagnosisContext, overview: Overview) -> Search:
    """Find out whether the network is over- or under-confident, and which temperature would mend it.

    Parameters
    ----------
    context : DiagnosisContext
    overview : Overview
        Of the context's observations.

    Returns
    -------
    Search
        With one finding at most; its effect is the mean confidence minus the accuracy.
    """
    observations = context.observations
    rows = np.flatnonzero(observations.is_labelled)
    if len(rows) < MIN_LABELLED:
        lack = f"{len(rows)} labelled images are too few to measure calibration; {MIN_LABELLED} are needed."
        return Search("calibration", QUESTION, 0, lack)
    confidence, correct = confidences(observations.logits)[rows], observations.is_correct[rows]
    differences = confidence - correct
    effect, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(rows)))
    quantile = normal_quantile(0.95)
    interval = effect - quantile * error, effect + quantile * error
    size = (quantile + normal_quantile(2 * POWER - 1)) * error
    detectable = f"A difference of {100 * size:.1f} points between mean confidence and accuracy would have been found."
    p_value = calibration_p_value(confidence, correct, context.seed)
    if p_value > LEVEL or overview.debiased_calibration_error < MIN_ERROR:
        return Search("calibration", QUESTION, 1, detectable)
    sample = sample_rows(rows, observations.logits.shape[1], context.seed)
    after = calibrated_error(observations.logits[sample], observations.labels[sample])
    finding = Finding(
        "calibration",
        _summary(overview, effect, after),
        _recommendation(overview, after),
        _images(rows, confidence, correct, overview.temperature > 1),
        (),
        effect,
        interval,
        p_value,
        {
            "effect": "mean confidence minus accuracy",
            "mean_confidence": overview.mean_confidence,
            "accuracy": overview.accuracy,
            "temperature": overview.temperature,
            "calibration_error": overview.calibration_error,
            "debiased_calibration_error": overview.debiased_calibration_error,
            "debiased_calibration_error_with_temperature": after,
        },
    )
    return Search("calibration", QUESTION, 1, detectable, (finding,))


def calibration_p_value(confidence: Floats, correct: npt.NDArray[np.bool_], seed: int) -> float:
    """Return the probability of a calibration error as large as this one if confidences were probabilities.

    Whether each image is right is simulated 999 times with its confidence as probability (consistency resampling). Of
    more than 20,000 images a sample is taken.

    Parameters
    ----------
    confidence : ndarray of shape (N,)
    correct : ndarray of shape (N,), bool
    seed : int

    References
    ----------
    Bröcker and Smith, Increasing the reliability of reliability diagrams, Weather and Forecasting 2007.
    """
    generator = np.random.default_rng(seed)
    if len(confidence) > MAX_TESTED:
        sample = generator.choice(len(confidence), MAX_TESTED, replace=False)
        confidence, correct = confidence[sample], correct[sample]
    order, starts = bins_of(confidence)
    probability, counts = confidence[order], np.diff(np.append(starts, len(order)))
    mean = np.add.reduceat(probability, starts) / counts

    def error(is_right: npt.NDArray[np.bool_]) -> Floats:
        """Return the error of each of R outcomes (R, N)."""
        accuracy = np.add.reduceat(is_right, starts, axis=1, dtype=np.float64) / counts
        return debiased_squared_error(accuracy, mean, counts)

    observed, at_least, size = error(correct[order][None])[0], 0, max(1, MAX_SIMULATED // len(order))
    for start in range(0, RESAMPLES, size):
        simulated = generator.random((min(size, RESAMPLES - start), len(order))) < probability
        at_least += int((error(simulated) >= observed).sum())
    return (1 + at_least) / (1 + RESAMPLES)


def calibrated_error(logits: npt.NDArray[np.floating], labels: Classes) -> float:
    """Return the debiased calibration error with a temperature, fitted on one half of the images for the other one."""
    confidence, is_odd = np.empty(len(labels)), np.arange(len(labels)) % 2 == 1
    for half in (is_odd, ~is_odd):
        confidence[half] = softmax(logits[half] / fit_temperature(logits[~half], labels[~half])).max(1)
    return debiased_calibration_error(reliability_curve(confidence, logits.argmax(1) == labels))


def _summary(overview: Overview, effect: float, after: float) -> str:
    subject = "The network's probabilities are not how often it is right"
    if effect > 0 and overview.temperature > 1:
        subject = "The network is over-confident"
    elif effect < 0 and overview.temperature < 1:
        subject = "The network is under-confident"
    before = overview.debiased_calibration_error
    temperature = (
        f"A temperature of {overview.temperature:.2f} reduces the calibration error from {before:.3f} to {after:.3f}."
        if after < before
        else f"The calibration error is {before:.3f}, and no temperature reduces it."
    )
    return (
        f"{subject}: its mean confidence is {percent(overview.mean_confidence, 1)}, its accuracy "
        f"{percent(overview.accuracy, 1)} ({100 * effect:+.1f} points). {temperature}"
    )


def _recommendation(overview: Overview, after: float) -> str:
    if after < overview.debiased_calibration_error:
        return f"Divide the logits by {overview.temperature:.2f} (temperature scaling) wherever probabilities are used."
    return (
        "Do not use the probabilities as they are; fit a calibration to labelled images, such as isotonic regression."
    )


def _images(
    rows: Classes, confidence: Floats, correct: npt.NDArray[np.bool_], is_overconfident: bool
) -> tuple[int, ...]:
    """Return wrong images of the highest confidence, or right ones of the lowest."""
    usable = np.flatnonzero(correct != is_overconfident)
    order = np.argsort(confidence[usable] * (-1 if is_overconfident else 1), kind="stable")
    return tuple(rows[usable[order]][:MAX_IMAGES].tolist())
