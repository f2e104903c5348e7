"""A tiny network, a scanned store and a published site, shared by the tests of the explorer's pages."""

from __future__ import annotations

import io

import pytest
from PIL import Image

import convscope
from tests.oracles.explorer import data_folder, save_concepts_and_atlas, save_diagnosis, smooth_image, tiny_model

IMAGE_NAMES = ("first.png", "second.png")


def write_png(folder, index: int) -> str:
    """Write a sample image and return its path."""
    path = folder / IMAGE_NAMES[index]
    Image.fromarray(smooth_image(index, 240, 360)).save(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny():
    """A model that tests must not change."""
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_store_and_results(tiny, tmp_path_factory):
    """A store of two layers, and the concepts, the atlas and the diagnosis that were saved in it."""
    folder = tmp_path_factory.mktemp("tiny_store")
    data = data_folder(folder / "data")
    store = convscope.scan(tiny, data, folder / "store", layers=["relu1", "relu3"], k=10, workers=0)
    results = save_concepts_and_atlas(tiny, store)
    return store, *results, save_diagnosis(tiny, store, data)


@pytest.fixture(scope="session")
def tiny_store(tiny_store_and_results):
    """A store of two layers, with concepts and an atlas."""
    return tiny_store_and_results[0]


@pytest.fixture(scope="session")
def tiny_concepts(tiny_store_and_results):
    """Concepts of class 1 at relu3, as saved in the store."""
    return tiny_store_and_results[1]


@pytest.fixture(scope="session")
def tiny_atlas(tiny_store_and_results):
    """The atlas of relu3, as saved in the store."""
    return tiny_store_and_results[2]


@pytest.fixture(scope="session")
def tiny_diagnosis(tiny_store_and_results):
    """The diagnosis at relu3, as saved in the store."""
    return tiny_store_and_results[3]


@pytest.fixture(scope="session")
def tiny_cache(tiny, tmp_path_factory):
    """A folder with one generated pattern, of unit 2 of relu3."""
    from convscope.explorer.service.patterns import PatternCache, PatternSpec
    from convscope.explorer.service.state import Explorer

    folder = tmp_path_factory.mktemp("tiny_cache")
    patterns = convscope.patterns(tiny, "relu3", [2], steps=2)
    buffer = io.BytesIO()
    Image.fromarray(patterns.images[0]).save(buffer, "PNG")
    height, width = patterns.images.shape[1:3]
    pattern = {"image": buffer.getvalue(), "height": height, "width": width, "score": 1.5, "steps": 2}
    pattern |= {"noise_score": 0.25, "reference_score": None, "notes": ["a note on the pattern"]}
    explorer = Explorer({"tiny": tiny})
    PatternCache(folder).put(explorer.first.version, PatternSpec("relu3", 2), pattern)
    explorer.close()
    return folder


@pytest.fixture(scope="session")
def tiny_site(tiny, tiny_store, tiny_cache, tmp_path_factory):
    """The folder of the published pages of the store, with two images."""
    from convscope.explorer.publish import publish

    folder = tmp_path_factory.mktemp("tiny_site")
    images = [write_png(folder, index) for index in (0, 1)]
    settings = {"images": images, "cache_dir": tiny_cache, "workers": 0}
    assert publish({"tiny": tiny}, tiny_store, folder / "site", **settings) == []
    return folder / "site"
