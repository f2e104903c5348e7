"""Causal tests of shortcuts: remove and insert them, and compare with matched random changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convscope.diagnosis import interventions
from convscope.diagnosis.shortcut_candidates import FRAMES, ShortcutCandidate
from convscope.evaluation.statistics import bootstrap

Floats = npt.NDArray[np.float64]
Scores = Callable[[Tensor], Tensor]

REPEATS = 4  # random changes per image that a change is compared with
PERMUTATIONS = 2000
MARGIN = 0.25  # of a recurring patch's side, that is moved with it on each side


@dataclass(frozen=True)
class Effect:
    """What a change does to the probability of a class, image by image.

    Attributes
    ----------
    changes : ndarray of shape (n,)
        Change of the probability.
    controls : ndarray of shape (n,)
        The mean of what matched random changes do.
    answers : tuple of float
        The fraction of images whose answer becomes (or stops being) the class, and for the controls.
    """

    changes: Floats
    controls: Floats
    answers: tuple[float, float]

    @property
    def size(self) -> float:
        """The mean change beyond the controls."""
        return float((self.changes - self.controls).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % bootstrap interval."""
        low, high = bootstrap(self.changes - self.controls)
        return float(low), float(high)

    def p_value(self, rng: np.random.Generator) -> float:
        """Return the p-value of the mean change beyond the controls, by random signs."""
        return sign_test(self.changes - self.controls, rng)


def sign_test(differences: Floats, rng: np.random.Generator) -> float:
    """Return the probability that the mean of differences is as large under random signs (Fisher's randomisation)."""
    signs = rng.choice([-1.0, 1.0], (PERMUTATIONS, len(differences)))
    return float((1 + np.count_nonzero(signs @ differences >= differences.sum() - 1e-12)) / (1 + PERMUTATIONS))


