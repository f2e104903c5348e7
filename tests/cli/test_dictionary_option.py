"""The option --dictionary: commands compute what Python does with the dictionary attached, and stores keep it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

import convscope
from convscope.cli import app
from convscope.cli.dictionary_options import LayerNetworkOptions
from convscope.explorer.app import create_app
from convscope.explorer.service.networks import Network
from convscope.explorer.service.state import Explorer
from convscope.store.stored_dictionaries import with_stored_dictionaries
from tests.oracles.nets import SmallConvNet, randomized

MODEL = "tests.cli.test_dictionary_option:small"
OTHER = "tests.cli.test_dictionary_option:other"
LAYER, FEATURES = "relu3", "relu3/dictionary"
SETTINGS = '{"size": 32}'


def small() -> torch.nn.Module:
    """What MODEL names: relu2 has 12 units, relu3 10."""
    return randomized(SmallConvNet())


def other() -> torch.nn.Module:
    """A network with the same layers and other weights."""
    return randomized(SmallConvNet(), seed=1)


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--preprocessing", SETTINGS])


def done(*arguments: str | Path | int) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refusal(*arguments: str | Path | int) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, convscope.ConvscopeError)
    return str(result.exception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and dictionaries of two layers of MODEL."""
    root = tmp_path_factory.mktemp("dictionaries")
    (root / "images").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), np.uint8)):
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    network = load()
    for layer in ("relu2", LAYER):
        learned = convscope.dictionary(network, root / "images", layer, features=24, active=4, steps=10)
        learned.save(root / layer)
    return root


def load(name: str = MODEL) -> convscope.Model:
    return convscope.load(name, preprocessing=json.loads(SETTINGS))


def attached(folder: Path, *layers: str) -> convscope.Model:
    network = load()
    for layer in layers:
        network = convscope.load_dictionary(folder / layer).attach(network)
    return network


@pytest.fixture(scope="module")
def store(folder: Path) -> convscope.Store:
    done(
        "scan", MODEL, folder / "images", "--dictionary", folder / LAYER, "--dictionary", folder / "relu2", "--k", 3,
        "--workers", 0, "-o", folder / "store",
    )  # fmt: skip
    return convscope.open_store(folder / "store")


@pytest.mark.parametrize(
    ("arguments", "compute", "name"),
    [
        (("heatmap", "--target", "1"), lambda m, x: convscope.heatmaps(m, x, 1, layer=FEATURES), "values"),
        (("locate", "--target", "1"), lambda m, x: convscope.locate(m, x, 1, layer=FEATURES), "values"),
        (("activations",), lambda m, x: convscope.activations(m, x, FEATURES), "maps"),
        (("explain", "--features", "3"), lambda m, x: convscope.explain(m, x, layer=FEATURES, features=3), "effects"),
        (
            ("effects", "--layer", FEATURES, "--target", "1"),
            lambda m, x: convscope.effects(m, x, FEATURES, targets=1),
            "logits",
        ),
    ],
)
def test_commands_on_images_compute_what_python_does(arguments, compute, name, folder, tmp_path):
    image, (command, *options) = folder / "images" / "0.png", arguments
    done(command, MODEL, image, *options, "--dictionary", folder / LAYER, "-o", tmp_path / "out")
    saved, expected = convscope.open(tmp_path / "out"), compute(attached(folder, LAYER), image)
    values = [getattr(result, name) for result in (saved, expected)]
    pairs = [[v[FEATURES] for v in values]] if name == "maps" else [values]
    for first, second in pairs:
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
        assert np.abs(second).max() > 0
    if hasattr(saved, "layer"):
        assert saved.layer == FEATURES


def test_patch_and_patterns_take_the_layer_of_features(folder, tmp_path):
    images = [folder / "images" / f"{i}.png" for i in range(2)]
    options = ("--dictionary", folder / LAYER, "--layer", FEATURES, "--units", "2,5")
    done("patch", MODEL, *images, *options, "--target", 1, "-o", tmp_path / "patch")
    network = attached(folder, LAYER)
    expected = convscope.patch(network, *images, FEATURES, units=[2, 5], targets=1)
    np.testing.assert_allclose(convscope.open(tmp_path / "patch").effects, expected.effects, rtol=1e-5, atol=1e-6)
    done("patterns", MODEL, *options, "--steps", 2, "--size", 32, "-o", tmp_path / "patterns")
    patterns = convscope.patterns(network, FEATURES, [2, 5], steps=2, size=32)
    np.testing.assert_array_equal(convscope.open(tmp_path / "patterns").images, patterns.images)


