"""`evaluate`: measure how faithful heatmaps are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.context import LOGITS_RTOL
from convscope.attribution.targets import Targets
from convscope.datasets.image_inputs import open_images
from convscope.engine import capture
from convscope.engine.acceleration import accelerate
from convscope.engine.batching import (
    MEMORY,
    batch_size,
    forward_batch_size,
    forward_bytes,
    pad_to_fixed_batch,
)
from convscope.engine.capture import ForwardResult
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, require_int, warns_of_failures
from convscope.evaluation.baselines import check_fill
from convscope.evaluation.context import EvaluationContext, Scores
from convscope.evaluation.inputs import HeatmapInput, check_mask_size, parse_heatmaps, parse_masks
from convscope.evaluation.registry import METRICS, MetricOptions, get_metric, metric_name, resolve_options
from convscope.evaluation.result import Evaluation, suspicion_notes
from convscope.images.batches import Batch
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

BYTES_PER_PIXEL = 64  # of each map: its values, ranks, and the temporaries of ranking

Run = Callable[[Tensor], ForwardResult]


@warns_of_failures
@check_arguments
def evaluate(
    model: ModelLike,
    images: object,
    heatmaps: object,
    metrics: str | Sequence[str] = ("deletion", "insertion"),
    *,
    targets: Targets | None = None,
    masks: object = None,
    fill: str = "blur",
    steps: int = 28,
    seed: int = 0,
    fit: str | None = None,
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
    **options: object,
) -> Evaluation:
    """Measure how faithful heatmaps are.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        The N images of the heatmaps, in any form that `convscope.predict` takes.
    heatmaps : Heatmaps or array
        Result of `convscope.heatmaps` for these images; or maps of any origin, (N, h, w) or (N, T, h, w) at any
        resolution over the network's input, higher values for more evidence.
    metrics : str or sequence of str
        Names of metrics; `convscope.metrics` lists them.
    targets : optional
        Targets of maps given as an array, as in `convscope.heatmaps`.
    masks : array or list, optional
        Where the targets are, for "pointing", "energy" and "iou": per image (H, W) or (T, H, W) bool at the image's own
        size; a list or an array (N, H, W) or (N, T, H, W).
    fill : {"blur", "mean", "zero", "noise"}
        Replacement of removed pixels.
    steps : int
        Steps of curves: each removes or inserts an equal part of the pixels.
    seed : int
        Seed of all random numbers, which are the same for every image.
    fit : {"squash", "crop", "pad"}, optional
        For maps given as an array: how they lie over the image, as in `convscope.heatmaps`.
    memory : int
        Bytes for the intermediate results of a batch.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : callable, optional
        Called with the number of images done, fractions included, and the number of images. Exceptions raised here
        cancel cleanly.
    **options
        Keyword arguments of the metrics' functions; one that several metrics have is passed to all of them.

    Returns
    -------
    Evaluation
        ``evaluation["deletion"]`` is float32 (N, T).

    Raises
    ------
    ConvscopeError
        Before any work is done: for an unknown metric, option or fill, for heatmaps of other images, for missing masks,
        and for arrays where a metric must compute maps again. Later: if no image can be used, or if numbers are not
        finite. Images that cannot be used are named in ``.failed``.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> image = convscope.samples.photographs()[3]
    >>> heatmaps = convscope.heatmaps(model, image)
    >>> evaluation = convscope.evaluate(model, image, heatmaps, steps=7)
    >>> evaluation["deletion"].shape
    (1, 1)
    >>> evaluation.mean("insertion") > evaluation.mean("deletion")
    True
    """
    model = as_model(model, images)
    names = list(dict.fromkeys(metric_name(name) for name in ([metrics] if isinstance(metrics, str) else metrics)))
    if not names:
        raise ConvscopeError(f"no metrics; expected some of {', '.join(METRICS)}")
    metric_options = resolve_options(names, options, {"steps": steps, "fill": fill})
    check_fill(fill)
    require_int("steps", steps)
    heatmap_fit = getattr(heatmaps, "fit", None)
    if fit is not None and heatmap_fit is not None and fit != heatmap_fit:
        raise ConvscopeError(f"fit is {fit!r}, but the heatmaps were computed with fit={heatmap_fit!r}; leave it out")
    loader = ImageBatchLoader(
        open_images(images), model.preprocessing, fit=heatmap_fit or fit or "squash", max_pixels=max_pixels
    )
    maps = parse_heatmaps(model, loader, heatmaps, targets)
    mask_list = None if masks is None else parse_masks(masks, len(loader), maps.targets.num_targets)
    _check_requirements(names, maps, mask_list)
    if mask_list is not None and maps.result is not None:
        for index, geometry in zip(maps.result.image_indices, maps.result.geometry, strict=True):
            check_mask_size(mask_list[index], geometry, loader.names[index])
    with progress_bar(progress, "evaluate") as report:
        job = _EvaluationJob(model, loader, maps, mask_list, metric_options, seed, memory, report)
        return job.collect(job.run())


@dataclass(frozen=True)
class _BatchScores:
    """Scores of one batch by metric, the targets' classes (B, T), and the images' indices."""

    scores: dict[str, Scores]
    classes: Tensor
    indices: tuple[int, ...]


@dataclass(frozen=True)
class _EvaluationJob:
    """A checked request."""

    model: Model
    loader: ImageBatchLoader
    maps: HeatmapInput
    masks: list[Tensor] | None
    options: dict[str, MetricOptions]
    seed: int
    memory: int
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def run(self) -> list[_BatchScores]:
        """Compute all metrics, batch by batch."""
        model = self.model
        bytes_per_image = forward_bytes(model) + BYTES_PER_PIXEL * self.maps.targets.num_targets * float(
            np.prod(model.preprocessing.size)
        )
        # Finding a faster pass costs a pass or two, which pays off for metrics with many passes.
        many_passes = any({"steps", "samples"} & options.keys() for options in self.options.values())
        batches: list[_BatchScores] = []
        with torch.no_grad(), capture.capture_layers(model, []) as run:
            fast_run: Run | None = None
            for batch in self.loader.batches(batch_size(model, bytes_per_image, self.memory)):
                context = self._make_context(batch, run)
                if many_passes:
                    example = pad_to_fixed_batch(model, context.x[:1])
                    fast_run = fast_run or accelerate(
                        run, model.module, example, enabled=model.can_accelerate, rtol=LOGITS_RTOL
                    )
                    context = replace(context, run=fast_run)
                first = sum(len(b.indices) for b in batches) + len(self.loader.failed)
                scores = self._score_batch(context, first)
                batches.append(_BatchScores(scores, context.batch_targets.classes.cpu(), batch.indices))
        return batches

    def collect(self, batches: Sequence[_BatchScores]) -> Evaluation:
        """Concatenate the batches' scores."""
        names = list(self.options)
        first = batches[0].scores
        values = {name: _concatenate([batch.scores[name].values for batch in batches]) for name in names}
        curves = {
            curve: _concatenate([batch.scores[name].curves[curve] for batch in batches])
            for name in names
            for curve in first[name].curves
        }
        chance_level = {
            name: _concatenate([batch.scores[name].chance_level for batch in batches])
            for name in names
            if first[name].chance_level is not None
        }
        classes = torch.cat([batch.classes for batch in batches]).numpy()
        indices = [index for batch in batches for index in batch.indices]
        notes = (*self.loader.notes, *_probability_notes(self.maps), *suspicion_notes(values, chance_level))
        return Evaluation(
            self.model,
            values=values,
            curves=curves,
            chance_level=chance_level,
            targets=classes,
            names=self.maps.targets.names(classes, indices),
            method=self.maps.method,
            layer=self.maps.layer,
            fit=self.loader.fit,
            image_names=tuple(self.loader.names[i] for i in indices),
            settings={"seed": self.seed, "options": self.options},
            notes=notes,
            failed=tuple(self.loader.failed),
        )

    def _score_batch(self, context: EvaluationContext, num_done: int) -> dict[str, Scores]:
        """Compute every metric of one batch and report progress."""
        scores = {}
        for number, (name, options) in enumerate(self.options.items()):

            def report(fraction: float, number: int = number) -> None:
                done = num_done + len(context.x) * (number + fraction) / len(self.options)
                self.progress(done, len(self.loader))

            scores[name] = get_metric(name).function(replace(context, report_progress=report), **options)
            report(1)
        return scores

    def _make_context(self, batch: Batch, run: Run) -> EvaluationContext:
        """Run the unmodified images and check that the maps and masks are theirs."""
        model, maps = self.model, self.maps
        x = batch.x.to(model.device)
        outputs = run(pad_to_fixed_batch(model, x))
        require_finite(model, outputs.logits, "the network's output")
        for index, geometry in zip(batch.indices, batch.geometry, strict=True):
            if index not in maps.row_of_image:
                name = self.loader.names[index]
                raise ConvscopeError(
                    f"{name} has no heatmap: it could not be used when they were computed, or is not in this selection"
                )
            if self.masks is not None:
                check_mask_size(self.masks[index], geometry, self.loader.names[index])
        logits = outputs.logits[: len(x)]
        context = EvaluationContext(
            model=model,
            x=x,
            attribution_maps=maps.values[[maps.row_of_image[i] for i in batch.indices]].to(x.device),
            batch_targets=maps.batch_targets(batch.indices, logits),
            outputs=outputs,
            run=run,
            batch_size=forward_batch_size(model, self.memory),
            seed=self.seed,
            geometry=batch.geometry,
            masks=[] if self.masks is None else [self.masks[i] for i in batch.indices],
            recompute=maps.recompute_function(model, batch.indices, self.memory),
        )
        maps.check_same_logits(batch.indices, logits, context.logits, self.loader.names)
        return context


