"""Names of heatmap methods, recipes and metrics, each with one line of description, as plain text; tasks; columns.

The command line refuses an unknown name by these tables, before it spends seconds on importing PyTorch. A test keeps
them equal to the tables of functions: `attribution.registry`, `featurevis.recipes`, `dictionaries.methods.registry` and
`evaluation.registry`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape

TASKS = (
    "classification",
    "binary",
    "multilabel",
    "regression",
    "probabilities",
    "segmentation",
    "detection",
    "embedding",
)
"""What the outputs of a network mean."""

BOX_EDGES = ("left", "top", "right", "bottom")
"""Columns of boxes in tables."""

METHOD_DESCRIPTIONS = {
    "cam": "channels weighted by the class's weights after pooling",
    "grad-cam": "channels weighted by their mean gradient; the default",
    "hirescam": "each position weighted by its own gradient",
    "grad-cam++": "channels weighted by their positive gradients",
    "xgrad-cam": "channels weighted by their activation-averaged gradient",
    "layer-cam": "positions weighted by their positive gradient",
    "eigen-cam": "first principal component; the same for all classes",
    "eigen-grad-cam": "first principal component of gradient x activation",
    "odam": "weighted by local gradients; default for boxes",
    "finer-cam": "grad-cam against the three most similar classes",
    "saliency": "largest absolute gradient over the channels; unsigned",
    "input-x-gradient": "input times gradient, summed over the channels",
    "smooth-grad": "saliency, averaged over noisy copies",
    "var-grad": "variance of the gradient over noisy copies; unsigned",
    "integrated-gradients": "gradients along the path from a baseline",
    "expected-gradients": "integrated gradients, averaged over reference images",
    "guided-backprop": "positive gradients only; hardly depends on the class",
    "deconvnet": "deconvolutional network; hardly depends on the class",
    "guided-grad-cam": "guided-backprop times grad-cam",
    "full-grad": "input and bias gradients of all layers; unsigned",
    "lrp-epsilon": "layer-wise relevance, epsilon rule; extra lrp",
    "lrp-gamma": "layer-wise relevance, gamma and z-box rules; extra lrp",
    "lrp-zplus": "layer-wise relevance, z-plus rule; extra lrp",
    "attention-rollout": "product of the attention of all layers; transformers",
    "transformer-attribution": "attention times its gradient, all layers; transformers",
    "attn-lrp": "layer-wise relevance through attention; transformers",
    "legrad": "positive gradients at all attention; transformers",
    "score-cam": "channels weighted by the score of masked images; slow",
    "ablation-cam": "channels weighted by the score lost without them; slow",
    "occlusion": "drop of the score behind a sliding window; slow",
    "rise": "mean score over random masks; for black boxes; slow",
    "d-rise": "rise for boxes of detectors; for black boxes; slow",
    "random": "uniform noise; methods must beat this baseline",
    "centred": "Gaussian at the centre; methods must beat this baseline",
}

METHOD_OPTIONS = {
    "smooth-grad": "samples=50, noise=0.15",
    "var-grad": "samples=50, noise=0.15",
    "integrated-gradients": "steps=32, baseline=0.0",
    "expected-gradients": "samples=50",
    "lrp-epsilon": "epsilon=1e-06",
    "lrp-gamma": "gamma=0.25, epsilon=1e-06",
    "lrp-zplus": "epsilon=1e-06, biases=true",
    "occlusion": "window, stride, fill=0.0",
    "rise": "samples=4000, cells=7, keep=0.5, tolerance=0.05, probability=false",
    "d-rise": "samples=5000, cells=16, keep=0.5, tolerance=0.05",
    "centred": "width=0.25",
}
"""The options of methods that have any, with their defaults, as they are typed after ``--option``."""

RECIPE_DESCRIPTIONS = {
    "plain": "gradient steps on pixels, as in the textbook",
    "robust": "Fourier image under random transforms; the default",
    "maco": "phases of a natural spectrum, with opacity",
    "dream": "a photograph, changed to excite a layer or units",
    "caricature": "exaggerates what a layer responds to in a photograph",
}

DICTIONARY_DESCRIPTIONS = {
    "topk": "the largest features of each position; the default",
    "batch-topk": "the largest features of a batch; positions share them",
    "matryoshka": "batch-topk, where the first features do on their own",
    "jumprelu": "a learned threshold for each feature",
    "archetypal": "topk with atoms among the data; stable over seeds",
    "nmf": "non-negative atoms and features; a few hundred at most",
}

METRIC_DESCRIPTIONS = {
    "deletion": "lower: probability while relevant pixels are removed",
    "insertion": "higher: probability while relevant pixels are inserted",
    "road": "higher: probability without irrelevant - relevant pixels",
    "average-drop": "lower: probability lost on image x map",
    "average-gain": "higher: probability gained on image x map",
    "average-increase": "higher: targets more probable on image x map",
    "mu-fidelity": "higher: correlation of relevance with drops of the score",
    "infidelity": "lower: squared error of relevance as predicted drop",
    "max-sensitivity": "lower: change of the map under imperceptible noise",
    "sparseness": "higher: Gini index of the map, a measure of brevity",
    "complexity": "lower: entropy of the map, a measure of brevity",
    "pointing": "higher: maximum on the target; needs masks",
    "energy": "higher: relevance on the target; needs masks",
    "iou": "higher: overlap of the map with the target; needs masks",
    "randomisation": "lower: similarity to maps of random weights",
    "random-logit": "lower: similarity to the map of another class",
}

METHOD_NAMES = tuple(METHOD_DESCRIPTIONS)
RECIPE_NAMES = tuple(RECIPE_DESCRIPTIONS)
METRIC_NAMES = tuple(METRIC_DESCRIPTIONS)


@dataclass(frozen=True, repr=False)
class NameTable(Mapping[str, str]):
    """Names with one line of description each; prints as a table.

    Attributes
    ----------
    kind : str
        What the names stand for, such as "method".
    descriptions : dict of str to str
        A line for each name.
    """

    kind: str
    descriptions: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.descriptions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.descriptions)

    def __len__(self) -> int:
        return len(self.descriptions)

    def __repr__(self) -> str:
        width = max(map(len, self.descriptions))
        return "\n".join(f"{name:{width}}  {line}" for name, line in self.descriptions.items())

    def _repr_html_(self) -> str:
        rows = [f"<tr><th>{self.kind}</th><th>description</th></tr>"]
        rows += [f"<tr><td>{escape(name)}</td><td>{escape(line)}</td></tr>" for name, line in self.items()]
        return f"<table>{''.join(rows)}</table>"


def methods() -> NameTable:
    """List the methods of `convscope.heatmaps`, with one line each.

    Returns
    -------
    NameTable
        A mapping of names to descriptions that prints as a table.

    Examples
    --------
    >>> import convscope
    >>> convscope.methods()["grad-cam"]
    'channels weighted by their mean gradient; the default'
    """
    return NameTable("method", METHOD_DESCRIPTIONS)


def recipes() -> NameTable:
    """List the recipes of `convscope.patterns`, with one line each.

    Returns
    -------
    NameTable
        A mapping of names to descriptions that prints as a table.

    Examples
    --------
    >>> import convscope
    >>> convscope.recipes()
    plain       gradient steps on pixels, as in the textbook
    robust      Fourier image under random transforms; the default
    maco        phases of a natural spectrum, with opacity
    dream       a photograph, changed to excite a layer or units
    caricature  exaggerates what a layer responds to in a photograph
    """
    return NameTable("recipe", RECIPE_DESCRIPTIONS)


def metrics() -> NameTable:
    """List the metrics of `convscope.evaluate`, with one line each, which begins with the better direction.

    Returns
    -------
    NameTable
        A mapping of names to descriptions that prints as a table.

    Examples
    --------
    >>> import convscope
    >>> convscope.metrics()["deletion"]
    'lower: probability while relevant pixels are removed'
    """
    return NameTable("metric", METRIC_DESCRIPTIONS)
