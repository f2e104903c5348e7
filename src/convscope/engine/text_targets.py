"""Targets that are texts, for networks that compare images with text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from convscope.arguments import check_arguments
from convscope.engine.adapters import TorchAdapter
from convscope.engine.capture import ForwardResult, LayerOutputs
from convscope.engine.dual_encoder import IMAGE_EMBEDS, DualEncoder
from convscope.engine.model import Model
from convscope.engine.outputs import OutputReader
from convscope.errors import ConvscopeError


@dataclass(frozen=True)
class TextTarget:
    """A text to compare images with; made by `convscope.text_target`.

    Attributes
    ----------
    text : str
        The text as the network reads it.
    """

    text: str

    def bind(self, model: Model) -> Callable[[Any], Tensor]:
        """Return the function of the output of `model` that scores the text: its logit (N,)."""
        encoder = require_dual_encoder(model, self.text)
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
        Alone or in a list: for `targets` of `convscope.heatmaps` and `convscope.predict`, and in the place of a layer
        in `convscope.patterns`.

    Raises
    ------
    ConvscopeError
        For an empty text. Functions that get the target raise it for networks that do not compare images with text.

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


def parse_names(
    model: Model, names: Sequence[str | int] | None, num_images: int
) -> list[list[int]] | list[TextTarget] | None:
    """Return the targets for each image, or None: classes, or texts if the network has image embeddings instead.

    Parameters
    ----------
    model : Model
    names : sequence of str or int, optional
        Names or indices of classes, or texts.
    num_images : int
    """
    if not names:
        return None
    if model.dual_encoder is not None and model.classes is None:
        return [text_target(str(name)) for name in names]
    return [[model.class_index(name) for name in names]] * num_images


def require_dual_encoder(model: Model, text: str) -> DualEncoder:
    """Return the encoders of a network that compares images with text; raise ConvscopeError for other networks."""
    if model.dual_encoder is None:
        raise ConvscopeError(
            f"text_target({text!r}) is for networks that compare images with text, such as CLIP; {model.name} does not"
        )
    return model.dual_encoder


def parse_texts(targets: object) -> list[str]:
    """Return the texts of one text target or of several; raise ConvscopeError for anything else."""
    texts = [targets] if isinstance(targets, TextTarget) else targets
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, TextTarget) for text in texts):
        raise ConvscopeError(
            f"targets is {targets!r}; expected convscope.text_target(...) or a list of these (the logits of all "
            "classes are in the result's `logits`)"
        )
    return [text.text for text in texts]


def model_of_texts(model: Model, texts: Sequence[str]) -> Model:
    """Return the network with the logits of texts as its outputs, in the order of the texts.

    They are probabilities after a sigmoid where each text has one of its own; otherwise they are values.
    """
    encoder = require_dual_encoder(model, texts[0])
    embeds = encoder.text_embeds(model.module, texts)
    task = "multilabel" if encoder.has_independent_texts(model.module) else "embedding"
    return replace(
        model,
        classes=tuple(texts),
        num_outputs=len(texts),
        adapter=TorchAdapter(encoder.forward_function(embeds)),
        reader=OutputReader(task, "logits"),
    )


def with_text_logits(
    forward: Callable[[Tensor], LayerOutputs], model: Model, texts: Sequence[str]
) -> Callable[[Tensor], LayerOutputs]:
    """Return `forward`, whose results also hold the logits (N,) of `texts`, under the texts, among their maps."""
    encoder = require_dual_encoder(model, texts[0])
    embeds = encoder.text_embeds(model.module, texts)

    def run(x: Tensor) -> LayerOutputs:
        result = forward(x)
        if not isinstance(result, ForwardResult):
            raise ConvscopeError("the forward pass ended before the output, which texts are compared with")
        output: Any = result.output
        logits = encoder.logits(model.module, output[IMAGE_EMBEDS], embeds)
        return replace(result, maps={**result.maps, **dict(zip(texts, logits.unbind(1), strict=True))})

    return run


def require_classes(model: Model, text: str) -> None:
    """Raise ConvscopeError if a network that takes texts has no classes; its advice is the target `text`."""
    if model.task == "embedding":
        raise ConvscopeError(
            f"{model.name} has no classes; give a text as targets= (convscope.text_target({text!r})), or load the "
            "network with classes="
        )


def bind_texts(model: Model, targets: Any) -> Any:
    """Return `targets` with every text replaced by the function that scores it.

    Raises
    ------
    ConvscopeError
        For a name where the network has image embeddings instead of classes.
    """
    if model.dual_encoder is not None and isinstance(targets, str):
        require_classes(model, targets)
    if isinstance(targets, TextTarget):
        return targets.bind(model)
    if isinstance(targets, list | tuple):
        return [target.bind(model) if isinstance(target, TextTarget) else target for target in targets]
    return targets