def test_layers_lists_the_features(folder):
    lines = done("layers", MODEL, "--dictionary", folder / LAYER).stdout.splitlines()
    assert [line.split("\t")[2] for line in lines if line.startswith(f"{FEATURES}\t")] == ["24 x 16 x 16"]


# --- stores -----------------------------------------------------------------------------------------------------------


def test_scan_records_the_features_and_keeps_the_dictionaries(folder, store, tmp_path):
    assert store.layers == ["relu2/dictionary", "relu3/dictionary", "logits"]
    network = attached(folder, "relu2", LAYER)
    expected = convscope.scan(network, folder / "images", tmp_path / "store", list(store.layers)[:2], k=3, workers=0)
    for layer in store.layers:
        np.testing.assert_array_equal(store.samples(layer), expected.samples(layer))
    assert [entry["layer"] for entry in store.manifest["dictionaries"]] == ["relu2", LAYER]  # in the network's order
    again = with_stored_dictionaries(store, load())
    assert again.weights_hash() == network.weights_hash() == store.manifest["model"]["weights_sha256"]
    assert again.layers.names == network.layers.names


def test_only_the_network_that_was_scanned_gets_the_dictionaries_of_a_store(folder, store):
    for network in (load(OTHER), attached(folder, "relu2"), attached(folder, "relu2", LAYER)):
        assert with_stored_dictionaries(store, network) is network


def test_store_without_dictionaries_has_none(folder, tmp_path):
    plain = convscope.scan(load(), folder / "images", tmp_path / "store", LAYER, workers=0)
    assert "dictionaries" not in plain.manifest
    assert not (tmp_path / "store" / "dictionaries").exists()
    network = load()
    assert with_stored_dictionaries(plain, network) is network
    with pytest.raises(convscope.ConvscopeError, match="with no dictionary; this model has dictionaries of relu2, or"):
        plain.check_weights(attached(folder, "relu2"))


def test_commands_with_a_store_find_its_dictionaries(folder, store, tmp_path):
    image = folder / "images" / "0.png"
    done("effects", MODEL, image, "--layer", FEATURES, "--store", folder / "store", "-o", tmp_path / "effects")
    expected = convscope.effects(attached(folder, LAYER), image, FEATURES)
    np.testing.assert_allclose(convscope.open(tmp_path / "effects").logits, expected.logits, rtol=1e-5, atol=1e-6)
    moved = shutil.copytree(folder / "store", tmp_path / "store")
    done("patterns", MODEL, "--layer", FEATURES, "--units", "2", "--steps", 2, "--size", 32, "-o", moved)
    assert convscope.open_store(moved).unit(FEATURES, 2).pattern() is not None
    message = refusal("explain", MODEL, image, "--dictionary", folder / LAYER, "--store", moved)
    assert f"the store {moved} is of" in message
    assert "with dictionaries of relu2, relu3; this model has dictionaries of relu3" in message


def test_search_by_image_runs_the_features(folder, store, monkeypatch):
    image, network = folder / "images" / "0.png", load()
    monkeypatch.setattr("convscope.cli.search.load_model", lambda *_: network)
    result = CliRunner().invoke(app, ["search", str(folder / "store"), str(image), "--json", "--count", "5"])
    expected = store.search(image, 5, model=attached(folder, "relu2", LAYER))
    assert [(r["layer"], r["unit"]) for r in json.loads(result.stdout)] == [(m.layer, m.unit) for m in expected]


