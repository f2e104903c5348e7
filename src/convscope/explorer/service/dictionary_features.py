"""What a dictionary says about its features."""

from __future__ import annotations

import numpy as np
import torch

from convscope.dictionaries.attachment import attached_dictionaries
from convscope.engine.model import Model


def nearest_features(model: Model, layer: str, feature: int, count: int) -> list[tuple[int, float]]:
    """Return the features of a dictionary whose decoder vectors are most like that of a feature.

    Pairs of number and cosine, the highest first; none for layers that are not the features of a dictionary.
    """
    for edit, encoder in attached_dictionaries(model):
        if layer in edit.modules:
            atoms = encoder.atoms.detach()
            cosines = torch.nn.functional.cosine_similarity(atoms, atoms[feature][None], dim=1).float().cpu().numpy()
            order = np.argsort(-cosines, kind="stable")
            return [(int(k), float(cosines[k])) for k in order if k != feature][:count]
    return []
