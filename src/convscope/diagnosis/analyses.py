"""The analyses of a diagnosis, one after the other, each with a progress bar of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from convscope.diagnosis.changed_images import ChangedImages, change_images
from convscope.diagnosis.confusions import find_confusions
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.importance import sort_findings
from convscope.diagnosis.label_errors import find_label_errors
from convscope.diagnosis.miscalibration import find_miscalibration
from convscope.diagnosis.named_units import name_units_of
from convscope.diagnosis.near_duplicates import find_near_duplicates
from convscope.diagnosis.overview import Overview
from convscope.diagnosis.recording import RecordingJob
from convscope.diagnosis.saved_searches import Outcome, SavedSearches
from convscope.diagnosis.search import Search
from convscope.diagnosis.shortcuts import find_shortcuts
from convscope.diagnosis.slices import find_slices
from convscope.progress import ProgressOption, progress_bar

SEARCHES = "searches"  # folder of finished searches in that of the report


@dataclass(frozen=True)
class Analyses:
    """What all analyses found.

    Attributes
    ----------
    findings : list of Finding
        The most important first; units have their names.
    searches : tuple of Search
    label_quality : ndarray of shape (N,)
    changed_images : ChangedImages
    """

    findings: list[Finding]
    searches: tuple[Search, ...]
    label_quality: np.ndarray
    changed_images: ChangedImages


def run_analyses(
    context: DiagnosisContext, overview: Overview, folds: int, saved: SavedSearches, progress: ProgressOption
) -> Analyses:
    """Run the analyses; those that an interrupted run has finished are read instead.

    Parameters
    ----------
    context : DiagnosisContext
    overview : Overview
    folds : int
        As of `convscope.diagnose`.
    saved : SavedSearches
    progress : bool, callable or None
        As of `convscope.diagnose`.
    """
    analyses: dict[str, Callable[[DiagnosisContext], Outcome]] = {
        "labels": partial(find_label_errors, folds=folds),
        "confusions": _without_array(partial(find_confusions, overview=overview)),
        "calibration": _without_array(partial(find_miscalibration, overview=overview)),
        "duplicates": _without_array(find_near_duplicates),
        "slices": _without_array(find_slices),
        "shortcuts": _without_array(find_shortcuts),
    }
    outcomes: dict[str, Outcome] = {}
    for name, analysis in analyses.items():
        with progress_bar(progress, name) as report:
            step = partial(_run, analysis, replace(context, report_progress=report))
            outcomes[name] = saved.load_or_run(name, step)
    names = None if context.store is None else context.store.names()
    searches = [name_units_of(search, names, context.layer.name) for search, _ in outcomes.values()]
    findings = sort_findings([f for search in searches for f in search.findings], overview.num_labelled)
    quality = outcomes["labels"][1]
    assert quality is not None
    with progress_bar(progress, "evidence") as report:
        changed = change_images(replace(context, report_progress=report), findings)
    return Analyses(findings, tuple(searches), quality, changed)


def saved_searches(job: RecordingJob, context: DiagnosisContext, folds: int, folder: Path | None) -> SavedSearches:
    """Return the searches that are kept in the folder of a report, for these images, labels and settings."""
    labels = hashlib.sha256(np.ascontiguousarray(context.observations.labels).tobytes()).hexdigest()
    identity = {**job.identity(), "labels": labels, "seed": context.seed, "folds": folds}
    return SavedSearches(None if folder is None else folder / SEARCHES, identity)


def _run(analysis: Callable[[DiagnosisContext], Outcome], context: DiagnosisContext) -> Outcome:
    """Run an analysis; one that reports no progress itself can be cancelled before it starts."""
    context.report_progress(0, 1)
    return analysis(context)


def _without_array(analysis: Callable[[DiagnosisContext], Search]) -> Callable[[DiagnosisContext], Outcome]:
    return lambda context: (analysis(context), None)
