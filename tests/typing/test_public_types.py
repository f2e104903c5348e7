"""The types that users see: what mypy says of code that uses every public name through the lazy package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import convscope

ROOT = Path(__file__).parents[2]
USER_CODE = Path(__file__).with_name("user_code.py")


@pytest.fixture(scope="module")
def mypy_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says of the user's code, and of a script that reveals the type of every public name."""
    pytest.importorskip("mypy")
    script = tmp_path_factory.mktemp("typing") / "reveal_types.py"
    script.write_text("import convscope\n" + "".join(f"reveal_type(convscope.{name})\n" for name in convscope.__all__))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-pretty",
        "--config-file",
        "pyproject.toml",
        str(USER_CODE),
        str(script),
    ]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600).stdout


@pytest.mark.slow
def test_code_that_uses_every_result_type_checks(mypy_output):
    assert [line for line in mypy_output.splitlines() if ": error:" in line] == []


@pytest.mark.slow
def test_no_public_name_is_any(mypy_output):
    revealed = re.findall(r'reveal_types\.py:(\d+): note: Revealed type is "(.*)"', mypy_output)
    types = {convscope.__all__[int(line) - 2]: kind for line, kind in revealed}
    assert list(types) == convscope.__all__
    assert not {name: kind for name, kind in types.items() if kind in ("Any", "builtins.object")}
    functions = {name: kind for name, kind in types.items() if kind.startswith("def (") and name[0].islower()}
    assert not {name: kind for name, kind in functions.items() if kind.endswith("-> Any")}


def test_user_code_mentions_every_public_name():
    used = set(re.findall(r"convscope\.(\w+)", USER_CODE.read_text(encoding="utf-8")))
    assert used >= set(convscope.__all__)
