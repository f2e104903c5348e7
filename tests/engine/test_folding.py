"""Layers whose rows are not one per image: frames, windows and sequences, each image's rows by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Model
from convscope.engine.layouts import Layout
from tests.engine.helpers import relative_error
from tests.oracles.nets import randomized

FRAMES, SIZE = 5, 10


class Clips(nn.Module):
    """Frames as channels (N, 5 * 3, H, W), folded into the batch; in `order` "frames" the frame comes first."""

    def __init__(self, order: str = "images") -> None:
        super().__init__()
        self.conv, self.relu, self.frame, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 6), nn.Linear(6, 3)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        frames = x.reshape(len(x), FRAMES, 3, *x.shape[2:])
        if self.order == "frames":
            frames = frames.transpose(0, 1)
        z = self.frame(self.relu(self.conv(frames.flatten(0, 1))).square().mean((2, 3)))
        z = z.view(-1, len(x), 6).transpose(0, 1) if self.order == "frames" else z.view(len(x), -1, 6)
        return self.fc(z.mean(1))


def load_clips(net: nn.Module) -> tuple[Model, Tensor]:
    model = convscope.load(randomized(net), preprocessing={"size": SIZE, "channels": FRAMES * 3})
    x = torch.randn((2, FRAMES * 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    return model, x


def test_frames_are_laid_out_as_channels() -> None:
    model, x = load_clips(Clips())
    net = model.module
    layer = model.layers["conv"]
    assert (layer.shape, layer.units, layer.is_spatial) == ((FRAMES * 4, 8, 8), FRAMES * 4, True)
    assert layer.layout == Layout(1, (2, 3), rows_per_image=FRAMES)
    assert (model.layers["frame"].shape, model.layers["frame"].units) == ((FRAMES, 6), 6)
    assert model.layers["fc"].layout.rows_per_image == 1
    maps = convscope.activations(model, x, ["conv", "frame"])
    for n in range(2):
        for f in range(FRAMES):
            expected = net.conv(x[n : n + 1, 3 * f : 3 * f + 3])
            assert relative_error(maps["conv"][n, 4 * f : 4 * f + 4], expected[0].detach()) < 1e-5
            pooled = net.frame(expected.relu().square().mean((2, 3)))
            assert relative_error(maps["frame"][n, f], pooled[0].detach()) < 1e-5
    raw = torch.randn(2 * FRAMES, 4, 8, 8)
    assert torch.equal(layer.from_nchw(layer.to_nchw(raw), raw), raw)


def test_heatmaps_of_folded_frames_by_hand() -> None:
    """Grad-CAM of each clip: every frame's channels with their own weights, summed over frames."""
    model, x = load_clips(Clips())
    net = model.module
    actual = convscope.heatmaps(model, x, 1)
    assert (actual.layer, actual.values.shape, len(actual.image_names)) == ("relu", (2, 1, 8, 8), 2)
    for n in range(2):
        frames = x[n].reshape(FRAMES, 3, SIZE, SIZE)
        maps = net.relu(net.conv(frames)).detach().requires_grad_()
        score = net.fc(net.frame(maps.square().mean((2, 3))).mean(0))[1]
        (gradient,) = torch.autograd.grad(score, maps)
        expected = (gradient.mean((2, 3), keepdim=True) * maps).sum((0, 1)).detach()
        assert relative_error(actual.values[n, 0], expected) < 1e-5
    assert all(overlay.shape[:2] == (SIZE, SIZE) for overlay in map(np.asarray, actual.overlay()))
    ablated = convscope.heatmaps(model, x, 1, method="ablation-cam")
    one = convscope.heatmaps(model, x[1:], 1, method="ablation-cam")
    assert relative_error(ablated.values[1], one.values[0]) < 1e-5
    assert ablated.values.any()
    assert convscope.heatmaps(model, x, 1, method="score-cam").values.any()


