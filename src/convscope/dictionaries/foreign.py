"""Dictionaries of other packages: state dicts of overcomplete, and plain files of four matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from convscope.dictionaries.encoder import DictionaryWeights
from convscope.dictionaries.files import read_tensors
from convscope.dictionaries.result import Dictionary
from convscope.engine.model import Model
from convscope.engine.model_description import ModelDescription
from convscope.errors import ConvscopeError, require_int, require_number

LENGTH_RTOL = 1e-3  # of atoms that count as equally long


def dictionary_from_file(
    path: Path, layer: str | None = None, active: int | None = None, threshold: float | None = None
) -> Dictionary:
    """Make a dictionary of a file with the weights of a linear encoder and decoder.

    Parameters
    ----------
    path : Path
    layer : str, optional
        The layer that it is of.
    active : int, optional
        k, of a dictionary with the k largest features of each position.
    threshold : float, optional
        Below it features are 0; by default what the file has, or 0.
    """
    tensors = read_tensors(path)
    weights = _from_overcomplete(tensors) if "dictionary._weights" in tensors else _from_plain(tensors, path)
    if threshold is not None:
        weights["thresholds"] = torch.full_like(weights["encoder_bias"], require_number("threshold", threshold))
    count = len(weights["atoms"])
    k = 0 if active is None else require_int("active", active)
    if k > count:
        raise ConvscopeError(f"active is {active}; expected at most the number of features, {count}")
    unit = _with_unit_atoms(weights, is_ranked=k > 0)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in unit.tensors().items()}
    description = {"name": "unknown network", "preprocessing": {}, "notes": []}
    return Dictionary(
        cast(Model, ModelDescription(description, {})),
        **arrays,
        layer=layer or "",
        method="topk" if k else "threshold",
        activation="topk" if k else "threshold",
        active=k,
        steps=0,
        seed=0,
        num_images=0,
        metrics={},
        density=np.full(count, np.nan, np.float32),
        history=np.zeros(0, np.float32),
        notes=(f"loaded from {path.name}: its metrics were not measured",),
    )


def _from_plain(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Read W_enc (C, F) or (F, C), b_enc (F,), W_dec (F, C) or (C, F), b_dec (C,) and, if there is one, threshold."""
    missing = [name for name in ("W_enc", "b_enc", "W_dec", "b_dec") if name not in tensors]
    if missing:
        raise ConvscopeError(
            f"{path} lacks {', '.join(missing)}; expected W_enc, b_enc, W_dec and b_dec, or a state dict of "
            f"overcomplete with a linear encoder; it has {', '.join(list(tensors)[:8]) or 'nothing'}"
        )
    bias, offset = tensors["b_enc"].float(), tensors["b_dec"].float()
    shape = (len(bias), len(offset))
    threshold = tensors.get("threshold", torch.zeros(())).float()
    return {
        "atoms": _oriented(tensors["W_dec"], shape, path, "W_dec", is_transposed=False),
        "encoder": _oriented(tensors["W_enc"], shape, path, "W_enc", is_transposed=True),
        "encoder_bias": bias,
        "bias": offset,
        "thresholds": threshold.expand(len(bias)).clone(),
    }


def _oriented(matrix: Tensor, shape: tuple[int, int], path: Path, name: str, *, is_transposed: bool) -> Tensor:
    """Return a matrix as (F, C); a square one counts as (C, F) if `is_transposed`."""
    if tuple(matrix.shape) not in (shape, shape[::-1]):
        raise ConvscopeError(f"{path}: {name} has the shape {tuple(matrix.shape)}; expected {shape} by its biases")
    is_turned = is_transposed if shape[0] == shape[1] else tuple(matrix.shape) != shape
    return (matrix.T if is_turned else matrix).float().contiguous()


def _from_overcomplete(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a state dict of overcomplete: a linear encoder, atoms and their multiplier; no bias is decoded."""
    encoder, bias = (tensors.get(f"encoder.final_block.0.{part}") for part in ("weight", "bias"))
    if encoder is None or bias is None or any(name.startswith("encoder.mlp_blocks") for name in tensors):
        raise ConvscopeError("the encoder of this dictionary of overcomplete is not linear; only linear ones are read")
    if any(name.startswith("encoder.final_block.1") for name in tensors):
        raise ConvscopeError("the encoder of this dictionary of overcomplete normalises batches, which is not read")
    atoms = tensors["dictionary._weights"].float()
    atoms = atoms * tensors.get("dictionary.multiplier", torch.zeros(())).float().exp()
    thresholds = tensors["thresholds"].exp() if "thresholds" in tensors else torch.zeros(len(atoms))  # of JumpSAE
    return {
        "atoms": atoms,
        "encoder": encoder.float(),
        "encoder_bias": bias.float(),
        "bias": atoms.new_zeros(atoms.shape[1]),
        "thresholds": thresholds.float(),
    }


def _with_unit_atoms(weights: Mapping[str, Tensor], *, is_ranked: bool) -> DictionaryWeights:
    """Scale atoms to length 1, and their features with them."""
    lengths = weights["atoms"].norm(dim=1)
    if is_ranked and float(lengths.max() - lengths.min()) > LENGTH_RTOL * float(lengths.max()):
        raise ConvscopeError(
            "the atoms of this dictionary differ in length, so scaling them to 1 would change which features are the "
            "largest; scale atoms and encoder in training, or give threshold= in place of active="
        )
    divisor = lengths.clamp_min(1e-12)
    return DictionaryWeights(
        weights["atoms"] / divisor[:, None],
        weights["encoder"] * lengths[:, None],
        weights["encoder_bias"] * lengths,
        weights["bias"],
        weights["thresholds"] * lengths,
    )
