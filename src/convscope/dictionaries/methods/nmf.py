"""Non-negative matrix factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.dictionaries.encoder import DictionaryWeights, non_negative_least_squares
from convscope.dictionaries.methods.base import Settings, Start, Step
from convscope.errors import ConvscopeError

MAX_FEATURES = 512


class Nmf:
    """Write non-negative vectors as non-negative combinations of non-negative atoms; `active` has no meaning.

    ::

        min over f >= 0, A >= 0 of |x - f A|^2

    Features are the solution for the present atoms; the atoms follow by projected gradient steps on batches.

    References
    ----------
    Lee, Seung, Learning the parts of objects by non-negative matrix factorization, Nature 1999.
    Mairal et al., Online Learning for Matrix Factorization and Sparse Coding, JMLR 2010 (batches).
    """

    activation = "nnls"
    is_centred = False
    is_sparse = False
    step_size = 1.0

    def __init__(self, settings: Settings, start: Start) -> None:
        if settings.features > MAX_FEATURES:
            raise ConvscopeError(
                f"features is {settings.features}; method='nmf' solves for all of them at each position and takes at "
                f"most {MAX_FEATURES}"
            )
        self.settings = settings
        chosen = torch.arange(settings.features, device=start.sample.device) % len(start.sample)
        atoms = start.sample[chosen] + 0.1 * start.atoms.abs()
        self.parameters, self.buffers = {"atoms": atoms.requires_grad_()}, dict[str, Tensor]()
        self.renormalize()

    @property
    def atoms(self) -> Tensor:
        """The atoms (F, C), with gradients."""
        return self.parameters["atoms"]

    def step(self, x: Tensor) -> Step:
        """Return the loss on vectors x (B, C)."""
        with torch.no_grad():
            gram = self.atoms @ self.atoms.T
            features = non_negative_least_squares(x @ self.atoms.T, gram, 1 / torch.linalg.matrix_norm(gram, 2))
        reconstruction = features @ self.atoms
        loss = (x - reconstruction).square().sum(1).mean()
        return Step(loss, reconstruction.detach(), (features > 0).sum(0))

    def renormalize(self) -> None:
        """Make the atoms non-negative, of length 1."""
        with torch.no_grad():
            atoms = self.parameters["atoms"]
            atoms.clamp_(min=0)
            atoms /= atoms.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def restart(self, features: Tensor, directions: Tensor) -> None:
        """Let features begin anew with the positive parts of directions."""
        with torch.no_grad():
            self.parameters["atoms"][features] = directions.clamp_min(0)
        self.renormalize()

    def weights(self) -> DictionaryWeights:
        """Return the dictionary; its encoder is that of the first step of the solution."""
        atoms = self.atoms.detach()
        zeros = atoms.new_zeros(len(atoms))
        return DictionaryWeights(atoms, atoms, zeros, atoms.new_zeros(atoms.shape[1]), zeros)
