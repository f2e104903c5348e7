"""Models of Hugging Face's transformers: by name, from a folder, or an instance.

Only safetensors are read, and no code of a repository is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from convscope.engine.candidates import DetectionReader
from convscope.engine.dual_encoder import DualEncoder, Tokenizer
from convscope.engine.outputs import OutputSelector
from convscope.errors import ConvscopeError, require_extra
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, fixed_seed
from convscope.sources.text_image import check_vocabulary, tokenize

PROCESSOR_FILE = "preprocessor_config.json"
DUAL_ENCODER = ("get_image_features", "get_text_features", "logit_scale")  # CLIP, SigLIP and their relatives
TIMM_CLASSES = {"timm_wrapper": "TimmWrapperForImageClassification"}  # repositories of timm name no class
PROBLEM_TYPES = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:
    """Load a model of the hub, or of a local folder; `weights` may be "random" or a file."""
    transformers = require_extra("transformers", "hf")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConvscopeError(_cannot_load(name, error)) from error
    notes: list[str] = []
    build = _model_class(transformers, config, name)
    if weights == "default":
        try:
            with _without_progress_bars(transformers):
                module = build.from_pretrained(name, config=config, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConvscopeError(_cannot_load(name, error)) from error
    else:
        if num_classes not in (None, config.num_labels):
            config.num_labels = num_classes
        with fixed_seed():
            module = build(config)
        if weights != "random":
            notes = files.load_weights_file(module, Path(weights))
    spec = from_model(module.eval())
    spec.name, spec.loaded_by_convscope = f"hf:{name}", True
    spec.notes += notes
    spec.preprocessing = _saved_preprocessing(name) or spec.preprocessing
    spec.preprocessing_origin = None  # the model's own
    return spec


@contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    """Switch the progress bars of transformers off inside the block."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _cannot_load(name: str, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:240]
    if "safetensors" in reason:
        advice = "only safetensors are read: save it with save_pretrained(FOLDER) and load hf:FOLDER"
    elif Path(name).is_dir():
        advice = "expected a folder written by save_pretrained"
    else:
        advice = "expected ORG/NAME of the hub, or a folder; without a connection: hf:FOLDER"
    return f"hf:{name} cannot be loaded ({reason}); {advice}"


def _model_class(transformers: Any, config: Any, name: str) -> Any:
    """Return the class of transformers that the configuration names."""
    architecture = next(iter(config.architectures or ()), TIMM_CLASSES.get(config.model_type))
    build = getattr(transformers, str(architecture), None)
    if build is None:
        remark = " (its own code, which is not run)" if getattr(config, "auto_map", None) else ""
        raise ConvscopeError(
            f"hf:{name} is a {architecture or config.model_type}, which transformers {transformers.__version__} does "
            f"not have{remark}; build it yourself and pass the module"
        )
    return build


