"""Names of units, written into a store as they are given."""

from __future__ import annotations

import numpy as np

import convscope
from convscope.store.unit_names import UnitNames, described_model, write_names


def name_units(store: convscope.Store, layer: str, names: dict[int, str]) -> None:
    """Write names of units of a layer into a store."""
    count = len(names)
    units = UnitNames(
        described_model(store),
        layer=np.full(count, layer),
        units=np.array(list(names)),
        names=np.array(list(names.values())),
        scores=np.linspace(1, 0.6, count, dtype=np.float32),
        runner_up=np.full(count, "other"),
        runner_up_scores=np.full(count, 0.5, np.float32),
        named=np.ones(count, bool),
        wpmi=np.ones(count, np.float32),
        p_values=np.zeros(count),
        num_words=100,
        num_images=store.num_images,
        level=0.05,
        vocabulary="0",
        judge="test",
        seed=0,
    )
    write_names(store, units)
