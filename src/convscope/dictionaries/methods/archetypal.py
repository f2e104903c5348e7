"""Relaxed archetypal sparse autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from convscope.dictionaries.methods.base import Settings, Start, Step, fitted_scale
from convscope.dictionaries.methods.topk import TopK

MAX_POINTS = 1024
RELAXATION = 0.5  # largest length of the part of an atom outside the convex hull


class Archetypal(TopK):
    """Select as TopK does; atoms lie near the convex hull of the data, which makes them stable over seeds.

    ::

        A = W X + L,   W >= 0,  rows of W sum to 1,  |L_i| <= 0.5

    X are up to 1024 vectors of the data, scaled to length 1; the rows of A are scaled to length 1.

    References
    ----------
    Fel et al., Archetypal SAE: Adaptive and Stable Dictionary Learning for Concept Extraction in Large Vision Models,
    ICML 2025, equations 5 and 6.
    """

    def __init__(self, settings: Settings, start: Start) -> None:
        super().__init__(settings, start)
        points = start.sample[:MAX_POINTS]
        self.points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
        nearest = torch.arange(settings.features, device=points.device) % len(points)
        mixture = torch.nn.functional.one_hot(nearest, len(points)).float()
        del self.parameters["atoms"]
        relaxation = 0.1 * start.atoms
        self.parameters |= {"mixture": mixture.requires_grad_(), "relaxation": relaxation.requires_grad_()}
        self._atoms = self._compute_atoms()
        with torch.no_grad():
            self.step_size = float(fitted_scale(self._atoms, start.sample, settings.active))
            self.parameters["encoder"].copy_(self.step_size * self._atoms)

    @property
    def atoms(self) -> Tensor:
        """The atoms (F, C) of this step."""
        return self._atoms

    def _compute_atoms(self) -> Tensor:
        return normalize(self.parameters["mixture"] @ self.points + self.parameters["relaxation"], dim=1)

    def step(self, x: Tensor) -> Step:
        """Return the loss on vectors x (B, C)."""
        self._atoms = self._compute_atoms()
        return super().step(x)

    def renormalize(self) -> None:
        """Bring mixtures and relaxation back to their constraints."""
        with torch.no_grad():
            mixture, relaxation = self.parameters["mixture"], self.parameters["relaxation"]
            mixture.clamp_(min=0)
            mixture /= mixture.sum(1, keepdim=True).clamp_min(1e-12)
            relaxation *= (RELAXATION / relaxation.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
            self._atoms = self._compute_atoms()

    def restart(self, features: Tensor, directions: Tensor) -> None:
        """Let features begin anew at the points nearest to directions."""
        with torch.no_grad():
            nearest = (directions @ self.points.T).argmax(1)
            self.parameters["mixture"][features] = torch.nn.functional.one_hot(nearest, len(self.points)).float()
            self.parameters["relaxation"][features] = 0
            self._atoms = self._compute_atoms()
            self.parameters["encoder"][features] = self._atoms[features]
            self.parameters["encoder_bias"][features] = 0
