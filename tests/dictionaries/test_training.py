"""Training: planted atoms are found, sparse products are the dense ones, the same seed gives the same bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.optimize import linear_sum_assignment

import convscope
from convscope.dictionaries import api, training
from convscope.dictionaries import checkpoint as checkpoint_module
from convscope.dictionaries import positions as positions_module
from convscope.dictionaries.encoder import FeatureEncoder
from convscope.dictionaries.fidelity import accuracy_fraction, fidelity
from convscope.dictionaries.methods.base import Settings
from convscope.dictionaries.methods.registry import METHODS
from convscope.dictionaries.positions import PositionStore
from convscope.dictionaries.selection import top_k
from convscope.dictionaries.sparse import ActiveFeatures, decode, select
from convscope.dictionaries.training import geometric_median, train
from tests.dictionaries.conftest import LAYER

CPU = torch.device("cpu")


def planted(active: int = 2, count: int = 8192) -> tuple[PositionStore, np.ndarray]:
    """Make vectors that are sums of a few of 32 directions in 16 dimensions, two orthonormal bases, on an offset."""
    g = torch.Generator().manual_seed(1)
    atoms = torch.from_numpy(np.vstack([np.eye(16), hadamard(16) / 4])).float()
    chosen = torch.rand(count, 32, generator=g).topk(active).indices
    weights = torch.zeros(count, 32).scatter_(1, chosen, 0.5 + torch.rand(count, active, generator=g))
    store = PositionStore(count, 16, 1 << 30)
    store.append(weights @ atoms + torch.arange(16) / 8)
    return store, atoms.numpy()


def recovered(true: np.ndarray, atoms: np.ndarray) -> float:
    similarity = true @ atoms.T
    rows, columns = linear_sum_assignment(-similarity)
    return float(similarity[rows, columns].mean())


@pytest.mark.parametrize(
    "method",
    ["topk", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in ("topk", "nmf"))],
)
def test_planted_atoms_are_recovered(method):
    store, true = planted()
    trained = train(store, method, Settings(40, 2, 300), 0, CPU, lambda done: None)
    atoms = trained.weights.atoms.numpy()
    np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, rtol=1e-5)
    assert recovered(true, atoms) >= 0.95
    assert trained.history[-1] > 0.9
    encoder, x = FeatureEncoder(trained.weights, trained.activation, 2), store.read(slice(0, 2000))
    features = encoder(x)
    assert float((features > 0).float().sum(1).mean()) == pytest.approx(2, rel=0.1)
    error = (x - encoder.decode(features)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) < 0.1


@pytest.mark.parametrize(("count", "k"), [(96, 5), (1024, 8), (1024, 100), (4096, 32)])
def test_top_k_is_that_of_torch(count, k):
    values = torch.randn(20, count, generator=torch.Generator().manual_seed(0))
    selected, columns = top_k(values, k)
    expected = values.topk(k)
    torch.testing.assert_close(selected.sort(descending=True).values, expected.values, rtol=0, atol=0)
    torch.testing.assert_close(values.gather(1, columns), selected, rtol=0, atol=0)


@pytest.mark.parametrize("irregular", [False, True])
def test_sparse_products_and_their_gradients_are_the_dense_ones(irregular):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 6, generator=g)
    encoder, atoms = (torch.randn(12, 6, generator=g, requires_grad=True) for _ in range(2))
    bias = torch.randn(12, generator=g, requires_grad=True)
    scores = x @ encoder.T + bias
    if irregular:
        mask = scores > 1.5
        active = ActiveFeatures.of_pairs(*mask.nonzero(as_tuple=True), *scores.shape)
        assert not mask[mask.any(1)].all(1).any()
    else:
        columns = scores.topk(3).indices
        active = ActiveFeatures.of_rows(columns, 12)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, columns, value=True)
    values = scores.detach()[active.rows, active.columns]
    weight = torch.randn(10, 6, generator=g)
    sparse = decode(select(values, encoder, bias, x, active).relu(), atoms, active)
    dense = (scores * mask).relu() @ atoms
    torch.testing.assert_close(sparse, dense)
    of_sparse = torch.autograd.grad((sparse * weight).sum(), [encoder, bias, atoms])
    of_dense = torch.autograd.grad((dense * weight).sum(), [encoder, bias, atoms])
    for ours, theirs in zip(of_sparse, of_dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_features_are_the_k_largest_of_each_position(model, learned, x):
    maps = convscope.activations(model, x, LAYER)[LAYER]
    z = (np.moveaxis(maps, 1, -1) - learned.bias) @ learned.encoder.T + learned.encoder_bias
    kept = np.where(z >= np.sort(z)[..., -4:-3], z, 0).clip(0)
    np.testing.assert_allclose(np.moveaxis(learned.encode(model, x), 1, -1), kept, rtol=1e-4, atol=1e-5)


def test_a_feature_that_is_off_has_a_gradient_in_front_of_its_relu(learned):
    maps = torch.rand(1, 10, 2, 2, requires_grad=True)
    features = learned.feature_encoder(maps)
    relu = next(f for f in _graph(features.grad_fn) if f.name() == "ReluBackward0")
    assert relu._saved_result.shape == (1, 2, 2, 24)


def _graph(node):
    while node is not None:
        yield node
        node = next((f for f, _ in node.next_functions if f is not None), None)


def test_the_same_seed_gives_the_same_bytes(model, x, learned):
    again = convscope.dictionary(model, x, LAYER, features=24, active=4, steps=60)
    other = convscope.dictionary(model, x, LAYER, features=24, active=4, steps=60, seed=1)
    for name in ("atoms", "encoder", "encoder_bias", "bias", "history", "density"):
        np.testing.assert_array_equal(getattr(again, name), getattr(learned, name))
    assert again.metrics == learned.metrics
    assert not np.array_equal(other.atoms, learned.atoms)


def test_metrics_are_those_of_the_definition(net, model, x):
    """One image in ten is held out; the metrics are computed again by hand."""
    learned = convscope.dictionary(model, x, LAYER, features=24, active=4, steps=60)
    held = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:1]
    maps = convscope.activations(model, x[held], LAYER)[LAYER]
    features = learned.encode(model, x[held])
    rebuilt = np.einsum("nfhw,fc->nchw", features, learned.atoms) + learned.bias[:, None, None]
    variance = np.square(maps - maps.mean((0, 2, 3), keepdims=True)).sum()
    assert learned.metrics["r2"] == pytest.approx(1 - np.square(maps - rebuilt).sum() / variance, abs=1e-4)
    assert learned.metrics["l0"] == pytest.approx((features > 0).sum(1).mean(), abs=1e-4)
    others = convscope.activations(model, x[[n for n in range(12) if n != int(held)]], LAYER)[LAYER]
    ablated = others.mean((0, 2, 3), keepdims=True) + 0 * maps
    with torch.no_grad():
        y, y1, y0 = (net.fc(torch.from_numpy(m).float().mean((2, 3)))[0] for m in (maps, rebuilt, ablated))
    top = int(y.argmax())
    assert learned.metrics["logits_kept"] == pytest.approx(
        float(1 - (y - y1)[top].abs() / (y - y0)[top].abs()), abs=1e-2
    )
    p, p1, p0 = (logits.log_softmax(0) for logits in (y, y1, y0))
    kept = 1 - (p.exp() * (p - p1)).sum() / (p.exp() * (p - p0)).sum()
    assert learned.metrics["loss_kept"] == pytest.approx(float(kept), abs=1e-2)


def test_dead_features_are_counted_on_all_training_positions(model, learned, x):
    held = int(torch.randperm(12, generator=torch.Generator().manual_seed(0))[0])
    features = learned.encode(model, x[[n for n in range(12) if n != held]])
    np.testing.assert_allclose(learned.density, (features > 0).mean((0, 2, 3)), atol=2e-3)
    assert learned.metrics["dead"] == (learned.density == 0).mean()


def test_vectors_on_disk_give_nearly_the_same_and_leave_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(positions_module.tempfile, "tempdir", str(tmp_path))
    vectors = 100 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    store = PositionStore(1200, 8, memory=1000)
    assert store.is_on_disk
    store.append(vectors[:600])
    store.append(vectors[600:])
    torch.testing.assert_close(store.read(slice(None)), vectors, rtol=1e-3, atol=0.1)
    batches = store.batches(100, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(10)])
    torch.testing.assert_close(drawn.sort(0).values, store.read(slice(None)).sort(0).values)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_cancelling_leaves_nothing(model, x, monkeypatch, tmp_path):
    monkeypatch.setattr(positions_module.tempfile, "tempdir", str(tmp_path))

    def cancel(done: float, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.dictionary(model, x, LAYER, features=24, active=4, steps=60, memory=1000, progress=cancel)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["topk", "batch-topk", "jumprelu", "archetypal"])
def test_an_interrupted_run_resumes_and_gives_the_same_bytes(method, model, x, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "INTERVAL", 0.0)
    settings = {"features": 24, "active": 2, "steps": 40, "method": method}
    whole = convscope.dictionary(model, x, LAYER, **settings)
    path = tmp_path / "run.checkpoint"

    def interrupt(done: float, total: int) -> None:
        if done >= 12 + 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.dictionary(model, x, LAYER, **settings, checkpoint=path, progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["run.checkpoint"]
    steps = []
    monkeypatch.setattr(training._Loop, "step", _counted(training._Loop.step, steps))
    resumed = convscope.dictionary(model, x, LAYER, **settings, checkpoint=path)
    assert steps == list(range(26, 40))
    for name in ("atoms", "encoder", "encoder_bias", "bias", "thresholds", "history", "density"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert resumed.metrics == whole.metrics
    assert list(tmp_path.iterdir()) == []


def _counted(step, steps):
    def run(self, n, x):
        steps.append(n)
        step(self, n, x)

    return run


def test_a_checkpoint_of_another_run_is_refused(model, x, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "INTERVAL", 0.0)
    path = tmp_path / "run.checkpoint"

    def interrupt(done: float, total: int) -> None:
        if done >= 12 + 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.dictionary(model, x, LAYER, features=24, active=2, steps=9, checkpoint=path, progress=interrupt)
    with pytest.raises(convscope.ConvscopeError, match=r"other active \(2, now 3\); delete it"):
        convscope.dictionary(model, x, LAYER, features=24, active=3, steps=9, checkpoint=path)
    with pytest.raises(convscope.ConvscopeError, match="other vectors"):
        convscope.dictionary(model, x + 1, LAYER, features=24, active=2, steps=9, checkpoint=path)
    path.write_bytes(b"something else")
    with pytest.raises(convscope.ConvscopeError, match="is not a checkpoint"):
        convscope.dictionary(model, x, LAYER, features=24, active=2, steps=9, checkpoint=path)
    assert path.read_bytes() == b"something else"


def test_accuracy_fraction_by_hand():
    def logits(right: int) -> torch.Tensor:
        """Return logits of ten images of class 1, so many of them right."""
        return torch.nn.functional.one_hot((torch.arange(10) < right).long(), 3).float()

    kept = accuracy_fraction(torch.ones(10, dtype=torch.int64), logits(8), logits(6), logits(2))
    assert kept == pytest.approx(1 - (8 - 6) / (8 - 2))
    assert np.isnan(accuracy_fraction(torch.ones(10, dtype=torch.int64), logits(4), logits(3), logits(4)))


def test_labels_belong_to_the_images_that_are_held_out(model, x, monkeypatch):
    held = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:2]
    passed = []

    def measure(*args):
        passed.append(args)
        return fidelity(*args)

    monkeypatch.setattr(api, "fidelity", measure)
    images, labels = torch.cat([x, -x]), torch.arange(24) % 5
    learned = convscope.dictionary(model, images, LAYER, features=24, active=4, steps=5, labels=labels)
    _, _, _, inputs, *_, right = passed[0]
    assert right.tolist() == labels[held.sort().values].tolist()
    np.testing.assert_allclose(inputs, images[held.sort().values])
    assert "accuracy_kept" in learned.metrics
    with pytest.raises(convscope.ConvscopeError, match="give each image's right class"):
        convscope.dictionary(model, x, LAYER, features=24, active=4, labels=[1, 2])


def test_a_saved_dictionary_is_the_same(model, learned, x, tmp_path):
    loaded = convscope.load_dictionary(learned.save(tmp_path / "saved"))
    for field in dataclasses.fields(learned):
        if field.name not in ("model", "notes", "failed"):
            np.testing.assert_array_equal(getattr(loaded, field.name), getattr(learned, field.name))
    np.testing.assert_array_equal(loaded.encode(model, x), learned.encode(model, x))
    assert str(loaded) == str(learned)


def test_the_geometric_median_resists_outliers():
    vectors = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    vectors[:20] += 1000
    assert float(geometric_median(vectors).norm()) < 0.5
