"""A microscope for convnets: see what a PyTorch or Keras network has learned.

import convscope

model = convscope.load("lite0")
convscope.predict(model, "photo.jpg")
convscope.activations(model, "photo.jpg")
convscope.patterns(model, "logits", ["African elephant"])
heatmaps = convscope.heatmaps(model, "photo.jpg")
convscope.evaluate(model, "photo.jpg", heatmaps)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convscope.attribution.api import heatmaps
    from convscope.attribution.result import Heatmaps
    from convscope.attribution.targets import output_target, segmentation_target
    from convscope.decomposition.activation_atlas import Atlas, atlas
    from convscope.decomposition.craft import Concepts, concepts
    from convscope.engine.model import Model
    from convscope.errors import ConvscopeError
    from convscope.evaluation.api import evaluate
    from convscope.evaluation.comparison import Comparison, compare
    from convscope.evaluation.result import Evaluation
    from convscope.explorer.notebook import show
    from convscope.feature_maps import Activations, Predictions, activations, predict
    from convscope.featurevis import objectives
    from convscope.featurevis.api import patterns
    from convscope.featurevis.layer_story import Story, story
    from convscope.featurevis.result import Patterns
    from convscope.images.preprocessing import Preprocessing
    from convscope.scanning.api import scan
    from convscope.sources.api import load
    from convscope.store.store import Store, open_store

__version__ = "0.1.0"

_MODULES = {
    "Activations": "convscope.feature_maps",
    "Atlas": "convscope.decomposition.activation_atlas",
    "Comparison": "convscope.evaluation.comparison",
    "Concepts": "convscope.decomposition.craft",
    "ConvscopeError": "convscope.errors",
    "Evaluation": "convscope.evaluation.result",
    "Heatmaps": "convscope.attribution.result",
    "Model": "convscope.engine.model",
    "Patterns": "convscope.featurevis.result",
    "Predictions": "convscope.feature_maps",
    "Preprocessing": "convscope.images.preprocessing",
    "Store": "convscope.store.store",
    "Story": "convscope.featurevis.layer_story",
    "activations": "convscope.feature_maps",
    "atlas": "convscope.decomposition.activation_atlas",
    "compare": "convscope.evaluation.comparison",
    "concepts": "convscope.decomposition.craft",
    "evaluate": "convscope.evaluation.api",
    "heatmaps": "convscope.attribution.api",
    "load": "convscope.sources.api",
    "objectives": "convscope.featurevis",
    "open_store": "convscope.store.store",
    "output_target": "convscope.attribution.targets",
    "patterns": "convscope.featurevis.api",
    "predict": "convscope.feature_maps",
    "scan": "convscope.scanning.api",
    "segmentation_target": "convscope.attribution.targets",
    "show": "convscope.explorer.notebook",
    "story": "convscope.featurevis.layer_story",
}

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
    "objectives",
    "open_store",
    "output_target",
    "patterns",
    "predict",
    "scan",
    "segmentation_target",
    "show",
    "story",
]


def __getattr__(name: str) -> object:
    """Import a public name's module on first access, so that `import convscope` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module 'convscope' has no attribute {name!r}")
    if name == "objectives":
        return import_module("convscope.featurevis.objectives")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
