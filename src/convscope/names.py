"""Names of heatmap methods, recipes and metrics, as plain text.

The command line refuses an unknown name by these tables, before it spends seconds on importing PyTorch. A test keeps
them equal to the tables of functions: `attribution.registry`, `featurevis.recipes` and `evaluation.registry`.
"""

from __future__ import annotations

METHOD_NAMES = (
    "cam",
    "grad-cam",
    "hirescam",
    "grad-cam++",
    "xgrad-cam",
    "layer-cam",
    "eigen-cam",
    "eigen-grad-cam",
    "finer-cam",
    "saliency",
    "input-x-gradient",
    "smooth-grad",
    "var-grad",
    "integrated-gradients",
    "guided-backprop",
    "deconvnet",
    "guided-grad-cam",
    "full-grad",
    "lrp-epsilon",
    "lrp-gamma",
    "lrp-zplus",
    "score-cam",
    "ablation-cam",
    "occlusion",
    "rise",
    "random",
    "centred",
)
"""Methods of `convscope.heatmaps`."""

RECIPE_NAMES = (
    "plain",
    "robust",
    "maco",
    "dream",
    "caricature",
)
"""Recipes of `convscope.patterns`."""

METRIC_NAMES = (
    "deletion",
    "insertion",
    "road",
    "average-drop",
    "average-gain",
    "average-increase",
    "mu-fidelity",
    "infidelity",
    "max-sensitivity",
    "sparseness",
    "complexity",
    "pointing",
    "energy",
    "iou",
    "randomisation",
    "random-logit",
)
"""Metrics of `convscope.evaluate`."""
