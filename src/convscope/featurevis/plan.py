"""Settings of a call of `patterns`, and the plan for the network: sizes, forward pass and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.engine.acceleration import accelerate
from convscope.engine.batching import balanced_chunks, batch_size, cache_friendly_batch_size, gradient_bytes
from convscope.engine.capture import LayerOutputs, NetworkForward
from convscope.engine.model import Model
from convscope.engine.text_targets import with_text_logits
from convscope.errors import ConvscopeError, require_int
from convscope.featurevis.defaults import Size
from convscope.featurevis.objective import Forward
from convscope.featurevis.optimizer import Plateau
from convscope.featurevis.recipes import Recipe
from convscope.featurevis.request import PatternRequest, canvas_size, size_checker
from convscope.featurevis.skip_gradient import with_skip_gradient


@dataclass(frozen=True)
class PatternSettings:
    """Checked settings, with the recipe's defaults for what the user left out.

    Attributes
    ----------
    recipe_name : str
    recipe : Recipe
    steps, default_steps : int
        Number of steps, and that of the recipe.
    step_size : float
    views : int
        Random views per step.
    frames : int
        Number of intermediate images to record.
    patience : int or None
        Of the stopping criterion.
    space : {"pixels", "input"}
    seed : int
    memory : int
        Bytes for the intermediate results of a batch.
    """

    recipe_name: str
    recipe: Recipe
    steps: int
    default_steps: int
    step_size: float
    views: int
    frames: int
    patience: int | None
    space: str
    seed: int
    memory: int

    @property
    def plateau(self) -> Plateau | None:
        """The stopping criterion."""
        return None if self.patience is None else Plateau(self.patience)

    @property
    def skip_preprocessing(self) -> bool:
        """Whether images are the network's input as they are."""
        return self.space == "input"


def parse_settings(
    request: PatternRequest,
    model: Model,
    recipe_name: str,
    recipe: Recipe,
    *,
    steps: int | None,
    step_size: float | None,
    views: int | None,
    frames: int,
    patience: int | None,
    space: str,
    seed: int,
    memory: int,
) -> PatternSettings:
    """Return checked settings; raise ConvscopeError."""
    default_steps, default_size = recipe.schedule(request.receptive_field(model), model.preprocessing.image_size)
    num_steps = require_int("steps", default_steps if steps is None else steps, 0)
    num_frames = require_int("frames", frames, 0)
    if views is not None and recipe.views == 0:
        raise ConvscopeError(f"recipe {recipe_name!r} uses no random views; leave out views=")
    return PatternSettings(
        recipe_name=recipe_name,
        recipe=recipe,
        steps=num_steps,
        default_steps=default_steps,
        step_size=default_size if step_size is None else step_size,
        views=recipe.views if views is None else require_int("views", views, 1),
        frames=num_frames,
        patience=None if patience is None else require_int("patience", patience, 1),
        space=space,
        seed=seed,
        memory=memory,
    )


@dataclass(frozen=True)
class PatternPlan:
    """How the network is run.

    Attributes
    ----------
    forward : callable
        The forward pass up to the layers, accelerated if possible.
    receptive_field : int or None
        Of the units, in pixels; None for the whole image.
    size : (int, int)
        Height and width of the images.
    view_sizes : tuple of (int, int)
        Sizes in which the network is shown the images.
    batches : list of sequence of int
        Ranges of objectives.
    max_batch : int
        Largest number of images in a batch.
    """

    forward: Forward
    receptive_field: int | None
    size: Size
    view_sizes: tuple[Size, ...]
    batches: list[Sequence[int]]
    max_batch: int


def make_plan(
    network_forward: NetworkForward[LayerOutputs],
    model: Model,
    request: PatternRequest,
    settings: PatternSettings,
    start_images: Tensor | None,
    size: int | Size | None,
) -> PatternPlan:
    """Return sizes that the network accepts, an accelerated forward pass, and batches that fit into memory.

    Parameters
    ----------
    network_forward : callable
        The forward pass up to the layers.
    model : Model
    request : PatternRequest
    settings : PatternSettings
    start_images : Tensor or None
        Initial images (U, C, H, W).
    size : int or (int, int) or None
        The user's size; start images have their own.

    Raises
    ------
    ConvscopeError
        If the network does not run on the size, or takes fewer images at a time than an objective compares.
    """
    recipe, model_size = settings.recipe, model.preprocessing.image_size
    receptive_field, check = request.receptive_field(model), size_checker(model, network_forward)
    if start_images is not None:
        size = int(start_images.shape[-2]), int(start_images.shape[-1])
    canvas = canvas_size(size, recipe, receptive_field, model, check)
    view_sizes = recipe.view_sizes(receptive_field, model_size, canvas)
    fixed_position = any(objective.fixed_position for objective in request.objectives)
    if fixed_position or any(check(view_size) is not None for view_size in {*view_sizes} - {canvas}):
        view_sizes = (canvas,)
    noise = torch.randn(
        (model.fixed_batch_size or 1, model.preprocessing.channels, *view_sizes[-1]),
        generator=torch.Generator().manual_seed(0),
    )
    forward: Forward = accelerate(network_forward, model.module, noise, gradients=True, enabled=model.can_accelerate)
    if request.texts:
        forward = with_text_logits(forward, model, request.texts)
    if request.needs_logits and recipe.residual_grad_scale != 1:
        forward = with_skip_gradient(forward, recipe.residual_grad_scale)
    max_batch = _max_batch(model, request, settings, canvas, view_sizes)
    _check_fixed_batch(model, request)
    largest = max(objective.num_images for objective in request.objectives)
    batches = balanced_chunks(range(len(request.objectives)), max(1, max_batch // largest))
    return PatternPlan(forward, receptive_field, canvas, view_sizes, batches, max_batch)


def _max_batch(
    model: Model, request: PatternRequest, settings: PatternSettings, canvas: Size, view_sizes: tuple[Size, ...]
) -> int:
    """Return the number of images whose passes fit into memory and cache."""
    layer = request.deepest_layer(model)
    passes = (2 if request.paired else 1) * max(1, settings.views)  # per image and step
    pixels = max(height * width for height, width in (canvas, view_sizes[-1]))
    image_bytes = passes * gradient_bytes(model, layer, pixels)
    # The coarsest views decide: large batches save more time there than they lose with fine views.
    coarsest = min(height * width for height, width in view_sizes)
    cached = cache_friendly_batch_size(model, layer, coarsest, with_gradients=True)
    return batch_size(model, image_bytes, settings.memory, max(1, cached // passes))


def _check_fixed_batch(model: Model, request: PatternRequest) -> None:
    together = max(objective.num_images for objective in request.objectives) * (2 if request.paired else 1)
    if model.fixed_batch_size is not None and together > model.fixed_batch_size:
        raise ConvscopeError(
            f"{together} images have to go through the network together, and {model.name} takes "
            f"{model.fixed_batch_size} at a time"
        )
