"""Explain batches of images: order units by their effects, choose the few that carry the score, and remove them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from convscope.editing.removal import Removal, RemovalRun
from convscope.engine import capture
from convscope.engine.batching import forward_batch_size, pad_to_fixed_batch
from convscope.explanations.regions import boxes_in_image, contribution_maps
from convscope.explanations.selection import (
    first_order_effects,
    matched_units,
    nested_sets,
    smallest_prefix,
    sum_positions,
)
from convscope.images.batches import Batch
from convscope.images.geometry import Geometry
from convscope.images.loading import ImageBatchLoader
from convscope.progress import Progress, report_part

MAX_CANDIDATES = 256  # units whose effects are measured, where effects are not known from the gradient

Report = Callable[[float], None]


@dataclass(frozen=True)
class ImageExplanation:
    """What is found for one image; arrays as in `Explanation`, with k units."""

    units: np.ndarray
    effects: np.ndarray
    single_effects: np.ndarray
    maps: np.ndarray
    boxes: np.ndarray
    target: int
    scores: tuple[float, float, float]  # with all units, without any, without the selected ones
    removed_class: int
    random: np.ndarray
    geometry: Geometry


@dataclass(frozen=True)
class ExplanationJob:
    """What is the same for all batches.

    Attributes
    ----------
    removal : Removal
    is_affine : bool
        Whether the target's score is an affine function of the layer's output.
    features, share, draws, seed
        As of `explain`.
    """

    removal: Removal
    is_affine: bool
    features: int
    share: float
    draws: int
    seed: int

    def run_all(self, loader: ImageBatchLoader, report: Progress) -> tuple[list[ImageExplanation], list[int]]:
        """Explain all images; return the explanations and the positions of the images."""
        parts: list[ImageExplanation] = []
        indices: list[int] = []
        for batch in loader.batches(forward_batch_size(self.removal.model, self.removal.memory)):
            with self.removal.open(batch) as run:
                done = len(indices) + len(loader.failed)
                report_batch = partial(report_part, report, done, len(batch.indices), len(loader))
                parts += self._explain(batch, run, report_batch)
            indices += batch.indices
            report(len(indices) + len(loader.failed), len(loader))
        return parts, indices

    def _explain(self, batch: Batch, run: RemovalRun, report: Report) -> list[ImageExplanation]:
        """Explain a batch."""
        changes = (run.replacement - run.maps).float()
        gradients = self._gradients(batch)
        single = self._single_effects(run, changes, gradients, report)
        order = single.masked_fill(single <= 0, -torch.inf).argsort(dim=1, descending=True, stable=True)[
            :, : self.features
        ]
        order = order.masked_fill(single.gather(1, order) <= 0, -1).cpu()
        everything = torch.ones(1, *single.shape, dtype=torch.bool)
        scores, _ = run.scores(torch.cat([nested_sets(order, order.shape[1], single.shape[1]), everything]))
        baseline = run.baseline[:, :1].T[None]  # before those of the nested sets, (F + 2, B)
        scores_by_image = torch.cat([baseline.transpose(1, 2), scores])[:, :, 0].T.double().cpu().numpy()
        chosen = [self._choose(row, falls) for row, falls in zip(order.numpy(), scores_by_image, strict=True)]
        removed, random = self._prove(batch, run, chosen, sum_positions(changes**2).sqrt().cpu().numpy())
        maps = changes.abs() if gradients is None else contribution_maps(gradients, changes)
        return [
            ImageExplanation(
                units=units,
                effects=-np.diff(scores_by_image[n, : len(units) + 1]),
                single_effects=single[n, units].cpu().numpy(),
                **self._regions(maps[n, units].cpu().numpy(), batch.geometry[n]),
                target=int(run.targets.classes[n, 0]),
                scores=(scores_by_image[n, 0], scores_by_image[n, -1], scores_by_image[n, len(units)]),
                removed_class=-1 if self.removal.model.has_values else int(removed[n]),
                random=random[:, n],
                geometry=batch.geometry[n],
            )
            for n, units in enumerate(chosen)
        ]

    def _regions(self, maps: np.ndarray, geometry: Geometry) -> dict[str, np.ndarray]:
        """Return the maps (k, h, w) and boxes (k, 4) of an image's units; no positions for other than images."""
        if not self.removal.layer.is_spatial or maps.ndim != 3:
            return {"maps": np.zeros((len(maps), 0, 0), np.float32), "boxes": np.full((len(maps), 4), np.nan)}
        return {"maps": maps, "boxes": boxes_in_image(maps, geometry) if len(maps) else np.zeros((0, 4))}

    def _gradients(self, batch: Batch) -> Tensor | None:
        """Return the gradients (B, C, ...) of the targets' scores; None where none pass through the network."""
        model, layer = self.removal.model, self.removal.layer
        if not model.differentiable:
            return None
        with torch.enable_grad(), capture.capture_layers(model, [layer.name], detach_at_layer=True) as forward:
            outputs = forward(pad_to_fixed_batch(model, batch.x))
            targets = self.removal.targets.for_batch(batch.indices, outputs.logits[: len(batch.x)], batch.geometry)
            rows = pad_to_fixed_batch(model, torch.arange(len(batch.x), device=outputs.logits.device))
            scores = targets.scores(outputs, rows)[: len(batch.x), 0]
            if not scores.requires_grad:
                return None
            (gradient,) = torch.autograd.grad(scores.sum(), outputs.maps[layer.name], allow_unused=True)
        return None if gradient is None else gradient[: len(batch.x)].movedim(layer.unit_axis, 1).float()

    def _single_effects(self, run: RemovalRun, changes: Tensor, gradients: Tensor | None, report: Report) -> Tensor:
        """Return how far the score falls if each unit is removed (B, C); -inf for units that are not measured."""
        estimates = None if gradients is None else first_order_effects(gradients, changes)
        if estimates is not None and self.is_affine:
            return estimates
        units = run.maps.shape[1]
        if estimates is None or units <= MAX_CANDIDATES:
            candidates = torch.arange(units).expand(len(run.maps), -1)
        else:
            candidates = estimates.argsort(dim=1, descending=True, stable=True)[:, :MAX_CANDIDATES].cpu()
        sets = torch.nn.functional.one_hot(candidates.T, units).bool()  # (M, B, C)
        scores, _ = run.scores(sets, report)
        effects = torch.full((len(run.maps), units), -torch.inf, device=scores.device)
        return effects.scatter_(1, candidates.to(scores.device), (run.baseline - scores)[:, :, 0].T.float())

    def _choose(self, order: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return the units (k,) that carry the share.

        `scores` are those without removals, of the nested sets, and with all units of the layer removed.
        """
        order = order[order >= 0]
        total = scores[0] - scores[-1]
        shares = (scores[0] - scores[1 : len(order) + 1]) / total if total > 0 else np.zeros(len(order))
        return order[: smallest_prefix(shares, self.share)]

    def _prove(
        self, batch: Batch, run: RemovalRun, chosen: Sequence[np.ndarray], norms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Remove the chosen units of each image together, and as many others: return predicted classes and scores."""
        sets = np.zeros((1 + self.draws, *norms.shape), bool)
        for n, units in enumerate(chosen):
            sets[0, n, units] = True
            by_size = units[np.argsort(-norms[n, units], kind="stable")]
            generator = np.random.default_rng((self.seed, batch.indices[n]))
            for d, matched in enumerate(matched_units(norms[n], by_size, self.draws, generator)):
                sets[1 + d, n, matched[matched >= 0]] = True
        scores, predicted = run.scores(torch.from_numpy(sets))
        random = scores[1:, :, 0].cpu().numpy()
        complete = sets[1:].sum(2) == sets[0].sum(1)  # (R, B): as many units were left to draw
        return predicted[0].cpu().numpy(), np.where(complete & sets[0].any(1), random, np.nan)
