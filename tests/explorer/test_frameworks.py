"""The explorer with Keras models, with programs exported by torch, and with modules that cannot be copied."""

from __future__ import annotations

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.explorer.helpers import assert_packed, read_events
from tests.oracles.explorer import smooth_image
from tests.oracles.nets import SmallConvNet, randomized

PREPROCESSING = {"size": 32, "mean": 0.5, "std": 0.25}
IMAGE_API = "/api/models/net/images/first"


def keras_model() -> convscope.Model:
    """Return a channels-last model with a residual connection and a fused softmax."""
    keras = pytest.importorskip("keras", reason="the extra keras is not installed")
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="first")(x)
    y = keras.layers.Conv2D(8, 3, padding="same", name="second")(x)
    x = keras.layers.Add(name="sum")([x, y])
    x = keras.layers.MaxPooling2D(name="pool")(x)
    x = keras.layers.Conv2D(10, 3, activation="relu", name="third")(x)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    x = keras.layers.Dense(4, activation="softmax", name="classes")(x)
    return convscope.load(keras.Model(inputs, x), preprocessing=PREPROCESSING)


class Residual(SmallConvNet):
    """The usual network with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.bn1(self.conv1(x))))))
        x = self.relu3(self.bn3(self.conv3(x)) + x)
        return self.fc(self.gap(x).flatten(1))


def exported_program(file, any_batch_size: bool) -> convscope.Model:
    """Export a network with torch, and load it."""
    shapes = ({0: torch.export.Dim("batch")},) if any_batch_size else None
    example = torch.rand(2 if any_batch_size else 1, 3, 32, 32)
    torch.export.save(torch.export.export(randomized(Residual()), (example,), dynamic_shapes=shapes), file)
    return convscope.load(file, preprocessing=PREPROCESSING)


@pytest.fixture(
    scope="module", params=[pytest.param("keras", marks=pytest.mark.slow), "any batch size", "batch size 1"]
)
def model(request, tmp_path_factory):
    if request.param == "keras":
        return keras_model()
    return exported_program(tmp_path_factory.mktemp("program") / "net.pt2", request.param == "any batch size")


@pytest.fixture(scope="module")
def explorer(model):
    explorer = Explorer({"net": model})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    yield explorer
    explorer.close()


@pytest.fixture(scope="module")
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_all_pages_work(client, explorer):
    layers = [layer.name for layer in explorer.first.layers]
    pages = ["/", "/m/net", "/m/net/story", "/m/net/image/first", "/m/net/class/0", "/api/models/net"]
    pages += [f"/m/net/layer/{name}" for name in layers] + [f"/m/net/unit/{name}/1" for name in layers]
    assert {page: client.get(page).status_code for page in pages} == dict.fromkeys(pages, 200)
    assert len(layers) >= 5


def test_pages_agree_with_the_library(client, model):
    expected = convscope.predict(model, [smooth_image(0)], top=2)
    rows = client.get(f"{IMAGE_API}/predictions?top=2").json()["predictions"]
    assert [row["probability"] for row in rows] == pytest.approx(expected.probabilities[0].tolist(), rel=1e-5)
    for method in ("grad-cam", "layer-cam"):
        record = client.get(f"{IMAGE_API}/heatmap?target=1&method={method}").json()
        assert_packed(record["map"], convscope.heatmaps(model, [smooth_image(0)], 1, method=method).values[0, 0])
    layer = model.layers.last_spatial().name
    maps = convscope.activations(model, [smooth_image(0)], [layer])[layer][0]
    record = client.get(f"{IMAGE_API}/activations?layer={layer}").json()
    assert record["max"] == pytest.approx(maps.max((1, 2)), rel=1e-3)


def test_background_jobs_leave_the_model_unchanged(client, explorer, model):
    flags = [weight.requires_grad for weight in model.adapter.parameters(model.module)]
    rows = client.get(f"{IMAGE_API}/faithfulness?target=1").json()["rows"]
    assert [row["metric"] for row in rows] == ["deletion", "insertion"]
    summaries = client.get(f"{IMAGE_API}/layers").json()["layers"]
    assert set(summaries) == {layer.name for layer in explorer.first.layers}
    layer = model.layers.last_spatial().name
    events = read_events(client, f"/api/models/net/pattern/events?layer={layer}&unit=2")
    assert events[-1][0] == "done", events[-1]
    assert "/image/pattern" in client.get(f"/m/net/unit/{layer}/2").text
    assert explorer.first.background_model.module is not model.module
    assert [weight.requires_grad for weight in model.adapter.parameters(model.module)] == flags


def test_edges_of_a_residual_sum_join_two_branches(client):
    record = client.get("/api/models/net").json()
    names = [layer["name"] for layer in record["layers"]]
    inputs: dict[str, set[str]] = {}
    for start, end in record["edges"]:
        inputs.setdefault(names[end], set()).add(names[start])
    joins = {name: sources for name, sources in inputs.items() if len(sources) > 1}
    assert joins in ({"sum": {"first", "second"}}, {"relu3": {"bn3", "relu2"}})


class Uncopyable(SmallConvNet):
    """A network that cannot be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


def test_models_that_cannot_be_copied_are_shown_without_background_jobs():
    explorer = Explorer({"net": convscope.load(randomized(Uncopyable()), preprocessing=PREPROCESSING)})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    client = TestClient(create_app(explorer), base_url="http://localhost")
    for page in ("/m/net", "/m/net/image/first", "/m/net/layer/relu3", "/m/net/unit/relu3/1"):
        assert client.get(page).status_code == 200
    response = client.get(f"{IMAGE_API}/faithfulness?target=1")
    assert response.status_code == 422
    assert "one of a kind" in response.json()["error"]
    name, data = read_events(client, "/api/models/net/pattern/events?layer=relu3&unit=2")[-1]
    assert name == "failed"
    assert "cannot be copied" in data
    explorer.close()