def _check_requirements(names: Sequence[str], maps: HeatmapInput, masks: Sequence[Tensor] | None) -> None:
    """Refuse metrics whose requirements are not met."""
    for name in names:
        needs = get_metric(name).needs
        if "masks" in needs and masks is None:
            raise ConvscopeError(f"{name} needs masks=: for each image where its target is, (H, W) bool")
        if "heatmaps" in needs and maps.result is None:
            raise ConvscopeError(
                f"{name} computes the maps again; it needs the result of convscope.heatmaps, not an array"
            )
        if "classes" in needs and maps.targets.functions:
            raise ConvscopeError(f"{name} needs classes as targets, not functions of the output")
        if maps.targets.boxes and (maps.result is None or {"classes", "heatmaps"} & set(needs)):
            raise ConvscopeError(
                f"{name} cannot evaluate maps of boxes; deletion and insertion take convscope.heatmaps"
            )


def _probability_notes(maps: HeatmapInput) -> list[str]:
    """Explain what replaces the probability for targets that have none."""
    if maps.targets.boxes:
        return ["targets are boxes: their scores are used, the best candidate's probability times its overlap"]
    if maps.targets.functions:
        return ["targets are functions, which have no probability: their values are used"]
    if maps.targets.against is not None:
        return ["the probability of a class against others is the sigmoid of the difference of their logits"]
    return []


def _concatenate(parts: Sequence[Tensor | None]) -> npt.NDArray[np.float32]:
    return torch.cat([part for part in parts if part is not None]).float().cpu().numpy()