@dataclass(frozen=True)
class CausalTest:
    """Images to change, and the network's answers.

    Attributes
    ----------
    scores : callable
        Returns the probabilities (n, K) of inputs (n, C, H, W).
    inside, outside : Tensor of shape (n, C, H, W)
        Images that carry the shortcut and are taken for its class; images of other classes, that are not.
    inside_rows : ndarray of shape (n,)
        Positions of the former in the observations.
    label : int
    thumbnail_size : tuple of int
        Height and width that candidates' corners refer to.
    generator : torch.Generator
    """

    scores: Scores
    inside: Tensor
    outside: Tensor
    inside_rows: npt.NDArray[np.int64]
    label: int
    thumbnail_size: tuple[int, int]
    generator: torch.Generator

    def run(self, candidate: ShortcutCandidate) -> tuple[Effect, Effect | None]:
        """Return the effect of inserting the candidate's feature, and that of removing it, where that is possible."""
        if candidate.kind == "patch":
            return self.patch(candidate)
        if candidate.kind in FRAMES:
            return self.frame(FRAMES[candidate.kind])
        if candidate.kind == "color":
            return self.color()
        return self.blur(), None

    def insert(self, change: Callable[[Tensor], Tensor], controls: list[Callable[[Tensor], Tensor]]) -> Effect:
        """Measure a change that inserts, on images of other classes."""
        return self._effect(self.outside, change, controls, 1)

    def remove(self, change: Callable[[Tensor], Tensor], controls: list[Callable[[Tensor], Tensor]]) -> Effect:
        """Measure a change that removes, on images of the class."""
        return self._effect(self.inside, change, controls, -1)

    def _effect(
        self, x: Tensor, change: Callable[[Tensor], Tensor], controls: list[Callable[[Tensor], Tensor]], sign: int
    ) -> Effect:
        before = self.scores(x)[:, self.label]
        after = self.scores(change(x))
        others = [self.scores(control(x)) for control in controls]
        is_label = [float((p.argmax(1) == self.label).float().mean()) for p in (after, *others)]
        fractions = is_label if sign > 0 else [1 - fraction for fraction in is_label]
        changes = [sign * (p[:, self.label] - before).double().numpy() for p in (after, *others)]
        return Effect(changes[0], np.mean(changes[1:], axis=0), (fractions[0], float(np.mean(fractions[1:]))))

    # --- kinds of shortcuts ------------------------------------------------------------------------------------------

    def patch(self, candidate: ShortcutCandidate) -> tuple[Effect, Effect]:
        """Paste a recurring patch into other images, and impute it, against patches and boxes at random positions."""
        assert candidate.template is not None
        assert candidate.corners is not None
        size = (self.inside.shape[2], self.inside.shape[3])
        scale = np.array(size) / np.array(self.thumbnail_size)
        side = candidate.template.patch.shape[-1] * scale
        margins = MARGIN * side
        sides = (round(side[0] + 2 * margins[0]), round(side[1] + 2 * margins[1]))
        corners = torch.from_numpy(np.rint(candidate.corners * scale - margins).astype(np.int64))
        inside, donors = (
            self._clip(corners[self.inside_rows], sides, size),
            self._draw(len(self.inside), len(self.outside)),
        )
        positions = inside[donors]

        def paste(x: Tensor) -> Tensor:
            return interventions.paste_boxes(
                x, interventions.cut_boxes(self.inside[donors], positions, sides), positions
            )

        def paste_random(x: Tensor) -> Tensor:
            patches = interventions.cut_boxes(self.inside[donors], self._corners(len(x), sides, size), sides)
            return interventions.paste_boxes(x, patches, positions)

        def impute(x: Tensor) -> Tensor:
            return interventions.remove_region(x, interventions.box_masks(inside, sides, size))

        def impute_random(x: Tensor) -> Tensor:
            return interventions.remove_region(
                x, interventions.box_masks(self._corners(len(x), sides, size), sides, size)
            )

        return self.insert(paste, [paste_random] * REPEATS), self.remove(impute, [impute_random] * REPEATS)

    def frame(self, width: float) -> tuple[Effect, Effect]:
        """Swap frames between the class and others, against frames of images with other answers."""
        mask = self._frame_mask(width)
        return self.insert_frame(width), self.remove(
            self._swap(self.outside, mask), [self._swap(self.inside, mask)] * REPEATS
        )

    def insert_frame(self, width: float) -> Effect:
        """Put frames of the class around other images, against frames of images with other answers."""
        return self._swap_in(self._frame_mask(width))

    def _frame_mask(self, width: float) -> Tensor:
        return interventions.frame_mask((self.inside.shape[2], self.inside.shape[3]), width).to(self.inside.device)

    def center(self, width: float) -> Effect:
        """Swap centred boxes of the same area as a frame: what the object in the middle does."""
        mask = self._frame_mask(width)
        size = (mask.shape[0], mask.shape[1])
        return self._swap_in(interventions.center_mask(size, float(mask.float().mean())).to(mask.device))

    def _swap_in(self, mask: Tensor) -> Effect:
        return self.insert(self._swap(self.inside, mask), [self._swap(self.outside, mask)] * REPEATS)

    def _swap(self, donors: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the change that takes the pixels in a mask (H, W) from other images."""
        return lambda x: interventions.replace_region(x, donors[self._draw(len(donors), len(x))], mask)

    def color(self) -> tuple[Effect, Effect]:
        """Shift colors by the difference to other images, against shifts of the same length in other directions."""
        means, deviations = zip(*(interventions.color_statistics(x) for x in (self.inside, self.outside)), strict=True)
        shift = means[0].median(0).values - means[1].median(0).values
        scale = deviations[0].median(0).values / deviations[1].median(0).values.clamp(min=1e-6)
        both = torch.cat([self.inside, self.outside])
        limits = both.amin((0, 2, 3)), both.amax((0, 2, 3))

        def shifted(sign: int) -> Callable[[Tensor], Tensor]:
            return lambda x: interventions.shift_colors(x, sign * shift, scale**sign, limits)

        def random(sign: int) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                direction = torch.randn((len(x), len(shift)), generator=self.generator).to(shift)
                direction = direction / direction.norm(dim=1, keepdim=True) * shift.norm()
                return interventions.shift_colors(x, direction, scale**sign, limits)

            return change

        return self.insert(shifted(1), [random(1)] * REPEATS), self.remove(shifted(-1), [random(-1)] * REPEATS)

    def blur(self) -> Effect:
        """Blur other images to the detail of the class, and compare with what that does to the remaining classes."""
        x = self.outside
        sigma = interventions.blur_to_match(x, float(interventions.detail(self.inside).median()))
        before, after = self.scores(x), self.scores(interventions.gaussian_blur(x, sigma))
        changes = (after - before).double().numpy()
        rows = np.arange(len(x))
        is_other = np.ones_like(changes, bool)
        is_other[rows, before.argmax(1).numpy()] = False
        is_other[:, self.label] = False
        count = np.maximum(is_other.sum(1), 1)
        answers = after.argmax(1).numpy()
        fractions = float((answers == self.label).mean()), float((is_other[rows, answers] / count).mean())
        return Effect(changes[:, self.label], (changes * is_other).sum(1) / count, fractions)

    # --- random choices ----------------------------------------------------------------------------------------------

    def _draw(self, count: int, size: int) -> Tensor:
        """Draw `size` numbers below `count`."""
        return torch.randint(count, (size,), generator=self.generator)

    def _corners(self, count: int, sides: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Draw upper left corners (count, 2) of boxes within an image."""
        return torch.stack([self._draw(size[i] - sides[i] + 1, count) for i in (0, 1)], 1)

    @staticmethod
    def _clip(corners: Tensor, sides: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Move boxes into the image."""
        limits = torch.tensor([size[0] - sides[0], size[1] - sides[1]])
        return torch.minimum(corners.clamp(min=0), limits)
