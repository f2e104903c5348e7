"""What the methods of dictionary learning share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from convscope.dictionaries.encoder import DictionaryWeights
from convscope.dictionaries.selection import top_k
from convscope.dictionaries.sparse import ActiveFeatures, decode, select


@dataclass(frozen=True)
class Settings:
    """The size of a dictionary and the length of its training.

    Attributes
    ----------
    features : int
        Number of features F.
    active : int
        Features per position that are active, k.
    steps : int
        Training steps in total.
    """

    features: int
    active: int
    steps: int


@dataclass(frozen=True)
class Start:
    """With what training begins.

    Attributes
    ----------
    atoms : Tensor
        (F, C) random directions of length 1.
    bias : Tensor
        (C,).
    sample : Tensor
        (n, C) vectors.
    """

    atoms: Tensor
    bias: Tensor
    sample: Tensor


@dataclass
class Step:
    """What one step of training gives.

    Attributes
    ----------
    loss : Tensor
        What is minimised.
    reconstruction : Tensor
        (B, C), detached.
    fired : Tensor
        (F,) at how many positions of the batch each feature is active.
    scores : Tensor or None
        (B, F) the values of all features before selection, for the auxiliary loss of dead features.
    """

    loss: Tensor
    reconstruction: Tensor
    fired: Tensor
    scores: Tensor | None = None


class Method(Protocol):
    """A way to learn a dictionary of vectors whose distance from the origin is 1 on average.

    Attributes
    ----------
    activation : str
        How features are computed when the dictionary is done; see `FeatureEncoder`.
    is_centred : bool
        Whether the vectors are centred; otherwise they are non-negative.
    is_sparse : bool
        Whether the number of active features is an argument.
    parameters : dict of str to Tensor
        What is optimised. Those of features have F rows.
    buffers : dict of str to Tensor
        What else changes from step to step.
    step_size : float
        The learning rate relative to that for weights of length 1.
    """

    activation: str
    is_centred: bool
    is_sparse: bool
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    step_size: float

    @property
    def atoms(self) -> Tensor:
        """The atoms (F, C), with gradients."""

    def step(self, x: Tensor) -> Step:
        """Return the loss on vectors x (B, C)."""

    def renormalize(self) -> None:
        """Bring the parameters back to their constraints after an update."""

    def restart(self, features: Tensor, directions: Tensor) -> None:
        """Let features (d,) begin anew with directions (d, C) of length 1."""

    def weights(self) -> DictionaryWeights:
        """Return the dictionary."""


def fitted_scale(atoms: Tensor, sample: Tensor, active: int) -> Tensor:
    """Return the s >= 0 with which ``s TopK(x A^T) A`` is nearest to vectors x, by least squares.

    Many random atoms in few dimensions overlap: without s, the sum of the k nearest to x is several times as long as x.

    Parameters
    ----------
    atoms : Tensor
        (F, C) A.
    sample : Tensor
        (n, C) vectors x.
    active : int
        k.
    """
    values, columns = top_k(sample @ atoms.T, active)
    fitted = ActiveFeatures.of_rows(columns, len(atoms)).sum_atoms(values.clamp_min(0).flatten(), atoms)
    return (sample * fitted).sum().clamp_min(0) / fitted.square().sum().clamp_min(1e-12)


class SparseAutoencoder:
    """A linear encoder, a selection of features, and a linear decoder.

    ::

        z = W (x - b) + c;   f = selection of relu(z);   x' = f A + b;   loss = mean |x - x'|^2

    W begins as s A, where the rows of A have length 1 and s fits the first reconstructions to the data. The learning
    rate is proportional to s: Adam's steps would otherwise be as long as short rows of W. Subclasses select.

    Parameters
    ----------
    settings : Settings
    start : Start
    """

    activation = "topk"
    is_centred = True
    is_sparse = True

    def __init__(self, settings: Settings, start: Start) -> None:
        self.settings = settings
        self.buffers: dict[str, Tensor] = {}
        scale = fitted_scale(start.atoms, start.sample, settings.active)
        self.step_size = float(scale)
        self.parameters: dict[str, Tensor] = {
            "atoms": start.atoms.clone().requires_grad_(),
            "encoder": (scale * start.atoms).requires_grad_(),
            "encoder_bias": start.atoms.new_zeros(len(start.atoms)).requires_grad_(),
            "bias": start.bias.clone().requires_grad_(),
        }

    @property
    def atoms(self) -> Tensor:
        """The atoms (F, C), with gradients."""
        return self.parameters["atoms"]

    def scores(self, centred: Tensor) -> Tensor:
        """Return z (B, F), without gradients."""
        p = self.parameters
        with torch.no_grad():  # the bias as a channel that is 1: torch.addmm would first write it into all of z
            ones = centred.new_ones(len(centred), 1)
            weights = torch.cat([p["encoder"], p["encoder_bias"][:, None]], 1)
            return torch.cat([centred, ones], 1) @ weights.T

    def select(self, scores: Tensor) -> tuple[Tensor, ActiveFeatures]:
        """Return the values (n,) of the selected features, and which they are; for methods that use `step` as it is."""
        raise NotImplementedError

    def step(self, x: Tensor) -> Step:
        """Return the loss on vectors x (B, C)."""
        p = self.parameters
        centred = x - p["bias"].detach()
        scores = self.scores(centred)
        values, active = self.select(scores)
        features = select(values, p["encoder"], p["encoder_bias"], centred, active).relu()
        loss, reconstruction = self.reconstruct(x, features, active)
        fired = self.count_fired(features.detach(), active)
        return Step(loss, reconstruction.detach(), fired, scores)

    def reconstruct(self, x: Tensor, features: Tensor, active: ActiveFeatures) -> tuple[Tensor, Tensor]:
        """Return the loss of the reconstruction of x (B, C), and the reconstruction."""
        reconstruction = decode(features, self.atoms, active) + self.parameters["bias"]
        return (x - reconstruction).square().sum(1).mean(), reconstruction

    def count_fired(self, features: Tensor, active: ActiveFeatures) -> Tensor:
        """Return at how many positions each feature is above 0."""
        return torch.bincount(active.columns, (features > 0).float(), self.settings.features)

    def renormalize(self) -> None:
        """Give the atoms length 1."""
        with torch.no_grad():
            atoms = self.parameters["atoms"]
            atoms /= atoms.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def restart(self, features: Tensor, directions: Tensor) -> None:
        """Let features (d,) begin anew with directions (d, C) of length 1."""
        with torch.no_grad():
            self.parameters["atoms"][features] = directions
            self.parameters["encoder"][features] = directions
            self.parameters["encoder_bias"][features] = 0

    def thresholds(self) -> Tensor:
        """Return the thresholds (F,) of the features."""
        return torch.zeros_like(self.parameters["encoder_bias"])

    def weights(self) -> DictionaryWeights:
        """Return the dictionary."""
        p = {name: tensor.detach() for name, tensor in self.parameters.items()}
        return DictionaryWeights(self.atoms.detach(), p["encoder"], p["encoder_bias"], p["bias"], self.thresholds())
