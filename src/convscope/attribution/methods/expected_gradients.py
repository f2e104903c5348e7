"""Expected gradients: integrated gradients averaged over reference images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from convscope import samples as sample_images
from convscope.attribution.context import Extras, MethodContext
from convscope.attribution.methods.gradient import INTERPOLATION, iter_gradients
from convscope.datasets.image_inputs import open_images
from convscope.engine.batching import balanced_chunks
from convscope.errors import ConvscopeError, require_int
from convscope.images.loading import ImageBatchLoader

IMAGES_PER_READ = 16


def expected_gradients(context: MethodContext, *, samples: int = 50, reference: object = None) -> tuple[Tensor, Extras]:
    """Average the gradient at random points between the image and random reference images (signed).

    ::

        M = E_(x', a) sum_c (x_c - x'_c) G_c(x' + a (x - x')),    x' ~ reference,  a ~ U(0, 1)

    There is no single baseline, on which integrated gradients depend. In expectation the map sums to
    ``S(x) - E S(x')`` (completeness).

    Parameters
    ----------
    context : MethodContext
    samples : int
        The number of pairs of a reference image x' and a position a; they are the same for every image.
    reference : images, optional
        In any form that `convscope.heatmaps` takes: a sample of the data that the network is meant for. The sample
        photographs if omitted. They are read once per batch.

    Returns
    -------
    maps : Tensor of shape (B, T, ...)
    extras : dict
        "completeness_error" (B, T): the map's sum minus the score's difference to its mean over the chosen x'.

    Raises
    ------
    ConvscopeError
        If a reference image cannot be read.

    References
    ----------
    Erion et al., Improving performance of deep learning models with axiomatic attribution priors and expected
    gradients, Nature Machine Intelligence 2021.
    """
    x, generator = context.x, context.generator()
    images = _reference_images(context, reference)
    indices = torch.randint(len(images), (samples,), generator=generator)
    positions = torch.rand(samples, generator=generator)
    references = images[indices]

    def points_between(x: Tensor, _: Tensor) -> Iterator[Tensor]:
        return (start + a * (x - start) for start, a in zip(references, positions.tolist(), strict=True))

    maps = x.new_zeros(context.num_targets, len(x), *x.shape[2:], dtype=torch.float32)
    for part, first, gradients in iter_gradients(context, samples, points_between):
        differences = x[part] - references[first : first + gradients.shape[1], None]
        maps[:, part] += (differences * gradients).sum((1, 3)) / samples
    maps = maps.transpose(0, 1)
    rows = torch.arange(len(x), device=x.device)
    difference = context.scores(x, rows) - _mean_scores(context, images, indices)
    return maps, {"completeness_error": maps.flatten(2).sum(2) - difference}


def _reference_images(context: MethodContext, reference: object) -> Tensor:
    """Return the reference images (M, C, ...) as inputs of the network, at the size of the context's images."""
    preprocessing, size = context.model.preprocessing, context.x.shape[2:]
    if reference is None and (len(size) != 2 or preprocessing.channels not in (1, 3)):
        raise ConvscopeError(
            "expected-gradients has no default reference images for networks on this kind of input; give "
            "reference=, a sample of your data"
        )
    loader = ImageBatchLoader(
        sample_images.photographs() if reference is None else open_images(reference), preprocessing
    )
    images = torch.cat([batch.x for batch in loader.batches(IMAGES_PER_READ)])
    if loader.failed:
        raise ConvscopeError(f"a reference image of expected-gradients cannot be used: {loader.failed[0]}")
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode=INTERPOLATION[len(size)], align_corners=False)
    return images.to(context.x)


def _mean_scores(context: MethodContext, images: Tensor, indices: Tensor) -> Tensor:
    """Compute the mean scores (B, T) of reference images, weighted by how often each was chosen."""
    counts = torch.bincount(indices, minlength=len(images))
    weights = (counts / len(indices)).to(images)
    chosen = counts.nonzero()[:, 0].tolist()
    means = []
    for image in range(len(context.x)):
        total = torch.zeros(context.num_targets, device=images.device)
        for chunk in balanced_chunks(chosen, context.forward_batch_size):
            rows = torch.full((len(chunk),), image, device=images.device)
            total += weights[chunk] @ context.scores(images[chunk], rows)
        means.append(total)
    return torch.stack(means)


def check_expected_gradients(*, samples: int, reference: object) -> None:  # noqa: ARG001 - it is read with the batch
    """Validate the options of `expected_gradients`; raise ConvscopeError."""
    require_int("samples", samples)
