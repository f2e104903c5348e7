"""Targets that are texts, for networks that compare images with text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from convscope.arguments import check_arguments
from convscope.engine.dual_encoder import IMAGE_EMBEDS
from convscope.engine.model import Model
from convscope.errors import ConvscopeError


@dataclass(frozen=True)
class TextTarget:
    """A text as a target of `convscope.heatmaps`; made by `convscope.text_target`.

    Attributes
    ----------
    text : str
        The text as the network reads it.
    """

    text: str

    def bind(self, model: Model) -> Callable[[Any], Tensor]:
        """Return the function of the output of `model` that scores the text: its logit (N,)."""
        encoder = model.dual_encoder
        if encoder is None:
            raise ConvscopeError(
                f"text_target({self.text!r}) is for networks that compare images with text, such as CLIP; "
                f"{model.name} does not"
            )
        embeds = encoder.text_embeds(model.module, [self.text])

        def score(output: Any) -> Tensor:
            return encoder.logits(model.module, output[IMAGE_EMBEDS], embeds)[:, 0]

        score.__name__ = self.text
        return score


@check_arguments
def text_target(text: str) -> TextTarget:
    """Define the target "how well the image fits a text", for networks that compare images with text.

    The score is the logit that a class with this text would have: the cosine similarity of the embeddings of image and
    text, times the network's scale, plus its bias, if it has one.

    Parameters
    ----------
    text : str
        The text as the network reads it; the `template` of `convscope.load` is not applied.

    Returns
    -------
    TextTarget
        For `targets` of `convscope.heatmaps`, alone or in a list.

    Raises
    ------
    ConvscopeError
        For an empty text. `convscope.heatmaps` raises it for networks that do not compare images with text.

    References
    ----------
    Radford et al., Learning transferable visual models from natural language supervision, ICML 2021.

    Examples
    --------
    >>> import convscope
    >>> convscope.text_target("a striped cat")
    TextTarget(text='a striped cat')
    """
    if not text.strip():
        raise ConvscopeError("text is empty; expected a text such as 'a striped cat'")
    return TextTarget(text)


def bind_texts(model: Model, targets: Any) -> Any:
    """Return `targets` with every text replaced by the function that scores it.

    Raises
    ------
    ConvscopeError
        For no target or a name where the network has image embeddings instead of classes.
    """
    if model.dual_encoder is not None and model.task == "embedding" and (targets is None or isinstance(targets, str)):
        text = targets or "a striped cat"
        raise ConvscopeError(
            f"{model.name} has no classes; give a text as targets= (convscope.text_target({text!r})), or load the "
            "network with classes="
        )
    if isinstance(targets, TextTarget):
        return targets.bind(model)
    if isinstance(targets, list | tuple):
        return [target.bind(model) if isinstance(target, TextTarget) else target for target in targets]
    return targets
