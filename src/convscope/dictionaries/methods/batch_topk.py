"""BatchTopK sparse autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor

from convscope.dictionaries.methods.base import Settings, SparseAutoencoder, Start
from convscope.dictionaries.selection import largest
from convscope.dictionaries.sparse import ActiveFeatures

AVERAGING = 0.95  # of the threshold, over steps
MARGIN = 0.9  # below the threshold of earlier batches


class BatchTopK(SparseAutoencoder):
    """Select the B k largest features of a batch of B positions; positions share them.

    ::

        f = z where z is among the B k largest of the batch;   afterwards f = z where z > t

    t is the mean over batches of the smallest value that was selected.

    References
    ----------
    Bussmann, Leask, Nanda, BatchTopK Sparse Autoencoders, 2024, equations 4 to 6.
    """

    activation = "threshold"

    def __init__(self, settings: Settings, start: Start) -> None:
        super().__init__(settings, start)
        self.buffers["threshold"] = torch.zeros((), dtype=torch.float64)

    def select(self, scores: Tensor) -> tuple[Tensor, ActiveFeatures]:
        """Return the largest values of the batch, and which they are."""
        threshold = float(self.buffers["threshold"])
        rows, columns = largest(scores, len(scores) * self.settings.active, MARGIN * threshold)
        values = scores[rows, columns]
        if len(values):
            smallest = float(values.min())
            mixed = AVERAGING * threshold + (1 - AVERAGING) * smallest
            self.buffers["threshold"].fill_(mixed if threshold else smallest)
        return values, ActiveFeatures.of_pairs(rows, columns, len(scores), self.settings.features)

    def thresholds(self) -> Tensor:
        """Return the threshold, for all features (F,)."""
        return torch.full_like(self.parameters["encoder_bias"], float(self.buffers["threshold"]))
