"""The encoder and decoder of a dictionary, as a function of a layer's maps that gradients pass through."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convscope.dictionaries.selection import top_k

NNLS_STEPS = 60  # of projected gradient descent


@dataclass(frozen=True)
class DictionaryWeights:
    """The numbers of a dictionary of F features of C channels.

    Attributes
    ----------
    atoms : Tensor of shape (F, C)
        Directions of length 1: the decoder.
    encoder : Tensor of shape (F, C)
    encoder_bias : Tensor of shape (F,)
    bias : Tensor of shape (C,)
        What is decoded where no feature is active.
    thresholds : Tensor of shape (F,)
        A feature below its threshold is 0.
    """

    atoms: Tensor
    encoder: Tensor
    encoder_bias: Tensor
    bias: Tensor
    thresholds: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class FeatureEncoder(nn.Module):
    """Compute features f (N, F, ...) of maps x (N, C, ...), at each position by itself.

    ::

        z = W (x - b) + c
        f_i = z_i if z_i >= t_i and z_i > 0, else 0

    where t is the k-th largest z of the position for ``activation="topk"``, and a threshold of each feature for
    ``"threshold"``. With ``"nnls"``, f is the solution of min |x - b - f A|, f >= 0, for the atoms A.

    A feature that is off is computed as ``relu(z_i - t_i)``, so that methods that let gradients pass a ReLU find it.

    Parameters
    ----------
    weights : DictionaryWeights
    activation : {"topk", "threshold", "nnls"}
    active : int
        k.
    """

    def __init__(self, weights: DictionaryWeights, activation: str, active: int) -> None:
        super().__init__()
        self.activation, self.active = activation, active
        offset = weights.encoder_bias - weights.encoder @ weights.bias
        for name, tensor in (weights.tensors() | {"offset": offset}).items():
            setattr(self, name, nn.Parameter(tensor.detach().float().clone(), requires_grad=False))
        if activation == "nnls":
            gram = self.atoms @ self.atoms.T
            step = 1 / torch.linalg.matrix_norm(gram, 2)
            self.gram, self.step = nn.Parameter(gram, requires_grad=False), nn.Parameter(step, requires_grad=False)

    atoms: Tensor
    encoder: Tensor
    encoder_bias: Tensor
    bias: Tensor
    thresholds: Tensor
    offset: Tensor

    @property
    def weights(self) -> DictionaryWeights:
        """The numbers of the dictionary."""
        return DictionaryWeights(*(getattr(self, f.name) for f in fields(DictionaryWeights)))

    def forward(self, maps: Tensor) -> Tensor:
        """Return the features (N, F, ...) of maps (N, C, ...)."""
        x = maps.float().movedim(1, -1)
        return (self._nnls(x) if self.activation == "nnls" else self._encode(x)).movedim(-1, 1)

    def _encode(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.encoder, self.offset)
        thresholds = self.thresholds
        if self.activation == "topk":
            rows = z.detach().reshape(-1, z.shape[-1])
            thresholds = top_k(rows, self.active)[0].amin(1).reshape(*z.shape[:-1], 1)
        return F.relu(torch.where(z >= thresholds, z, z - thresholds))

    def _nnls(self, x: Tensor) -> Tensor:
        return non_negative_least_squares(F.linear(x - self.bias, self.atoms), self.gram, self.step)

    def combine(self, features: Tensor) -> Tensor:
        """Return the sum of the atoms (N, C, ...) weighted by features (N, F, ...), without the bias."""
        return F.linear(features.movedim(1, -1), self.atoms.T).movedim(-1, 1)

    def decode(self, features: Tensor) -> Tensor:
        """Return the reconstruction (N, C, ...) of maps from features (N, F, ...)."""
        return self.combine(features) + self.bias.view(-1, *[1] * (features.ndim - 2))


def non_negative_least_squares(target: Tensor, gram: Tensor, step: Tensor) -> Tensor:
    """Return the f >= 0 with the smallest ``|x - f A|`` by accelerated projected gradient descent.

    Parameters
    ----------
    target : Tensor
        (..., F) ``x A^T``.
    gram : Tensor
        (F, F) ``A A^T``.
    step : Tensor
        1 / its largest eigenvalue.

    References
    ----------
    Beck, Teboulle, A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems, 2009.
    """
    features = point = torch.zeros_like(target)
    momentum = 1.0
    for _ in range(NNLS_STEPS):
        updated = F.relu(point + step * (target - point @ gram))
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = updated + (momentum - 1) / following * (updated - features)
        features, momentum = updated, following
    return features
