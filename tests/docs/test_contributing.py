"""The sections of CONTRIBUTING.md that add something are applied to a copy of the source, as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in TEXT.split("\n## ") if part.startswith("Add ")}
STEP = re.compile(
    r"^(New file|At the end of|In|Then)(?: `([^`]+)`)?(?:, after `([^`]+)`)?:\n\n```\w+\n(.*?)^```$", re.M | re.S
)


def apply_step(folder: Path, action: str, path: str, anchor: str, code: str) -> None:
    """Change one file of the copy as the text says."""
    file = folder / path
    if action == "New file":
        assert not file.exists()
        file.write_text(code, encoding="utf-8")
        return
    source = file.read_text(encoding="utf-8")
    if action == "At the end of":
        file.write_text(f"{source}\n\n{code}", encoding="utf-8")
        return
    assert source.count(f"{anchor}\n") == 1, f"{path} has no line {anchor}"
    file.write_text(source.replace(f"{anchor}\n", f"{anchor}\n{code}"), encoding="utf-8")


def test_every_kind_of_addition_is_described() -> None:
    kinds = ("a heatmap method", "a recipe", "an objective", "a metric", "a source of models", "a page of the explorer")
    assert list(SECTIONS) == [f"Add {kind}" for kind in kinds]


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_work_as_they_stand(section: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    *steps, (action, _, _, example) = STEP.findall(SECTIONS[section])
    assert SECTIONS[section].count("```") == 2 * (len(steps) + 1), (
        "a code block has no line that says what to do with it"
    )
    assert steps
    assert action == "Then"
    for step in steps:
        apply_step(tmp_path, *step)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
