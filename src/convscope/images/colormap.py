"""Map values to colors, and blend heatmaps with images."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from convscope.errors import ConvscopeError, nearest

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.floating]


@lru_cache(maxsize=16)
def lookup_table(name: str) -> Pixels:
    """Return the 256 colors, uint8 (256, 3), of a colormap of matplotlib."""
    from matplotlib import colormaps

    if name not in colormaps:
        raise ConvscopeError(f"colormap {name!r} is not known; nearest: {nearest(name, list(colormaps))}")
    colors: Pixels = colormaps[name](np.arange(256), bytes=True)[:, :3]
    return colors


def apply_colormap(values: Values, name: str) -> Pixels:
    """Map values in [0, 1] (H, W) to colors, uint8 (H, W, 3)."""
    return np.asarray(lookup_table(name)[(np.clip(values, 0, 1) * 255).round().astype(np.uint8)])


def blend(image: Pixels, heatmap: Values, alpha: float, colormap: str) -> Image.Image:
    """Blend a heatmap in [0, 1] (H, W) with an image, uint8 (H, W, 3): (1 - alpha) image + alpha colors."""
    if not 0 <= alpha <= 1:
        raise ConvscopeError(f"alpha is {alpha}; expected a number from 0 (image only) to 1 (heatmap only)")
    mixed = (1 - alpha) * image.astype(np.float32) + alpha * apply_colormap(heatmap, colormap).astype(np.float32)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
