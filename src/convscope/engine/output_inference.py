"""Infer what a network's output means where that is certain, and say from what.

What is not certain stays open: the reader then has no scores, and says which argument of `convscope.load` settles it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from convscope.engine.candidates import DetectionReader, is_list_of_boxes
from convscope.engine.nested import PREFERRED_KEYS, iter_tensors, primary_tensor
from convscope.engine.outputs import (
    LOG_TASKS,
    VALUE_TASKS,
    OutputReader,
    OutputSelector,
    output_names,
    pick_output,
)
from convscope.errors import ConvscopeError

PROBABILITY_TASKS = (None, "classification", "binary", "multilabel", "probabilities")
SUM_TOLERANCE = 1e-3  # of probabilities that sum to 1, in half precision too


@dataclass(frozen=True)
class OutputRequest:
    """What is known of the output before the network runs.

    Attributes
    ----------
    task : str or None
        The task, if the user or the source says it.
    select : str, int, callable or None
        Which of several outputs.
    num_classes : int or None
        Number of class names, where they are known.
    """

    task: str | None = None
    select: OutputSelector = None
    num_classes: int | None = None


@dataclass(frozen=True)
class OutputFacts:
    """What a traced forward pass of one image tells about the output.

    Attributes
    ----------
    output : object
        What the network returned.
    spatial_dims : tuple of int
        Dimensions of the selected tensor that are spatial axes of the input.
    activation : str or None
        The softmax or sigmoid that ends the network.
    is_removable : bool
        Whether logits can be taken in front of `activation`: not inside TorchScript.
    softmax_dim : int or None
        The dimension that it runs along.
    input_shape : tuple of int
        Shape of the network's input.
    channels_last : bool
        Whether the selected tensor is class maps (N, H, W, K), which are brought to (N, K, H, W) when the network runs.
    rerun : callable
        Returns the selected tensor for another input.
    """

    output: object
    spatial_dims: tuple[int, ...]
    activation: str | None
    is_removable: bool
    softmax_dim: int | None
    input_shape: tuple[int, ...]
    channels_last: bool
    rerun: Callable[[], Tensor | None]


@dataclass(frozen=True)
class OutputMeaning:
    """The result of `infer_output`.

    Attributes
    ----------
    reader : OutputReader
    num_outputs : int or None
        Number of classes or values per image; None if it is not known.
    final_activation : str or None
        The activation that is removed to get logits.
    notes : tuple of str
        What was inferred, and from what.
    """

    reader: OutputReader
    num_outputs: int | None
    final_activation: str | None
    notes: tuple[str, ...]


def select_scores(output: object, request: OutputRequest) -> tuple[OutputSelector, list[str]]:
    """Choose the output that holds the scores; return its selector and notes."""
    if request.task == "detection" or is_list_of_boxes(output):
        select = request.select
        reader = select if isinstance(select, DetectionReader) else DetectionReader(request.num_classes, select)
        reader.check(output)
        return reader, []
    if request.select is not None:
        pick_output(output, request.select)  # raises where there is none
        return request.select, []
    names = output_names(output)
    tensors = list(iter_tensors(output))
    floats = [t for t in tensors if t.is_floating_point()]
    if len(floats) < 2 or any(name.startswith(repr(key)) for name in names for key in PREFERRED_KEYS):
        return None, []
    parts = list(output) if isinstance(output, tuple | list) else []
    fitting = [
        i
        for i, part in enumerate(parts)
        if (t := primary_tensor(part)) is not None and t.ndim == 2 and t.shape[1] == request.num_classes
    ]
    if request.num_classes is not None and len(fitting) == 1:
        note = f"the network returns {', '.join(names)}; output {fitting[0]} fits the {request.num_classes} class names"
        return fitting[0], [note]
    return None, [f"the network returns {', '.join(names)}; the first is taken as the scores: choose with output="]


def infer_output(facts: OutputFacts, request: OutputRequest, select: OutputSelector) -> OutputMeaning:
    """Infer the task and the layout of the scores.

    Raises
    ------
    ConvscopeError
        If the output contradicts the task that the user says.
    """
    if isinstance(select, DetectionReader):
        request = replace(request, task="detection")
    reader = OutputReader(request.task or "classification", select)
    tensor = reader.tensor(facts.output)
    if tensor is None:
        return OutputMeaning(
            replace(reader, class_dim=None, unreadable="the network returns no tensor"), None, None, ()
        )
    notes: list[str] = []
    reader, note = _find_classes(reader, tensor, facts)
    notes += [note] * bool(note)
    if reader.class_dim is None:
        return OutputMeaning(reader, None, None, tuple(notes))
    count = 1 if tensor.ndim == 1 else tensor.shape[reader.class_dim]
    task, note = _find_task(request, reader, tensor, facts, count)
    notes += [note] * bool(note)
    is_two_classes = request.num_classes == 2 or facts.activation == "sigmoid"
    implicit = count == 1 and (task == "binary" or (task in LOG_TASKS and is_two_classes))
    activation = None if task in (*VALUE_TASKS, *LOG_TASKS) else facts.activation
    class_dim = 1 if facts.channels_last else reader.class_dim
    reader = replace(reader, task=task, class_dim=class_dim, has_implicit_class=implicit)
    return OutputMeaning(reader, count + implicit, activation, tuple(notes))


def _find_classes(reader: OutputReader, tensor: Tensor, facts: OutputFacts) -> tuple[OutputReader, str]:
    """Find the dimension of the classes, and say from what, unless the output is (N, K)."""
    if tensor.ndim <= 2:
        return reader, ""
    shape = tuple(tensor.shape)
    dims = [dim for dim in range(1, tensor.ndim) if dim not in facts.spatial_dims]
    if facts.spatial_dims and len(dims) == 1:
        positions = " x ".join(str(shape[dim]) for dim in facts.spatial_dims)
        task = "segmentation" if reader.task == "classification" else reader.task
        note = f"the network returns class maps ({positions} positions); a class's score is its mean over positions"
        return replace(reader, class_dim=dims[0], task=task), note if task == "segmentation" else ""
    wide = [dim for dim in range(1, tensor.ndim) if shape[dim] > 1]
    if len(wide) <= 1:
        return replace(reader, class_dim=wide[0] if wide else 1), ""
    if facts.softmax_dim is not None and facts.softmax_dim % tensor.ndim:
        dim = facts.softmax_dim % tensor.ndim
        note = (
            f"the network returns {shape}; classes are taken along axis {dim}, along which its {facts.activation} "
            "runs, and averaged over the other axes"
        )
        return replace(reader, class_dim=dim), note
    ratios = {round(side / n, 3) for n, side in zip(shape[2:], facts.input_shape[2:], strict=False)}
    if tensor.ndim == len(facts.input_shape) and len(ratios) == 1:
        note = (
            f"the network returns {shape}, in the proportions of the image: taken for class maps; a class's score is "
            "its mean over positions"
        )
        return replace(reader, task="segmentation" if reader.task == "classification" else reader.task), note
    reason = (
        f"the network returns {shape} for one image, not scores (N, K), and which axis holds the classes is not known; "
        "say it: load(..., output=lambda out: ...) with a function that returns (N, K), or give a function of the "
        "output as target"
    )
    return replace(reader, class_dim=None, unreadable=reason), reason


def _find_task(
    request: OutputRequest, reader: OutputReader, tensor: Tensor, facts: OutputFacts, count: int
) -> tuple[str, str]:
    """Return the task, and a note that says what it was inferred from."""
    if not facts.is_removable and facts.activation in ("softmax", "sigmoid") and request.task in PROBABILITY_TASKS:
        return "probabilities", (
            f"the final {facts.activation} cannot be removed from this network: logits are logarithms of its outputs"
        )
    if request.task is not None:
        return _check_task(request.task, facts.activation, count), ""
    if reader.task != "classification":
        return reader.task, ""
    if count == 1 and facts.activation == "sigmoid":
        if request.num_classes == 1:
            return "multilabel", ""
        return "binary", "one output with a final sigmoid: taken for the probability of class 1 of two classes"
    if count == 1 and request.num_classes == 2:
        return "binary", "one output and two class names: taken for the logit of the second class"
    if count == 1:
        return "regression", (
            "one output without a final sigmoid: taken for a value (task='regression'); if it is the logit of one of "
            "two classes, say task='binary'"
        )
    if facts.activation == "sigmoid":
        return "multilabel", ""
    if facts.activation is not None and facts.is_removable:
        return reader.task, ""
    if _are_probabilities(tensor, reader) and _are_probabilities(facts.rerun(), reader):
        return "probabilities", (
            "the outputs are not negative and sum to 1 on two test images: taken for probabilities, no softmax is "
            "applied; logits are their logarithms"
        )
    return reader.task, (
        "the outputs are taken for logits of competing classes, whose probabilities are the softmax; for independent "
        "classes say task='multilabel', for values task='regression'"
    )


def _check_task(task: str, activation: str | None, count: int) -> str:
    """Check a task that the user says against the output; return it in the form that the network allows."""
    if task == "binary" and count > 2:
        raise ConvscopeError(f"task='binary' for a network with {count} outputs; expected 1 or 2")
    if task == "multilabel" and activation in ("softmax", "log_softmax"):
        raise ConvscopeError(
            f"task='multilabel' for a network that ends in a {activation}, which makes the classes compete; "
            "expected logits or a final sigmoid"
        )
    if task == "classification" and count == 1:
        return "binary"
    if task == "probabilities" and activation is not None:
        return "classification" if activation != "sigmoid" else "binary" if count == 1 else "multilabel"
    return task


def _are_probabilities(tensor: Tensor | None, reader: OutputReader) -> bool:
    if tensor is None or reader.class_dim is None:
        return False
    sums = tensor.detach().float().sum(reader.class_dim)
    return bool((tensor >= 0).all()) and bool((sums - 1).abs().max() <= SUM_TOLERANCE)
