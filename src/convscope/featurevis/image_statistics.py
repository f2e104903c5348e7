"""What can be measured about a picture: how coarse, how oriented, how colourful."""

from __future__ import annotations

import numpy as np

Images = np.ndarray  # uint8 (N, H, W, C)


def dominant_frequency(images: Images) -> np.ndarray:
    """The spatial frequency with most power (N,), in cycles per pixel: 0.5 is a change from each pixel to the next.

    Power of the brightness, its mean taken off, under a Hann window, is summed over rings one cycle over the picture
    wide; the ring with the largest sum says it. 0 for a picture of one brightness.
    """
    power, frequency = _spectrum(images)
    rings = np.rint(frequency * min(images.shape[1:3])).astype(int)
    sums = np.stack([np.bincount(rings.ravel(), weights=p.ravel()) for p in power])
    sums[:, 0] = 0
    found: np.ndarray = sums.argmax(1) / min(images.shape[1:3])
    return found


def orientation_selectivity(images: Images) -> np.ndarray:
    """How much the picture's structure runs in one direction (N,): 1 for a grating, 0 for what has none.

    |sum P exp(2 i angle)| / sum P over the power spectrum P, which is 1 minus the circular variance that is measured of
    cells in the visual cortex (Ringach, Shapley and Hawken, J. Neurosci. 2002). 0 for a picture of one brightness.
    """
    power, _ = _spectrum(images)
    down, across = _axes(images)
    turns = np.exp(2j * np.arctan2(down, across))
    total = power.sum((1, 2))
    found: np.ndarray = np.abs((power * turns).sum((1, 2))) / np.where(total > 0, total, 1)
    return found


def colourfulness(images: Images) -> np.ndarray:
    """Hasler and Süsstrunk's measure (N,): 0 is gray, 33 moderately, 82 highly colourful (Measuring colourfulness in
    natural images, 2003, M3).

    sqrt(var rg + var yb) + 0.3 sqrt(mean rg ^ 2 + mean yb ^ 2), rg = R - G, yb = (R + G) / 2 - B, of values 0..255. 0
    for pictures without three channels.
    """
    if images.shape[3] != 3:
        return np.zeros(len(images))
    red, green, blue = np.moveaxis(images.astype(np.float64), 3, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread = np.sqrt(opponents.var((2, 3)).sum(0))
    found: np.ndarray = spread + 0.3 * np.sqrt((opponents.mean((2, 3)) ** 2).sum(0))
    return found


IMAGE_STATISTICS = {
    "dominant frequency": dominant_frequency,
    "orientation selectivity": orientation_selectivity,
    "colourfulness": colourfulness,
}


def most_distinct(images: Images, count: int) -> list[int]:
    """`count` of the pictures, each as unlike those before it as can be; begins with the one farthest from the mean.

    Unlike are pictures whose mean colour, contrast of each channel, and brightness spectrum in 4 octaves by 6
    directions differ: greedy farthest-point choice, each number over its deviation among the pictures.
    """
    traits = _traits(images)
    spread = traits.std(0)
    traits = (traits - traits.mean(0)) / np.where(spread > 1e-9, spread, 1)
    chosen = [int(np.square(traits).sum(1).argmax())]
    apart = np.square(traits - traits[chosen[0]]).sum(1)
    while len(chosen) < min(count, len(images)):
        apart[chosen] = -1
        chosen.append(int(apart.argmax()))
        apart = np.minimum(apart, np.square(traits - traits[chosen[-1]]).sum(1))
    return chosen


def _traits(images: Images) -> np.ndarray:
    pixels = images.astype(np.float64) / 255
    power, frequency = _spectrum(images)
    down, across = _axes(images)
    octave = np.clip(np.floor(np.log2(np.maximum(frequency, 1e-9) / 0.5) + 4), 0, 3).astype(int)
    way = np.floor((np.arctan2(down, across) % np.pi) / np.pi * 6).astype(int) % 6
    cells = (octave * 6 + way).ravel()
    total = np.maximum(power.sum((1, 2)), 1e-12)
    shares = np.stack(
        [np.bincount(cells, weights=p.ravel(), minlength=24) / t for p, t in zip(power, total, strict=True)]
    )
    return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2)), np.sqrt(shares)], axis=1)


def _spectrum(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Power of the brightness (N, H, W), and each coefficient's frequency (H, W) in cycles per pixel."""
    weights = np.array([0.299, 0.587, 0.114]) if images.shape[3] == 3 else np.full(images.shape[3], 1 / images.shape[3])
    brightness = images.astype(np.float64) @ weights / 255
    height, width = brightness.shape[1:]
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    mean = (brightness * window).sum((1, 2), keepdims=True) / window.sum()
    # Rounding makes a spectrum even of a picture of one brightness.
    plain = np.ptp(brightness, axis=(1, 2), keepdims=True) < 1e-9
    power = np.abs(np.fft.fft2(np.where(plain, 0, (brightness - mean) * window))) ** 2
    return power, np.hypot(*_axes(images))


def _axes(images: Images) -> tuple[np.ndarray, np.ndarray]:
    height, width = images.shape[1:3]
    return np.broadcast_arrays(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])  # type: ignore[return-value]
