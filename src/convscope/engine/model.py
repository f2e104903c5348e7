"""The model: a network together with its preprocessing, class names and layer table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from convscope.engine.adapters import FrameworkAdapter
from convscope.engine.candidates import DetectionReader
from convscope.engine.class_names import find_class, is_class_name
from convscope.engine.dual_encoder import DualEncoder
from convscope.engine.edits import LayerEdit, digest_edits
from convscope.engine.layer_table import LayerTable
from convscope.engine.outputs import VALUE_TASKS, OutputReader
from convscope.errors import ConvscopeError, is_int
from convscope.images.preprocessing import Preprocessing

LOGITS = "logits"  # the name that stands for the classes wherever a layer is expected


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its preprocessing, class names and layer table, as returned by `convscope.load`.

    Attributes
    ----------
    module : torch.nn.Module
        The network itself.
    name : str
        Where it came from, such as "lite0" or "torchvision:vgg16".
    preprocessing : Preprocessing
        How images become inputs of the network.
    classes : tuple of str or None
        Class names, where they are known.
    layers : LayerTable
        The layers in the order in which they finish; prints as a table.
    adapter : FrameworkAdapter
        Access to the network in its own framework.
    final_activation : {"softmax", "log_softmax", "sigmoid"} or None
        The activation that ends the network; logits are its input.
    notes : tuple of str
        Remarks, for instance on where the preprocessing comes from.
    assumptions : tuple of str
        What was assumed, in a few words: "preprocessing is assumed", "weights are random".
    fixed_batch_size : int or None
        The only batch size that an exported network takes.
    num_outputs : int or None
        Number of outputs per image.
    loaded_by_convscope : bool
        Whether `load` made the module, so that user code does not modify it.
    channels_last_output : bool
        Whether the network returns class maps (N, H, W, K).
    contiguous_input : bool
        Whether inputs must be contiguous, because the network calls ``view`` on what it makes of them.
    accelerate : bool
        Whether passes may be accelerated; those of a user's own module never are.
    reader : OutputReader
        How class scores are read from what the network returns.
    differentiable : bool
        Whether gradients pass through the network.
    is_stochastic : bool
        Whether the network gives another output each time it runs.
    dual_encoder : DualEncoder or None
        The encoders of a network that compares images with text.
    edits : tuple of LayerEdit
        Changes of layers' outputs, made by `convscope.edit`.

    Examples
    --------
    >>> import convscope
    >>> model = convscope.load("lite0")
    >>> model
    <convscope model lite0: ... layers, 1000 classes, ...>
    >>> model.class_index("African elephant")
    386
    >>> model.layers["blocks.4.1"].shape
    (112, 14, 14)
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    layers: LayerTable
    adapter: FrameworkAdapter
    final_activation: str | None = None
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    fixed_batch_size: int | None = None
    num_outputs: int | None = None
    loaded_by_convscope: bool = False
    channels_last_output: bool = False
    contiguous_input: bool = False
    accelerate: bool = True
    reader: OutputReader = field(default_factory=OutputReader)
    differentiable: bool = True
    is_stochastic: bool = False
    dual_encoder: DualEncoder | None = None
    edits: tuple[LayerEdit, ...] = ()

    @property
    def task(self) -> str:
        """What the outputs mean.

        "classification", "binary", "multilabel", "regression", "probabilities", "segmentation", "detection" or
        "embedding".
        """
        return self.reader.task

    @property
    def has_values(self) -> bool:
        """Whether the outputs are values (regression, embedding), not scores of classes."""
        return self.task in VALUE_TASKS

    @property
    def has_independent_classes(self) -> bool:
        """Whether each class has a probability of its own, so that they need not sum to 1."""
        is_sigmoid = self.final_activation == "sigmoid" and not self.reader.has_implicit_class
        return self.task in ("multilabel", "detection") or is_sigmoid

    @property
    def can_accelerate(self) -> bool:
        """Whether passes may be accelerated: not switched off, `load` made the module, and nothing is edited."""
        return self.accelerate and self.loaded_by_convscope and not self.edits

    def modules_and_parameters(self) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
        """Return all layers by name, those of edits included, and all parameters of the network.

        Those of a user's own module are looked up on every call, since it may have changed.
        """
        return self._cached_parts if self.loaded_by_convscope else self._look_up_parts()

    @cached_property
    def _cached_parts(self) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
        return self._look_up_parts()

    def _look_up_parts(self) -> tuple[dict[str, nn.Module], list[nn.Parameter]]:
        added = {name: module for edit in self.edits for name, module in edit.modules.items()}
        return self.adapter.modules(self.module) | added, list(self.adapter.parameters(self.module))

    def _parameters(self) -> Iterable[nn.Parameter]:
        return self._cached_parts[1] if self.loaded_by_convscope else self.adapter.parameters(self.module)

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the CPU if there are none."""
        return next((p.device for p in self._parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters, and of the inputs that the network takes."""
        floats = (p.dtype for p in self._parameters() if p.is_floating_point())
        return next(floats, torch.float32)

    def as_input(self, x: Tensor) -> Tensor:
        """Return a batch on the device, and in the floating-point type and memory format, that the network takes."""
        x = x.to(device=self.device, dtype=self.dtype)
        return x.contiguous() if self.contiguous_input else x

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits (N, K) into probabilities (N, K); the values of a regression are returned as they are.

        The softmax for classification and segmentation; the sigmoid for binary and multi-label networks, and those that
        end in one; the exponential where the network returns probabilities.
        """
        return self.reader.probabilities(logits, self.final_activation)

    def require_scores(self) -> None:
        """Raise ConvscopeError if it is not known which part of the output holds scores."""
        if self.num_outputs is None:
            raise ConvscopeError(self.reader.unreadable or f"{self.name} returns no scores of classes")

    @property
    def detection_reader(self) -> DetectionReader:
        """How candidates are read from a detector's output; raises `ConvscopeError` for other networks."""
        if not isinstance(self.reader.select, DetectionReader):
            raise ConvscopeError(
                f"{self.name} is not known to be a detector (its task is {self.task!r}); if it is one, say so: "
                "convscope.load(..., task='detection')"
            )
        return self.reader.select

    def require_gradients(self, purpose: str) -> None:
        """Raise ConvscopeError if no gradients pass through the network; `purpose` names what needs them."""
        if not self.differentiable:
            raise ConvscopeError(
                f"{purpose} needs gradients or layers, and {self.name} is a function that has none; "
                "heatmaps by method='rise' or 'occlusion' work"
            )

    def losses(self, logits: Tensor) -> Tensor | None:
        """Return the cross-entropy (N, K) of logits for each class; None unless exactly one class is right."""
        if self.has_values or self.has_independent_classes:
            return None
        return -self.reader.log_probabilities(logits, self.final_activation)

    @property
    def score_name(self) -> str:
        """What `probabilities` returns: "probability", or "value" for a network that computes values."""
        return "value" if self.has_values else "probability"

    @property
    def output_noun(self) -> str:
        """What an output is: "class", or "output" for a network that computes values."""
        return "output" if self.has_values else "class"

    def format_score(self, score: float) -> str:
        """Format a probability as a percentage, or a value as it is."""
        return f"{score:.4g}" if self.has_values else f"{score:.1%}"

    def class_name(self, index: int) -> str:
        """Return the name of a class, or "class 7" where names are unknown; "output 7" where outputs are values."""
        if self.classes is not None:
            return self.classes[index]
        return f"output {index}" if self.has_values else f"class {index}"

    def class_index(self, target: int | str) -> int:
        """Return the index of a class given by index or by name; case and underscores do not matter.

        Raises
        ------
        ConvscopeError
            For an index out of range, and for a name that is unknown or shared by several classes.
        """
        if isinstance(target, str):
            return self._index_of_name(target)
        if not is_int(target):
            raise ConvscopeError(f"class {target!r} is neither an index nor a name")
        count = self.num_outputs if self.num_outputs is not None else len(self.classes or ()) or None
        if count is not None and not 0 <= target < count:
            raise ConvscopeError(f"class {target} is out of range: this model has {count} classes, 0 to {count - 1}")
        return int(target)

    def _index_of_name(self, name: str) -> int:
        if name.strip().isdecimal() and not is_class_name(name, self.classes or ()):
            return self.class_index(int(name))
        if self.classes is None:
            raise ConvscopeError(f"class {name!r} given by name, but this model has no class names; give the index")
        return find_class(name, self.classes)

    def weights_hash(self) -> str:
        """Return the SHA-256 of parameters and buffers with their names, and of edits, which identifies the weights."""
        digest = hashlib.sha256(digest_edits(self.edits))
        for name, tensor in self._named_tensors().items():
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        return digest.hexdigest()

    def _named_tensors(self) -> Mapping[str, object]:
        if self.adapter.name == "torch":
            return self.module.state_dict()
        return {str(i): p for i, p in enumerate(self.adapter.parameters(self.module))}

    def describe(self) -> dict[str, object]:
        """Return what a manifest says about the model: name, hash of the weights, preprocessing, notes."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_hash(),
            "preprocessing": self.preprocessing.as_dict(),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        classes = f"{self.num_outputs} outputs" if self.classes is None else f"{len(self.classes)} classes"
        facts = f"{len(self.layers)} layers, {classes}, {self.preprocessing}"
        return f"<convscope model {self.name}: {'; '.join([facts, *self.assumptions])}>"
