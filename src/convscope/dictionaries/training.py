"""Training of a dictionary on vectors of positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from convscope.dictionaries.checkpoint import Checkpoint
from convscope.dictionaries.dead_features import DeadFeatures, auxiliary_loss, restart
from convscope.dictionaries.encoder import DictionaryWeights
from convscope.dictionaries.methods.base import Method, Settings, Start
from convscope.dictionaries.methods.registry import METHODS
from convscope.dictionaries.positions import PositionStore
from convscope.errors import ConvscopeError

BATCH = 1024  # positions
MIN_STEPS, MAX_STEPS = 400, 3000
EPOCHS = 40  # of default training
LEARNING_RATE = 8e-3  # for encoders whose rows begin with length 1
WARMUP, DECAY = 0.05, 0.5  # fractions of the steps
RESTARTS = (0.15, 0.3, 0.45, 0.6)  # fractions of the steps at which dead features are restarted
MEDIAN_STEPS, MEDIAN_ROWS = 20, 4096


@dataclass(frozen=True)
class Trained:
    """A dictionary after training.

    Attributes
    ----------
    weights : DictionaryWeights
        In the units of the activations.
    activation : str
        How features are computed; see `FeatureEncoder`.
    history : ndarray of shape (steps,), float32
        The explained variance of each batch.
    """

    weights: DictionaryWeights
    activation: str
    history: np.ndarray


def default_steps(positions: int) -> int:
    """Return the number of steps for so many positions."""
    return min(MAX_STEPS, max(MIN_STEPS, math.ceil(EPOCHS * positions / BATCH)))


def geometric_median(vectors: Tensor) -> Tensor:
    """Return the point (C,) with the smallest sum of distances to vectors (n, C), by Weiszfeld's algorithm.

    References
    ----------
    Weiszfeld and Plastria, On the point for which the sum of the distances to n given points is minimum, 2009.
    """
    point = vectors.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights = 1 / (vectors - point).norm(dim=1).clamp_min(1e-8)
        point = (vectors * weights[:, None]).sum(0) / weights.sum()
    return point


def train(
    store: PositionStore,
    method: str,
    settings: Settings,
    seed: int,
    device: torch.device,
    report: Callable[[int], None],
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train a dictionary.

    Vectors are centred on their geometric median and divided by their mean distance from it. Adam minimises the
    method's loss; the learning rate grows for the first steps and falls linearly to 0 in the second half. The batches
    have a generator of their own, so that a run that resumes draws those that it would have drawn.

    Parameters
    ----------
    store : PositionStore
    method : str
        A key of `METHODS`.
    settings : Settings
    seed : int
    device : torch.device
        Where the training runs.
    report : callable
        Called with the number of steps done.
    checkpoint : Checkpoint, optional
        Where the state of training is saved, and read if it was.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = store.read(torch.randperm(store.count, generator=generator)[:MEDIAN_ROWS])
    factory = METHODS[method]
    if not factory.is_centred and bool((sample < 0).any()):
        raise ConvscopeError(
            f"method is {method!r}, and the layer has negative activations; choose a layer after a ReLU, or "
            "method='topk'"
        )
    centre = geometric_median(sample) if factory.is_centred else torch.zeros(sample.shape[1])
    scale = float((sample - centre).norm(dim=1).mean())
    if not scale > 0:
        raise ConvscopeError("the layer's activations are the same at all positions; there is nothing to learn")
    atoms = initial_atoms(settings.features, len(centre), generator).to(device)
    start = Start(atoms, torch.zeros_like(centre, device=device), ((sample - centre) / scale).to(device))
    learner = factory(settings, start)
    loop = _Loop(learner, settings, generator)
    first = loop.restore(checkpoint.load(store)) if checkpoint else 0
    batches = store.batches(min(BATCH, max(store.count, 64)), torch.Generator().manual_seed(seed + 1))
    for n, batch in enumerate(islice(batches, settings.steps)):
        if n < first:
            continue
        loop.step(n, ((batch - centre) / scale).to(device))
        report(n + 1)
        if checkpoint and n + 1 < settings.steps:
            checkpoint.save_if_due(store, partial(loop.state, n + 1))
    return Trained(_rescaled(learner.weights(), centre, scale), learner.activation, loop.history)


def initial_atoms(features: int, channels: int, generator: torch.Generator) -> Tensor:
    """Return random directions (F, C) of length 1."""
    atoms = torch.randn(features, channels, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    return atoms


def _rescaled(weights: DictionaryWeights, centre: Tensor, scale: float) -> DictionaryWeights:
    """Return weights for x of weights for (x - centre) / scale; features scale with x."""
    w = {name: tensor.cpu() for name, tensor in weights.tensors().items()}
    return DictionaryWeights(
        w["atoms"], w["encoder"], scale * w["encoder_bias"], scale * w["bias"] + centre, scale * w["thresholds"]
    )


class _Loop:
    """The state of training between steps."""

    def __init__(self, method: Method, settings: Settings, generator: torch.Generator) -> None:
        self.method, self.settings, self.generator = method, settings, generator
        parameters = method.parameters
        self.optimizer = torch.optim.Adam(list(parameters.values()), lr=LEARNING_RATE, fused=True)
        self.dead = DeadFeatures(settings.features, settings.active, method.atoms.device)
        self.restarts = {int(fraction * settings.steps) for fraction in RESTARTS}
        self.history = np.zeros(settings.steps, np.float32)

    def step(self, n: int, x: Tensor) -> None:
        """Make step `n` on vectors x (B, C), and note the explained variance."""
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * self.method.step_size * _schedule(n, self.settings.steps)
        step = self.method.step(x)
        loss = step.loss
        dead = self.dead.indices
        if len(dead) and step.scores is not None:
            loss = loss + auxiliary_loss(self.method, x, step, dead)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._project_gradients()
        self.optimizer.step()
        self.method.renormalize()
        self.dead.update(step, len(x))
        if n in self.restarts and step.scores is not None:
            restart(self.method, self.dead.indices, x, step, self.optimizer.state, self.generator)
        variance = (x - x.mean(0)).square().sum()
        self.history[n] = 1 - (x - step.reconstruction).square().sum() / variance.clamp_min(1e-12)

    def state(self, done: int) -> dict[str, Tensor]:
        """Return all that the steps that follow depend on, after so many steps."""
        state = {"done": torch.tensor(done), "history": torch.from_numpy(self.history), "idle": self.dead.idle}
        state["generator"] = self.generator.get_state()
        for name, tensor in self._tensors():
            state[name] = tensor
        return state

    def restore(self, state: Mapping[str, Tensor] | None) -> int:
        """Continue from a state; return the number of steps done, 0 without one."""
        if state is None:
            return 0
        self.history[:] = state["history"].numpy()
        self.dead.idle.copy_(state["idle"])
        self.generator.set_state(state["generator"])
        self._fill_moments()
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(state[name])
        return int(state["done"])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, what the method keeps beside them, and their moments, each with a name."""
        yield from ((f"buffer.{name}", tensor) for name, tensor in self.method.buffers.items())
        for name, parameter in self.method.parameters.items():
            yield f"parameter.{name}", parameter.detach()
            for moment, tensor in self.optimizer.state[parameter].items():
                yield f"{moment}.{name}", tensor

    def _fill_moments(self) -> None:
        """Let the optimizer make its moments, by a step of length 0."""
        self.optimizer.param_groups[0]["lr"] = 0.0
        for parameter in self.method.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def _project_gradients(self) -> None:
        """Remove the part of the atoms' gradients that would change their length."""
        atoms = self.method.parameters.get("atoms")
        if atoms is not None and atoms.grad is not None:
            with torch.no_grad():
                atoms.grad -= (atoms.grad * atoms).sum(1, keepdim=True) * atoms


def _schedule(n: int, steps: int) -> float:
    """Return the learning rate of step `n` relative to the highest."""
    warmup, decay = max(1.0, WARMUP * steps), DECAY * steps
    return min(1.0, (n + 1) / warmup, (steps - n) / decay)
