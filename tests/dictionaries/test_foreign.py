"""Dictionaries of other packages give the features that their own formula gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convscope
from convscope import ConvscopeError
from tests.dictionaries.conftest import LAYER


@pytest.fixture
def plain() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (10, 20), "b_enc": (20,), "W_dec": (20, 10), "b_dec": (10,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def vectors(model, x):
    return np.moveaxis(convscope.activations(model, x, LAYER)[LAYER], 1, -1)


def test_a_plain_file_with_thresholds(model, x, plain, tmp_path):
    plain["threshold"] = torch.rand(20, generator=torch.Generator().manual_seed(1))
    save_file(plain, tmp_path / "sae.safetensors")
    loaded = convscope.load_dictionary(tmp_path / "sae.safetensors", layer=LAYER)
    p = {name: tensor.numpy() for name, tensor in plain.items()}
    z = (vectors(model, x) - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = np.where(z > p["threshold"], z, 0)
    features = np.moveaxis(loaded.encode(model, x), 1, -1)
    np.testing.assert_allclose(features, f * np.linalg.norm(p["W_dec"], axis=1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features @ loaded.atoms + loaded.bias, f @ p["W_dec"] + p["b_dec"], rtol=1e-3, atol=1e-3)
    attached = loaded.attach(model)
    np.testing.assert_array_equal(convscope.predict(attached, x).logits, convscope.predict(model, x).logits)
    assert "not measured" in str(loaded)
    assert convscope.load_dictionary(loaded.save(tmp_path / "again")).layer == LAYER


def test_a_state_dict_of_overcomplete(model, x, tmp_path):
    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(16, 10, generator=g)
    state = {
        "encoder.final_block.0.weight": torch.randn(16, 10, generator=g),
        "encoder.final_block.0.bias": torch.randn(16, generator=g),
        "dictionary._weights": atoms / atoms.norm(dim=1, keepdim=True),
        "dictionary.multiplier": torch.tensor(0.0),
    }
    torch.save(state, tmp_path / "sae.pt")
    loaded = convscope.load_dictionary(tmp_path / "sae.pt", active=3)
    encoder = state["encoder.final_block.0.weight"].numpy()
    z = vectors(model, x) @ encoder.T + state["encoder.final_block.0.bias"].numpy()
    f = np.where(z >= np.sort(z)[..., -3:-2], z, 0).clip(0)
    np.testing.assert_allclose(np.moveaxis(loaded.encode(model, x, layer=LAYER), 1, -1), f, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConvscopeError, match="give layer="):
        loaded.attach(model)


def test_files_that_do_not_fit_are_refused(plain, tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"W_enc": Surprise()}, tmp_path / "code.pt")
    with pytest.raises(ConvscopeError, match="code is not loaded"):
        convscope.load_dictionary(tmp_path / "code.pt")
    save_file({"W_enc": plain["W_enc"]}, tmp_path / "part.safetensors")
    with pytest.raises(ConvscopeError, match="lacks b_enc, W_dec, b_dec"):
        convscope.load_dictionary(tmp_path / "part.safetensors")
    save_file(plain, tmp_path / "sae.safetensors")
    with pytest.raises(ConvscopeError, match="differ in length"):
        convscope.load_dictionary(tmp_path / "sae.safetensors", active=3)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ConvscopeError, match="cannot be read"):
        convscope.load_dictionary(tmp_path / "text.safetensors")
