"""Every code block of the README and the documentation runs, in order, in a folder with the files that it names.

Networks that need a download are built with random weights, and optimisations stop after a few steps: the blocks must
run; their values are tested elsewhere.
"""

from __future__ import annotations

import glob
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import convscope
from convscope.cli import main
from convscope.featurevis import recipes, scoring
from convscope.featurevis.defaults import constant_schedule
from convscope.sources import api

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
STEPS = 3

STAND_INS = {
    "--layers all --units all": "--layers bn2 --units 0-1",  # takes hours
    "--layers bn2,logits --units all": "--layers bn1 --units 0-1",
    "story lite0": "story lite0 --layers bn1,blocks.2 --units 4 --num-shown 2",
    "story(model)": "story(model, ['bn1', 'blocks.2'], units=4, num_displayed=2)",
    "--units 0-63": "--units 0-3",
    "range(64)": "range(4)",
    "lite0 *.jpg": "lite0 a.jpg",
    "deletion,insertion,road,randomisation": "deletion,randomisation",
    '"deletion", "insertion", "road", "randomisation"': '"deletion", "randomisation"',
    "torchvision:resnet50": "torchvision:resnet18",
    ",rise": "",
    "--layer blocks.4 -o dictionary": "--layer blocks.4 --features 64 --steps 4 -o dictionary",
    "--layer blocks.6 -o dictionary": "--layer blocks.6 --features 128 --steps 4 -o dictionary",
    "features=512, active=16, steps=100": "features=512, active=16, steps=4",
    "--features 512 --active 16 --steps 100": "--features 512 --active 16 --steps 4",
    "publish store": "publish small-store",
    " --compile": "",
    "atlas(model, many_paths": "atlas(model, many_paths, grid=3, steps=4",
    'target="tiger"': 'target="tabby", positions_per_image=40',
    "photos/*.jpg --target tiger": "photos/*.jpg --positions 49 --grid 3 --steps 4",
    "package.module:detector": "tests.oracles.detectors:confident_faster_rcnn",
    "--words textures,colors --judge open_clip:ViT-B-32/laion2b_s34b_b79k": "--words words.txt --scores scores.npy",
    '"open_clip:ViT-B-32/laion2b_s34b_b79k"': "small_clip()",
}
"""What takes long in a command, and a shorter form of it."""

OTHER_MACHINES = ("s3://", "pip install", "make ", "--host 0.0.0.0")
"""Lines that are about other machines, or set this one up."""

LABELLED_IMAGES = (
    "import pathlib, shutil; labels = {'tabby': 'a.jpg', 'fiddler crab': 'b.jpg', 'jacamar': 'photo.jpg'}\n"
    "for name, file in labels.items(): pathlib.Path('animals', name).mkdir(parents=True)\n"
    "for name, file in labels.items(): shutil.copy(file, pathlib.Path('animals', name))"
)
PRELUDES = {
    "docs/faithfulness.md": "import convscope; model = convscope.load('lite0'); images = ['a.jpg']",
    "docs/concepts.md": "paths = ['a.jpg', 'b.jpg']; many_paths = 6 * ['a.jpg', 'b.jpg', 'photo.jpg']",
    "docs/explorer.md": "import convscope; model = convscope.load('lite0')",
    "docs/models.md": (
        "import convscope, numpy, PIL.Image, torch, torchvision; from torchvision import transforms\n"
        "from torchvision.transforms import CenterCrop, Normalize, Resize, ToTensor; my_module = gray_classifier()\n"
        "mean, std = (0.5,) * 3, (0.5,) * 3; array = numpy.zeros((64, 64, 3), 'uint8')\n"
        "my_data = torch.utils.data.TensorDataset(torch.zeros(2, 3, 224, 224))"
    ),
    "docs/detection.md": (
        "import convscope; from tests.oracles.detectors import confident_faster_rcnn\n"
        "detector = confident_faster_rcnn()"
    ),
    "README.md": LABELLED_IMAGES,
    "docs/diagnosis.md": LABELLED_IMAGES,
    "docs/names.md": (
        "import numpy, pathlib; numpy.save('scores.npy', numpy.eye(3)[numpy.arange(60) % 3])\n"
        "_ = pathlib.Path('words.txt').write_text('red\\ngreen\\nblue\\n')"
    ),
    "docs/progress.md": "import convscope; model = convscope.load('lite0')",
    "docs/results.md": (
        "import convscope, shutil; model = convscope.load('lite0')\n"
        "for name in ('cat.jpg', 'dog.jpg'): shutil.copy('photo.jpg', name)"
    ),
    "docs/scan.md": (
        "import convscope; model = convscope.load('lite0')\n"
        "other_store = convscope.scan(model, 'photographs', 'other-store')"
    ),
    "docs/store.md": "import convscope, pandas, polars, duckdb",
}
"""What the prose of a page defines."""


@dataclass(frozen=True)
class Block:
    """A code block of a page: the number of its first line, its language and its text."""

    line: int
    language: str
    text: str


def code_blocks(page: str) -> list[Block]:
    """Return the fenced code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start()) + 2, match[1] or "shell", match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


class Gray(nn.Module):
    """The mean over colors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True)


