"""Numbers to colours."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from convscope.errors import ConvscopeError, nearest


@lru_cache(maxsize=16)
def lookup_table(name: str) -> np.ndarray:
    """The 256 colours, uint8 (256, 3), of one of matplotlib's colour maps."""
    from matplotlib import colormaps

    if name not in colormaps:
        raise ConvscopeError(f"colormap {name!r} is not known; nearest: {nearest(name, list(colormaps))}")
    colours: np.ndarray = colormaps[name](np.arange(256), bytes=True)[:, :3]
    return colours


def apply_colormap(values: np.ndarray, name: str) -> np.ndarray:
    """Values in [0, 1] (H, W) as colours, uint8 (H, W, 3)."""
    return np.asarray(lookup_table(name)[(np.clip(values, 0, 1) * 255).round().astype(np.uint8)])


def blend(image: np.ndarray, heatmap: np.ndarray, alpha: float, colormap: str) -> Image.Image:
    """Heat in [0, 1] (H, W) laid over a picture, uint8 (H, W, 3): (1 - alpha) picture + alpha colours."""
    if not 0 <= alpha <= 1:
        raise ConvscopeError(f"alpha is {alpha}; expected a number from 0 (picture only) to 1 (heat only)")
    mixed = (1 - alpha) * image.astype(np.float32) + alpha * apply_colormap(heatmap, colormap).astype(np.float32)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