def test_patterns_of_a_unit_of_one_frame() -> None:
    """Unit 4 * 2 + 1, channel 1 of frame 2, does not depend on the other frames."""
    model, _ = load_clips(Clips())
    start = np.full((1, SIZE, SIZE, FRAMES * 3), 0.5, np.float32)
    patterns = convscope.patterns(model, "conv", [9], recipe="plain", steps=3, start=start)
    changed = (patterns.images[0].astype(int) - patterns.images[0, 0, 0, 0] != 0).any((0, 1))
    assert patterns.units.tolist() == [9]
    assert changed[6:9].any()


def test_rows_in_another_order_are_refused() -> None:
    model, x = load_clips(Clips("frames"))
    assert not model.layers["conv"].is_spatial
    with pytest.raises(ConvscopeError, match="10 rows, not one per image, and which of them belong to which image"):
        convscope.activations(model, x, "conv")
    with pytest.raises(ConvscopeError, match="several rows per image"):
        convscope.heatmaps(model, x, 1, layer="conv")
    assert convscope.predict(model, x).logits.shape == (2, 3)


def test_sequences_before_the_batch() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.GRU(3 * SIZE, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(x.flatten(1, 2).permute(2, 0, 1))[0][-1])  # (W, N, 3 H)

    net = randomized(Recurrent())
    model = convscope.load(net, preprocessing={"size": SIZE})
    assert (model.layers["rnn"].shape, model.layers["rnn"].layout.batch_dim) == ((SIZE, 7), 1)
    x = torch.randn((3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    outputs = convscope.activations(model, x, "rnn")["rnn"]
    expected = net.rnn(x.flatten(1, 2).permute(2, 0, 1))[0].detach()
    assert outputs.shape == (3, SIZE, 7)
    assert relative_error(outputs, expected.transpose(0, 1)) < 1e-5


def test_networks_that_take_single_images_only() -> None:
    class Single(Clips):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 1
            return super().forward(x)

    model, x = load_clips(Single())
    with pytest.raises(ConvscopeError, match="could not be proven"):
        convscope.activations(model, x[:1], "conv")


class Crops(nn.Module):
    """Parts of an image, or the image and its mirror image, as rows of a batch; their scores are averaged."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.fc, self.kind = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), kind

    def parts(self, x: Tensor) -> list[Tensor]:
        if self.kind == "mirrored":
            return [x, x.flip(-1)]
        return [x[..., i : i + 5, j : j + 5] for i in (0, 5) for j in (0, 5)]

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack(self.parts(x), 1).flatten(0, 1)
        return self.fc(self.conv(rows).square().mean((2, 3))).view(len(x), -1, 3).mean(1)


@pytest.mark.parametrize(("kind", "count"), [("crops", 4), ("mirrored", 2)])
def test_crops_are_not_laid_over_the_image(kind: str, count: int) -> None:
    """Their activations belong to their images, but their positions are not those of the image."""
    net = randomized(Crops(kind))
    model = convscope.load(net, preprocessing={"size": SIZE})
    x = torch.randn((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    layer = model.layers["conv"]
    assert (layer.is_spatial, layer.layout) == (False, Layout(1, rows_per_image=count))
    activations = convscope.activations(model, x, "conv")["conv"]
    for n in range(2):
        for row, part in enumerate(net.parts(x[n : n + 1])):
            assert relative_error(activations[n, row], net.conv(part)[0].detach()) < 1e-5
    for requested in (None, "conv"):
        with pytest.raises(ConvscopeError, match=rf"{count} rows per image .* positions in the image are unknown"):
            convscope.heatmaps(model, x, 1, layer=requested)
    assert convscope.heatmaps(model, x, 1, method="saliency").values.any()


class Proposals(nn.Module):
    """A box head on the positions that exceed a threshold: none at all on the images that a network is tried on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        boxes = self.head(maps.movedim(1, -1)[maps[:, 0] > 1e6])
        return self.fc(maps.mean((2, 3))) + boxes.sum()


def test_a_layer_without_rows_is_refused_and_the_others_work() -> None:
    model = convscope.load(randomized(Proposals()), preprocessing={"size": SIZE})
    assert model.layers["head"].layout.rows_per_image == 0
    x = torch.randn((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    assert convscope.heatmaps(model, x, 1).layer == "conv"
    with pytest.raises(ConvscopeError, match="not one per image"):
        convscope.activations(model, x, "head")
