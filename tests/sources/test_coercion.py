"""A module, a Keras model or a name goes wherever a Model does."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope import objectives
from convscope.sources import api, coercion
from convscope.sources.coercion import as_model


class Tiny(nn.Module):
    """Two convolutions, of which the ReLU runs twice, and a classifier."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(width * 32 * 32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.fc(x.flatten(1))


@pytest.fixture
def net() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loads(monkeypatch) -> list[object]:
    """Record what is loaded, from an empty cache of names: other tests may have loaded one."""
    monkeypatch.setattr(coercion, "_by_name", OrderedDict())
    loaded: list[object] = []
    load = api.load

    def record(source, **options):
        loaded.append(source)
        return load(source, **options)

    monkeypatch.setattr(api, "load", record)
    return loaded


@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
def test_a_bare_module_gives_what_its_model_gives(net, x, tmp_path):
    model = convscope.load(net)
    images = [(255 * np.random.default_rng(0).random((40, 40, 3))).astype(np.uint8)] * 2
    assert np.array_equal(convscope.predict(net, x).logits, convscope.predict(model, x).logits)
    maps, expected = (convscope.activations(m, x, "conv2")["conv2"] for m in (net, model))
    assert np.array_equal(maps, expected)
    heatmaps = convscope.heatmaps(net, x)
    assert np.array_equal(heatmaps.values, convscope.heatmaps(model, x).values)
    assert convscope.evaluate(net, x, heatmaps, steps=2)["deletion"].shape == (2, 1)
    assert len(convscope.compare(net, x, methods=["grad-cam", "centred"], metrics=["deletion"]).heatmaps) == 2
    assert convscope.patterns(net, "conv1", [0], steps=1, size=32).images.shape == (1, 32, 32, 3)
    assert convscope.story(net, ["conv1"], units=2, num_displayed=1).chapters[0].layer == "conv1"
    assert convscope.scan(net, images[:1], tmp_path / "store", "conv1", k=1, workers=0).layers == ["conv1", "logits"]
    assert convscope.concepts(net, images, 1, count=2, crops=8, sobol_points=2, only_predicted=False).layer
    atlas = convscope.atlas(
        net, images, grid=1, min_count=1, positions_per_image=8, reducer=lambda v: v[:, :2], size=32, steps=1
    )
    assert atlas.icons.shape[0] >= 1


def test_assumptions_are_warned_of_once(net, x, loads):
    with pytest.warns(convscope.ConvscopeWarning, match=r"Tiny: .*preprocessing.*convscope\.load\(module") as caught:
        convscope.predict(net, x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convscope.predict(net, x)
        convscope.heatmaps(net, x)
    assert len(loads) == 1


def test_a_name_is_loaded_once_and_without_warnings(photos, loads):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = convscope.predict("lite0", photos[0], top=1)
        second = convscope.predict("lite0", photos[0], top=1)
    assert first.names == [["Egyptian cat"]]
    assert first.model is second.model
    assert loads == ["lite0"]


@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
def test_new_weights_and_new_layers_are_seen(net, x, loads):
    before = convscope.predict(net, x, top=1).logits
    with torch.no_grad():
        net.fc.bias += 1
    assert np.allclose(convscope.predict(net, x).logits, before + 1, atol=1e-5)
    assert len(loads) == 1
    net.fc = nn.Linear(4 * 32 * 32, 7)
    assert convscope.predict(net, x).logits.shape == (2, 7)
    net.conv1.padding = (2, 2)
    net.conv2.padding = (0, 0)
    assert as_model(net).layers["conv1"].shape == (4, 34, 34)
    assert len(loads) == 3


@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
def test_the_cache_keeps_no_module_alive():
    net = Tiny()
    as_model(net)
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


def test_few_names_stay_in_memory(monkeypatch):
    monkeypatch.setattr(api, "load", lambda source: convscope.Model(nn.Identity(), source, None, None, None, None))
    for name in "abcd":
        as_model(name)
    assert [name for name, _ in coercion._by_name] == ["c", "d"]
    coercion._by_name.clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
def test_keras_model(loads):
    import keras

    net = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3, name="c"), keras.layers.Flatten()])
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert convscope.activations(net, images, net.get_layer("c")).layers == ["c"]
    convscope.predict(net, images)
    assert len(loads) == 1


@pytest.mark.parametrize("wrong", ["cat.JPG", np.zeros((4, 4, 3)), torch.zeros(1, 3, 4, 4), ["a.png"], None])
def test_swapped_arguments(net, wrong):
    with pytest.raises(convscope.ConvscopeError, match="the model comes first: heatmaps"):
        convscope.heatmaps(wrong, net)


