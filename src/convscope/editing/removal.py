"""Remove sets of units from a layer's output, and run what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.attribution.batch_targets import BatchTargets
from convscope.attribution.targets import TargetSpec
from convscope.engine.batching import pad_to_fixed_batch, resumed_batch_size
from convscope.engine.capture import ForwardResult
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.engine.resume import ResumedForward, resume_from_layer
from convscope.engine.validation import require_finite
from convscope.images.batches import Batch
from convscope.images.tensor_inputs import to_channels_last

MIN_ACCELERATED = 16  # changed copies of a layer's output from which it is worth preparing faster passes

Replacement = Callable[[Tensor, tuple[int, ...]], Tensor]
"""Takes maps (B, C, ...) with the units on axis 1, and positions of the images; returns what replaces them."""


@dataclass(frozen=True)
class Removal:
    """How units are removed from a layer.

    Attributes
    ----------
    model : Model
    layer : Layer
    targets : TargetSpec
        The targets whose scores are measured.
    replacement : callable
        What takes the place of a removed unit.
    memory : int
        Bytes that intermediate results may take.
    """

    model: Model
    layer: Layer
    targets: TargetSpec
    replacement: Replacement
    memory: int

    @contextmanager
    def open(self, batch: Batch) -> Iterator[RemovalRun]:
        """Run a batch of images; the block gets a `RemovalRun`, which removes units from them."""
        count = len(batch.indices)
        with resume_from_layer(self.model, self.layer.name, batch.x) as resumed:
            logits = resumed.original.logits[:count]
            require_finite(self.model, logits, "the network's output")
            targets = self.targets.for_batch(batch.indices, logits, batch.geometry)
            maps = resumed.original.maps[self.layer.name][:count].movedim(self.layer.unit_axis, 1)
            yield RemovalRun(self, batch, resumed, targets, maps, self.replacement(maps, batch.indices))

    @property
    def passes_together(self) -> int:
        """The number of changed copies of the layer's output whose passes run together."""
        return resumed_batch_size(self.model, self.layer, self.memory)


@dataclass(frozen=True)
class RemovalRun:
    """A batch of B images that has run up to a layer with C units.

    Attributes
    ----------
    removal : Removal
    batch : Batch
    resumed : ResumedForward
    targets : BatchTargets
    maps : Tensor of shape (B, C, ...)
        The layer's output, units on axis 1.
    replacement : Tensor of shape (B, C, ...)
        What a removed unit's map is replaced by.
    """

    removal: Removal
    batch: Batch
    resumed: ResumedForward
    targets: BatchTargets
    maps: Tensor
    replacement: Tensor

    @property
    def baseline(self) -> Tensor:
        """The targets' scores (B, T) without any removal."""
        return self._scores(self.resumed.original, torch.arange(len(self.maps), device=self.maps.device))

    @property
    def predicted(self) -> Tensor:
        """The class (B,) with the highest logit without any removal."""
        return self.resumed.original.logits[: len(self.maps)].argmax(1)

    def scores(self, sets: Tensor, report: Callable[[float], None] = lambda _: None) -> tuple[Tensor, Tensor]:
        """Compute the targets' scores with sets of units removed, and the predicted classes.

        Images and sets share passes. Sets that change nothing on an image take none.

        Parameters
        ----------
        sets : Tensor of shape (S, C) or (S, B, C), bool
            The units of each set; the same for all images, or for each image its own.
        report : callable, optional
            Called with the fraction that is done.

        Returns
        -------
        scores : Tensor of shape (S, B, T)
        predicted : Tensor of shape (S, B)
        """
        sets = sets if sets.ndim == 3 else sets[:, None].expand(-1, len(self.maps), -1)
        sets = sets.to(self.maps.device)
        scores = self.baseline.repeat(len(sets), 1, 1)
        predicted = self.predicted.repeat(len(sets), 1)
        changed = self.replacement != self.maps
        changed = changed.flatten(2).any(2) if changed.ndim > 2 else changed
        differs = torch.stack([(sets[:, i] & changed[i]).any(1) for i in range(len(changed))])
        pairs = differs.nonzero()  # rows (image, set), image by image
        done = 0
        for image, resumed in self._runs():
            selected = pairs if image is None else pairs[pairs[:, 0] == image]
            if len(selected) >= MIN_ACCELERATED:
                resumed.accelerate()
            for part in torch.split(selected, self.removal.passes_together) if len(selected) else ():
                rows, chosen = part.unbind(1)
                outputs = self._run(resumed, rows, sets[chosen, rows], image)
                scores[chosen, rows] = self._scores(outputs, rows)
                predicted[chosen, rows] = outputs.logits.argmax(1)[: len(rows)]
                done += len(rows)
                report(done / len(pairs))
        return scores, predicted

    def _runs(self) -> Iterator[tuple[int | None, ResumedForward]]:
        """Yield the pass of the batch, or that of each image where they cannot share one, with its position."""
        if self.resumed.is_exact:
            yield None, self.resumed
            return
        for image in range(len(self.maps)):
            x = self.batch.x[image : image + 1]
            with resume_from_layer(self.removal.model, self.removal.layer.name, x) as resumed:
                yield image, resumed

    def _run(self, resumed: ResumedForward, rows: Tensor, units: Tensor, image: int | None) -> ForwardResult:
        """Run what follows the layer for the images `rows` (M,) with units (M, C) removed."""
        mask = units.reshape(*units.shape, *[1] * (self.maps.ndim - 2))
        edited = torch.where(mask, self.replacement[rows], self.maps[rows]).movedim(1, self.removal.layer.unit_axis)
        values = pad_to_fixed_batch(self.removal.model, to_channels_last(edited))
        outputs = resumed(values, rows if image is None else torch.zeros_like(rows))
        require_finite(self.removal.model, outputs.logits, "the network's output")
        return outputs

    def _scores(self, outputs: ForwardResult, rows: Tensor) -> Tensor:
        """Return the targets' scores (M, T) in a pass for the images `rows` (M,), which may be padded."""
        return self.targets.scores(outputs, pad_to_fixed_batch(self.removal.model, rows))[: len(rows)]
