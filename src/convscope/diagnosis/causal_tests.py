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
Change = Callable[[Tensor], Tensor]

REPEATS = 2  # random changes per image that a change is compared with in a test
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


def effect_on_class(before: Tensor, after: Tensor, label: int, sign: int) -> Effect:
    """Return the effect of a change on the probability of a class, against the changes that it is compared with.

    Parameters
    ----------
    before : Tensor of shape (n, K)
        Probabilities of the images as they are.
    after : Tensor of shape (1 + R, n, K)
        Those after the change, and after R changes to compare with.
    label : int
    sign : {1, -1}
        1 for the increase of the probability and answers that become the class, -1 for the decrease and answers that
        stop being it.
    """
    changes = sign * (after - before)[..., label].double().numpy()
    is_label = after.argmax(2) == label
    answers = (is_label if sign > 0 else ~is_label).double().mean(1).tolist()
    return Effect(changes[0], changes[1:].mean(0), (answers[0], float(np.mean(answers[1:]))))


def sign_test(differences: Floats, rng: np.random.Generator) -> float:
    """Return the probability that the mean of differences is as large under random signs (Fisher's randomisation)."""
    signs = rng.choice([-1.0, 1.0], (PERMUTATIONS, len(differences)))
    return float((1 + np.count_nonzero(signs @ differences >= differences.sum() - 1e-12)) / (1 + PERMUTATIONS))


@dataclass(frozen=True)
class _Changes:
    """Changes of images that insert and remove something, and the matched random changes."""

    insert: Change
    insert_control: Change
    remove: Change
    remove_control: Change


@dataclass(frozen=True)
class CausalTest:
    """Images to change, and the network's answers.

    Attributes
    ----------
    scores : callable
        Returns the probabilities (n, K) of inputs (n, C, H, W).
    inside, outside : Tensor of shape (n, C, H, W)
        Images that carry the shortcut and are taken for its class; images of other classes, that are not.
    inside_before, outside_before : Tensor of shape (n, K)
        The probabilities of these images as they are.
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
    inside_before: Tensor
    outside_before: Tensor
    inside_rows: npt.NDArray[np.int64]
    label: int
    thumbnail_size: tuple[int, int]
    generator: torch.Generator

    def inserted(self, candidate: ShortcutCandidate, repeats: int = REPEATS) -> Effect:
        """Return the effect of inserting what a candidate is about into images of other classes.

        `repeats` is the number of random changes of each image that it is compared with.
        """
        changes = self._changes(candidate)
        return self.blur() if changes is None else self._inserted(changes, repeats)

    def removed(self, candidate: ShortcutCandidate) -> Effect | None:
        """Return the effect of removing it from images of the class; None where that is impossible."""
        changes = self._changes(candidate)
        if changes is None:
            return None
        return self._effect(self.inside, self.inside_before, changes.remove, changes.remove_control, -1, 1)

    def _changes(self, candidate: ShortcutCandidate) -> _Changes | None:
        if candidate.kind == "patch":
            return self._patch(candidate)
        if candidate.kind in FRAMES:
            return self._swaps(self._frame_mask(FRAMES[candidate.kind]))
        return self._color() if candidate.kind == "color" else None

    def _inserted(self, changes: _Changes, repeats: int) -> Effect:
        return self._effect(self.outside, self.outside_before, changes.insert, changes.insert_control, 1, repeats)

    def _effect(self, x: Tensor, before: Tensor, change: Change, control: Change, sign: int, repeats: int) -> Effect:
        after = self.scores(torch.cat([change(x), *(control(x) for _ in range(repeats))]))
        return effect_on_class(before, after.view(1 + repeats, len(x), -1), self.label, sign)

    # --- kinds of shortcuts ------------------------------------------------------------------------------------------

    def _patch(self, candidate: ShortcutCandidate) -> _Changes:
        """Paste a recurring patch into other images, and impute it, against patches and boxes at random positions."""
        assert candidate.template is not None
        assert candidate.corners is not None
        size = (self.inside.shape[2], self.inside.shape[3])
        scale = np.array(size) / np.array(self.thumbnail_size)
        side = candidate.template.patch.shape[-1] * scale
        margins = MARGIN * side
        sides = (min(round(side[0] + 2 * margins[0]), size[0]), min(round(side[1] + 2 * margins[1]), size[1]))
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
            return interventions.remove_boxes(x, inside, sides)

        def impute_random(x: Tensor) -> Tensor:
            return interventions.remove_boxes(x, self._corners(len(x), sides, size), sides)

        return _Changes(paste, paste_random, impute, impute_random)

    def frame(self, width: float) -> Effect:
        """Put frames of the class around other images, against frames of images with other answers."""
        return self._inserted(self._swaps(self._frame_mask(width)), 1)

    def center(self, width: float) -> Effect:
        """Put centres of the area of a frame into other images: what the object in the middle does."""
        mask = self._frame_mask(width)
        center = interventions.center_mask((mask.shape[0], mask.shape[1]), float(mask.float().mean()))
        return self._inserted(self._swaps(center), 1)

    def _frame_mask(self, width: float) -> Tensor:
        return interventions.frame_mask((self.inside.shape[2], self.inside.shape[3]), width).to(self.inside.device)

    def _swaps(self, mask: Tensor) -> _Changes:
        """Swap the pixels in a mask with those of the other group, against those of the same group."""
        mask = mask.to(self.inside.device)
        from_class, from_others = self._swap(self.inside, mask), self._swap(self.outside, mask)
        return _Changes(from_class, from_others, from_others, from_class)

    def _swap(self, donors: Tensor, mask: Tensor) -> Change:
        """Return the change that takes the pixels in a mask (H, W) from other images."""
        return lambda x: interventions.replace_region(x, donors[self._draw(len(donors), len(x))], mask)

    def _color(self) -> _Changes:
        """Shift colors by the difference to other images, against shifts of the same length in other directions."""
        shift, scale, limits = interventions.color_difference(self.inside, self.outside)

        def shifted(sign: int) -> Change:
            return lambda x: interventions.shift_colors(x, sign * shift, scale**sign, limits)

        def random(sign: int) -> Change:
            def change(x: Tensor) -> Tensor:
                direction = torch.randn((len(x), len(shift)), generator=self.generator).to(shift)
                direction = direction / direction.norm(dim=1, keepdim=True) * shift.norm()
                return interventions.shift_colors(x, direction, scale**sign, limits)

            return change

        return _Changes(shifted(1), random(1), shifted(-1), random(-1))

    def blur(self) -> Effect:
        """Blur other images to the detail of the class, and compare with what that does to the remaining classes."""
        x, before = self.outside, self.outside_before
        sigma = interventions.blur_to_match(x, float(interventions.detail(self.inside).median()))
        after = self.scores(interventions.gaussian_blur(x, sigma))
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
