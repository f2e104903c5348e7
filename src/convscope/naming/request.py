"""Parse what units are named by: words and a matrix, a judge, or the labels of the data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convscope.errors import ConvscopeError
from convscope.naming.judges import class_names, score_images, words_of_classes
from convscope.naming.vocabulary import check_words, read_words
from convscope.naming.word_scores import OUTPUTS, WordScores, check_matrix, label_scores, parse_scores
from convscope.progress import Progress
from convscope.sources.coercion import ModelLike, as_model
from convscope.store.tables import StoreTables

LABELS, CLASSES = "labels", "classes"  # in place of words
JUDGE_SHARE = 0.6  # of the time


@dataclass(frozen=True)
class ScoreRequest:
    """What units are named by.

    Attributes
    ----------
    source : str
        Where the scores come from.
    share : float
        The fraction of the time that the scores take.
    score : callable
        ``score(images, report) -> WordScores`` for positions of images in the sample.
    """

    source: str
    share: float
    score: Callable[[np.ndarray, Progress], WordScores]


def parse_request(
    store: StoreTables,
    words: Sequence[str] | str,
    scores: object,
    judge: ModelLike | None,
    template: str | None,
    output: str | None,
) -> ScoreRequest:
    """Check the arguments of `convscope.name_units` that say where scores come from.

    Raises
    ------
    ConvscopeError
        For unknown words, missing scores, and arguments that exclude each other.
    """
    if output not in (None, *OUTPUTS):
        raise ConvscopeError(f"output is {output!r}; expected {', '.join(OUTPUTS)}")
    if scores is not None and judge is not None:
        raise ConvscopeError("scores= and judge= are given; expected one of them")
    if template is not None and (judge is None or template.count("{}") != 1):
        raise ConvscopeError(
            f"template is {template!r}; expected a text with one {{}} for a judge that reads text, such as 'a photo of "
            "a {}'"
        )
    if isinstance(words, str) and words == LABELS:
        return _labels_request(store, scores, judge)
    if judge is not None:
        return _judge_request(store, words, as_model(judge), template, output)
    if isinstance(words, str) and words == CLASSES:
        raise ConvscopeError("words is 'classes', those of a classifier; give it as judge=")
    names = read_words(words) if isinstance(words, str) else check_words(words)
    if scores is None:
        raise ConvscopeError(
            "scores= is missing: how well each word describes each image, (images, words); or judge=, a network that "
            "scores images"
        )
    matrix = check_matrix(names, scores, store)
    return ScoreRequest("scores", 0, lambda images, _: parse_scores(names, matrix, store, images, output))


def _labels_request(store: StoreTables, scores: object, judge: ModelLike | None) -> ScoreRequest:
    if scores is not None or judge is not None:
        raise ConvscopeError("words is 'labels', which have scores of their own; leave out scores= and judge=")
    names, matrix = label_scores(store)
    check_words(names)
    return ScoreRequest(
        "labels of the data set", 0, lambda images, _: parse_scores(names, matrix, store, images, "probability")
    )


def _judge_request(
    store: StoreTables, words: Sequence[str] | str, judge: ModelLike, template: str | None, output: str | None
) -> ScoreRequest:
    network = as_model(judge)
    if output is not None:
        raise ConvscopeError(f"output is {output!r}; it is for scores=, and known of a judge: leave it out")
    reads_text = network.dual_encoder is not None and network.task == "embedding"
    if isinstance(words, str) and words == CLASSES:
        names = class_names(network)
        columns = list(range(len(names)))
    else:
        names = read_words(words) if isinstance(words, str) else check_words(words)
        columns = [] if reads_text else words_of_classes(network, names)
    if template is not None and not reads_text:
        raise ConvscopeError(f"template is for a judge that reads text; {network.name} does not")
    texts = names if template is None else tuple(template.replace("{}", name) for name in names)

    def score(images: np.ndarray, report: Progress) -> WordScores:
        ids = store.sample_images[images]
        part, kind, notes = score_images(network, texts, store, ids, None if reads_text else columns, report)
        matrix = np.full((len(store.sample_images), len(names)), np.nan, np.float32)
        matrix[images] = part
        return replace(parse_scores(names, matrix, store, images, kind), notes=tuple(notes))

    return ScoreRequest(network.name, JUDGE_SHARE, score)
