"""How the outputs of layers are laid out: which dimensions are channels and positions, and their conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convscope.errors import ConvscopeError


@dataclass(frozen=True)
class Layout:
    """Meaning of the dimensions of a layer's own output.

    Attributes
    ----------
    channel_dim : int
        Dimension of the channels.
    spatial_dims : tuple of int
        Dimensions of the spatial axes; empty where there are none. With a `grid`, the one dimension along which all
        positions follow each other, row by row.
    grid : tuple of int
        Height and width of token sequences; empty for other outputs.
    prefix_tokens : int
        Tokens in front of the grid: class tokens and registers.
    rows_per_image : int
        Rows of dimension 0 per image, more than one where frames or windows are folded into the batch; 0 if unknown.
        Rows of maps are laid out as channels: those of the first row, of the second, and so on.
    batch_dim : int
        Dimension of the batch; 1 for sequences (T, N, C).
    """

    channel_dim: int
    spatial_dims: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    prefix_tokens: int = 0
    rows_per_image: int = 1
    batch_dim: int = 0

    def to_nchw(self, output: Tensor) -> Tensor:
        """Return a layer's own output with the channels first, (N, C, H, W) for images; tokens on their grid.

        Outputs without spatial axes keep their dimensions after the batch; quantised ones become floats. Raises
        ConvscopeError if the number of tokens is not the grid's, and if it is unknown which rows belong to which image.
        """
        if self.rows_per_image == 0:
            raise ConvscopeError(
                f"a layer returned {len(output)} rows, not one per image, and which of them belong to which image "
                "could not be proven; choose another layer"
            )
        output = output.dequantize() if output.is_quantized else output
        nchw = self._channels_first(output.movedim(self.batch_dim, 0) if self.batch_dim else output)
        if self.rows_per_image == 1:
            return nchw
        rows = nchw.reshape(-1, self.rows_per_image, *nchw.shape[1:])
        return rows.flatten(1, 2) if self.spatial_dims else rows

    def _channels_first(self, output: Tensor) -> Tensor:
        """Apply `to_nchw` to an output of which each row is an image."""
        if not self.spatial_dims or (not self.grid and self.channel_dim == 1):
            return output
        if not self.grid:
            return output.movedim(self.channel_dim, 1)
        (dim,), count = self.spatial_dims, math.prod(self.grid)
        if output.shape[dim] != self.prefix_tokens + count:
            raise ConvscopeError(
                f"a layer returned {output.shape[dim]} tokens; expected {self.prefix_tokens + count}, the number for an"
                " image of the network's own size: the grid of other numbers is unknown"
            )
        positions = output.narrow(dim, self.prefix_tokens, count).movedim(self.channel_dim, 1)
        return positions.view(*positions.shape[:2], *self.grid)

    def from_nchw(self, tensor: Tensor, output: Tensor) -> Tensor:
        """Invert `to_nchw`; prefix tokens, dtype and quantisation are taken from `output`, the layer's own."""
        if self.rows_per_image > 1:
            is_map = bool(self.spatial_dims)
            rows = tensor.reshape(len(tensor), self.rows_per_image, -1, *tensor.shape[2:]) if is_map else tensor
            tensor = rows.flatten(0, 1)
        tensor = self._from_channels_first(tensor, output)
        return _as_dtype_of(output, tensor.movedim(0, self.batch_dim) if self.batch_dim else tensor)

    def _from_channels_first(self, tensor: Tensor, output: Tensor) -> Tensor:
        if not self.spatial_dims:
            return tensor
        if not self.grid:
            return tensor.movedim(1, self.channel_dim)
        (dim,) = self.spatial_dims
        positions = tensor.flatten(2).movedim(1, self.channel_dim)
        if not self.prefix_tokens:
            return positions
        return torch.cat([output.narrow(dim, 0, self.prefix_tokens), positions], dim)


def _as_dtype_of(like: Tensor, values: Tensor) -> Tensor:
    """Return values in the dtype of a tensor, quantised as it is; no gradients pass through quantisation."""
    if not like.is_quantized:
        return values.to(like.dtype)
    if like.qscheme() in {torch.per_tensor_affine, torch.per_tensor_symmetric}:
        return torch.quantize_per_tensor(values.detach(), like.q_scale(), like.q_zero_point(), like.dtype)
    parameters = like.q_per_channel_scales(), like.q_per_channel_zero_points(), like.q_per_channel_axis()
    return torch.quantize_per_channel(values.detach(), *parameters, like.dtype)
