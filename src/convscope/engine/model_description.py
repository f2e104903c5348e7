"""What a saved or pickled result knows of its model: everything but the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from convscope.engine.model import Model
from convscope.images.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """The name, preprocessing and class names of a model, without its network.

    Attributes
    ----------
    description : dict
        What `Model.describe` returned: name, hash of the weights, preprocessing, notes.
    class_names : mapping of int to str
        Names of the classes that the result mentions.
    task : str
        What the outputs mean, as in `Model.task`.
    final_activation : str or None
        The activation that ends the network.
    """

    description: dict[str, Any]
    class_names: Mapping[int, str]
    task: str = "classification"
    final_activation: str | None = None

    has_values = Model.has_values
    has_independent_classes = Model.has_independent_classes
    score_name = Model.score_name
    output_noun = Model.output_noun
    format_score = Model.format_score

    @classmethod
    def of(cls, model: Model, classes: Iterable[int]) -> Model:
        """Describe a model and some of its classes; typed as the Model that it stands for."""
        if isinstance(model, cls):
            return model
        names = {int(index): model.class_name(int(index)) for index in classes if index >= 0}
        return cast(Model, cls(model.describe(), names, model.task, model.final_activation))

    @property
    def name(self) -> str:
        """Where the model came from, such as "lite0"."""
        return str(self.description["name"])

    @property
    def preprocessing(self) -> Preprocessing:
        """How images became inputs of the network."""
        return Preprocessing.of(self.description["preprocessing"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the model."""
        return tuple(self.description["notes"])

    def describe(self) -> dict[str, Any]:
        """Return the description."""
        return self.description

    def class_name(self, index: int) -> str:
        """Return the name of a class."""
        return self.class_names.get(index, f"class {index}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{name!r} needs the network of {self.name}, which a saved or pickled result does not carry; load the "
            "model and repeat the call"
        )

    def __repr__(self) -> str:
        return f"<description of the convscope model {self.name}, without its network>"
