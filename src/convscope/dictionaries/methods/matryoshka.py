"""Matryoshka sparse autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.dictionaries.methods.batch_topk import BatchTopK
from convscope.dictionaries.sparse import ActiveFeatures, decode

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the features, in nested dictionaries


class Matryoshka(BatchTopK):
    """Select as BatchTopK does; the first features alone must reconstruct, too.

    ::

        loss = mean over m of |x - (b + sum over i < m of f_i a_i)|^2,   m = F/16, F/8, F/4, F/2, F

    so that general features come first and are not split into special ones.

    References
    ----------
    Bussmann, Nabeshima, Karvonen, Nanda, Learning Multi-Level Features with Matryoshka Sparse Autoencoders, ICML 2025,
    equation 3.
    """

    def reconstruct(self, x: Tensor, features: Tensor, active: ActiveFeatures) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the nested reconstructions of x (B, C), and the last reconstruction."""
        reconstruction, start = self.parameters["bias"].expand_as(x), 0
        losses = []
        for fraction in FRACTIONS:
            end = max(1, round(fraction * self.settings.features))
            mask = (active.columns >= start) & (active.columns < end)
            reconstruction = reconstruction + decode(features[mask], self.atoms, active.where(mask))
            losses.append((x - reconstruction).square().sum(1).mean())
            start = end
        return torch.stack(losses).mean(), reconstruction
