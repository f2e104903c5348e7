"""Files of the project beside the package: checks of names, extras, versions of Python, workflows."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import check_names, release_check
from tools.extra_examples import EXAMPLES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*.yml")
}


def test_names_are_in_the_terms_of_the_field(tmp_path: Path) -> None:
    assert list(check_names.problems(ROOT / "src" / "convscope")) == []
    (tmp_path / "scan.py").write_text(
        "class HeldPicture:\n    def width(self, meantime, shown_rows): self.eyes = told = 1\n"
    )
    problems = [line.partition("scan.py:")[2] for line in check_names.problems(tmp_path)]
    assert [problem.partition(";")[0] for problem in problems] == [
        "1: the module 'scan' has the name of a public function",
        "1: the name 'HeldPicture' contains 'held, picture'",
        "2: the name 'shown_rows' contains 'shown'",
        "2: the name 'told' contains 'told'",
    ]


def test_modules_that_are_imported_with_an_extra_are_found() -> None:
    modules = release_check.required_modules()
    assert set(modules) <= set(release_check.extras())
    assert modules["lrp"] == {"zennit.rules"}
    assert {"onnx", "onnx2pytorch"} <= modules["onnx"]
    assert {"pyarrow", "fsspec.core"} <= modules["scan"]


def test_every_extra_has_an_example() -> None:
    assert list(EXAMPLES)
    assert set(EXAMPLES) == set(release_check.extras())
    for name, program in EXAMPLES.items():
        compile(program, name, "exec")


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        (("works", "works"), 0),
        (("works", "not checked: the package index lacks something"), release_check.UNCHECKED),
        (("not checked: the package index lacks something", "failed"), release_check.FAILED),
    ],
)
def test_the_status_of_the_release_check_says_what_was_not_checked(
    outcomes: tuple[str, str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter(outcomes)
    for name in ("make_environment", "run", "try_demo"):
        monkeypatch.setattr(release_check, name, lambda *_: "")
    monkeypatch.setattr(release_check, "build", lambda _: Path("a.whl"))
    monkeypatch.setattr(release_check, "try_extra", lambda *_: next(left))
    monkeypatch.setattr(sys, "argv", ["release_check", "--extras", "keras,scan"])
    assert release_check.main() == status
    assert capsys.readouterr().out.splitlines()[1:] == [f"[keras] {outcomes[0]}", f"[scan] {outcomes[1]}"]


def test_a_missing_package_is_not_a_failure_of_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_check, "make_environment", lambda *_: Path(sys.executable))
    for text, outcome in (("ERROR: No matching distribution found for ray>=2.31", "not checked"), ("Error", "failed")):
        command = [sys.executable, "-c", f"import sys; sys.exit({text!r})"]
        with pytest.raises(release_check.StepFailedError, match=text) as raised:
            release_check.run(command, tmp_path)
        monkeypatch.setattr(release_check, "run", raising(raised.value))
        assert release_check.try_extra("ray", tmp_path, tmp_path, tmp_path / "ray", set()).startswith(outcome)
        monkeypatch.undo()
        monkeypatch.setattr(release_check, "make_environment", lambda *_: Path(sys.executable))


def raising(error: Exception) -> Callable[..., str]:
    def run(*_: object) -> str:
        raise error

    return run


def test_links_of_the_description_are_absolute() -> None:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = "![a b](docs/a.webp) [c](docs/c.md#d) [e](https://x.org/f) [g](#h) `[0](1)`"
    assert script.absolute_links(text).split(" `")[0] == (
        f"![a b]({script.FILES}docs/a.webp) [c]({script.PAGES}docs/c.md#d) [e](https://x.org/f) [g](#h)"
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert release_check.relative_links(readme)
    assert release_check.relative_links(script.absolute_links(readme)) == []
    for path in release_check.relative_links(readme):
        assert (ROOT / path.partition("#")[0]).exists(), path


def test_workflows_run_all_supported_versions_of_python() -> None:
    prefix = "Programming Language :: Python :: 3."
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.startswith(prefix)]
    matrix = WORKFLOWS["tests"]["jobs"]["newest"]["strategy"]["matrix"]
    assert matrix["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert len(matrix["os"]) == 3


def commands(workflow: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)"', commands(WORKFLOWS["tests"])))
    for name in ("torch", "torchvision", "timm"):
        assert pinned[name].removesuffix(".0") == bounds[name].removesuffix(".0")


def test_workflows_call_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    called = {target for flow in WORKFLOWS.values() for target in re.findall(r"make ([\w-]+)", commands(flow))}
    assert called
    assert called <= targets


def test_workflows_have_no_rights_that_they_do_not_need() -> None:
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(
    "name", ["CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"]
)
def test_files_of_the_project_link_to_what_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_version_of_a_checkout_that_is_not_installed() -> None:
    """The name is looked up in a folder without metadata of the package."""
    code = f"import sys; sys.path[:] = [{str(ROOT / 'src')!r}, *[p for p in sys.path if 'site-packages' not in p]]\n"
    code += "import convscope, importlib.metadata as m\n"
    code += "def missing(name): raise m.PackageNotFoundError(name)\n"
    code += "m.version = missing\nprint(convscope.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0+unknown\n"
