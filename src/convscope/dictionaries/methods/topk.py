"""TopK sparse autoencoders."""

from __future__ import annotations

from torch import Tensor

from convscope.dictionaries.methods.base import SparseAutoencoder
from convscope.dictionaries.selection import top_k
from convscope.dictionaries.sparse import ActiveFeatures


class TopK(SparseAutoencoder):
    """Select the k largest features of each position.

    ::

        f = TopK(W (x - b) + c)

    References
    ----------
    Gao et al., Scaling and evaluating sparse autoencoders, 2024, equations 5 and 6.
    """

    activation = "topk"

    def select(self, scores: Tensor) -> tuple[Tensor, ActiveFeatures]:
        """Return the k largest values of each row, and which they are."""
        values, columns = top_k(scores, self.settings.active)
        return values.flatten(), ActiveFeatures.of_rows(columns, self.settings.features)
