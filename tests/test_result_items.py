"""Length, indexing and iteration of results."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convscope
from convscope import ConvscopeError

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    return convscope.load(net, preprocessing={"size": 16}, classes=list("abcde"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{name}.png" for name in ("cat", "dog", "fox")]
    for path in paths:
        Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return list(map(str, paths))


def test_each_image_is_a_result(model, images):
    for result in (
        convscope.predict(model, images, 2),
        convscope.activations(model, images, ["0", "1"]),
        convscope.heatmaps(model, images, ["a", "c", "b"], method="integrated-gradients", steps=2),
        convscope.evaluate(model, images, convscope.heatmaps(model, images)),
    ):
        assert len(result) == 3 == len(list(result))
        singles = list(result)
        for n, single in enumerate(singles):
            assert type(single) is type(result)
            assert single.image_names == (images[n],)
            for name, array in result.arrays().items():
                np.testing.assert_array_equal(single.arrays()[name], array[n : n + 1])
        assert result[-1].image_names == (images[2],)
        assert result[1:].image_names == tuple(images[1:])
        assert result[[2, 0]].image_names == (images[2], images[0])
        assert result.select("dog.png").image_names == (images[1],)
        with pytest.raises(IndexError):
            result[3]


def test_figures_and_overlays_of_single_images(model, images):
    heatmaps = convscope.heatmaps(model, images, ["a", "c", "b"])
    assert heatmaps["fox.png"].names == [["b"]]
    for one, expected in zip(heatmaps, heatmaps.overlay(), strict=True):
        assert one.figure().axes
        np.testing.assert_array_equal(np.asarray(one.overlay()[0]), np.asarray(expected))


def test_names(model, images):
    predictions = convscope.predict(model, images)
    assert predictions["dog.png"].image_names == (images[1],)
    assert predictions[images[1]].image_names == (images[1],)
    with pytest.raises(ConvscopeError, match=r"'dig.png' is not in this result; nearest: .*dog.png"):
        predictions["dig.png"]
    folder = images[1].rpartition("/")[0].rpartition("/")[2]
    for name in ("dog", f"{folder}/dog.png"):
        assert predictions[name].image_names == (images[1],)
    with pytest.raises(ConvscopeError, match=r"'do' is not in this result; known: .*cat.png"):
        predictions["do"]
    twice = convscope.predict(model, [images[0], images[0]])
    with pytest.raises(ConvscopeError, match=r"'cat' is the name of 2 items .*more of the path"):
        twice["cat"]
    with pytest.raises(ConvscopeError, match=r"'cat.png' is the name of 2 items"):
        twice["cat.png"]


def test_activations_and_evaluations_are_mappings_too(model, images):
    activations = convscope.activations(model, images, ["0", "1"])
    assert activations["1"].shape == (3, 4, 14, 14)
    np.testing.assert_array_equal(activations[1]["1"], activations["1"][1:2])
    assert activations._ipython_key_completions_() == ["0", "1"]
    with pytest.raises(ConvscopeError, match="layer '3' was not computed; there are 0, 1"):
        activations["3"]
    evaluation = convscope.evaluate(model, images, convscope.heatmaps(model, images))
    assert evaluation["deletion"].shape == (3, 1)
    assert evaluation[0].mean("deletion") == evaluation["deletion"][0, 0]


def test_selected_heatmaps_are_evaluated_on_their_images(model, images):
    for options in ({}, {"against": ["b", "a", "c"]}, {"targets": [["a", "c"], ["b", "d"], ["e", "a"]]}):
        heatmaps = convscope.heatmaps(model, images, **options)
        expected = convscope.evaluate(model, images, heatmaps, metrics=("deletion", "max-sensitivity"))
        for n in (1, 2):
            evaluation = convscope.evaluate(model, images[n], heatmaps[n], metrics=("deletion", "max-sensitivity"))
            np.testing.assert_allclose(evaluation["deletion"][0], expected["deletion"][n], rtol=1e-4)
            assert evaluation["max-sensitivity"].shape == expected["max-sensitivity"][:1].shape
    with pytest.raises(ConvscopeError, match="is not in this selection"):
        convscope.evaluate(model, images, heatmaps[0])
    with pytest.raises(ConvscopeError, match="expected the same ones"):
        convscope.evaluate(model, images[0], heatmaps[1])


def test_one_image_has_no_interval(model, images):
    evaluation = convscope.evaluate(model, images, convscope.heatmaps(model, images))
    assert np.isfinite(evaluation.interval("deletion")).all()
    assert np.isnan(evaluation[0].interval("deletion")).all()
    assert evaluation[0].rows()[0]["low"] is None
    assert " - " in str(evaluation[0]).splitlines()[2]


def test_comparisons(model, images):
    comparison = convscope.compare(model, images, methods=["grad-cam", "random"])
    second = comparison[1]
    assert [h.image_names for h in second.heatmaps] == [(images[1],)] * 2
    expected = [e["deletion"][1, 0] for e in comparison.evaluations]
    assert [row["deletion"] for row in second.rows()] == pytest.approx(expected)
    assert second.figure().axes


def test_patterns_are_indexed_by_unit(model):
    patterns = convscope.patterns(model, "logits", steps=2, recipe="plain", size=16, frames=1)
    noted = dataclasses.replace(patterns, notes=("class 1 (b) is odd", "class 2 (c) is odd", "all of them are small"))
    assert (len(noted), noted["b"].units.tolist()) == (5, [1])
    assert noted["b"].notes == ("class 1 (b) is odd", "all of them are small")
    for k, one in enumerate(noted):
        assert one.names == ["abcde"[k]]
        np.testing.assert_array_equal(one.images[0], patterns.images[k])
        np.testing.assert_array_equal(one.history[:, 0], patterns.history[:, k])
        np.testing.assert_array_equal(one.frames[:, 0], patterns.frames[:, k])
    units = dataclasses.replace(convscope.patterns(model, "0", [1, 3], steps=1, size=16), notes=("unit 1 looks dead",))
    assert units[1].notes == ()
    assert units[0].notes == units.notes


def test_stories_are_indexed_by_layer(model):
    story = convscope.story(model, ["0", "1"], units=2, num_displayed=1)
    assert [s.chapters[0].layer for s in story] == ["0", "1"]
    assert story["1"].table() == story.table()[1:]


def test_status_of_patterns(model):
    patterns = convscope.patterns(model, "0", [0, 1, 2, 3], steps=2, size=16)
    marked = dataclasses.replace(
        patterns,
        scores=np.array([0, 0, 0.5, 2], np.float32),
        noise_scores=np.array([0, 0, 1, 1], np.float32),
        history=np.array([[0, 0, 1, 1], [0, 3, 1, 1]], np.float32),
    )
    assert marked.status == ("dead", "stuck", "not above noise", "")
    assert [row["status"] for row in marked.rows()] == list(marked.status)
    assert marked.text_files()["units.csv"].splitlines()[1] == "0,0 0,0.0,0.0,dead"
    assert dataclasses.replace(marked, noise_scores=None).status == ("dead", "", "", "")
    referred = dataclasses.replace(patterns, reference_scores=np.array([-1, 0, 2, 4], np.float32))
    ratios = [line.split(",")[-2] for line in referred.text_files()["units.csv"].splitlines()[1:]]
    assert ratios[:2] == ["", ""]
    assert float(ratios[3]) == pytest.approx(patterns.scores[3] / 4)


def test_overlays_that_show_nothing_are_noted(model):
    """A spot that is lost when the map is resized to a small image, and one that remains."""
    from convscope.attribution.api import quality_notes
    from convscope.images.geometry import Geometry

    maps = torch.full((2, 1, 9, 9), -1.0)
    maps[0, 0, 0, 1] = 0.25  # between the positions that a 3 x 3 image shows
    maps[1, 0, 4, 4] = 0.25  # the centre of the image
    small, large = Geometry.whole((3, 3)), Geometry.whole((900, 900))
    names, images, reasons = [["a"], ["b"]], ["x", "y"], [[""], [""]]
    assert [note[:4] for note in quality_notes(maps, reasons, names, images, "0", [small, small])] == ["x, a"]
    assert quality_notes(maps, reasons, names, images, "0", [large, large]) == []
    dots = torch.zeros((1, 1, 200, 200))
    dots[0, 0, 7, 7] = 1  # at the input the maximum is a quantile, which leaves a single pixel out
    (note,) = quality_notes(dots, [[""]], [["a"]], ["x"], "input", [Geometry.whole((200, 200))])
    assert "no positive evidence is left in the overlay" in note


def test_contrasts_are_in_the_manifest(model, images):
    heatmaps = convscope.heatmaps(model, images, "a", against=["b", "c"])
    assert heatmaps.parameters()["against"] == [["b", "c"]] * 3
    assert convscope.heatmaps(model, images).parameters()["against"] is None
