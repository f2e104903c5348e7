"""Images before and after a shortcut is inserted or removed: pixels, and the network's answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import convscope
from convscope.diagnosis.causal_tests import MARGIN
from convscope.diagnosis.changed_images import change_images, insert, remove
from convscope.diagnosis.finding import Finding
from convscope.images.decode_worker import thumbnail
from tests.diagnosis.planted import MARK, SIZE, MarkNetwork, context_of, make_images, make_mark

BOX = [1 / SIZE, 1 / SIZE, (1 + MARK) / SIZE, (1 + MARK) / SIZE]


def shortcut(images: list[int], **evidence: object) -> Finding:
    return Finding("shortcut", "", "", tuple(images), (0,), 0.5, (0.4, 0.6), 0.01, evidence)


@pytest.fixture(scope="module")
def planted():
    """Images of three classes; those of the first one carry a mark, which the network takes for the class."""
    labels = np.arange(30) % 3
    mark = make_mark()
    x = make_images(labels, labels == 0, mark)
    return context_of(MarkNetwork(mark, 8.0), x, labels), x, labels


def test_a_mark_that_is_inserted_and_removed_turns_answers(planted) -> None:
    context, x, labels = planted
    carriers = np.flatnonzero((labels == 0) & (context.observations.predictions == 0)).tolist()
    other = Finding("slice", "", "", (0,), (0,), 0.1, (0, 0.2), 0.01)
    changed = change_images(context, [other, shortcut(carriers, feature="patch", boxes=[BOX] * len(carriers))])
    assert changed.finding.tolist() == [2] * 8
    assert changed.inserted.tolist() == [True] * 4 + [False] * 4
    inserted, removed = changed.image[:4], changed.image[4:]
    assert set(labels[inserted]) <= {1, 2}
    assert removed.tolist() == carriers[:4]
    assert (changed.prediction_before[:4] == context.observations.predictions[inserted]).all()
    assert (changed.prediction_after[:4] == 0).all()
    expected = [thumbnail(image.permute(1, 2, 0).numpy()) for image in x[changed.image]]
    np.testing.assert_array_equal(changed.before, expected)
    probabilities = convscope.predict(context.model, x[changed.image], top=1, progress=False)
    np.testing.assert_allclose(changed.confidence_before, probabilities.probabilities[:, 0], atol=1e-5)
    assert (changed.prediction_before[4:] == 0).all()
    assert (changed.confidence_after[4:] < changed.confidence_before[4:]).all()


def test_only_the_box_with_its_margin_changes(planted) -> None:
    _, x, labels = planted
    finding = shortcut([0, 3], feature="patch", boxes=[BOX, BOX])
    inside, outside = x[[0, 3]], x[labels == 1][:5]
    side = round((1 + 2 * MARGIN) * MARK)
    inserted, removed = insert(finding, [0, 1], inside, outside), remove(finding, [0, 1], inside, outside)
    assert removed is not None
    for n, image in enumerate(inserted):
        torch.testing.assert_close(image[:, :side, :side], inside[n % 2, :, :side, :side])
    for before, after in ((outside, inserted), (inside, removed)):
        is_changed = (before - after).abs().amax((0, 1)) > 1e-4
        assert is_changed[1 : 1 + MARK, 1 : 1 + MARK].all()
        is_changed[:side, :side] = False
        assert not is_changed.any()


def test_frames_are_swapped_and_colors_and_blur_matched(planted) -> None:
    _, x, labels = planted
    inside, outside = x[labels == 0][:4] * 0.5, x[labels == 1][:4]
    frame = shortcut([0], feature="background")
    width = round(SIZE / 6)
    torch.testing.assert_close(insert(frame, [], inside, outside)[..., :width, :], inside[..., :width, :])
    center = (..., slice(width, -width), slice(width, -width))
    torch.testing.assert_close(insert(frame, [], inside, outside)[center], outside[center])
    torch.testing.assert_close(remove(frame, [], inside, outside)[center], inside[center])  # type: ignore[index]
    color = insert(shortcut([0], feature="color"), [], inside, outside)
    middle = [part.mean((2, 3)).median(0).values for part in (color, inside, outside)]
    assert ((middle[0] - middle[1]).abs() < 0.3 * (middle[2] - middle[1]).abs()).all()
    assert remove(shortcut([0], feature="blur"), [], inside, outside) is None
    assert insert(shortcut([0], feature="blur"), [], inside, outside).var() < outside.var()


def test_findings_without_images_of_other_classes_have_no_changes(planted) -> None:
    context, _, labels = planted
    alone = replace(context, observations=replace(context.observations, labels=np.zeros_like(labels)))
    assert len(change_images(alone, [shortcut([0], feature="color")]).image) == 0
    assert len(change_images(context, []).image) == 0
