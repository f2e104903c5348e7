"""Functions and TorchScript as models: the same predictions and perturbation maps as the module's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError
from tests.oracles.nets import SmallConvNet, randomized

SIZE = 24
SETTINGS: dict[str, Any] = {"preprocessing": {"size": SIZE}, "task": "classification"}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return randomized(SmallConvNet(inplace=False))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def functions(net: nn.Module) -> dict[str, Any]:
    def on_arrays(images: np.ndarray) -> np.ndarray:
        assert isinstance(images, np.ndarray)
        with torch.no_grad():
            scores: np.ndarray = net(torch.from_numpy(images)).numpy()
        return scores

    return {"arrays": on_arrays, "tensors": lambda images: net(images), "lists": lambda x: on_arrays(x).tolist()}


@pytest.mark.parametrize("kind", ["arrays", "tensors", "lists"])
def test_a_function_equals_the_network_it_calls(kind: str, net: nn.Module, x: Tensor) -> None:
    black_box = convscope.load(functions(net)[kind], **SETTINGS)
    model = convscope.load(net, **SETTINGS)
    np.testing.assert_allclose(
        convscope.predict(black_box, x).logits, convscope.predict(model, x).logits, rtol=1e-4, atol=1e-5
    )
    for method, options in {"occlusion": {}, "rise": {"samples": 30, "tolerance": 0.0}}.items():
        actual, expected = (
            convscope.heatmaps(m, x, [1, 3], method=method, **options).values for m in (black_box, model)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        metrics = ["deletion", "insertion", "road"]
        scores = [convscope.evaluate(m, x, expected, metrics, targets=[1, 3], steps=4) for m in (black_box, model)]
        for metric in metrics:
            np.testing.assert_allclose(scores[0][metric], scores[1][metric], rtol=1e-3, atol=1e-5)


def test_what_needs_layers_or_gradients_is_refused(net: nn.Module, x: Tensor) -> None:
    model = convscope.load(functions(net)["arrays"], **SETTINGS)
    assert len(model.layers) == 0
    for method in ("grad-cam", "saliency", "lrp-epsilon", "score-cam"):
        with pytest.raises(ConvscopeError, match="method='rise' or 'occlusion' work"):
            convscope.heatmaps(model, x, 1, method=method)
    with pytest.raises(ConvscopeError, match="shows no layers"):
        convscope.activations(model, x)
    with pytest.raises(ConvscopeError, match="gradient"):
        convscope.patterns(model, "logits", [0], steps=1)


def test_a_function_goes_wherever_a_model_goes(x: Tensor) -> None:
    def mean_color(images: np.ndarray) -> np.ndarray:
        colors: np.ndarray = images.mean((2, 3))
        return colors

    with pytest.warns(convscope.ConvscopeWarning, match="mean_color"):
        predictions = convscope.predict(mean_color, (x.permute(0, 2, 3, 1) * 255).byte().numpy())
    assert predictions.logits.shape == (2, 3)


# --- TorchScript ---


class Probability(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = randomized(SmallConvNet(classes=1, inplace=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x))


@pytest.mark.parametrize("form", ["script", "trace", "file"])
def test_torchscript_has_the_gradients_of_its_module(form: str, net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    scripted: Any = torch.jit.trace(net, x) if form == "trace" else torch.jit.script(net)
    if form == "file":
        scripted.save(str(tmp_path / "net.pt"))
    model = convscope.load(str(tmp_path / "net.pt") if form == "file" else scripted, **SETTINGS)
    plain = convscope.load(net, **SETTINGS)
    for method in ("saliency", "integrated-gradients", "occlusion"):
        actual, expected = (convscope.heatmaps(m, x, 1, method=method).values for m in (model, plain))
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert any("TorchScript shows no layers" in note for note in model.notes)


def test_a_sigmoid_inside_torchscript(x: Tensor) -> None:
    net = Probability().eval()
    model = convscope.load(torch.jit.script(net), preprocessing={"size": SIZE})
    predictions = convscope.predict(model, x)
    with torch.no_grad():
        p = net(x)[:, 0].numpy()
    expected = np.take_along_axis(np.stack([1 - p, p], 1), predictions.indices, 1)
    np.testing.assert_allclose(predictions.probabilities, expected, rtol=1e-4)


def test_torchscript_that_writes_files_is_not_opened(tmp_path: Path) -> None:
    class Writer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.save(x, "stolen.pt")
            return x.mean((2, 3))

    try:
        torch.jit.script(Writer()).save(str(tmp_path / "net.pt"))
    except (RuntimeError, OSError) as error:
        pytest.skip(f"this version of torch does not script torch.save: {error}")
    with pytest.raises(ConvscopeError, match="its code calls"):
        convscope.load(str(tmp_path / "net.pt"))


# --- formats that are not opened ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.tflite", "TensorFlow Lite"),
        ("m.engine", "TensorRT"),
        ("m.pkl", "pickle"),
    ],
)
def test_files_of_other_formats_are_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\x07")
    with pytest.raises(ConvscopeError, match=message):
        convscope.load(str(tmp_path / name))


def test_a_saved_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ConvscopeError, match=r"SavedModel; save the model as \.keras"):
        convscope.load(str(tmp_path))


def test_an_exported_program_in_hand(net: nn.Module, x: Tensor) -> None:
    program = torch.export.export(net, (x[:1],))
    model = convscope.load(program, **SETTINGS)
    assert "conv2" in model.layers
    expected = convscope.predict(convscope.load(net, **SETTINGS), x).logits
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-6)
