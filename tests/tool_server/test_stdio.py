"""The command over standard input and output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters

from tests.tool_server.conftest import images_of, run


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "convscope", "mcp", "lite0", "-o", str(tmp_path / "out"), "--image-size", "256"],
        env=dict(os.environ),
        cwd=tmp_path,
    )
    reports: list[float] = []

    async def progress(done: float, _total: float | None, _message: str | None) -> None:
        reports.append(done)

    async def request() -> None:
        async with Client(parameters) as client:
            overview = (await client.call_tool("overview")).structured_content
            assert overview["models"] == ["lite0"]
            assert overview["reads"][0] == os.path.realpath(tmp_path)
            arguments = {"images": ["red_panda.jpg"], "targets": ["lesser panda"]}
            result = await client.call_tool("heatmap", arguments, progress_callback=progress)
            assert result.structured_content["rows"][0]["probability"] == pytest.approx(0.8035, abs=1e-3)
            assert [max(image.size) for image in images_of(result)] == [256]

    run(request)
    assert reports
    assert not (tmp_path / "out").exists()
