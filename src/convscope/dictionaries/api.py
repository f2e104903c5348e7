"""`convscope.dictionary`: learn a sparse dictionary of a layer's activations."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from convscope.arguments import check_arguments
from convscope.attribution.targets import parse_labels
from convscope.datasets.image_inputs import open_images
from convscope.dictionaries.attachment import require_layer
from convscope.dictionaries.checkpoint import Checkpoint
from convscope.dictionaries.collection import collect, new_store
from convscope.dictionaries.encoder import FeatureEncoder
from convscope.dictionaries.fidelity import densities, fidelity
from convscope.dictionaries.methods.base import Settings
from convscope.dictionaries.methods.registry import METHODS
from convscope.dictionaries.result import Dictionary
from convscope.dictionaries.training import BATCH, Trained, default_steps, train
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import LayerLike, find_layer
from convscope.engine.layer_table import Layer
from convscope.engine.model import Model
from convscope.errors import ConvscopeError, find_name, require_int, warns_of_failures
from convscope.images.loading import DEFAULT_MAX_PIXELS, ImageBatchLoader
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike, as_model

MANY_DEAD = 0.05  # fraction of the features
POOR_FIT = 0.7  # explained variance


@warns_of_failures
@check_arguments
def dictionary(
    model: ModelLike,
    images: object,
    layer: LayerLike,
    *,
    features: int = 4096,
    method: str = "topk",
    active: int = 32,
    steps: int | None = None,
    seed: int = 0,
    labels: object = None,
    checkpoint: str | os.PathLike[str] | None = None,
    fit: str = "squash",
    memory: int = MEMORY,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: ProgressOption = None,
) -> Dictionary:
    """Learn a sparse dictionary of a layer's activations: more features than units, of which few are active at a time.

    The vector x of a layer's activations at a position is written as a sum of a few of F atoms::

        x ~ b + sum over active i of  f_i a_i,   f_i > 0,  |a_i| = 1

    The network runs once over the images. A tenth of them, at most 64, is held out, and `metrics` are measured there.
    `Dictionary.attach` makes the features a layer of the network.

    Parameters
    ----------
    model : Model, nn.Module, Keras model or str
        From `convscope.load`, or anything that it takes.
    images : path, sequence of paths, PIL images, arrays or tensor
        Any form that `convscope.predict` takes: many images, like those that the network is used on. A data set of
        thousands gives better features than a handful.
    layer : str, Layer or nn.Module
        The layer whose activations the dictionary is of.
    features : int
        Number of features F.
    method : {"topk", "batch-topk", "matryoshka", "jumprelu", "archetypal", "nmf"}
        How features are selected: the `active` largest of each position ("topk"; "archetypal" also keeps atoms near
        the data), the largest of a batch ("batch-topk"; "matryoshka" with features in order of generality), or by a
        learned threshold ("jumprelu"). "nmf" is non-negative matrix factorisation, for up to 512 features of layers
        without negative activations; its features are not sparse.
    active : int
        Features that are active at a position: at each, or on average with "batch-topk", "matryoshka" and "jumprelu".
    steps : int, optional
        Training steps of 1024 positions each; by default 40 passes over the positions, within 400 to 3000 steps.
    seed : int
        Seed of the initial atoms, the order of positions, and the images that are held out.
    labels : int, str or sequence of these, optional
        The right class of each image, for the metric "accuracy_kept".
    checkpoint : path, optional
        A file in which the state of training is saved every 20 seconds. If the run is interrupted, the same call
        resumes there, and its result is that of an uninterrupted run, byte for byte. The file is removed at the end.
    fit : {"squash", "crop", "pad"}
        Show the network the whole image, squashed to its input size or with a gray border that keeps its aspect ratio
        ("pad"), or the crop of its own evaluation.
    memory : int
        Bytes for intermediate results. Activations beyond half of it are written to a temporary file.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        as ``progress(done, total)`` with numbers of images and steps; exceptions raised in it cancel cleanly.

    Returns
    -------
    Dictionary
        `atoms` (F, C) and, among others, `metrics`:

        - "r2": explained variance of the activations of held-out images;
        - "l0": features that are active at a position, on average;
        - "dead": fraction of the features that are active at no training position;
        - "logits_kept": how much of the logits of the top classes is kept when the reconstruction replaces the layer's
          output, between 0 for the layer's mean in its place and 1;
        - "loss_kept", "top1_kept": the same for the probabilities of all classes, by their Kullback-Leibler
          divergence, and the fraction of images whose top class stays the same;
        - "accuracy_kept": how much of the accuracy is kept; with `labels`.

    Raises
    ------
    ConvscopeError
        For an unknown layer or method, arguments out of range, a checkpoint of another run, and when no image can be
        read.

    References
    ----------
    Gao et al., Scaling and evaluating sparse autoencoders, 2024 ("topk").
    Bussmann et al., BatchTopK Sparse Autoencoders, 2024, and Learning Multi-Level Features with Matryoshka Sparse
    Autoencoders, ICML 2025.
    Rajamanoharan et al., Jumping Ahead, 2024 ("jumprelu"). Fel et al., Archetypal SAE, ICML 2025.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> photos = convscope.samples.photographs()
    >>> dictionary = convscope.dictionary(model, photos, "blocks.6", features=64, active=8, steps=5)
    >>> dictionary.atoms.shape
    (64, 320)
    >>> dictionary.encode(model, photos[0]).shape
    (1, 64, 7, 7)
    """
    name = find_name("method", method, list(METHODS))
    count = require_int("features", features, 2)
    k = require_int("active", active) if METHODS[name].is_sparse else count
    settings = Settings(count, k, 0 if steps is None else require_int("steps", steps))
    if k > count:
        raise ConvscopeError(f"active is {active}; expected at most features, {count}")
    model = as_model(model, images)
    selected = find_layer(model, layer)
    require_layer(selected)
    loader = ImageBatchLoader(open_images(images), model.preprocessing, fit=fit, max_pixels=max_pixels)
    seed = require_int("seed", seed, 0)
    right = None if labels is None else parse_labels(model, labels, len(loader))
    saved = None if checkpoint is None else _open_checkpoint(Path(checkpoint), model, selected, name, settings, seed)
    job = _Job(model, selected, loader, name, settings, seed, memory, right, saved)
    with progress_bar(progress, "dictionary") as report:
        return job.run(report)


def _open_checkpoint(path: Path, model: Model, layer: Layer, method: str, settings: Settings, seed: int) -> Checkpoint:
    run = {"layer": layer.name, "method": method, **asdict(settings), "seed": seed, "weights": model.weights_hash()}
    return Checkpoint(path, run)


@dataclass(frozen=True)
class _Job:
    """The checked arguments of a call; see `dictionary`. `settings.steps` is 0 for the default."""

    model: Model
    layer: Layer
    loader: ImageBatchLoader
    method: str
    settings: Settings
    seed: int
    memory: int
    labels: Tensor | None
    checkpoint: Checkpoint | None

    def run(self, report: Progress) -> Dictionary:
        """Collect activations, train and evaluate."""
        model, layer, loader, settings = self.model, self.layer, self.loader, self.settings
        limit = None if settings.steps == 0 else settings.steps * BATCH
        store, per_image = new_store(layer, len(loader), limit, self.memory)
        try:
            planned = settings.steps or default_steps(per_image * len(loader))
            total = len(loader) + planned
            collected = collect(
                model, layer, loader, store, per_image, self.seed, self.memory, lambda done, _: report(done, total)
            )
            settings = replace(settings, steps=planned)
            trained = train(
                store,
                self.method,
                settings,
                self.seed,
                model.device,
                lambda done: report(min(len(loader) + done, total - 1), total),
                self.checkpoint,
            )
            encoder = FeatureEncoder(trained.weights, trained.activation, settings.active).to(model.device)
            density = densities(encoder, store)
            labels = None if self.labels is None else self.labels[collected.validation_indices]
            metrics = fidelity(model, layer, encoder, collected.validation, store.mean(), self.memory, labels)
            report(total, total)
        finally:
            store.close()
        if self.checkpoint:
            self.checkpoint.remove()
        return self._result(trained, settings, metrics, density, collected.num_images)

    def _result(
        self, trained: Trained, settings: Settings, measured: dict[str, float], density: np.ndarray, num_images: int
    ) -> Dictionary:
        dead = float((density == 0).mean())
        metrics = {"r2": measured.pop("r2"), "l0": measured.pop("l0"), "dead": dead, **measured}
        return Dictionary(
            self.model,
            **_arrays(trained),
            layer=self.layer.name,
            method=self.method,
            activation=trained.activation,
            active=settings.active,
            steps=settings.steps,
            seed=self.seed,
            num_images=num_images,
            metrics=metrics,
            density=density,
            history=trained.history,
            notes=(*self.loader.notes, *_notes(metrics, len(self.loader))),
            failed=tuple(self.loader.failed),
        )


def _arrays(trained: Trained) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in trained.weights.tensors().items()}


def _notes(metrics: dict[str, float], num_images: int) -> list[str]:
    """Say what the numbers mean where they are poor, or not measured as they should be."""
    notes = []
    if num_images == 1:
        notes.append("one image only: the metrics are measured on the image of training, and are too good")
    if metrics["dead"] > MANY_DEAD:
        notes.append(
            f"{metrics['dead']:.0%} of the features are dead (active at no training position): give more images, more "
            "steps, or fewer features"
        )
    if metrics["r2"] < POOR_FIT:
        notes.append(
            f"explained variance {metrics['r2']:.0%} on held-out images: the features leave much of the layer out; "
            "give more images, more steps, or a larger active="
        )
    return notes
