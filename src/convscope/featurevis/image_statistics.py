"""Statistics of images: spatial frequency, orientation, colorfulness; and a choice of dissimilar images."""

from __future__ import annotations

import numpy as np

Images = np.ndarray  # uint8 (N, H, W, C)

NUM_OCTAVES, NUM_ORIENTATIONS = 4, 6  # bins of the power spectrum in `most_distinct`


def dominant_frequency(images: Images) -> np.ndarray:
    """Return the spatial frequency with the most power (N,), in cycles per pixel; at most 0.5 along an axis.

    The power of the luminance, minus its mean and under a Hann window, is summed over rings of the width of one cycle
    per image. 0 for an image of constant luminance.
    """
    power, frequency = _power_spectrum(images)
    rings = np.rint(frequency * min(images.shape[1:3])).astype(int)
    ring_power = np.stack([np.bincount(rings.ravel(), weights=p.ravel()) for p in power])
    ring_power[:, 0] = 0
    dominant: np.ndarray = ring_power.argmax(1) / min(images.shape[1:3])
    return dominant


def orientation_selectivity(images: Images) -> np.ndarray:
    """Return how far the structure of an image has a single orientation (N,): 1 for a grating, 0 for none.

    |sum of P exp(2 i angle)| / sum of P over the power spectrum P: 1 minus the circular variance. 0 for an image of
    constant luminance.

    References
    ----------
    Ringach, Shapley and Hawken, Orientation selectivity in macaque V1, J. Neurosci. 2002.
    """
    power, _ = _power_spectrum(images)
    vertical, horizontal = _frequency_axes(images)
    phasors = np.exp(2j * np.arctan2(vertical, horizontal))
    total = power.sum((1, 2))
    selectivity: np.ndarray = np.abs((power * phasors).sum((1, 2))) / np.where(total > 0, total, 1)
    return selectivity


def colorfulness(images: Images) -> np.ndarray:
    """Return the colorfulness (N,): 0 is gray, 33 moderately, 82 highly colorful.

    sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2), with rg = R - G and yb = (R + G) / 2 - B of values 0..255.
    0 for images without three channels.

    References
    ----------
    Hasler and Süsstrunk, Measuring colourfulness in natural images, 2003, M3.
    """
    if images.shape[3] != 3:
        return np.zeros(len(images))
    red, green, blue = np.moveaxis(images.astype(np.float64), 3, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    std = np.sqrt(opponents.var((2, 3)).sum(0))
    result: np.ndarray = std + 0.3 * np.sqrt((opponents.mean((2, 3)) ** 2).sum(0))
    return result


IMAGE_STATISTICS = {
    "dominant frequency": dominant_frequency,
    "orientation selectivity": orientation_selectivity,
    "colorfulness": colorfulness,
}


def image_statistics(images: Images) -> dict[str, np.ndarray]:
    """Return each statistic of images (N,); gray images have no colorfulness."""
    return {
        name: statistic(images)
        for name, statistic in IMAGE_STATISTICS.items()
        if images.shape[3] == 3 or statistic is not colorfulness
    }


def most_distinct(images: Images, count: int) -> list[int]:
    """Return the indices of `count` dissimilar images by greedy farthest-point selection.

    The first is the image farthest from the mean. Features are the mean color, the contrast of each channel, and the
    luminance spectrum in 4 octaves and 6 orientations, each divided by its standard deviation over the images.
    """
    features = _features(images)
    std = features.std(0)
    features = (features - features.mean(0)) / np.where(std > 1e-9, std, 1)
    chosen = [int(np.square(features).sum(1).argmax())]
    distances = np.square(features - features[chosen[0]]).sum(1)
    while len(chosen) < min(count, len(images)):
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.square(features - features[chosen[-1]]).sum(1))
    return chosen


def _features(images: Images) -> np.ndarray:
    pixels = images.astype(np.float64) / 255
    power, frequency = _power_spectrum(images)
    vertical, horizontal = _frequency_axes(images)
    octave = np.floor(np.log2(np.maximum(frequency, 1e-9) / 0.5) + NUM_OCTAVES)
    octave = np.clip(octave, 0, NUM_OCTAVES - 1).astype(int)
    angle = np.arctan2(vertical, horizontal) % np.pi
    orientation = np.floor(angle / np.pi * NUM_ORIENTATIONS).astype(int) % NUM_ORIENTATIONS
    bins = (octave * NUM_ORIENTATIONS + orientation).ravel()
    total = np.maximum(power.sum((1, 2)), 1e-12)
    num_bins = NUM_OCTAVES * NUM_ORIENTATIONS
    fractions = np.stack(
        [np.bincount(bins, weights=p.ravel(), minlength=num_bins) / t for p, t in zip(power, total, strict=True)]
    )
    return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2)), np.sqrt(fractions)], axis=1)


def _power_spectrum(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Return the power of the luminance (N, H, W), and the frequencies (H, W) in cycles per pixel."""
    weights = np.array([0.299, 0.587, 0.114]) if images.shape[3] == 3 else np.full(images.shape[3], 1 / images.shape[3])
    luminance = images.astype(np.float64) @ weights / 255
    height, width = luminance.shape[1:]
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    mean = (luminance * window).sum((1, 2), keepdims=True) / window.sum()
    # Rounding errors of a constant image would have a spectrum of their own.
    constant = np.ptp(luminance, axis=(1, 2), keepdims=True) < 1e-9
    power = np.abs(np.fft.fft2(np.where(constant, 0, (luminance - mean) * window))) ** 2
    return power, np.hypot(*_frequency_axes(images))


def _frequency_axes(images: Images) -> tuple[np.ndarray, np.ndarray]:
    height, width = images.shape[1:3]
    vertical, horizontal = np.broadcast_arrays(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    return vertical, horizontal
