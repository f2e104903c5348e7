"""Networks that compare images with text: an image encoder and a text encoder with a joint embedding space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convscope.engine.adapters import ForwardFunction
from convscope.engine.isolation import isolated_pass
from convscope.errors import ConvscopeError

Tokenizer = Callable[[list[str]], Any]
"""``tokenizer(texts)`` returns token ids (K, L), or a mapping that holds them as ``"input_ids"``."""

MAX_TEXTS = 256  # that are encoded at a time
IMAGE_EMBEDS = "image_embeds"  # in what the network returns, as in transformers


@dataclass(frozen=True)
class DualEncoder:
    """The encoders of a network that compares images with text.

    Every function takes the network, so that none is kept alive here.

    Attributes
    ----------
    encode_image : callable
        ``encode_image(module, x) -> (N, D)`` for a batch of images.
    encode_text : callable
        ``encode_text(module, texts, tokenizer) -> (K, D)`` for a list of strings.
    tokenizer : callable, optional
        Tokenizer of the text encoder; None for the one that `encode_text` finds.
    """

    encode_image: Callable[[Any, Tensor], Tensor]
    encode_text: Callable[[Any, list[str], Tokenizer | None], Tensor]
    tokenizer: Tokenizer | None = None

    def text_embeds(self, module: nn.Module, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (K, D) of texts, of length 1, without gradients."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            isolated_pass(module, list(module.modules())[1:], list(module.parameters())),
        ):
            chunks = [list(texts[start : start + MAX_TEXTS]) for start in range(0, len(texts), MAX_TEXTS)]
            parts = [self.encode_text(module, chunk, self.tokenizer).float() for chunk in chunks]
            embeds = F.normalize(torch.cat(parts), dim=-1)
        if not bool(embeds.isfinite().all()):
            raise ConvscopeError("the text encoder returns values that are not finite (NaN or Inf in its weights?)")
        return embeds

    def logits(self, module: Any, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Return the scaled similarities (N, K) of images and texts, with the network's bias, if it has one."""
        logits: Tensor = module.logit_scale.exp() * image_embeds @ text_embeds.to(image_embeds).T
        bias = getattr(module, "logit_bias", None)
        return logits if bias is None else logits + bias

    def has_independent_texts(self, module: Any) -> bool:
        """Return whether each text has a probability of its own (SigLIP), not one relative to other texts (CLIP)."""
        return getattr(module, "logit_bias", None) is not None

    def forward_function(self, text_embeds: Tensor | None = None) -> ForwardFunction:
        """Return a function that runs the image encoder.

        It returns ``"image_embeds"`` (N, D), of length 1, and, if there are texts, their ``"logits"`` (N, K).
        """

        def forward(module: Any, x: Tensor) -> dict[str, Tensor]:
            image_embeds = F.normalize(self.encode_image(module, x), dim=-1)
            if text_embeds is None:
                return {IMAGE_EMBEDS: image_embeds}
            return {"logits": self.logits(module, image_embeds, text_embeds), IMAGE_EMBEDS: image_embeds}

        return forward
