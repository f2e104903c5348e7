"""What is done about features that are never active: an auxiliary loss, and a new start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convscope.dictionaries.methods.base import Method, Step
from convscope.dictionaries.selection import top_k
from convscope.dictionaries.sparse import ActiveFeatures, decode, select

WINDOW = 256  # a feature is dead if it was inactive for so many times the positions in which a typical one fires once
AUXILIARY_WEIGHT = 1 / 32
AUXILIARY_ROWS = 4  # one row in so many


class DeadFeatures:
    """Count for each feature the positions since it was active.

    Parameters
    ----------
    features : int
        F.
    active : int
        k: a typical feature is active at k of F positions.
    device : torch.device
    """

    def __init__(self, features: int, active: int, device: torch.device) -> None:
        self.limit = WINDOW * features // active
        self.idle = torch.zeros(features, dtype=torch.long, device=device)

    def update(self, step: Step, positions: int) -> None:
        """Add a batch."""
        self.idle += positions
        self.idle[step.fired > 0] = 0

    @property
    def indices(self) -> Tensor:
        """The dead features."""
        return (self.idle >= self.limit).nonzero()[:, 0]


def auxiliary_loss(method: Method, x: Tensor, step: Step, dead: Tensor) -> Tensor:
    """Return the loss of what the dead features make of the residual.

    ::

        e = x - x';   loss = 1/32 * mean |e - e'|^2

    where e' is decoded from the C / 2 dead features with the largest z, on a quarter of the batch.

    Parameters
    ----------
    method : Method
    x : Tensor
        (B, C).
    step : Step
        The step on `x`, with scores.
    dead : Tensor
        (d,) the dead features.

    References
    ----------
    Gao et al., Scaling and evaluating sparse autoencoders, 2024, appendix A.2.
    """
    assert step.scores is not None
    p, count = method.parameters, max(1, len(x) // AUXILIARY_ROWS)
    centred = x[:count] - p["bias"].detach()
    residual = x[:count] - step.reconstruction[:count]
    values, columns = top_k(step.scores[:count, dead], min(len(dead), max(1, x.shape[1] // 2)))
    active = ActiveFeatures.of_rows(dead[columns], len(method.atoms))
    features = select(values.flatten(), p["encoder"], p["encoder_bias"], centred, active).relu()
    return AUXILIARY_WEIGHT * (residual - decode(features, method.atoms, active)).square().sum(1).mean()


def restart(
    method: Method,
    dead: Tensor,
    x: Tensor,
    step: Step,
    state: Mapping[Tensor, Mapping[str, Tensor]],
    generator: torch.Generator,
) -> None:
    """Point dead features at what is reconstructed worst, and forget their moments.

    Positions are chosen with probabilities proportional to their squared errors.

    Parameters
    ----------
    method : Method
    dead : Tensor
        (d,).
    x : Tensor
        (B, C).
    step : Step
        The step on `x`.
    state : mapping
        The optimizer's state of each parameter.
    generator : torch.Generator
        On the CPU.

    References
    ----------
    Bricken et al., Towards Monosemanticity, 2023, "Neuron resampling".
    """
    residual = x - step.reconstruction
    errors = residual.square().sum(1).cpu()
    if not len(dead) or not bool((errors > 0).any()):
        return
    chosen = torch.multinomial(errors, len(dead), replacement=len(dead) > int((errors > 0).sum()), generator=generator)
    directions = residual[chosen.to(x.device)]
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    method.restart(dead, directions)
    for parameter in method.parameters.values():
        if len(parameter) == len(method.atoms):
            for moment in state.get(parameter, {}).values():
                if moment.ndim:
                    moment[dead] = 0
