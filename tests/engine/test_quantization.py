"""Networks of 8-bit integers: their layers are shown as the numbers that the integers stand for."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import convscope
from convscope import ConvscopeError, Model
from tests.engine.helpers import load_model


class Residual(nn.Module):
    """A sum, a normalisation, and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.relu, self.norm, self.max = nn.ReLU(), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.last, self.pool, self.fc = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x = self.max(self.norm(x + self.b(x)))
        logits: Tensor = self.fc(self.pool(self.last(x)).flatten(1))
        return logits


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    """The network with floats, and quantised."""
    torch.manual_seed(0)
    engines = torch.backends.quantized.supported_engines
    engine = next(name for name in ("fbgemm", "x86", "qnnpack") if name in engines)
    torch.backends.quantized.engine = engine
    net = Residual().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observed = prepare_fx(net, get_default_qconfig_mapping(engine), (images(1),))
        observed(images(4))
        return net, convert_fx(observed)


@pytest.fixture(scope="module")
def model(nets: tuple[nn.Module, nn.Module]) -> Model:
    return load_model(nets[1], 16)


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_layers_and_receptive_fields_are_those_of_floats(nets: tuple[nn.Module, nn.Module], model: Model) -> None:
    plain = load_model(nets[0], 16)
    for name in ("a", "b", "norm", "max", "last"):
        actual, expected = model.layers[name], plain.layers[name]
        assert actual.shape == expected.shape
        assert actual.is_spatial
        assert actual.is_pooling == expected.is_pooling
        assert (actual.receptive_field, actual.stride, actual.origin) == (
            expected.receptive_field,
            expected.stride,
            expected.origin,
        )
    assert any("return integers" in note for note in model.notes)


def test_activations_are_the_dequantised_integers(nets: tuple[nn.Module, nn.Module], model: Model) -> None:
    captured: list[Tensor] = []
    handle = nets[1].get_submodule("last").register_forward_hook(lambda _, __, out: captured.append(out.dequantize()))
    nets[1](images(3))
    handle.remove()
    actual = convscope.activations(model, images(3), "last")["last"]
    np.testing.assert_array_equal(actual, captured[0].numpy())


def test_methods_without_gradients_work_at_layers(nets: tuple[nn.Module, nn.Module], model: Model) -> None:
    """Channel c's weight in Ablation-CAM is the share of the score that is lost without it."""
    heatmaps = convscope.heatmaps(model, images(1), 1, method="ablation-cam")
    assert heatmaps.layer == "last"
    assert "no gradient reaches it" in heatmaps.layer_reason
    maps = convscope.activations(model, images(1), "last")["last"][0]
    module, score = nets[1].get_submodule("last"), float(nets[1](images(1))[0, 1])
    weights = []
    for channel in range(len(maps)):

        def ablate(_: nn.Module, __: object, out: Tensor, channel: int = channel) -> Tensor:
            values = out.dequantize()
            values[:, channel] = 0
            return torch.quantize_per_tensor(values, out.q_scale(), out.q_zero_point(), out.dtype)

        handle = module.register_forward_hook(ablate)
        weights.append((score - float(nets[1](images(1))[0, 1])) / abs(score))
        handle.remove()
    expected = np.tensordot(weights, maps, 1)
    actual = heatmaps.values[0, 0]
    assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.999
    for method in ("score-cam", "eigen-cam"):
        assert np.isfinite(convscope.heatmaps(model, images(2), 1, method=method).values).all()


@pytest.mark.parametrize("method", ["grad-cam", "saliency"])
def test_gradients_are_refused_with_the_reason(model: Model, method: str) -> None:
    with pytest.raises(ConvscopeError, match=r"int8 arithmetic has no gradients.* ablation-cam"):
        convscope.heatmaps(model, images(1), 1, method=method)
