"""What the removal of units changes for one image, with plain data as results."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from convscope.attribution.default_layer import choose_layer
from convscope.attribution.targets import parse_targets
from convscope.datasets.image_inputs import open_images
from convscope.editing.api import edit
from convscope.editing.removal import Removal
from convscope.editing.replacements import constants
from convscope.engine.batching import MEMORY
from convscope.engine.layer_selection import find_layer
from convscope.engine.model import LOGITS, Model
from convscope.explanations.api import explain
from convscope.explorer.service.compute import ProgressCallback, pack_map
from convscope.explorer.service.schemas import ExplainingUnit, ExplanationRecord, LogitChange
from convscope.images.loading import ImageBatchLoader
from convscope.predictions import predict
from convscope.store.store import Store

TOP_CHANGES = 4  # classes whose logits fall most, and as many whose logits rise most
FEATURES = 6  # units of an explanation
How = Literal["zero", "mean"]
"""What takes the place of a unit: 0, or the mean of its activations."""


def logit_changes(
    model: Model, x: Tensor, layer: str, unit: int, value: float = 0.0, top: int = TOP_CHANGES
) -> list[LogitChange]:
    """Return the classes whose logits change most if a unit is set to a value: see `largest_changes`."""
    before = predict(model, x, top=1).logits[0]
    after = predict(edit(model, {layer: {unit: value}}), x, top=1).logits[0]
    return largest_changes(model, before, after, top)


def largest_changes(model: Model, before: np.ndarray, after: np.ndarray, top: int = TOP_CHANGES) -> list[LogitChange]:
    """Return the classes whose logits (K,) fall most, the largest falls first, and those whose logits rise most."""
    changes = after - before
    order = np.argsort(changes, kind="stable")
    falls = [k for k in order[:top] if changes[k] < 0]
    rises = [k for k in order[::-1][:top] if changes[k] > 0]
    return [
        {
            "index": int(k),
            "name": model.class_name(int(k)),
            "before": float(before[k]),
            "after": float(after[k]),
            "change": float(changes[k]),
        }
        for k in (*falls, *rises)
    ]


def logits_without_units(
    model: Model, x: Tensor, layer: str, values: np.ndarray, report_progress: ProgressCallback | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Set each unit of a layer to its value (C,) in turn: return the logits (K,) before, and those then (C, K)."""
    selected, loader = find_layer(model, layer), ImageBatchLoader(open_images(x), model.preprocessing)
    spec = parse_targets(model, [list(range(model.num_outputs or 0))], 1)
    replacement = constants(torch.from_numpy(values.astype(np.float32)))

    def report(fraction: float) -> None:
        if report_progress is not None:
            report_progress(fraction, 1)

    with Removal(model, selected, spec, replacement, MEMORY).open(next(loader.batches(1))) as run:
        scores, _ = run.scores(torch.eye(selected.units, dtype=torch.bool), report)
        return run.baseline[0].float().cpu().numpy(), scores[:, 0].float().cpu().numpy()


def explanation(
    model: Model,
    x: Tensor,
    target: int,
    layer: str | None,
    store: Store | None,
    report_progress: ProgressCallback | None = None,
) -> ExplanationRecord:
    """Return the few units that carry a class's logit on an image, and the proof.

    By default at the last layer whose units have names, else at that of Grad-CAM.
    """
    chosen = layer or _last_named_layer(store) or choose_layer(model, parse_targets(model, target, 1).functions)[0].name
    result = explain(
        model,
        x,
        target,
        layer=chosen,
        features=FEATURES,
        store=store if store is not None and chosen in store.layers else None,
        progress=report_progress or False,
    )
    units: list[ExplainingUnit] = [
        {
            "unit": row["unit"],
            "name": row["name"],
            "effect": row["effect"],
            "share": None if np.isnan(row["share"]) else row["share"],
            "position": row["position"],
            "map": pack_map(values) if values.size else None,
        }
        for row, values in zip(result.rows(), result.maps[0], strict=False)
    ]
    return {
        "target": target,
        "layer": result.layer,
        "sentence": result.sentences[0],
        "before": float(result.logits[0]),
        "after": float(result.removed_logits[0]),
        "random_logits": [float(value) for value in result.random_logits[0] if np.isfinite(value)],
        "units": units,
    }


def _last_named_layer(store: Store | None) -> str | None:
    """Return the last layer of a store with named units; the logits are none."""
    names = None if store is None else store.names()
    if store is None or names is None:
        return None
    named = set(names.layer[names.named].tolist()) - {LOGITS}
    return next((layer for layer in reversed(store.layers) if layer in named), None)
