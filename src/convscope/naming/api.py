"""`convscope.name_units`: name the units of a store by words that go with their activations."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convscope.arguments import check_arguments
from convscope.engine.layer_selection import name_of
from convscope.engine.layer_table import Layer
from convscope.errors import ConvscopeError, require_int, require_number
from convscope.naming.assignment import Activations, check_words, choose_words, report_part, split_images
from convscope.naming.compositions import BEAM, find_compositions
from convscope.naming.request import parse_request
from convscope.naming.significance import benjamini_hochberg, p_values
from convscope.naming.word_scores import WordScores
from convscope.progress import Progress, ProgressOption, progress_bar
from convscope.sources.coercion import ModelLike
from convscope.store.store import Store, open_store
from convscope.store.unit_names import UnitNames, described_model, write_names
from convscope.suggestions import suggest

MIN_IMAGES = 20  # of the sample: ten to choose a name, ten to check it
CHOICE_SHARE, CHECK_SHARE, COMPOSITION_SHARE = 0.6, 0.2, 0.2  # of the time


@check_arguments
def name_units(
    store: Store | str | os.PathLike[str],
    words: Sequence[str] | str,
    scores: object = None,
    *,
    judge: ModelLike | None = None,
    template: str | None = None,
    layer: str | Layer | Sequence[str | Layer] | None = None,
    output: str | None = None,
    level: float = 0.01,
    shuffles: int = 1000,
    compositions: bool = False,
    save: bool = True,
    seed: int = 0,
    progress: ProgressOption = None,
) -> UnitNames:
    """Name units by words whose scores on the scanned images agree with the units' activations.

    A scan stores the maximum of every unit on a sample of images. Half of these images, chosen by a hash, serve to
    choose for each unit the word with the highest soft pointwise mutual information with the unit's top images
    (SoftWPMI of CLIP-Dissect). The other half tells how well the word suits the unit: by the area under the ROC curve,
    and by a test against chance, in which units with shuffled images go through the same choice of the best of all
    words. The false discovery rate over the units is controlled by the procedure of Benjamini and Hochberg; units whose
    word is not better than chance stay without a name.

    Parameters
    ----------
    store : Store or path
        A scan, from `convscope.scan` or `convscope.open_store`.
    words : sequence of str, or str
        W words or short descriptions; a text file with one on each line; or one of these: "colors", "textures",
        "imagenet" (its 1,000 classes), "wordnet" (the 21,841 nouns of ImageNet's hierarchy), several of them separated
        by commas; "classes", those of a classifier that is the `judge`; "labels", the classes of the data set that was
        scanned, whose images are scored by their labels.
    scores : array of shape (images, W), optional
        How well each word describes each image: a row for each image of the data set, in the order of
        ``store.image_names``, or for each image of the sample, in the order of ``store.sample_images``. A memory map is
        read in parts.
    judge : Model, nn.Module, Keras model or str, optional
        A network that scores the images instead: one that compares images with text, such as
        ``convscope.load("open_clip:ViT-B-32")``, or a classifier whose classes the words are. It sees the files of the
        images, or their thumbnails where files are missing.
    template : str, optional
        What a `judge` that reads text reads for a word, such as "a photo of a {}"; by default the word itself.
    layer : str, Layer or sequence of these, optional
        Layers whose units are named; all of the store by default.
    output : {"probability", "softmax", "sigmoid"}, optional
        What the scores are: probabilities; logits of words that exclude each other; logits of words that do not. By
        default "probability" if all scores are in [0, 1], else "softmax".
    level : float
        False discovery rate: the fraction of the named units whose names may be chance.
    shuffles : int
        Number of shuffled units.
    compositions : bool
        Also try compositions of two words: "red or orange", "red and striped", "red and not striped". One that suits
        the unit better on the other half of the images becomes the name, and the single word the runner-up.
    save : bool
        Write the names into the store, where they replace earlier ones: into ``names.parquet``.
    seed : int
        Seed of the shuffled units.
    progress : bool or callable, optional
        By default a progress bar appears after 1.5 seconds; True shows it at once, False never. A function is called
        with the work done and the whole work.

    Returns
    -------
    UnitNames
        Names, scores and runners-up of the units, and which names are better than chance.

    Raises
    ------
    ConvscopeError
        For unknown layers, scores that do not fit, and samples of fewer than 20 images.

    References
    ----------
    Oikarinen and Weng, CLIP-Dissect: automatic description of neuron representations in deep vision networks, ICLR
    2023. Bykov et al., Labeling neural representations with inverse recognition, NeurIPS 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import convscope
    >>> images = np.zeros((60, 8, 8, 3), np.uint8)
    >>> color = np.arange(60) % 3
    >>> images[np.arange(60), ..., color] = 255
    >>> _ = convscope.scan("lite0", images, "colors", layers=["conv_stem"], sample=60, workers=0)
    >>> scores = np.eye(3)[color]
    >>> names = convscope.name_units("colors", ["red", "green", "blue"], scores, layer="conv_stem")
    >>> names.names.shape, bool(names.named.any())
    ((32,), True)
    """
    store = store if isinstance(store, Store) else open_store(store)
    layers = _parse_layers(store, layer)
    level = require_number("level", level, above=0, below=1)
    shuffles, seed = require_int("shuffles", shuffles, 1), require_int("seed", seed, 0)
    images = _usable_images(store)
    request = parse_request(store, words, scores, judge, template, output)
    with progress_bar(progress, "name units") as report:
        word_scores = request.score(images, report_part(report, 0, request.share))
        settings = Settings(level, shuffles, compositions, seed, request.source)
        rest = report_part(report, request.share, 1 - request.share)
        names = _name(store, layers, images, word_scores, settings, rest)
        if save:
            write_names(store, names)
    return names


def _parse_layers(store: Store, layer: str | Layer | Sequence[str | Layer] | None) -> list[str]:
    if layer is None:
        return store.layers
    requested = [name_of(item) for item in ([layer] if isinstance(layer, str | Layer) else layer)]
    if not requested:
        raise ConvscopeError("layer is empty; expected layers of the store, or None for all")
    for name in requested:
        if name not in store.unit_counts:
            raise ConvscopeError(f"layer {name!r} is not in this store; {suggest(name, store.layers)}")
    return [name for name in store.layers if name in requested]


def _usable_images(store: Store) -> np.ndarray:
    """Return the positions in the sample of the images that did not fail."""
    rows = store.image_rows(store.sample_images.tolist(), ["image", "failed"])
    images = np.array([i for i, row in enumerate(rows) if row["failed"] is None], np.int64)
    if len(images) < MIN_IMAGES:
        raise ConvscopeError(
            f"the sample of {store.address} has {len(images)} images; names need {MIN_IMAGES} or more: scan with a "
            "larger sample="
        )
    return images


@dataclass(frozen=True)
class Settings:
    """The settings of a call that its result holds."""

    level: float
    shuffles: int
    compositions: bool
    seed: int
    source: str


def _name(
    store: Store,
    layers: list[str],
    images: np.ndarray,
    scores: WordScores,
    settings: Settings,
    report: Progress,
) -> UnitNames:
    """Choose and check words for all units of some layers."""
    first, second = split_images(store.sample_images[images])
    pairs = [(layer, unit) for layer in layers for unit in range(store.unit_counts[layer])]
    rows = np.array([store.row_of_unit(layer, unit) for layer, unit in pairs])
    shuffled = np.random.default_rng(settings.seed).random((settings.shuffles, len(images)), np.float32)
    activations = Activations(store, rows, images, shuffled)
    count = BEAM if settings.compositions else 2
    words, wpmi = choose_words(activations, scores, first, count, report_part(report, 0, CHOICE_SHARE))
    checked = check_words(activations, scores, second, words[:, :2], report_part(report, CHOICE_SHARE, CHECK_SHARE))
    count = len(pairs)
    p = p_values(checked.evidence[:count], checked.evidence[count:])
    p[words[:count, 0] < 0] = 1
    texts = np.array([*scores.words, ""])
    names, runners_up = texts[words[:count, 0]], texts[words[:count, 1]]
    auc, runner_up_auc = checked.auc[:count].T.astype(np.float32).copy()
    if settings.compositions:
        rest = report_part(report, CHOICE_SHARE + CHECK_SHARE, COMPOSITION_SHARE)
        better = find_compositions(activations, scores, (first, second), words, rest)
        composed = np.array(list(better), int)
        runners_up[composed], runner_up_auc[composed] = names[composed], auc[composed]
        auc[composed] = [composition.auc for composition in better.values()]
        bounds = np.full(count, 1.0)
        bounds[composed] = [math.exp(-composition.evidence) for composition in better.values()]
        p = np.minimum(2 * np.minimum(p, bounds), 1)  # of two tests
        replaced = {i: composition.text(scores.words) for i, composition in better.items()}
        names = np.array([replaced.get(i, str(name)) for i, name in enumerate(names)])
    return UnitNames(
        described_model(store),
        layer=np.array([layer for layer, _ in pairs]),
        units=np.array([unit for _, unit in pairs], np.int32),
        names=names,
        scores=auc,
        runner_up=runners_up,
        runner_up_scores=runner_up_auc,
        named=benjamini_hochberg(p, settings.level),
        wpmi=np.where(words[:count, 0] < 0, np.nan, wpmi[:count, 0]).astype(np.float32),
        p_values=p,
        num_words=len(scores.words),
        num_images=len(images),
        level=settings.level,
        vocabulary=hashlib.sha256("\n".join(scores.words).encode()).hexdigest()[:16],
        judge=settings.source,
        seed=settings.seed,
        notes=scores.notes,
    )
