"""Feature maps: what the layers of a network compute for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import numpy as np
import torch

from convscope.arguments import check_arguments
from convscope.datasets.image_inputs import open_images
from convscope.engine import capture
from convscope.engine.batching import MEMORY, batch_size, forward_bytes, iter_batches
from convscope.engine.layer_selection import LayerLike, find_layer, find_layers, last_per_resolution
from convscope.engine.validation import require_finite
from convscope.errors import ConvscopeError, is_int, warns_of_failures
from convscope.formatting import count_of
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import ProgressOption, progress_bar
from convscope.result_items import IndexedResult
from convscope.sources.coercion import ModelLike, as_model

SCALINGS = ("standard", "minmax")


@dataclass(frozen=True, eq=False, repr=False)
class Activations(IndexedResult):
    """Feature maps of N images: ``activations["block1_conv1"]`` is float32 (N, C, H, W), not normalised.

    Attributes
    ----------
    maps : dict of str to ndarray
        The output of each layer, channels first.
    image_names : tuple of str
        Names of the images, in the order of the first axis.
    fit : {"squash", "crop", "pad"}
        How images were brought to the network's size.
    scaling : {"standard", "minmax"}
        How maps are drawn: see `activations`.
    """

    ITEM_AXES: ClassVar[Mapping[str, int]] = {"maps": 0, "image_names": 0}

    maps: dict[str, np.ndarray]
    image_names: tuple[str, ...]
    fit: str
    scaling: str = "standard"

    @property
    def layers(self) -> list[str]:
        """The layers' names."""
        return list(self.maps)

    @overload
    def __getitem__(self, key: LayerLike) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: int | slice | list[int]) -> Activations: ...
    def __getitem__(self, key: LayerLike | int | slice | list[int]) -> np.ndarray | Activations:
        if isinstance(key, slice | list) or is_int(key):
            return self.select(key)  # type: ignore[arg-type]
        if isinstance(key, str) and key in self.maps:
            return self.maps[key]
        name = find_layer(self.model, key).name  # type: ignore[arg-type]
        if name not in self.maps:
            raise ConvscopeError(f"layer {name!r} was not computed; there are {', '.join(self.maps)}")
        return self.maps[name]

    def _ipython_key_completions_(self) -> list[str]:
        return self.layers

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the maps by layer."""
        return self.maps

    def parameters(self) -> dict[str, object]:
        """Return layers, image names, `fit` and `scaling`."""
        return {"layers": self.layers, "image_names": self.image_names, "fit": self.fit, "scaling": self.scaling}

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per layer: the shape of its maps, their mean and maximum, active positions, dead channels."""
        rows = []
        for layer, maps in self.maps.items():
            summary = self.summary(layer)
            rows.append(
                {
                    "layer": layer,
                    "maps": " x ".join(map(str, maps.shape[1:])),
                    "mean": float(summary["mean"].mean()),
                    "maximum": float(summary["max"].max()),
                    "active": float(summary["active"].mean()),
                    "dead channels": int(summary["dead"].all(0).sum()),
                }
            )
        return rows

    def _title(self) -> str:
        return f"{count_of(len(self.maps), 'layer')}, {count_of(len(self.image_names), 'image')}"

    def summary(self, layer: LayerLike) -> dict[str, np.ndarray]:
        """Summarize a layer's maps per image and channel.

        Returns
        -------
        dict of str to ndarray
            Each (N, C): "mean", "max", "active" (fraction of positions above 0) and "dead" (constant on this image).
        """
        maps = self[layer].reshape(*self[layer].shape[:2], -1)
        return {
            "mean": maps.mean(2),
            "max": maps.max(2),
            "active": (maps > 0).mean(2, dtype=np.float32),
            "dead": is_constant_channel(self[layer]),
        }


def is_constant_channel(maps: np.ndarray) -> np.ndarray:
    """Return which channels of maps (N, C, ...) are constant up to rounding: bool (N, C)."""
    flat = maps.reshape(*maps.shape[:2], -1)
    constant: np.ndarray = flat.max(2) - flat.min(2) <= 1e-6 * np.abs(flat).max(2)
    return constant


@warns_of_failures
@check_arguments
def activations(
    model: ModelLike,
    images: object,
    layers: LayerLike | Sequence[LayerLike] | None = None,
    *,
    fit: str = "squash",
    scaling: str = "standard",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Activations:
    """Compute the outputs of layers for images, in one forward pass that stops after the last of the layers.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        One image or N, in any form that `convscope.predict` takes.
    layers : str, Layer, nn.Module or sequence of these, optional
        Names in ``model.layers``, its rows, or modules of the network. The last layer of each resolution if omitted.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    scaling : {"standard", "minmax"}
        How each map is scaled when it is drawn: standardised, times 64, plus 128 and clipped to 0..255, or from its
        minimum to its maximum. The values themselves are never scaled.
    memory : int
        Bytes that a batch's intermediate results may take; the results themselves are not counted.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` after every batch with numbers of images; exceptions raised in it cancel cleanly.

    Returns
    -------
    Activations
        A mapping of layers to float32 arrays (N, C, H, W). Images that cannot be read are left out and listed in
        ``failed``.

    Raises
    ------
    ConvscopeError
        For an unknown layer, for values that are not finite, and when no image can be read.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> activations = convscope.activations(model, convscope.samples.photographs(), ["blocks.0", "blocks.4"])
    >>> activations["blocks.0"].shape
    (4, 16, 112, 112)
    >>> activations.summary("blocks.4")["active"].shape
    (4, 112)
    """
    if scaling not in SCALINGS:
        raise ConvscopeError(f"scaling is {scaling!r}; expected {' or '.join(SCALINGS)}")
    model = as_model(model, images)
    if not len(model.layers):
        raise ConvscopeError(f"{model.name} shows no layers: it is a function or a TorchScript program")
    selected = last_per_resolution(model) if layers is None else find_layers(model, layers)
    outputs: dict[str, list[np.ndarray]] = {layer.name: [] for layer in selected}
    loader = ImageBatchLoader(open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels)
    indices: list[int] = []
    with (
        progress_bar(progress, "activations") as report,
        torch.no_grad(),
        capture.capture_layers(model, list(outputs), stop_early=True) as run,
    ):
        for batch in iter_batches(loader, batch_size(model, forward_bytes(model), memory), report):
            for name, maps in run(batch.x).maps.items():
                require_finite(model, maps, f"layer {name!r}")
                outputs[name].append(maps.float().contiguous().cpu().numpy())
            indices += batch.indices
    return Activations(
        model,
        maps={name: np.concatenate(parts) for name, parts in outputs.items()},
        image_names=tuple(loader.names[i] for i in indices),
        fit=fit,
        scaling=scaling,
        notes=tuple(loader.notes),
        failed=tuple(loader.failed),
    )
