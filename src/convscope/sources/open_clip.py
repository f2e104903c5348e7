"""Networks of open_clip and of OpenAI's CLIP: by name, or an instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from convscope.engine.dual_encoder import DualEncoder, Tokenizer
from convscope.errors import ConvscopeError, require_extra
from convscope.images.preprocessing import Preprocessing
from convscope.sources import files
from convscope.sources.spec import ModelSpec, fixed_seed
from convscope.sources.text_image import check_vocabulary, tokenize
from convscope.suggestions import suggest

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT_LENGTH = 77  # tokens of a text
VOCABULARY = 49408  # tokens of CLIP's byte-pair encoding
ATTRIBUTES = ("encode_image", "encode_text", "logit_scale", "visual")


def from_name(name: str, weights: str, num_classes: int | None = None) -> ModelSpec:  # noqa: ARG001
    """Make a network of open_clip, "NAME" or "NAME/TAG"; weights are downloaded unless "random" or a file."""
    open_clip = require_extra("open_clip", "clip")
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise ConvscopeError(
            f"open_clip has no model {architecture!r}; {suggest(architecture, open_clip.list_models())}"
        )
    notes: list[str] = []
    if weights == "default":
        tag = _tag(open_clip, architecture, tag, notes)
        quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
        with files.download_errors(f"open_clip:{name}"):
            module = open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick_gelu)
    else:
        with fixed_seed():
            module = open_clip.create_model(architecture, pretrained=None, pretrained_hf=False)
        if weights != "random":
            notes = files.load_weights_file(module, Path(weights))
    spec = from_model(module.eval(), _named_tokenizer(open_clip, architecture))
    spec.name, spec.loaded_by_convscope = f"open_clip:{name}", True
    spec.notes += notes
    spec.preprocessing_origin = None  # the model's own
    return spec


def _tag(open_clip: Any, architecture: str, tag: str, notes: list[str]) -> str:
    """Return the tag of the weights to load; of several, the first is taken, with a note."""
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if not known:
        raise ConvscopeError(f"open_clip has no weights for {architecture!r}; give weights='random' or a file")
    if tag and tag not in known:
        raise ConvscopeError(f"open_clip has no weights {tag!r} for {architecture!r}; there are {', '.join(known)}")
    if not tag and len(known) > 1:
        notes.append(f"weights {known[0]!r} of {', '.join(known)}; choose with open_clip:{architecture}/TAG")
    return tag or str(known[0])


def _named_tokenizer(open_clip: Any, architecture: str) -> Tokenizer | None:
    """Return the tokenizer of a network by name; None if its files are not on this machine and cannot be loaded."""
    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(architecture)
    except (OSError, ValueError, ImportError):
        return None
    return tokenizer


def is_text_image_model(module: object) -> bool:
    """Whether a module has the interface of open_clip's and OpenAI's CLIP."""
    return all(hasattr(module, name) for name in ATTRIBUTES)


def from_model(module: Any, tokenizer: Tokenizer | None = None) -> ModelSpec:
    """Describe a network of open_clip or OpenAI's CLIP."""
    config = getattr(module.visual, "preprocess_cfg", None)
    if not config and type(module).__module__ == "clip.model":  # OpenAI's own package
        config = {"size": module.visual.input_resolution, "mean": OPENAI_MEAN, "std": OPENAI_STD}
    return ModelSpec(
        module,
        type(module).__name__,
        preprocessing=Preprocessing.of(_preprocessing_fields(config)) if config else None,
        preprocessing_origin="the network's preprocess_cfg" if config else None,
        loaded_by_convscope=False,
        dual_encoder=DualEncoder(_encode_image, _encode_text, tokenizer),
        size=_image_size(module.visual),
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
    )


def _encode_image(module: Any, x: Tensor) -> Tensor:
    embeds: Tensor = module.encode_image(x)
    return embeds


def _encode_text(module: Any, texts: list[str], tokenizer: Tokenizer | None) -> Tensor:
    vocabulary = getattr(module, "vocab_size", None)
    length = int(getattr(module, "context_length", None) or CONTEXT_LENGTH)
    encode = _default_tokenizer(vocabulary, length) if tokenizer is None else tokenizer
    ids = tokenize(encode, texts, length, next(module.parameters()).device)["input_ids"]
    if vocabulary is not None:
        check_vocabulary(ids, vocabulary)
    embeds: Tensor = module.encode_text(ids)
    return embeds


def _default_tokenizer(vocabulary: int | None, length: int) -> Tokenizer:
    """Return CLIP's own tokenizer, whose vocabulary is in open_clip's package."""
    if vocabulary not in (None, VOCABULARY):
        raise ConvscopeError(
            f"the text encoder knows {vocabulary} tokens, CLIP's tokenizer {VOCABULARY}; pass the network's own: "
            "load(..., tokenizer=), a function of a list of texts that returns token ids (K, L)"
        )
    tokenizer: Tokenizer = require_extra("open_clip", "clip").SimpleTokenizer(context_length=length)
    return tokenizer


def _image_size(visual: Any) -> tuple[int, int] | None:
    """Return the height and width that the image encoder is built for."""
    size = getattr(visual, "image_size", None) or getattr(visual, "input_resolution", None)
    if size is None:
        return None
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _preprocessing_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Preprocessing` that open_clip's ``preprocess_cfg`` describes."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    fields = {"size": (height, width), "interpolation": config.get("interpolation", "bicubic")}
    fields |= {"mean": tuple(config["mean"]), "std": tuple(config["std"])}
    is_cropped = config.get("resize_mode", "shortest") == "shortest"
    return {**fields, **({"resize": max(height, width)} if is_cropped else {})}
