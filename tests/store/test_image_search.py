"""Search by an example image: ranks are those of the scan itself, and planted units come first."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import convscope
from convscope.cli.app import app
from convscope.errors import ConvscopeError
from convscope.store.image_search import rank_among
from tests.oracles.nets import SmallConvNet, randomized


def test_rank_among_by_hand():
    sample = np.array([[1.0, 2.0, 3.0, np.nan], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 6.0]], np.float32)
    relevance, distance = rank_among(np.array([3.0, 6.0, -1.0], np.float32), sample)
    np.testing.assert_allclose(relevance, [2.5 / 3, 1, 0])
    np.testing.assert_allclose(distance, [1 / np.sqrt(2 / 3), 0, -2.5 / np.sqrt(6.75)])


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    net = randomized(SmallConvNet())
    model = convscope.load(net, preprocessing={"size": 16}, classes=["a", "b", "c", "d", "e"])
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("search") / "store"
    return model, images, convscope.scan(model, images, folder, ["relu2", "logits"], sample=40, workers=0)


def test_relevance_is_the_rank_of_the_image_in_the_scan(scanned):
    model, images, store = scanned
    matches = store.search(images[7], n=1000, model=model)
    assert len(matches) == 12 + 5
    for match in matches:
        values = store.samples(match.layer)[match.unit]
        own = values[store.sample_images.tolist().index(7)]
        rank = (np.sum(values < own) + 0.5 * np.sum(values == own)) / 40
        assert match.relevance == pytest.approx(rank, abs=1 / 40)  # a fused scan rounds otherwise
        assert match.name == (store.classes[match.unit] if match.layer == "logits" else "")
    relevance = [match.relevance for match in matches]
    assert relevance == sorted(relevance, reverse=True)
    assert [m[:2] for m in store.search(images[7], n=3, model=model)] == [m[:2] for m in matches[:3]]


def test_an_image_file_on_the_command_line(tmp_path):
    images = np.zeros((20, 32, 32, 3), np.uint8)
    images[:10, ..., 0] = 255
    images[10:, ..., 2] = 255
    store = convscope.scan("lite0", images, tmp_path / "store", layers=["conv_stem"], sample=20, workers=0)
    Image.fromarray(images[0]).save(tmp_path / "red.png")
    result = CliRunner().invoke(app, ["search", str(tmp_path / "store"), str(tmp_path / "red.png"), "-n", "2"])
    assert result.exit_code == 0, result.output
    best = store.search(tmp_path / "red.png", n=1, model=convscope.load("lite0"))[0]
    assert result.output.splitlines()[1].split("\t")[:3] == [best.layer, str(best.unit), best.name]
    red = np.isin(store.sample_images, range(10))
    values = store.samples(best.layer)[best.unit]
    assert values[red].min() > values[~red].max()


def test_refused_searches(scanned):
    model, images, store = scanned
    with pytest.raises(ConvscopeError, match="model= is missing"):
        store.search(images[0])
    with pytest.raises(ConvscopeError, match="expected one example image"):
        store.search(images[:2], model=model)
    other = convscope.load(randomized(SmallConvNet(), seed=1), preprocessing={"size": 16})
    with pytest.raises(ConvscopeError, match="other weights"):
        store.search(images[0], model=other)
