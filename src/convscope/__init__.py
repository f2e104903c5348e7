"""A microscope for convnets: see what a PyTorch or Keras network has learned.

import convscope

model = convscope.load("lite0")
convscope.predict(model, "photo.jpg")
convscope.activations(model, "photo.jpg")
convscope.patterns(model, "logits", ["African elephant"])
heat = convscope.heatmaps(model, "photo.jpg")
convscope.evaluate(model, "photo.jpg", heat)
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convscope.activations import Activations, Predictions, activations, predict
    from convscope.comparison import Comparison, compare
    from convscope.errors import ConvscopeError
    from convscope.evaluation import Evaluation, evaluate
    from convscope.explorer.embed import show
    from convscope.heatmaps import Heatmaps, heatmaps, of_head, over_region
    from convscope.images import Preprocessing
    from convscope.model import Model
    from convscope.patterns import Patterns, patterns
    from convscope.scan.atlas import Atlas, atlas
    from convscope.scan.concepts import Concepts, concepts
    from convscope.scan.run import scan
    from convscope.scan.store import Store, open_store
    from convscope.sources import load
    from convscope.story import Story, story

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Atlas",
    "Comparison",
    "Concepts",
    "ConvscopeError",
    "Evaluation",
    "Heatmaps",
    "Model",
    "Patterns",
    "Predictions",
    "Preprocessing",
    "Store",
    "Story",
    "activations",
    "atlas",
    "compare",
    "concepts",
    "evaluate",
    "heatmaps",
    "load",
    "of_head",
    "open_store",
    "over_region",
    "patterns",
    "predict",
    "scan",
    "show",
    "story",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: `import convscope` itself stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'convscope' has no attribute {name!r}")
    from importlib import import_module

    for teacher in (
        "convscope.storybook",
        "convscope.scan.concept_figures",
        "convscope.scan.show",
    ):  # with figures, they teach results to draw themselves
        import_module(teacher)
    where = {
        "convscope.activations": ("Activations", "Predictions", "activations", "predict"),
        "convscope.comparison": ("Comparison", "compare"),
        "convscope.errors": ("ConvscopeError",),
        "convscope.evaluation": ("Evaluation", "evaluate"),
        "convscope.explorer.embed": ("show",),
        "convscope.heatmaps": ("Heatmaps", "heatmaps", "of_head", "over_region"),
        "convscope.images": ("Preprocessing",),
        "convscope.model": ("Model",),
        "convscope.patterns": ("Patterns", "patterns"),
        "convscope.scan.atlas": ("Atlas", "atlas"),
        "convscope.scan.concepts": ("Concepts", "concepts"),
        "convscope.scan.run": ("scan",),
        "convscope.scan.store": ("Store", "open_store"),
        "convscope.sources": ("load",),
        "convscope.story": ("Story", "story"),
    }
    for module, names in where.items():
        globals().update({n: getattr(import_module(module), n) for n in names})
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """Importing `convscope.heatmaps`, the module, must not hide `convscope.heatmaps`, the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
