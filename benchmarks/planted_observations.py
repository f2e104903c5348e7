"""Observations of a world, in memory, and the context that analyses take."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from planted_worlds import World, as_input
from torch import Tensor

from convscope.diagnosis.context import DiagnosisContext
from convscope.diagnosis.facts import FACTS, measure_image
from convscope.diagnosis.forward import POSITION_FACTS, observing_forward, position_facts
from convscope.diagnosis.observations import Observations


def observe(world: World, seed: int = 0) -> DiagnosisContext:
    """Record a world's images."""
    model, layer = world.model, world.model.layers.find(world.layer)
    x = as_input(world.checked.images)
    with observing_forward(model, layer, x[:1]) as run:
        logits, features, peaks, evidence = (torch.cat(parts) for parts in zip(*map(run, x.split(50)), strict=True))
    facts = np.stack([measure_image([Image.fromarray(image)], None) for image in world.checked.images])
    facts = np.concatenate([facts, position_facts(evidence).numpy()], axis=1)
    count = len(x)
    observations = Observations(
        image_names=tuple(f"{i:04d}.png" for i in range(count)),
        image_ids=np.arange(count),
        labels=world.noisy_labels,
        classes=tuple(model.classes or ()),
        logits=logits.numpy(),
        features=features.half().numpy(),
        peaks=peaks.half().numpy(),
        evidence=evidence.half().numpy(),
        facts=facts.astype(np.float32),
        fact_names=(*FACTS, *POSITION_FACTS),
        thumbnails=(255 * (x * 0.25 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).to(torch.uint8).numpy(),
    )

    def load_inputs(positions: list[int]) -> Tensor:
        return x[torch.as_tensor(np.asarray(positions))]

    return DiagnosisContext(model, layer, observations, load_inputs, seed, lambda *_: None, 1 << 30)
