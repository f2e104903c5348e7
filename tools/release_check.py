"""Build the package and try it as its users get it: python -m tools.release_check [FOLDER].

Builds sdist and wheel into FOLDER (build/release), checks them with twine, check-wheel-contents and pyroma, installs
the wheel in a new virtual environment, and runs its demo there: outside of the checkout, without a network. Then each
extra is installed in an environment of its own on top of the first, where everything that it is for can be imported
and its example of tools/extra_examples.py runs, without a network too.

Exit status: 0, everything works; 1, something does not; 3, what was checked works, but an extra could not be
installed because the package index does not have, or does not serve, what it needs.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.extra_examples import EXAMPLES

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 2_000_000
INTERNAL_EXTRAS = ("dev", "docs", "test", "benchmarks")
NO_NETWORK = """
import socket
connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo
def is_local(host):
    if host in (None, "", "localhost", "::1", b"localhost", socket.gethostname()):
        return True
    try:  # only addresses of this machine can be bound; Ray's processes speak by its address
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
def connect_locally(self, address):
    if isinstance(address, tuple) and not is_local(address[0]):
        raise OSError(f"no network in this check: {address}")
    return connect(self, address)
def getaddrinfo_locally(host, *args, **kwargs):
    if not is_local(host):
        raise OSError(f"no network in this check: {host}")
    return getaddrinfo(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = connect_locally, getaddrinfo_locally
"""
"""A ``sitecustomize`` module, with which Python reaches no other host."""
UNAVAILABLE = re.compile(r"No matching distribution found|NewConnectionError|ReadTimeoutError|Could not fetch URL")
"""What pip says when the package index lacks a package, or does not answer."""
FAILED, UNCHECKED = 1, 3  # exit statuses


class StepFailedError(Exception):
    """Raised for a command that failed, with its output, and for a check that was not passed."""


def run(command: Sequence[str | Path], folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """Run a command, print it with the time that it took, and return its output."""
    words = [Path(word).name if isinstance(word, Path) else word for word in command]
    # Of programs that are passed as text, the last line shows best what they are about.
    print("$", *(word.strip().rpartition("\n")[2] for word in words), end="", flush=True)
    # PYTHONPATH of the caller would hide what is installed.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(environment or {})
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    if done.returncode:
        raise StepFailedError(f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}: {' '.join(words)}")
    return done.stdout


def build(out: Path) -> Path:
    """Build sdist and wheel, check them, and return the wheel."""
    shutil.rmtree(out, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", out])
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist])
    run([sys.executable, "-m", "check_wheel_contents", wheel])
    run([sys.executable, "-m", "pyroma", "--min", "9", sdist])
    if links := relative_links(description(wheel)):
        raise StepFailedError(f"links of the description lead nowhere on PyPI: {', '.join(links)}")
    size = wheel.stat().st_size
    if size > MAX_WHEEL_BYTES:
        raise StepFailedError(f"{wheel.name} has {size:,} bytes; at most {MAX_WHEEL_BYTES:,} are allowed")
    print(f"{wheel.name}: {size:,} bytes; {sdist.name}: {sdist.stat().st_size:,} bytes")
    return wheel


def description(wheel: Path) -> str:
    """Return the description in a wheel, which PyPI shows."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode().partition("\n\n")[2]


def relative_links(text: str) -> list[str]:
    """Return the relative addresses of images and links in a Markdown text."""
    return re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", text)


def make_environment(folder: Path, base: Path | None = None) -> Path:
    """Make a virtual environment, which also sees the packages of `base`; return its Python."""
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    if base is not None:
        (site_packages(folder) / "base.pth").write_text(f"{site_packages(base)}\n")
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def site_packages(folder: Path) -> Path:
    """Return the folder of an environment's packages."""
    return next(folder.glob("[Ll]ib/**/site-packages"))


def offline(folder: Path) -> dict[str, str]:
    """Return the environment of a process that reaches no other host and reads no file of this user."""
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return {"PYTHONPATH": str(folder), "HOME": str(folder), "KERAS_BACKEND": "torch"}


def try_demo(python: Path, folder: Path) -> None:
    """Run the demo offline, in a folder outside of the checkout, and check that its page exists."""
    folder.mkdir()
    environment = offline(folder)
    origin = run([python, "-c", "import convscope; print(convscope.__file__)"], folder, environment)
    if ROOT in Path(origin.strip()).parents:
        raise StepFailedError(f"the demo would run from the checkout: {origin}")
    run([python, "-m", "convscope", "demo", "-o", "demo"], folder, environment)
    if not (folder / "demo" / "index.html").is_file():
        raise StepFailedError("convscope demo has written no page")


def required_modules() -> dict[str, set[str]]:
    """Return the modules that the source imports through `errors.require_extra`, by extra."""
    modules: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require_extra":
                module, extra = argument_values(node, constants, ("", "scan"))
                if module:
                    modules[extra].add(module)
    return modules


def argument_values(call: ast.Call, constants: Mapping[str, object], defaults: Sequence[str]) -> list[str]:
    """Return the values of a call's arguments; "" for one that is neither a literal nor a constant of the module."""
    values = [constants.get(a.id) if isinstance(a, ast.Name) else getattr(a, "value", None) for a in call.args]
    return [value if isinstance(value, str) else "" for value in values] + [*defaults[len(values) :]]


def extras() -> list[str]:
    """Return the extras for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [name for name in project["optional-dependencies"] if name not in INTERNAL_EXTRAS]


def try_extra(name: str, wheel: Path, base: Path, folder: Path, modules: set[str]) -> str:
    """Install an extra, import what it is for and run its example; return "works", "not checked" or "failed"."""
    try:
        python = make_environment(folder, base)
        run([python, "-m", "pip", "install", "--quiet", f"{wheel}[{name}]"], folder)
        environment = offline(folder)
        run([python, "-c", "\n".join(f"import {module}" for module in sorted(modules))], folder, environment)
        run([python, "-c", EXAMPLES[name]], folder, environment)
    except StepFailedError as error:
        print(error, file=sys.stderr)
        return "not checked: the package index lacks something" if UNAVAILABLE.search(str(error)) else "failed"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "works"


def main() -> int:
    """Run all checks, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "release", help="for sdist and wheel")
    parser.add_argument("--extras", help="names of extras, separated by commas; all of them if omitted")
    arguments = parser.parse_args()
    names = extras() if arguments.extras is None else [name for name in arguments.extras.split(",") if name]
    modules = required_modules() | {
        "keras": {"keras", "h5py"},
        "jupyter": {"anywidget"},
        "mcp": {"convscope.tool_server.app"},
        "serve": {"fastapi", "uvicorn"},
    }
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            wheel = build(arguments.folder.resolve())
            python = make_environment(folder / "base")
            run([python, "-m", "pip", "install", "--quiet", wheel], folder)
            try_demo(python, folder / "demo")
        except StepFailedError as error:
            print(error, file=sys.stderr)
            return FAILED
        for name in names:
            outcomes[name] = try_extra(name, wheel, folder / "base", folder / name, modules.get(name, set()))
    print(f"{wheel.name} works alone")
    for name, outcome in outcomes.items():
        print(f"[{name}] {outcome}")
    if "failed" in outcomes.values():
        return FAILED
    return 0 if all(outcome == "works" for outcome in outcomes.values()) else UNCHECKED


if __name__ == "__main__":
    sys.exit(main())