def gray_classifier() -> nn.Module:
    """Return a network for gray and for RGB images, with ten classes."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(Gray(), *layers).eval()


def small_clip() -> nn.Module:
    """Return a network that compares images with text."""
    import open_clip

    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    network: nn.Module = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    return network


def write_images(folder: Path, photos: list[str]) -> None:
    """Write the files that the pages name: photographs, small ones, alone, in folders and in tar files."""
    images = [Image.open(path).convert("RGB") for path in photos]
    for image in images:
        image.thumbnail((256, 256))
    singles = ("photo", "elephant", "a", "b", "photo1", "photo2")
    several = [f"{name}/{i}" for name in ("pandas", "photos") for i in (0, 1)]
    several += [f"photographs/{name}/{i}" for name in ("cats", "birds") for i in range(7)]
    for number, name in enumerate((*singles, *several)):
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[number % 4].save(path)
    images[0].save(folder / "b.png")
    (folder / "shards").mkdir()
    for number in range(100):
        with tarfile.open(folder / "shards" / f"train-{number:03}.tar", "w") as archive:
            archive.add(folder / ("a.jpg" if number else "b.jpg"), "image.jpg")


@pytest.fixture
def workspace(tmp_path: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with the images, where recipes take few steps and nothing is downloaded or served."""
    write_images(tmp_path, photos)
    monkeypatch.chdir(tmp_path)
    for name, recipe in recipes.RECIPES.items():
        monkeypatch.setitem(recipes.RECIPES, name, replace(recipe, schedule=constant_schedule(STEPS, 0.05), starts=1))
    monkeypatch.setattr(scoring, "RETRY_STEPS", STEPS)
    monkeypatch.setattr(scoring, "NUM_NOISE_IMAGES", 2)
    for prefix, make in api.BY_PREFIX.items():
        monkeypatch.setitem(api.BY_PREFIX, prefix, with_random_weights(make))
    monkeypatch.setattr("convscope.explorer.server.serve", lambda application, socket: socket.close())
    monkeypatch.setattr("convscope.cli.serve.signal.signal", lambda *_: None)
    return tmp_path


def with_random_weights(make: Callable[..., object]) -> Callable[..., object]:
    """Return a source of models that never downloads weights."""
    return lambda name, weights, *rest: make(name, "random" if weights == "default" else weights, *rest)


def shorten(text: str) -> str:
    """Replace what takes long."""
    for long, short in STAND_INS.items():
        text = text.replace(long, short)
    return text


def shell_commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each command of a block, with file patterns expanded."""
    for line in shorten(text).replace("\\\n", " ").splitlines():
        words = [] if any(other in line for other in OTHER_MACHINES) else shlex.split(line, comments=True)
        if words:
            yield [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str:
    """Run a command in this process, and return its exit status."""
    assert words[0] == "convscope", f"no command of this package: {words}"
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def scan_lite0(folder: Path) -> None:
    """Scan the photographs with one layer of the bundled network."""
    convscope.scan(convscope.load("lite0"), folder / "photographs", folder / "store", layers=["bn1"])


def scan_vgg16(folder: Path) -> None:
    """Scan the photographs with VGG16, and copy the store."""
    model = convscope.load("torchvision:vgg16", weights="random")
    convscope.scan(model, folder / "photographs", folder / "store", layers=["features.0", "features.28"])
    shutil.copytree(folder / "store", folder / "later")


def prepare_explorer(folder: Path) -> None:
    """Write a small Keras classifier, and stores of the bundled network and of one with fewer classes."""
    import keras

    layers = (keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D())
    keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")]).save(folder / "my.keras")
    scan_lite0(folder)
    scan_small_network(folder)


def scan_small_network(folder: Path) -> None:
    """Scan four photographs with a network of few classes, so that there are few pages."""
    for name in ("cats/0", "cats/1", "birds/0", "birds/1"):
        copy = folder / "few-photographs" / f"{name}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "photographs" / f"{name}.jpg", copy)
    small = convscope.load(f"{__name__}:gray_classifier", preprocessing={"size": 28, "mean": 0.5, "std": 0.5})
    convscope.scan(small, folder / "few-photographs", folder / "small-store")


WRITERS: dict[str, Callable[[Path], None]] = {
    "docs/tour.md": scan_small_network,
    "docs/concepts.md": scan_lite0,
    "docs/explorer.md": prepare_explorer,
    "docs/store.md": scan_vgg16,
}
"""What a page takes from others: files that other commands wrote."""


@pytest.mark.parametrize("document", [page for page in PAGES if code_blocks(page)])
def test_code_blocks_run(document: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, object] = {"gray_classifier": gray_classifier, "small_clip": small_clip}
    WRITERS.get(document, lambda _: None)(workspace)
    exec(PRELUDES.get(document, ""), namespace)
    for block in code_blocks(document):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + shorten(block.text), document, "exec"), namespace)
        elif block.language != "json":
            for words in shell_commands(block.text):
                assert run_command(words, monkeypatch) == 0, shlex.join(words)
    for value in namespace.values():
        if hasattr(value, "close"):
            value.close()