def test_a_module_as_images(lite0, net):
    with pytest.raises(convscope.ConvscopeError, match="images is a Tiny; the model comes first"):
        convscope.predict(lite0, net)


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
def test_layers_as_modules_and_rows(net, x):
    model = convscope.load(net)
    row = model.layers["conv2"]
    expected = convscope.activations(model, x, "conv2")["conv2"]
    for layer in (net.conv2, row, [net.conv2], [row]):
        maps = convscope.activations(net, x, layer)
        assert maps.layers == ["conv2"]
        assert np.array_equal(maps[net.conv2], expected)
        assert np.array_equal(maps[row], expected)
        assert convscope.heatmaps(net, x, layer=layer).layer == "conv2"
    both = convscope.activations(net, x, [net.conv1, row])
    assert both.layers == ["conv1", "conv2"]
    assert convscope.patterns(net, net.conv2, [1], steps=1, size=32).layer == "conv2"
    assert convscope.patterns(net, row, [1], steps=1, size=32).layer == "conv2"
    assert convscope.patterns(net, objectives.channel(row, 1), steps=1, size=32).layer == "conv2"


@pytest.mark.filterwarnings("ignore::convscope.ConvscopeWarning")
def test_objectives_of_modules_are_those_of_their_names(net):
    def objective(first, second):
        contrast = objectives.channel(first, 1) - 2 * objectives.neuron(second, 0)
        return [contrast, objectives.diversity(objectives.channels(second, [0, 1]), first, 2)]

    by_module, by_name = (
        convscope.patterns(net, objective(*layers), steps=2, size=32)
        for layers in ((net.conv1, net.conv2), ("conv1", "conv2"))
    )
    assert by_module.names == by_name.names
    assert by_module.names[0] == "conv1 1 - 2 * conv2 0 at middle"
    assert by_module.layer == by_name.layer == "conv1, conv2"
    np.testing.assert_array_equal(by_module.images, by_name.images)
    with pytest.raises(convscope.ConvscopeError, match="this Conv2d is not a layer of Tiny"):
        convscope.patterns(net, objectives.channel(nn.Conv2d(3, 3, 1), 0), steps=1)
    with pytest.raises(convscope.ConvscopeError, match="relu#2"):
        convscope.patterns(net, objectives.deepdream(net.relu), steps=1)
    with pytest.raises(convscope.ConvscopeError, match=r"layer is 3; expected a name in model\.layers"):
        objectives.channel(3, 1)
    with pytest.raises(convscope.ConvscopeError, match="layer is 5; expected a layer's name or module, an objective"):
        convscope.patterns(net, 5)


class Digits(nn.Sequential):
    """A network that runs on images of any size."""

    def __init__(self) -> None:
        pool = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        super().__init__(*pool, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def test_the_assumed_size_is_that_of_tensors():
    """A network that runs on any size is described for the tensors that it is called with, in whatever order."""
    net, x = Digits(), torch.rand(3, 1, 8, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    with pytest.warns(convscope.ConvscopeWarning, match="assumed: 8 x 8 L, .*, the size of the tensors"):
        predictions = convscope.predict(net, x)
    assert predictions.model.preprocessing.size == (8, 8)
    assert predictions.model.layers["3"].shape == (4, 4, 4)
    assert not predictions.notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for images in (loader, list(x), x[0]):
            assert convscope.heatmaps(net, images).model.preprocessing.size == (8, 8)
        assert convscope.patterns(net, "3", [0], steps=1, size=8).model.preprocessing.size == (224, 224)
        array = np.zeros((8, 8), np.uint8)
        assert "images of 8 x 8 pixels are enlarged to 224 x 224" in convscope.predict(net, array).notes[0]
    model = convscope.load(Digits(), preprocessing={"size": 28, "channels": 1})
    assert convscope.predict(model, x).model.preprocessing.size == (28, 28)


def test_layers_in_a_wrapped_module(net, x):
    model = convscope.load(nn.DataParallel(net))
    assert convscope.heatmaps(model, x, layer=net.conv1).layer == "conv1"


def test_layers_that_do_not_fit(net, x):
    model = convscope.load(net)
    with pytest.raises(convscope.ConvscopeError, match=r"runs 2 times; give one of its calls: relu, relu#2"):
        convscope.heatmaps(model, x, layer=net.relu)
    with pytest.raises(convscope.ConvscopeError, match="this Conv2d is not a layer of Tiny"):
        convscope.heatmaps(model, x, layer=nn.Conv2d(3, 3, 1))
    with pytest.raises(convscope.ConvscopeError, match=r"layer is 3; expected a name in model\.layers"):
        convscope.activations(model, x, [3])
    with pytest.raises(convscope.ConvscopeError, match=r"layer is -1; expected a name in model\.layers"):
        convscope.heatmaps(model, x, layer=-1)
    with pytest.raises(convscope.ConvscopeError, match=r"layer 'conv3' is not in this model; nearest: conv"):
        convscope.activations(model, x, "conv3")
