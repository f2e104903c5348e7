"""Show what neural networks for images predict, why, and what their units respond to.

Every public name is imported from its module on first use, so that ``import convscope`` is fast.

Examples
--------
>>> import convscope
>>> model = convscope.load("lite0")
>>> photo = convscope.samples.photographs()[0]
>>> convscope.predict(model, photo, top=1).names
[['...']]
>>> convscope.activations(model, photo, "blocks.0")["blocks.0"].shape
(1, 16, 112, 112)
>>> convscope.heatmaps(model, photo).values.shape
(1, 1, 7, 7)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convscope import objectives, samples
    from convscope.attribution.api import heatmaps
    from convscope.attribution.box_targets import box_target
    from convscope.attribution.location_result import Locations
    from convscope.attribution.locations import locate
    from convscope.attribution.output_targets import output_target, segmentation_target
    from convscope.attribution.result import Heatmaps
    from convscope.decomposition.activation_atlas import atlas
    from convscope.decomposition.craft import concepts
    from convscope.decomposition.result import Atlas, Concepts
    from convscope.detection.api import detect
    from convscope.detection.result import Detections
    from convscope.diagnosis.api import diagnose
    from convscope.diagnosis.result import Diagnosis
    from convscope.dictionaries.api import dictionary
    from convscope.dictionaries.result import Dictionary
    from convscope.editing.activation_patching import patch
    from convscope.editing.api import edit
    from convscope.editing.result import Effects, Patching
    from convscope.editing.unit_effects import effects
    from convscope.engine.model import Model
    from convscope.engine.text_targets import text_target
    from convscope.errors import ConvscopeError, ConvscopeWarning
    from convscope.evaluation.api import evaluate
    from convscope.evaluation.comparison import Comparison, compare
    from convscope.evaluation.result import Evaluation
    from convscope.explanations.api import explain
    from convscope.explanations.result import Explanation
    from convscope.explorer.notebook import show
    from convscope.feature_maps import Activations, activations
    from convscope.featurevis.api import patterns
    from convscope.featurevis.layer_story import Story, story
    from convscope.featurevis.result import Patterns
    from convscope.images.preprocessing import Preprocessing
    from convscope.names import methods, metrics, recipes
    from convscope.naming.api import name_units
    from convscope.predictions import Predictions, predict
    from convscope.saved import load_dictionary, open
    from convscope.scanning.api import scan
    from convscope.sources.api import load
    from convscope.store.store import Store, open_store
    from convscope.store.unit_names import UnitNames

    __version__: str

__all__ = [
    "Activations",
    "Atlas",
    "Comparison",
    "Concepts",
    "ConvscopeError",
    "ConvscopeWarning",
    "Detections",
    "Diagnosis",
    "Dictionary",
    "Effects",
    "Evaluation",
    "Explanation",
    "Heatmaps",
    "Locations",
    "Model",
    "Patching",
    "Patterns",
    "Predictions",
    "Preprocessing",
    "Store",
    "Story",
    "UnitNames",
    "activations",
    "atlas",
    "box_target",
    "compare",
    "concepts",
    "detect",
    "diagnose",
    "dictionary",
    "edit",
    "effects",
    "evaluate",
    "explain",
    "heatmaps",
    "load",
    "load_dictionary",
    "locate",
    "methods",
    "metrics",
    "name_units",
    "objectives",
    "open",
    "open_store",
    "output_target",
    "patch",
    "patterns",
    "predict",
    "recipes",
    "samples",
    "scan",
    "segmentation_target",
    "show",
    "story",
    "text_target",
]

_TARGETS = {
    "Activations": "convscope.feature_maps:Activations",
    "Atlas": "convscope.decomposition.result:Atlas",
    "Comparison": "convscope.evaluation.comparison:Comparison",
    "Concepts": "convscope.decomposition.result:Concepts",
    "ConvscopeError": "convscope.errors:ConvscopeError",
    "ConvscopeWarning": "convscope.errors:ConvscopeWarning",
    "Detections": "convscope.detection.result:Detections",
    "Diagnosis": "convscope.diagnosis.result:Diagnosis",
    "Dictionary": "convscope.dictionaries.result:Dictionary",
    "Effects": "convscope.editing.result:Effects",
    "Evaluation": "convscope.evaluation.result:Evaluation",
    "Explanation": "convscope.explanations.result:Explanation",
    "Heatmaps": "convscope.attribution.result:Heatmaps",
    "Locations": "convscope.attribution.location_result:Locations",
    "Model": "convscope.engine.model:Model",
    "Patching": "convscope.editing.result:Patching",
    "Patterns": "convscope.featurevis.result:Patterns",
    "Predictions": "convscope.predictions:Predictions",
    "Preprocessing": "convscope.images.preprocessing:Preprocessing",
    "Store": "convscope.store.store:Store",
    "Story": "convscope.featurevis.layer_story:Story",
    "UnitNames": "convscope.store.unit_names:UnitNames",
    "activations": "convscope.feature_maps:activations",
    "atlas": "convscope.decomposition.activation_atlas:atlas",
    "box_target": "convscope.attribution.box_targets:box_target",
    "compare": "convscope.evaluation.comparison:compare",
    "concepts": "convscope.decomposition.craft:concepts",
    "detect": "convscope.detection.api:detect",
    "diagnose": "convscope.diagnosis.api:diagnose",
    "dictionary": "convscope.dictionaries.api:dictionary",
    "edit": "convscope.editing.api:edit",
    "effects": "convscope.editing.unit_effects:effects",
    "evaluate": "convscope.evaluation.api:evaluate",
    "explain": "convscope.explanations.api:explain",
    "heatmaps": "convscope.attribution.api:heatmaps",
    "load": "convscope.sources.api:load",
    "load_dictionary": "convscope.saved:load_dictionary",
    "locate": "convscope.attribution.locations:locate",
    "methods": "convscope.names:methods",
    "metrics": "convscope.names:metrics",
    "name_units": "convscope.naming.api:name_units",
    "objectives": "convscope.objectives",
    "open": "convscope.saved:open",
    "open_store": "convscope.store.store:open_store",
    "output_target": "convscope.attribution.output_targets:output_target",
    "patch": "convscope.editing.activation_patching:patch",
    "patterns": "convscope.featurevis.api:patterns",
    "predict": "convscope.predictions:predict",
    "recipes": "convscope.names:recipes",
    "samples": "convscope.samples",
    "scan": "convscope.scanning.api:scan",
    "segmentation_target": "convscope.attribution.output_targets:segmentation_target",
    "show": "convscope.explorer.notebook:show",
    "story": "convscope.featurevis.layer_story:story",
    "text_target": "convscope.engine.text_targets:text_target",
}
"""What each public name stands for: a module, or an attribute of one."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name not in _TARGETS:
        from difflib import get_close_matches

        close = "".join(f"; did you mean {match}?" for match in get_close_matches(name, __all__, n=1))
        raise AttributeError(f"module 'convscope' has no attribute {name!r}{close}")
    module, _, attribute = _TARGETS[name].partition(":")
    value: object = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def _version() -> str:
    """Return the installed version, which is that of the git tag."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("convscope")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
