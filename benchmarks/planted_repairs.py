"""Repairs of networks that took a shortcut, by what the first finding says, measured on images without the bias."""

from __future__ import annotations

import copy

import numpy as np
import torch
from planted_images import SIZE
from planted_worlds import World, as_input, pooled_features, predict, set_head
from torch import Tensor

import convscope
from convscope.diagnosis import interventions, templates
from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.finding import Finding
from convscope.diagnosis.shortcut_candidates import FRAMES

USED = 40  # images of a finding that its feature is taken from


def repair(world: World, context: DiagnosisContext, findings: tuple[Finding, ...]) -> dict[str, float]:
    """Return the accuracy on unbiased images as the network is, and after each repair by the first finding.

    "masked": what was found is removed from the images (not possible for blur). "edited": its units are set to their
    means. "without units": a new head that is fitted to the diagnosed images without these units. "balanced": a new
    head that is fitted to the diagnosed images with and without the feature, for all classes. "refitted": the control,
    a new head that is fitted to the diagnosed images as they are.
    """
    labels, x = world.test.labels, as_input(world.test.images)
    result = {"before": accuracy(world.model, x, labels)}
    findings = [finding for finding in findings if finding.evidence["feature"] != "unit"]  # no change of pixels
    if not findings:
        return result
    finding, observations = findings[0], context.observations
    feature = Feature(finding, context)
    if finding.evidence["feature"] != "blur":
        result["masked"] = accuracy(world.model, feature.masked(x), labels)
    means = observations.features.astype(float).mean(0)
    units = {int(unit["unit"]): float(means[int(unit["unit"])]) for unit in finding.evidence["units"]}
    result["edited"] = accuracy(convscope.edit(world.model, {world.layer: units}), x, labels)
    checked = context.load_inputs(range(len(observations)))
    plain = pooled_features(world.model.module, checked)
    changed = [pooled_features(world.model.module, part) for part in feature.balanced(checked)]
    test, y = pooled_features(world.model.module, x), observations.labels
    rest = np.setdiff1d(np.arange(plain.shape[1]), list(units))
    for name, features, columns in (
        ("refitted", [plain], np.arange(plain.shape[1])),
        ("without units", [plain], rest),
        ("balanced", changed, np.arange(plain.shape[1])),
    ):
        head = copy.deepcopy(torch.nn.ModuleDict({"classifier": world.model.module.classifier}))
        set_head(head, torch.cat(features)[:, columns], np.tile(y, len(features)))
        with torch.no_grad():
            answers = head["classifier"](test[:, columns]).argmax(1).numpy()
        result[name] = float((answers == labels).mean())
    return result


def accuracy(model: convscope.Model, x: Tensor, labels: np.ndarray) -> float:
    """Return the accuracy on inputs."""
    return float((predict(model, x) == labels).mean())


class Feature:
    """What a finding is about, to be removed from inputs or inserted, using only what the finding says."""

    def __init__(self, finding: Finding, context: DiagnosisContext) -> None:
        self.kind, self.finding = str(finding.evidence["feature"]), finding
        count = len(context.observations)
        self.is_carrier = np.isin(np.arange(count), finding.images)
        others = np.flatnonzero(~self.is_carrier)
        self.rng = np.random.default_rng(0)
        images = list(finding.images[:USED])
        self.inside = context.load_inputs(images)
        self.outside = context.load_inputs(self.rng.permutation(others)[: 4 * USED].tolist())
        if "boxes" in finding.evidence:
            boxes = torch.tensor(finding.evidence["boxes"][: len(images)]) * SIZE
            self.corners, side = boxes[:, [1, 0]].round().long(), int((boxes[0, 2] - boxes[0, 0]).round())
            self.patches = interventions.cut_boxes(self.inside, self.corners, (side, side))

    def masked(self, x: Tensor) -> Tensor:
        """Remove the feature from inputs."""
        if self.kind in FRAMES:
            return interventions.remove_region(x, self._frame()[None])
        if self.kind == "color":
            return self._recolored(x, self.outside)
        patch = self.patches.mean(0)
        limit = templates.Correlations(self.inside).best_matches(patch)[0].quantile(0.1)
        values, positions = templates.Correlations(x).best_matches(patch)
        side = patch.shape[-1] + 4
        boxes = interventions.box_masks(positions - 2, (side, side), (SIZE, SIZE))
        return interventions.remove_region(x, boxes & (values >= limit)[:, None, None])

    def balanced(self, x: Tensor) -> list[Tensor]:
        """Return the diagnosed images without the feature and with it; blur cannot be removed, so with it alone."""
        carries = torch.from_numpy(self.is_carrier)[:, None, None, None]
        donors = torch.from_numpy(self.rng.integers(len(self.inside), size=len(x)))
        if self.kind == "blur":
            target = float(interventions.detail(self.inside).median())
            sigma = interventions.blur_to_match(x[~self.is_carrier], target)
            return [torch.where(carries, x, interventions.gaussian_blur(x, sigma))]
        if self.kind in FRAMES:
            free = torch.from_numpy(self.rng.integers(len(self.outside), size=len(x)))
            without, having = (
                interventions.replace_region(x, part, self._frame())
                for part in (self.outside[free], self.inside[donors])
            )
        elif self.kind == "color":
            without, having = (self._recolored(x, part) for part in (self.outside, self.inside))
        else:
            without = self.masked(x)
            having = interventions.paste_boxes(x, self.patches[donors], self.corners[donors])
        return [torch.where(carries, without, x), torch.where(carries, x, having)]

    def _frame(self) -> Tensor:
        return interventions.frame_mask((SIZE, SIZE), FRAMES[self.kind])

    @staticmethod
    def _recolored(x: Tensor, like: Tensor) -> Tensor:
        """Give each input the typical mean and deviation of each channel of other ones."""
        means, deviations = interventions.color_statistics(x)
        typical = [values.median(0).values for values in interventions.color_statistics(like)]
        limits = x.amin((0, 2, 3)), x.amax((0, 2, 3))
        return interventions.shift_colors(x, typical[0] - means, typical[1] / deviations.clamp(min=1e-6), limits)
