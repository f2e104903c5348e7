"""Images that are read one at a time, when they are needed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convscope.errors import ConvscopeError
from convscope.images.decoding import Array
from convscope.images.tensor_inputs import to_array

Item = str | io.BytesIO | Image.Image | Array | Tensor
"""One image: a path, a file in memory, a PIL image, an array, or a preprocessed tensor."""


@dataclass(frozen=True, eq=False)
class LazyImages:
    """A sequence of named images of any number, of which none is kept in memory.

    Attributes
    ----------
    names : sequence of str
        One name per image.
    read : callable
        ``read(index)`` returns a path, bytes of a file, a PIL image, an array, or a preprocessed tensor.
    notes : tuple of str
        Remarks for the user, such as files left out.
    """

    names: Sequence[str]
    read: Callable[[int], object] = field(repr=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        """Read one image; raise ConvscopeError with the reason if that fails, whatever the reader raises."""
        try:
            item = self.read(index)
        except ConvscopeError:
            raise
        except Exception as error:
            raise ConvscopeError(f"cannot be read ({type(error).__name__}: {error})") from error
        return as_item(item)


def as_item(value: object) -> Item:
    """Return one image in a form that can be decoded; raise ConvscopeError for anything else.

    A uint8 tensor (C, H, W), as `torchvision.io.decode_image` returns, becomes an array (H, W, C).
    """
    if isinstance(value, bytes | bytearray):
        return io.BytesIO(value)
    if isinstance(value, str | os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 3:
        return to_array(value)
    if isinstance(value, io.BytesIO | Image.Image | np.ndarray | Tensor):
        return value
    raise ConvscopeError(f"is of type {type(value).__name__}, which is no image")
