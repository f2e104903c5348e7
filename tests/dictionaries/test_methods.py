"""Each method's equation, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

import convscope
from convscope import ConvscopeError
from convscope.dictionaries.encoder import FeatureEncoder
from convscope.dictionaries.methods.base import Settings, Start, fitted_scale
from convscope.dictionaries.methods.jumprelu import BANDWIDTH, SPARSITY_WEIGHT
from convscope.dictionaries.methods.registry import METHODS
from convscope.dictionaries.selection import largest
from convscope.dictionaries.stability import matched_cosine, stability
from convscope.names import DICTIONARY_DESCRIPTIONS
from tests.dictionaries.conftest import LAYER

SETTINGS = Settings(features=32, active=3, steps=10)


@pytest.fixture(name="vectors")
def fixture_vectors() -> torch.Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).abs() / 2.5


def start(x: torch.Tensor) -> Start:
    g = torch.Generator().manual_seed(1)
    atoms = torch.randn(32, 6, generator=g)
    return Start(atoms / atoms.norm(dim=1, keepdim=True), 0.1 * torch.randn(6, generator=g), x)


def scores_of(learner, x):
    p = learner.parameters
    return (x - p["bias"]) @ p["encoder"].T + p["encoder_bias"]


def test_the_table_of_names_is_that_of_the_methods():
    assert list(METHODS) == list(DICTIONARY_DESCRIPTIONS)


def test_the_first_reconstruction_is_as_long_as_the_data():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    atoms = start(x).atoms
    z = x @ atoms.T
    fitted = torch.where(z >= z.topk(12).values[:, -1:], z, 0).relu() @ atoms
    errors = [float((x - s * fitted).square().sum()) for s in (torch.arange(1000) / 1000)]
    assert float(fitted_scale(atoms, x, 12)) == pytest.approx(int(np.argmin(errors)) / 1000, abs=1e-3)
    assert float(fitted_scale(atoms, atoms, 1)) == pytest.approx(1)


def test_topk(vectors):
    x = vectors
    learner = METHODS["topk"](SETTINGS, start(x))
    z = scores_of(learner, x)
    f = torch.where(z >= z.topk(3).values[:, -1:], z, 0).relu()
    step = learner.step(x)
    torch.testing.assert_close(step.reconstruction, f @ learner.atoms + learner.parameters["bias"])
    torch.testing.assert_close(step.loss, (x - step.reconstruction).square().sum(1).mean())
    assert step.fired.tolist() == (f > 0).sum(0).tolist()


def batch_top_k(learner, x):
    z = scores_of(learner, x)
    smallest = z.flatten().topk(len(x) * 3).values[-1]
    return torch.where(z >= smallest, z, 0).relu(), smallest


def test_batch_topk(vectors):
    x = vectors
    learner = METHODS["batch-topk"](SETTINGS, start(x))
    f, smallest = batch_top_k(learner, x)
    step = learner.step(x)
    torch.testing.assert_close(step.reconstruction, f @ learner.atoms + learner.parameters["bias"])
    torch.testing.assert_close(learner.thresholds(), smallest.expand(32))
    before = learner.step(x).loss
    torch.testing.assert_close(before, step.loss)  # with a guess of the threshold


def test_matryoshka(vectors):
    x = vectors
    learner = METHODS["matryoshka"](SETTINGS, start(x))
    f, _ = batch_top_k(learner, x)
    centred = x - learner.parameters["bias"]
    losses = [(centred - f[:, :m] @ learner.atoms[:m]).square().sum(1).mean() for m in (2, 4, 8, 16, 32)]
    torch.testing.assert_close(learner.step(x).loss, torch.stack(losses).mean())


def test_jumprelu_and_its_derivatives(vectors):
    x = vectors
    learner = METHODS["jumprelu"](SETTINGS, start(x))
    z, t = scores_of(learner, x).detach(), learner.thresholds()
    f = z * (z > t)
    residual = x - f @ learner.atoms - learner.parameters["bias"]
    excess = (z > t).sum() / len(x) / 3 - 1
    step = learner.step(x)
    torch.testing.assert_close(step.loss, residual.square().sum(1).mean() + SPARSITY_WEIGHT * excess**2)
    step.loss.backward()
    near = ((z - t).abs() < BANDWIDTH / 2) & (z > 0)
    of_f = -2 * residual @ learner.atoms.T / len(x)
    of_count = SPARSITY_WEIGHT * 2 * excess / len(x) / 3
    expected = (near * (-of_f * t - of_count) / BANDWIDTH).sum(0) * t
    torch.testing.assert_close(learner.parameters["log_threshold"].grad, expected.detach(), rtol=1e-4, atol=1e-6)
    of_encoder = torch.einsum("nf,nc->fc", of_f * (z > t), x - learner.parameters["bias"])
    torch.testing.assert_close(learner.parameters["encoder"].grad, of_encoder.detach(), rtol=1e-4, atol=1e-6)


def test_archetypal_atoms_are_near_the_hull_of_the_data(vectors):
    x = vectors
    learner = METHODS["archetypal"](SETTINGS, start(x))
    with torch.no_grad():
        learner.parameters["mixture"] += torch.randn(32, 50, generator=torch.Generator().manual_seed(2))
        learner.parameters["relaxation"] *= 100
    learner.renormalize()
    mixture, relaxation = learner.parameters["mixture"].detach(), learner.parameters["relaxation"].detach()
    assert (mixture >= 0).all()
    torch.testing.assert_close(mixture.sum(1), torch.ones(32))
    torch.testing.assert_close(relaxation.norm(dim=1), torch.full((32,), 0.5))
    atoms = mixture @ (x / x.norm(dim=1, keepdim=True)) + relaxation
    torch.testing.assert_close(learner.weights().atoms, atoms / atoms.norm(dim=1, keepdim=True))


def test_nmf_features_are_those_of_scipy(vectors):
    x = vectors
    learner = METHODS["nmf"](Settings(4, 3, 10), Start(start(x).atoms[:4], torch.zeros(6), x))
    encoder = FeatureEncoder(learner.weights(), learner.activation, 3)
    expected = np.array([nnls(learner.atoms.detach().numpy().T, row)[0] for row in x.numpy()])
    np.testing.assert_allclose(encoder(x).numpy(), expected, atol=2e-3)
    step = learner.step(x)
    torch.testing.assert_close(
        step.reconstruction, torch.from_numpy(expected).float() @ learner.atoms, atol=5e-3, rtol=0
    )


def test_nmf_learns_and_refuses_what_it_cannot(model):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    learned = convscope.dictionary(model, images, LAYER, features=6, method="nmf", steps=150)
    assert learned.atoms.min() >= 0
    assert learned.history[-1] > max(0.5, learned.history[0])
    attached = learned.attach(model)
    np.testing.assert_array_equal(convscope.predict(attached, images).logits, convscope.predict(model, images).logits)
    with pytest.raises(ConvscopeError, match="negative activations"):
        convscope.dictionary(model, images, "conv1", features=6, method="nmf")
    with pytest.raises(ConvscopeError, match="at most 512"):
        convscope.dictionary(model, images, LAYER, features=600, method="nmf")


def test_largest_is_exact_whatever_the_guess():
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    expected = values.flatten().topk(70).values.sort().values
    for guess in (0.0, 0.3, 10.0):
        rows, columns = largest(values, 70, guess)
        torch.testing.assert_close(values[rows, columns].sort().values, expected, rtol=0, atol=0)
        assert (rows.diff() >= 0).all()
    assert len(largest(-values.abs(), 5, 0.0)[0]) == 0


def test_stability_is_invariant_to_the_order(learned):
    shuffled = np.random.default_rng(0).permutation(learned.atoms)
    assert stability(learned, learned) == pytest.approx(1, abs=1e-5)
    assert matched_cosine(learned.atoms, shuffled) == pytest.approx(1, abs=1e-5)
    basis = np.eye(4)
    assert matched_cosine(basis[:2], basis[[3, 0, 1]]) == 1
    assert matched_cosine(basis[:2], basis[[0, 3]]) == 0.5
