"""The first technique: what each layer makes of a picture; and what the whole network says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from convscope.engine import capture
from convscope.engine.batching import MEMORY, Progress, batch_size, forward_bytes
from convscope.engine.model import Model
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.results import Result


@dataclass(frozen=True, eq=False)
class Activations(Result):
    """Feature maps: `activations["block1_conv1"]` is float32 (N, C, H, W), raw.

    `scaling` is how grids are drawn: "standard", as the chapter does, or "minmax".
    """

    maps: dict[str, np.ndarray]
    image_names: tuple[str, ...]
    fit: str
    scaling: str = "standard"

    @property
    def layers(self) -> list[str]:
        return list(self.maps)

    def __getitem__(self, layer: str) -> np.ndarray:
        if layer in self.maps:
            return self.maps[layer]
        return self.maps[self.model.layers.find(layer).name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def arrays(self) -> dict[str, np.ndarray]:
        return self.maps

    def parameters(self) -> dict[str, Any]:
        return {"layers": self.layers, "image_names": self.image_names, "fit": self.fit, "scaling": self.scaling}

    def summary(self, layer: str) -> dict[str, np.ndarray]:
        """Per picture and channel, each (N, C): `mean`, `max`, `active` (share of places above 0) and `dead`.

        A channel is dead on a picture if it says the same everywhere.
        """
        maps = self[layer].reshape(*self[layer].shape[:2], -1)
        return {
            "mean": maps.mean(2),
            "max": maps.max(2),
            "active": (maps > 0).mean(2, dtype=np.float32),
            "dead": is_constant_channel(self[layer]),
        }


def is_constant_channel(maps: np.ndarray) -> np.ndarray:
    """Which channels of maps (N, C, ...) say the same everywhere; bool (N, C).

    Rounding alone makes no pattern: what counts must rise above the precision of the values.
    """
    flat = maps.reshape(*maps.shape[:2], -1)
    quiet: np.ndarray = flat.max(2) - flat.min(2) <= 1e-6 * np.abs(flat).max(2)
    return quiet


def activations(
    model: Model,
    images: Any,
    layers: str | Sequence[str] | None = None,
    *,
    fit: str = "squash",
    scaling: str = "standard",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> Activations:
    """The outputs of layers for pictures, all from one forward pass that stops behind the last of them.

    Parameters
    ----------
    model
        From `convscope.load`.
    images
        Pictures in any form that `convscope` takes.
    layers
        A layer's name, several, or None for every layer with spatial extent that makes something of its own.
    fit
        "squash" shows the network the whole picture, "crop" its own evaluation crop.
    scaling
        How grids are drawn, each map for itself: "standard" (standardised, times 64, plus 128, clipped) or "minmax".
    memory
        Bytes that a batch's intermediate results may take; the results themselves are not counted.
    max_pixels
        Pictures with more are refused before memory is spent on them.
    progress
        Called after every batch with the number of pictures done and the number in all.

    Raises
    ------
    ConvscopeError
        For an unknown layer, and when no picture can be used. If only some cannot, they are named in `.failed`.
    """
    if scaling not in ("standard", "minmax"):
        raise ConvscopeError(f"scaling {scaling!r} is not known; expected standard or minmax")
    if isinstance(layers, str):
        layers = [layers]
    names = [row.name for row in model.layers.unique_spatial()] if layers is None else list(layers)
    rows = [model.layers.find(name) for name in names]
    pictures = ImageBatchLoader(images, model.preprocessing, fit=fit, max_pixels=max_pixels)
    found: dict[str, list[np.ndarray]] = {row.name: [] for row in rows}
    done: list[int] = []
    with torch.no_grad(), capture.capture_layers(model, list(found), stop_early=True) as run:
        for batch in pictures.batches(batch_size(model, forward_bytes(model), memory)):
            seen = run(batch.x)
            for name, maps in seen.maps.items():
                require_finite(model, maps, f"layer {name!r}")
                found[name].append(maps.float().contiguous().cpu().numpy())
            done += batch.indices
            if progress is not None:
                progress(len(done) + len(pictures.failed), len(pictures))
    return Activations(
        model,
        maps={name: np.concatenate(parts) for name, parts in found.items()},
        image_names=tuple(pictures.names[i] for i in done),
        fit=fit,
        scaling=scaling,
        notes=tuple(pictures.notes),
        failed=tuple(pictures.failed),
    )


@dataclass(frozen=True, eq=False)
class Predictions(Result):
    """What the network says: `indices` and `probabilities` (N, top), best first; `logits` (N, K)."""

    indices: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray
    image_names: tuple[str, ...]
    fit: str

    @property
    def names(self) -> list[list[str]]:
        """The classes' names, as `indices`."""
        return [[self.model.class_name(int(i)) for i in row] for row in self.indices]

    def parameters(self) -> dict[str, Any]:
        return {"top": self.indices.shape[1], "image_names": self.image_names, "fit": self.fit, "classes": self.names}


def predict(
    model: Model,
    images: Any,
    top: int = 5,
    *,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
) -> Predictions:
    """The `top` classes of each picture. Probabilities are the softmax of the logits.

    For a network that ends in a sigmoid or has a single output, they are the sigmoid of each logit by itself.

    Raises ConvscopeError when no picture can be used; if only some cannot, they are named in `.failed`.
    """
    pictures = ImageBatchLoader(images, model.preprocessing, fit=fit, max_pixels=max_pixels)
    logits: list[torch.Tensor] = []
    done: list[int] = []
    with torch.no_grad(), capture.capture_layers(model, []) as run:
        for batch in pictures.batches(batch_size(model, forward_bytes(model), memory)):
            seen = run(batch.x)
            require_finite(model, seen.logits, "the network's output")
            logits.append(seen.logits.cpu())
            done += batch.indices
            if progress is not None:
                progress(len(done) + len(pictures.failed), len(pictures))
    scores = torch.cat(logits)
    shares = model.probabilities(scores)
    best = shares.topk(min(top, scores.shape[1]), dim=1)
    return Predictions(
        model,
        indices=best.indices.numpy(),
        probabilities=best.values.numpy(),
        logits=scores.numpy(),
        image_names=tuple(pictures.names[i] for i in done),
        fit=fit,
        notes=tuple(pictures.notes),
        failed=tuple(pictures.failed),
    )
