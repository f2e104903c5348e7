"""Activation patching: equal to hand-written hooks, to closed forms, and to planted positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import convscope
from convscope import ConvscopeError
from tests.editing.conftest import SIZE
from tests.oracles.nets import diff_snapshots, snapshot


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def score(net: nn.Module, x: torch.Tensor, target: int, name: str = "", maps: torch.Tensor | None = None) -> float:
    """Logit of a class, with the output of one module replaced."""
    hooks = [] if maps is None else [net.get_submodule(name).register_forward_hook(lambda *_: maps.clone())]
    try:
        with torch.no_grad():
            return float(net(x)[0, target])
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("by", ["unit", "position", "both"])
def test_effects_equal_those_of_a_forward_hook(net, model, images, by):
    layer = model.layers.unique_spatial()[-1].name
    source, destination = images[:1], images[1:]
    maps = [torch.from_numpy(convscope.activations(model, x, layer)[layer]) for x in (source, destination)]
    units = [1, 2]
    patched = convscope.patch(model, source, destination, layer, by=by, units=units, targets=2)
    plain = score(net, destination, 2)
    assert patched.destination_score == pytest.approx(plain, rel=1e-5)
    assert patched.source_score == pytest.approx(score(net, source, 2), rel=1e-4)
    height, width = maps[0].shape[2:]
    shape = {"unit": (2,), "position": (height, width), "both": (2, height, width)}[by]
    assert patched.effects.shape == shape
    for index in np.ndindex(*shape):
        changed = maps[1].clone()
        unit = [units[index[0]]] if by != "position" else units
        rows, columns = (slice(None), slice(None)) if by == "unit" else index[-2:]
        changed[0, unit, rows, columns] = maps[0][0, unit, rows, columns]
        expected = score(net, destination, 2, layer, changed) - plain
        assert patched.effects[index] == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("by", ["unit", "position", "both"])
def test_joint_effects_equal_those_of_a_forward_hook(net, model, images, by):
    layer = model.layers.unique_spatial()[-1].name
    source, destination = images[:1], images[1:]
    maps = [torch.from_numpy(convscope.activations(model, x, layer)[layer]) for x in (source, destination)]
    patched = convscope.patch(model, source, destination, layer, by=by, targets=2)
    size = patched.effects.size
    assert patched.counts.tolist() == [*(n for n in (2**i for i in range(20)) if n < size), size]
    order = np.argsort(-np.sign(patched.total) * patched.effects.ravel(), kind="stable")
    plain = score(net, destination, 2)
    for count, effect in zip(patched.counts, patched.joint_effects, strict=True):
        index = np.unravel_index(order[:count], patched.effects.shape)
        mask = torch.zeros(patched.effects.shape, dtype=torch.bool)
        mask[index] = True
        mask = mask[:, None, None] if by == "unit" else mask
        changed = torch.where(mask, maps[0], maps[1])
        expected = score(net, destination, 2, layer, changed) - plain
        assert effect == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert patched.joint_effects[-1] == pytest.approx(patched.total, rel=1e-4)
    assert patched.joint_effects[0] == pytest.approx(patched.effects.ravel()[order[0]], rel=1e-4)


def test_the_default_target_is_the_contrast_of_both_top_classes(model, images):
    predictions = convscope.predict(model, images, top=1)
    first, second = predictions.indices[:, 0].tolist()
    layer = model.layers.unique_spatial()[-1].name
    patched = convscope.patch(model, images[0], images[1], layer)
    rest = {} if first == second else {"against": second}
    expected = convscope.patch(model, images[0], images[1], layer, targets=first, **rest)
    np.testing.assert_array_equal(patched.effects, expected.effects)
    logits = predictions.logits
    contrast = logits[:, first] - (logits[:, second] if first != second else 0)
    assert (patched.source_score, patched.destination_score) == pytest.approx(tuple(contrast), rel=1e-4)
    assert patched.total == pytest.approx(contrast[0] - contrast[1], rel=1e-4)


def test_a_planted_unit_and_position_carry_all_of_it():
    """The score is the mean of channel 2; both images differ at one position of that channel only."""
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1, bias=False)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
        net[3].weight.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
    model = convscope.load(net, preprocessing={"size": 8}, task="regression")
    destination = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    source = destination.clone()
    source[0, 2, 3, 5] += 64
    expected = np.zeros((3, 8, 8))
    expected[2, 3, 5] = 1
    both = convscope.patch(model, source, destination, "0", by="both", targets=0)
    np.testing.assert_allclose(both.effects, expected, atol=1e-5)
    np.testing.assert_allclose(
        convscope.patch(model, source, destination, "0", targets=0).effects, [0, 0, 1], atol=1e-5
    )
    by_position = convscope.patch(model, source, destination, "0", by="position", targets=0)
    np.testing.assert_allclose(by_position.effects, expected.sum(0), atol=1e-5)
    assert by_position.rows()[0]["position"] == "3, 5"
    assert by_position.rows()[0]["share"] == pytest.approx(1, abs=1e-4)


def test_an_image_patched_with_itself_does_not_change(model, images):
    layer = model.layers.unique_spatial()[0].name
    patched = convscope.patch(model, images[0], images[0], layer, by="position", targets=0)
    np.testing.assert_allclose(patched.effects, 0, atol=1e-5)
    assert np.isnan(patched.shares).all() or abs(patched.total) > 0


def test_nothing_is_left_behind(net, model, images):
    before, layer = snapshot(net), model.layers.unique_spatial()[0].name

    def stop(done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.patch(model, images[0], images[1], layer, progress=stop)
    assert diff_snapshots(before, snapshot(net)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "row"}, "by is 'row'"),
        ({"units": [99]}, "unit 99"),
        ({"targets": [[0, 1]]}, "2 targets; patch takes one"),
        ({"layer": "fc", "by": "position"}, "needs positions"),
    ],
)
def test_wrong_arguments_are_refused(model, images, options, message):
    layer = options.pop("layer", model.layers.unique_spatial()[0].name)
    layer = model.layers[-1].name if layer == "fc" else layer
    with pytest.raises(ConvscopeError, match=message):
        convscope.patch(model, images[0], images[1], layer, **options)
    with pytest.raises(ConvscopeError, match="2 images; patch takes one source"):
        convscope.patch(model, images, images[1], model.layers.unique_spatial()[0])


def test_a_saved_result_is_opened_again(model, images, tmp_path):
    patched = convscope.patch(model, images[0], images[1], model.layers.unique_spatial()[0], by="position", targets=0)
    opened = convscope.open(patched.save(tmp_path))
    np.testing.assert_array_equal(opened.effects, patched.effects)
    np.testing.assert_array_equal(opened.joint_effects, patched.joint_effects)
    joint = [line.split(",")[:2] for line in (tmp_path / "joint.csv").read_text().splitlines()[1:]]
    assert [(int(n), np.float32(effect)) for n, effect in joint] == [
        *zip(patched.counts, patched.joint_effects, strict=True)
    ]
    assert str(opened) == str(patched)
