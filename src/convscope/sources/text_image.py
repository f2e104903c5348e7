"""What sources of networks that compare images with text share: classes as texts, and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convscope.engine.adapters import TorchAdapter
from convscope.engine.dual_encoder import IMAGE_EMBEDS, Tokenizer
from convscope.errors import ConvscopeError
from convscope.sources.spec import ModelSpec

PREFERRED_TEMPLATE = "a photo of a {}"


def set_tokenizer(spec: ModelSpec, tokenizer: Tokenizer | None) -> None:
    """Let a network that compares images with text use the user's tokenizer.

    Raises
    ------
    ConvscopeError
        For a network that does not take text, and for what is no function.
    """
    if tokenizer is None:
        return
    if spec.dual_encoder is None:
        raise ConvscopeError(f"tokenizer= is for networks that compare images with text; {spec.name} does not")
    if not callable(tokenizer):
        raise ConvscopeError(f"tokenizer is {tokenizer!r}; expected a function of a list of texts")
    spec.dual_encoder = replace(spec.dual_encoder, tokenizer=tokenizer)


def set_classes(spec: ModelSpec, classes: Sequence[str] | None, template: str | None) -> None:
    """Make a network that compares images with text a classifier over `classes`, or an embedding without them.

    Raises
    ------
    ConvscopeError
        If the network does not compare images with text and there is a template, for a template without "{}", and for
        a single class whose probability is relative to the others.
    """
    encoder = spec.dual_encoder
    if encoder is None:
        if template is not None:
            raise ConvscopeError(f"template= is for networks that compare images with text; {spec.name} does not")
        return
    if classes is None:
        if template is not None:
            raise ConvscopeError("template= needs classes=[...], whose names it puts in a text")
        spec.adapter, spec.task, spec.select = TorchAdapter(encoder.forward_function()), "embedding", IMAGE_EMBEDS
        spec.notes.append(
            "the outputs are image embeddings; classes= makes the network a classifier, and "
            "convscope.text_target explains a text"
        )
        return
    is_sigmoid = encoder.has_independent_texts(spec.module)
    if len(classes) < (1 if is_sigmoid else 2):
        raise ConvscopeError(
            f"{len(classes)} class for a network whose probabilities are relative to other classes; give at least two, "
            "or explain one text: heatmaps(model, images, convscope.text_target(...))"
        )
    embeds = encoder.text_embeds(spec.module, _texts(spec, classes, template))
    spec.adapter = TorchAdapter(encoder.forward_function(embeds))
    spec.task, spec.select = "multilabel" if is_sigmoid else "classification", "logits"


def _texts(spec: ModelSpec, classes: Sequence[str], template: str | None) -> list[str]:
    """Return the text of each class."""
    if template is None:
        spec.notes.append(
            f"the texts of the classes are their names; template={PREFERRED_TEMPLATE!r} puts them in a sentence"
        )
        return list(classes)
    if template.count("{}") != 1:
        raise ConvscopeError(f"template is {template!r}; expected a text with one {{}}, such as {PREFERRED_TEMPLATE!r}")
    return [template.replace("{}", name) for name in classes]


def tokenize(tokenizer: Any, texts: list[str], length: int | None, device: torch.device) -> dict[str, Tensor]:
    """Return token ids, under ``"input_ids"``, and what else the tokenizer returns, as tensors."""
    try:
        if hasattr(tokenizer, "pad_token"):  # of transformers
            tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        else:
            tokens = tokenizer(texts)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConvscopeError(
            f"the tokenizer raised {type(error).__name__} ({reason}); expected a function of a list of texts that "
            "returns token ids (K, L)"
        ) from error
    parts = dict(tokens) if isinstance(tokens, Mapping) else {"input_ids": tokens}
    tensors = {key: torch.as_tensor(value, device=device) for key, value in parts.items()}
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or len(ids) != len(texts):
        shape = None if ids is None else tuple(ids.shape)
        raise ConvscopeError(f"the tokenizer returns ids of shape {shape} for {len(texts)} texts; expected (K, L)")
    return tensors


def check_vocabulary(ids: Tensor, size: int) -> None:
    """Raise ConvscopeError for token ids that the text encoder does not know."""
    if bool((ids >= size).any()) or bool((ids < 0).any()):
        raise ConvscopeError(
            f"the tokenizer returns ids up to {int(ids.max())}, and the text encoder knows {size} tokens; pass the "
            "network's own: tokenizer="
        )
