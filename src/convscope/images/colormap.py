"""Map values to colors, and blend heatmaps with images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.suggestions import suggest

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.floating]

SEQUENTIAL, DIVERGING = "jet", "RdBu_r"
ALPHA, SIGNED_ALPHA = 0.4, 0.8


@lru_cache(maxsize=16)
def lookup_table(name: str) -> Pixels:
    """Return the 256 colors, uint8 (256, 3), of a colormap of matplotlib."""
    from matplotlib import colormaps

    if name not in colormaps:
        raise ConvscopeError(f"colormap {name!r} is not known; {suggest(name, list(colormaps))}")
    colors: Pixels = colormaps[name](np.arange(256), bytes=True)[:, :3]
    return colors


def color_stops(name: str) -> list[list[int]]:
    """Return 52 evenly spaced colors of a colormap, the first and the last among them."""
    stops: list[list[int]] = lookup_table(name)[::5].tolist()
    return stops


def apply_colormap(values: Values, name: str) -> Pixels:
    """Map values in [0, 1] (H, W) to colors, uint8 (H, W, 3)."""
    return np.asarray(lookup_table(name)[(np.clip(values, 0, 1) * 255).round().astype(np.uint8)])


@dataclass(frozen=True)
class ColorScale:
    """The values at both ends of a colormap: 0 and the maximum, or the maximum and its negative.

    Attributes
    ----------
    maximum : float
        Not negative; 0 if there is nothing to show.
    signed : bool
        Whether negative values are shown; else they have the color of 0.
    colormap : str
        Name of a matplotlib colormap: a sequential one, a diverging one if `signed`.
    """

    maximum: float
    signed: bool = False
    colormap: str = SEQUENTIAL

    @property
    def minimum(self) -> float:
        """The value of the first color."""
        return -self.maximum if self.signed else 0.0

    def normalize(self, values: Values) -> Values:
        """Divide values by the maximum and clip them to [0, 1], to [-1, 1] if `signed`."""
        if not self.maximum > 0:
            return np.zeros_like(values)
        clipped: Values = np.clip(values / self.maximum, -1 if self.signed else 0, 1)
        return clipped

    def overlay(self, image: Pixels, values: Values, alpha: float | None = None) -> Image.Image:
        """Blend an image, uint8 (H, W, 3), with the colors of values (H, W).

        The opacity is `alpha`, by default 0.4. If `signed`, the image is gray, so that its colors are not taken for
        values, and `alpha`, by default 0.8, is the opacity of the strongest values; others are fainter in proportion.
        """
        normalized = self.normalize(values)
        if not self.signed:
            return blend(image, normalized, ALPHA if alpha is None else alpha, self.colormap)
        gray = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
        strongest = SIGNED_ALPHA if alpha is None else alpha
        return blend(gray, (normalized + 1) / 2, strongest, self.colormap, np.abs(normalized))


def blend(image: Pixels, heatmap: Values, alpha: float, colormap: str, strength: Values | None = None) -> Image.Image:
    """Blend a heatmap in [0, 1] (H, W) with an image, uint8 (H, W, 3): (1 - alpha) image + alpha colors.

    With `strength` in [0, 1] (H, W) alpha is multiplied by it.
    """
    if not 0 <= alpha <= 1:
        raise ConvscopeError(f"alpha is {alpha}; expected a number from 0 (image only) to 1 (heatmap only)")
    opacity = np.float32(alpha) if strength is None else (alpha * strength[..., None]).astype(np.float32)
    mixed = (1 - opacity) * image.astype(np.float32) + opacity * apply_colormap(heatmap, colormap).astype(np.float32)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
