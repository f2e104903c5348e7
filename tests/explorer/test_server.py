"""The explorer as a process, and the packages that it needs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.explorer import server

PROGRAM = "import sys; from convscope.cli import main; sys.argv[0] = 'convscope'; main()"


@pytest.fixture(scope="module")
def running_server(tmp_path_factory):
    """A server process that listens on all interfaces: host name, port and token of the URL that it prints."""
    arguments = ["serve", "lite0", "--host", "0.0.0.0", "--port", "0", "--token", "auto"]
    arguments += ["--cache-dir", str(tmp_path_factory.mktemp("cache"))]
    arguments += ["--hostname", "GPU7.example.org", "--hostname", "gpu7"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    while line and not line.startswith("open "):
        line = process.stderr.readline()
    yield re.fullmatch(r"open http://([^:]*):(\d+)/\?token=(\S{32})\n", line).groups()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.slow
def test_printed_url_opens_the_first_page(running_server):
    _, port, token = running_server
    with httpx.Client(follow_redirects=True) as client:
        assert client.get(f"http://127.0.0.1:{port}/").status_code == 401
        page = client.get(f"http://127.0.0.1:{port}/?token={token}")
    assert page.status_code == 200
    assert "lesser panda" in page.text
    assert page.url.query == b""


@pytest.mark.slow
def test_server_answers_to_its_host_names_and_this_machine(running_server):
    host, port, token = running_server
    assert host == "gpu7.example.org"
    statuses = {}
    for name in (host, "gpu7", "localhost", "127.0.0.1", "evil.example"):
        headers = {"Host": f"{name}:{port}", "Authorization": f"Bearer {token}"}
        statuses[name] = httpx.get(f"http://127.0.0.1:{port}/api/models", headers=headers).status_code
    assert statuses == {host: 200, "gpu7": 200, "localhost": 200, "127.0.0.1": 200, "evil.example": 421}


def test_printed_url_names_this_machine_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(server, "serve", lambda app, listening: listening.close())
    result = CliRunner().invoke(
        app, ["serve", "tests.oracles.nets:SmallConvNet", "--port", "0", "--cache-dir", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"open http://127\.0\.0\.1:\d+/\n", result.output)


def test_printed_url_has_the_token_as_a_parameter(monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(server, "serve", lambda app, listening: listening.close())
    arguments = ["serve", "tests.oracles.nets:SmallConvNet", "--port", "0", "--token", "auto"]
    result = CliRunner().invoke(app, [*arguments, "--cache-dir", str(tmp_path)])
    assert re.search(r"open http://127\.0\.0\.1:\d+/\?token=\S{32}\n", result.output)


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--host", "0.0.0.0", "--token", "short"], ["--token", "short"]]
)
def test_listening_for_other_machines_requires_a_token(arguments):
    result = CliRunner().invoke(app, ["serve", "none", *arguments])
    assert isinstance(result.exception, convscope.ConvscopeError)
    assert "token" in str(result.exception)


@pytest.mark.parametrize("package", ["fastapi", "jinja2", "uvicorn"])
def test_missing_packages_are_named(package, monkeypatch, tmp_path, tiny):
    for module in sorted((name for name in sys.modules if name.startswith("convscope.explorer.")), reverse=True):
        monkeypatch.delattr(module)  # restored afterwards, so that no module exists twice
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"(the explorer needs {package}|{package} is not installed); pip install ['\"]convscope\[serve\]['\"]"
    for arguments in (["serve", "lite0", "--port", "0"], ["publish", str(tmp_path)]):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, convscope.ConvscopeError)
        assert re.fullmatch(message, str(result.exception))
    with pytest.raises(convscope.ConvscopeError, match=message):
        convscope.show(tiny)


def test_port_in_use_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as used,
        pytest.raises(convscope.ConvscopeError, match="try another --port"),
    ):
        server.bind_socket("127.0.0.1", used.getsockname()[1])