@pytest.mark.parametrize("command", ["publish", "serve"])
def test_the_explorer_gets_the_network_that_was_scanned(command, folder, store, tmp_path, monkeypatch):
    given: list[dict[str, convscope.Model]] = []

    def receive(networks: dict[str, convscope.Model], *_args: object, **_options: object) -> None:
        given.append(networks)
        raise KeyboardInterrupt

    monkeypatch.setattr("convscope.explorer.publish.publish", receive)
    monkeypatch.setattr("convscope.explorer.server.build_app", receive)
    address = folder / "store"
    run(
        *(("publish", address, "-o", tmp_path) if command == "publish" else ("serve", OTHER, MODEL, "--store", address))
    )
    network = given[0][MODEL]
    assert Network("small", network, MODEL, store).store is store
    assert FEATURES in network.layers.names
    explorer = Explorer({"small": network}, store=store)
    explorer.images.add_samples([str(folder / "images" / "0.png")])
    page = TestClient(create_app(explorer), base_url="http://localhost").get("/m/small/image/0").text
    assert f">{FEATURES}</a></li>" in page  # among the links to activation maps
    explorer.close()
    assert all(FEATURES not in other.layers.names for name, other in given[0].items() if name != MODEL)


# --- several networks and dictionaries --------------------------------------------------------------------------------


def test_each_network_gets_its_own_dictionaries(folder):
    options = LayerNetworkOptions(preprocessing=SETTINGS, dictionary=[folder / LAYER])
    networks = options.load_several([OTHER, MODEL])
    assert {name: FEATURES in network.layers.names for name, network in networks.items()} == {OTHER: False, MODEL: True}


def test_the_order_of_dictionaries_does_not_matter(folder):
    hashes = [
        LayerNetworkOptions(preprocessing=SETTINGS, dictionary=[folder / layer for layer in layers])
        .load(MODEL)
        .weights_hash()
        for layers in (["relu2", LAYER], [LAYER, "relu2"])
    ]
    assert hashes[0] == hashes[1] != load().weights_hash()


def test_methods_at_the_input_keep_taking_no_layer(folder, tmp_path):
    image = folder / "images" / "0.png"
    done("heatmap", MODEL, image, "--method", "saliency", "--dictionary", folder / LAYER, "-o", tmp_path / "out")
    assert convscope.open(tmp_path / "out").layer == "input"


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_is_no_dictionary_is_refused_before_a_network_is_loaded(folder, tmp_path, monkeypatch):
    maps = convscope.predict(load(), folder / "images" / "0.png").save(tmp_path / "predictions")
    weights = tmp_path / "weights.safetensors"
    save_file({"W_enc": torch.zeros(3, 3)}, weights)

    def fail(*_args: object, **_options: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(convscope, "load", fail)
    refused = [refusal("layers", MODEL, "--dictionary", path) for path in (tmp_path / "gone", tmp_path, maps, weights)]
    assert refused[0].endswith("gone does not exist; expected a folder written by `convscope dictionary`")
    assert "has no manifest.json; expected a folder" in refused[1]
    assert "holds Predictions; expected a folder written by dictionary.save()" in refused[2]
    assert "is a file; expected a folder" in refused[3]
    assert "convscope.load_dictionary(FILE, layer=LAYER).save(FOLDER)" in refused[3]


def test_dictionary_of_another_network_or_layer_is_refused(folder, tmp_path):
    image, one = folder / "images" / "0.png", folder / LAYER
    message = refusal("heatmap", OTHER, image, "--dictionary", one, "-o", tmp_path / "out")
    assert (
        f"--dictionary {one} was learned on layer relu3 of {MODEL} with other weights than those of {OTHER}" in message
    )
    assert f"convscope dictionary {OTHER} IMAGES --layer relu3" in message
    assert not (tmp_path / "out").exists()
    shutil.copytree(one, tmp_path / "copy")
    message = refusal("layers", MODEL, "--dictionary", one, "--dictionary", tmp_path / "copy")
    assert message == f"--dictionary {one} and {tmp_path / 'copy'} are both of layer relu3; give one of them"
    message = refusal("heatmap", MODEL, image, "--dictionary", one, "--dictionary", folder / "relu2")
    assert message.endswith("say which: relu2/dictionary or relu3/dictionary")
    weights = {"W_enc": torch.rand(7, 9), "b_enc": torch.rand(9), "W_dec": torch.rand(9, 7), "b_dec": torch.rand(7)}
    save_file(weights, tmp_path / "weights.safetensors")
    for layer, reason in (("relu3", "has 10 units; the dictionary is of a layer with 7"), ("relu9", "relu9")):
        foreign = convscope.load_dictionary(tmp_path / "weights.safetensors", layer=layer).save(tmp_path / layer)
        message = refusal("layers", MODEL, "--dictionary", foreign)
        assert message.startswith(f"--dictionary {foreign}: ")
        assert reason in message
