"""Connecting to a cluster: errors that need no cluster."""

from __future__ import annotations

import pytest

from convscope import ConvscopeError
from convscope.distributed.ray_pool import map_unordered

pytest.importorskip("ray", reason="the extra convscope[ray] is not installed")


def test_an_address_where_nothing_listens_is_refused() -> None:
    with pytest.raises(ConvscopeError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        list(map_unordered(lambda: abs, range(2), address="127.0.0.1:1"))