def is_pretrained_model(module: object) -> bool:
    """Whether a module is a model of transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def from_model(module: Any) -> ModelSpec:
    """Describe a model of transformers: its classes, task and preprocessing."""
    config, kind = module.config, type(module).__name__
    if all(hasattr(module, name) for name in DUAL_ENCODER):
        return _dual_encoder_spec(module)
    if hasattr(module, "text_model"):
        raise ConvscopeError(
            f"{kind} takes text besides images; load its image part: load(model.vision_model), or say how it is "
            "called: forward=lambda module, x: ..."
        )
    task, select = _task(module)
    name = getattr(config, "name_or_path", "") or ""
    spec = ModelSpec(
        module,
        name or kind,
        classes=_class_names(config) if task not in (None, "embedding") else None,
        task=task,
        select=select,
        size=_input_size(config),
        channels=getattr(config, "num_channels", None),
        loaded_by_convscope=False,
    )
    spec.preprocessing = (_saved_preprocessing(name) if name else None) or _timm_preprocessing(config)
    if task == "detection":
        spec.notes.append("a class's score is its highest probability among the detector's queries")
    spec.preprocessing_origin = f"the image processor in {name}" if spec.preprocessing else None
    return spec


def _dual_encoder_spec(module: Any) -> ModelSpec:
    """Describe a model of transformers that compares images with text."""
    name, vision = getattr(module.config, "name_or_path", "") or "", module.config.vision_config
    spec = ModelSpec(
        module,
        name or type(module).__name__,
        preprocessing=_saved_preprocessing(name) if name else None,
        loaded_by_convscope=False,
        dual_encoder=DualEncoder(_encode_image, _encode_text),
        size=_input_size(vision),
        channels=getattr(vision, "num_channels", None),
    )
    spec.preprocessing_origin = f"the image processor in {name}" if spec.preprocessing else None
    return spec


def _encode_image(module: Any, x: Tensor) -> Tensor:
    return _embeds(module.get_image_features(pixel_values=x))


def _encode_text(module: Any, texts: list[str], tokenizer: Tokenizer | None) -> Tensor:
    config = module.config.text_config
    encode = _saved_tokenizer(module) if tokenizer is None else tokenizer
    tokens = tokenize(encode, texts, config.max_position_embeddings, module.device)
    check_vocabulary(tokens["input_ids"], config.vocab_size)
    return _embeds(module.get_text_features(**tokens))


def _embeds(features: Any) -> Tensor:
    """Return embeddings (N, D); from version 5 on, transformers returns them with other outputs."""
    embeds: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return embeds


def _saved_tokenizer(module: Any) -> Tokenizer:
    """Load the tokenizer beside a model, in a folder or in the local cache of the hub."""
    transformers = require_extra("transformers", "hf")
    name, kind = getattr(module.config, "name_or_path", "") or "", type(module).__name__
    advice = "pass tokenizer=, a tokenizer of transformers or a function of a list of texts that returns ids (K, L)"
    if not name:
        raise ConvscopeError(f"this {kind} was not loaded from a folder or the hub, where its tokenizer is; {advice}")
    try:
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(f"no tokenizer can be loaded for {name} ({reason}); {advice}") from error
    return tokenizer


def _task(module: Any) -> tuple[str | None, OutputSelector]:
    """Return the task of a model, and how its scores are selected from its outputs."""
    kind, config = type(module).__name__, module.config
    if kind.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
        return PROBLEM_TYPES.get(getattr(config, "problem_type", None) or "", "classification"), None
    if kind.endswith("ForSemanticSegmentation"):
        return "segmentation", "logits"
    if kind.endswith(("ForObjectDetection", "ForSegmentation")) and "Mask" not in kind:
        return "detection", DetectionReader(config.num_labels)
    if kind.endswith(("Model", "Backbone")):
        return "embedding", _embedding
    return None, None


def _embedding(output: Any) -> Tensor:
    """Return the pooled features of a model without a head, or its last feature maps or tokens."""
    for key in ("pooler_output", "image_embeds", "last_hidden_state"):
        value = getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    maps: Sequence[Tensor] = getattr(output, "feature_maps", None) or output
    return maps[-1]


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Return the names in ``id2label``; None if they are placeholders."""
    names: Mapping[int, str] = getattr(config, "id2label", None) or {}
    ordered = [names[i] for i in sorted(names, key=int)]
    if not ordered or all(name == f"LABEL_{i}" for i, name in enumerate(ordered)):
        return None
    return tuple(map(str, ordered))


def _input_size(config: Any) -> tuple[int, int] | None:
    """Return the height and width that the configuration fixes."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _saved_preprocessing(name: str) -> Preprocessing | None:
    """Read the image processor beside a model, in a folder or in the local cache of the hub."""
    path: Path | None = Path(name) / PROCESSOR_FILE
    if path is not None and not path.is_file():
        path = _cached_file(name)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConvscopeError(f"{path} cannot be read as an image processor: {files.first_line(error)}") from error
    return Preprocessing.of(config)


def _timm_preprocessing(config: Any) -> Preprocessing | None:
    """Return the preprocessing in the configuration of a model of timm, whose repositories have no image processor."""
    settings = getattr(config, "pretrained_cfg", None)
    if not settings:
        return None
    from timm.data import resolve_data_config

    return Preprocessing.of(resolve_data_config(pretrained_cfg=settings))


def _cached_file(name: str) -> Path | None:
    """Return the processor's file of a hub model; it is downloaded where the hub can be reached."""
    if name.count("/") != 1 or Path(name).is_absolute() or name.startswith("."):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, PROCESSOR_FILE))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
