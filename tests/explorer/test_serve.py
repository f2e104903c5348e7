"""The explorer as it is started: from a shell, and from a notebook."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.explorer import server
from convscope.explorer.web import security
from tests.oracles.explorer import smooth_image, tiny_model


def served(arguments: list[str], env: dict[str, str] | None = None) -> tuple[subprocess.Popen[str], str]:
    """A server process, and what it says first."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    while line and not line.startswith("open "):
        line = process.stderr.readline()
    return process, line.removeprefix("open ").strip()


PROGRAM = "import sys; from convscope.cli import main; sys.argv[0] = 'convscope'; main()"


def test_serving_others_demands_a_token():
    for arguments in (["--host", "0.0.0.0"], ["--host", "0.0.0.0", "--token", "short"], ["--token", "short"]):
        result = CliRunner().invoke(app, ["serve", "none", *arguments])
        assert isinstance(result.exception, convscope.ConvscopeError)
        assert "token" in str(result.exception)


@pytest.mark.parametrize(
    ("host", "is_so"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback_is_known(host, is_so):
    assert security.is_loopback(host) is is_so


def test_a_server_says_where_it_is_and_ends_when_told(tmp_path):
    process, address = served(["serve", "lite0", "--port", "0", "--keep", str(tmp_path), "--token", "auto"])
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S{32}", address)
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(address.partition("?")[0]).status_code == 401
            page = client.get(address)
            assert page.status_code == 200
            assert "lesser panda" in page.text
            assert page.url.query == b""
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_address_that_is_printed_is_let_in_and_so_is_this_machine(tmp_path):
    process, address = served(
        ["serve", "lite0", "--host", "0.0.0.0", "--port", "0", "--keep", str(tmp_path), "--token", "auto",
         "--name", "GPU7.example.org", "--name", "gpu7"]
    )  # fmt: skip
    try:
        host, port, token = re.fullmatch(r"http://([^:]*):(\d+)/\?token=(\S{32})", address).groups()
        assert host == "gpu7.example.org"
        asked = {}
        for name in (host, "gpu7", "localhost", "127.0.0.1", "evil.example"):
            headers = {"Host": f"{name}:{port}", "Authorization": f"Bearer {token}"}
            asked[name] = httpx.get(f"http://127.0.0.1:{port}/api/models", headers=headers).status_code
        assert asked == {host: 200, "gpu7": 200, "localhost": 200, "127.0.0.1": 200, "evil.example": 421}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("lacking", ["fastapi", "jinja2", "uvicorn"])
def test_what_has_to_be_installed_is_said(lacking, monkeypatch, tmp_path):
    for module in [name for name in sys.modules if name.startswith("convscope.explorer.")]:
        monkeypatch.delattr(module)  # so that afterwards the package has what is imported, and no second copy
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, lacking, None)
    said = rf"the explorer needs {lacking}; pip install 'convscope\[serve\]'"
    for arguments in (["serve", "lite0", "--port", "0"], ["publish", str(tmp_path)]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, convscope.ConvscopeError)  # which the command ends with status 2
        assert re.fullmatch(said, str(result.exception))
    with pytest.raises(convscope.ConvscopeError, match=said):
        convscope.show(tiny_model())


def test_a_port_that_is_taken_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(convscope.ConvscopeError, match="try another --port"),
    ):
        server.bind_socket("127.0.0.1", taken.getsockname()[1])


def test_a_notebook_shows_a_frame_whose_address_answers():
    before = set(threading.enumerate())
    shown = convscope.show(tiny_model(), smooth_image(0), height=500)
    try:
        html = shown._repr_html_()
        assert f'<iframe src="{shown.url}" width="100%" height="500"' in html
        for _ in range(100):
            try:
                page = httpx.get(shown.url, follow_redirects=True)
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        assert page.status_code == 200
        assert "image-0" in str(page.url)
        assert "frame-ancestors 'self' http://localhost:*" in page.headers["content-security-policy"]
        assert "x-frame-options" not in page.headers
    finally:
        shown.close()
    for _ in range(100):
        if not [t for t in set(threading.enumerate()) - before if t.name.startswith("convscope")]:
            break
        time.sleep(0.1)
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("convscope")]


def test_only_models_are_shown():
    with pytest.raises(convscope.ConvscopeError, match=r"convscope\.load"):
        convscope.show("lite0")
    with pytest.raises(convscope.ConvscopeError, match=r"none\.png"):
        convscope.show(tiny_model(), "none.png")
