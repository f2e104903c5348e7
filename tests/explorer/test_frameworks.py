"""The explorer of networks from elsewhere: a Keras model, and a program exported by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service import compute
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import smooth_image
from tests.oracles.nets import Usual, filled

HOW = {"size": 32, "mean": 0.5, "std": 0.25}


def keras_model() -> convscope.Model:
    """A residual sum and a fused softmax; NHWC inside."""
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
    return convscope.load(keras.Model(inputs, x), preprocessing=HOW)


class Residual(Usual):
    """The usual network with a sum in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.bn1(self.conv1(x))))))
        x = self.relu3(self.bn3(self.conv3(x)) + x)
        return self.fc(self.gap(x).flatten(1))


@pytest.fixture(scope="module", params=["keras", "free batch", "one"])
def model(request, tmp_path_factory):
    if request.param == "keras":
        return keras_model()
    free = request.param == "free batch"
    shapes = ({0: torch.export.Dim("batch")},) if free else None
    program = torch.export.export(filled(Residual()), (torch.rand(2 if free else 1, 3, 32, 32),), dynamic_shapes=shapes)
    file = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(program, file)
    return convscope.load(file, preprocessing=HOW)


@pytest.fixture(scope="module")
def explorer(model):
    made = Explorer({"net": model})
    made.images.add_sample(smooth_image(0), "first.png", "first.png")
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_every_page_of_the_walk_is_there(client, explorer):
    net = explorer.first
    pages = ["/", "/m/net", "/m/net/story", "/m/net/picture/first", "/m/net/class/0", "/api/models/net"]
    pages += [f"/m/net/layer/{row.name}" for row in net.layers] + [f"/m/net/unit/{row.name}/1" for row in net.layers]
    assert {page: client.get(page).status_code for page in pages} == dict.fromkeys(pages, 200)
    assert len(net.layers) >= 5


def test_what_the_pages_say_is_what_the_library_says(client, model):
    base = "/api/models/net/pictures/first"
    known = convscope.predict(model, [smooth_image(0)], top=2)
    said = client.get(f"{base}/predictions?top=2").json()["predictions"]
    assert [row["probability"] for row in said] == pytest.approx(known.probabilities[0].tolist(), rel=1e-5)
    layer = model.layers.last_spatial().name
    for method in ("grad-cam", "layer-cam"):
        heat = client.get(f"{base}/heatmap?target=1&method={method}").json()
        values = convscope.heatmaps(model, [smooth_image(0)], 1, method=method).values[0, 0]
        assert compute.unpack_map(heat["map"]) == pytest.approx(values, abs=float(np.abs(values).max()) / 30000)
    maps = convscope.activations(model, [smooth_image(0)], [layer])[layer][0]
    told = client.get(f"{base}/activations?layer={layer}").json()
    assert told["max"] == pytest.approx(maps.max((1, 2)), rel=1e-3)


def test_work_beside_the_quick_answers_leaves_the_same_network_alone(client, explorer, model):
    """Faithfulness, measures of all layers and patterns run on a twin: modules of its own, the same weights."""
    base = "/api/models/net/pictures/first"
    before = [p.requires_grad for p in model.dialect.parameters(model.module)]
    assert [row["metric"] for row in client.get(f"{base}/faithfulness?target=1").json()["rows"]] == [
        "deletion", "insertion",
    ]  # fmt: skip
    measured = client.get(f"{base}/layers").json()["layers"]
    assert set(measured) == {row.name for row in explorer.first.layers}
    layer = model.layers.last_spatial().name
    with client.stream("GET", f"/api/models/net/pattern/events?layer={layer}&unit=2") as answer:
        text = "".join(answer.iter_text())
    assert "event: done" in text, text[-400:]
    assert "/image/pattern" in client.get(f"/m/net/unit/{layer}/2").text
    assert explorer.first.spare.module is not model.module
    assert [p.requires_grad for p in model.dialect.parameters(model.module)] == before


class Single(Usual):
    """A network that will not be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


def test_a_network_that_cannot_be_copied_says_so():
    made = Explorer({"net": convscope.load(filled(Single()), preprocessing=HOW)})
    made.images.add_sample(smooth_image(0), "first.png", "first.png")
    client = TestClient(create_app(made), base_url="http://localhost")
    for page in ("/m/net", "/m/net/picture/first", "/m/net/layer/relu3", "/m/net/unit/relu3/1"):
        assert client.get(page).status_code == 200
    answer = client.get("/api/models/net/pictures/first/faithfulness?target=1")
    assert answer.status_code == 422
    assert "one of a kind" in answer.json()["error"]
    with client.stream("GET", "/api/models/net/pattern/events?layer=relu3&unit=2") as stream:
        text = "".join(stream.iter_text())
    assert "event: failed" in text
    assert "cannot be copied" in text
    made.close()


def test_the_sum_joins_two_branches(client, explorer):
    rows, edges = (client.get("/api/models/net").json()[key] for key in ("layers", "edges"))
    names = [row["name"] for row in rows]
    into: dict[str, set[str]] = {}
    for start, end in edges:
        into.setdefault(names[end], set()).add(names[start])
    joins = {name: sources for name, sources in into.items() if len(sources) > 1}
    assert joins in ({"sum": {"first", "second"}}, {"relu3": {"bn3", "relu2"}})
