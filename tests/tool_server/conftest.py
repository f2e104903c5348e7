"""A server with a tiny network and two images, and a client in memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
import pytest
from mcp import Client
from mcp_types import CallToolResult
from PIL import Image

import convscope
from convscope.tool_server.app import build_server
from convscope.tool_server.limits import Limits
from tests.oracles.nets import SmallConvNet, randomized

Call = Callable[..., CallToolResult]
T = TypeVar("T")


@pytest.fixture(scope="session")
def tiny() -> convscope.Model:
    names = ["ant", "bee", "cat", "dog", "emu"]
    return convscope.load(randomized(SmallConvNet()), preprocessing={"size": 32}, classes=names)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, a secret outside of the folder, and links to it."""
    root = tmp_path_factory.mktemp("served")
    images = root / "images"
    (images / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "more/b.png"):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(images / name)
    outside = root / "outside"
    outside.mkdir()
    Image.new("RGB", (32, 32)).save(outside / "secret.png")
    (images / "link.png").symlink_to(outside / "secret.png")
    (images / "linked").symlink_to(outside)
    (images / "notes.txt").write_text(f"{outside / 'secret.png'}\n")
    return images


def run(request: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a thread of its own: browser tests leave a running loop in this one."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(anyio.run, request).result()


@pytest.fixture
def call(tiny: convscope.Model, folder: Path, tmp_path: Path) -> Call:
    """Call a tool of a server whose output folder is ``tmp_path / "out"``."""

    def call_tool(tool: str, limits: Limits | None = None, /, **arguments: Any) -> CallToolResult:
        server = build_server({"tiny": lambda: tiny}, roots=[folder], out=tmp_path / "out", limits=limits)

        async def request() -> CallToolResult:
            async with Client(server) as client:
                return await client.call_tool(tool, arguments)

        return run(request)

    return call_tool


def images_of(result: CallToolResult) -> list[Image.Image]:
    """Decode the images of an answer."""
    blocks = [block for block in result.content if block.type == "image"]
    assert {block.mime_type for block in blocks} <= {"image/png"}
    return [Image.open(io.BytesIO(base64.b64decode(block.data)), formats=["PNG"]) for block in blocks]


def error_of(result: CallToolResult) -> str:
    """Return the message of a refused call."""
    assert result.is_error
    return str(result.content[0].text)
