"""What the removal of units changes for one image, with plain data as results."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from convscope.editing.api import edit
from convscope.engine.model import Model
from convscope.explanations.api import explain
from convscope.explorer.service.compute import ProgressCallback, pack_map
from convscope.explorer.service.schemas import ExplainingUnit, ExplanationRecord, LogitChange
from convscope.predictions import predict
from convscope.store.store import Store

TOP_CHANGES = 6  # classes
FEATURES = 6  # units of an explanation


def logit_changes(model: Model, x: Tensor, layer: str, unit: int, top: int = TOP_CHANGES) -> list[LogitChange]:
    """Return the classes whose logits change most if a unit is set to 0, the largest changes first."""
    before = predict(model, x, top=1).logits[0]
    after = predict(edit(model, {layer: {unit: 0.0}}), x, top=1).logits[0]
    order = np.argsort(-np.abs(after - before), kind="stable")[:top]
    return [
        {
            "index": int(k),
            "name": model.class_name(int(k)),
            "before": float(before[k]),
            "after": float(after[k]),
            "change": float(after[k] - before[k]),
        }
        for k in order
    ]


def explanation(
    model: Model,
    x: Tensor,
    target: int,
    layer: str | None,
    store: Store | None,
    report_progress: ProgressCallback | None = None,
) -> ExplanationRecord:
    """Return the few units that carry a class's logit on an image, and the proof."""
    has_layer = store is not None and layer in store.layers
    result = explain(
        model,
        x,
        target,
        layer=layer,
        features=FEATURES,
        store=store if has_layer else None,
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
