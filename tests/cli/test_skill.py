"""The skill for agents: ten tasks, as a user puts them, are done with the commands that stand under their headings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.skill import skill_text
from tests.docs.test_code_blocks import shell_commands

SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", skill_text(), re.MULTILINE | re.DOTALL))


def prints(*words: str) -> Callable[[str], None]:
    """Return a check that each of these words is printed."""

    def check(output: str) -> None:
        assert all(word in output for word in words), output

    return check


def check_predictions(output: str) -> None:
    entries = json.loads(output)
    assert len(entries) == 4
    assert [c["name"] for c in entries[0]["classes"]][:2] == ["lesser panda", "red fox"]


def check_heatmap(folder: str, target: str) -> Callable[[str], None]:
    """Return a check that a folder has the overlay of a target, in the size of the image."""

    def check(_: str) -> None:
        heatmaps: Any = convscope.open(folder)
        assert heatmaps.names == [[target]]
        (overlay,) = Path(folder).glob("*.png")
        assert Image.open(overlay).size == Image.open("photo.jpg").size

    return check


def check_box(_: str) -> None:
    """The red panda fills the right half of the photograph."""
    (box,) = convscope.open("where").boxes[0]
    assert box[0] > 0.2 * Image.open("photo.jpg").width


def check_patching(output: str) -> None:
    """All units together move the whole difference of both scores."""
    patched: Any = convscope.open("patched")
    assert patched.target_name == "lesser panda rather than Egyptian cat"
    assert patched.joint_effects[-1] == pytest.approx(patched.total, rel=1e-4)
    assert output.splitlines()[1].split("\t")[0] == str(patched.units[abs(patched.effects).argmax()])


def check_scan(output: str) -> None:
    """Ranks of the units agree with those that follow from the activations."""
    activations = convscope.activations("lite0", "photos", "blocks.4")["blocks.4"]
    best = int(activations.mean((0, 2, 3)).argmax())
    first = next(line for line in output.splitlines() if line.split()[1:2] == ["blocks.4"])
    assert int(first.split()[2]) == best
    assert Path("unit.png").is_file()


TASKS = {
    "What is inside this network, and what are its layers called?": (
        "Which layers does the network have?",
        prints("blocks.4", "receptive field"),
    ),
    "Classify my photos; I want three guesses each.": (
        "What does the network predict for these images?",
        check_predictions,
    ),
    "Why does the network call this a panda?": (
        "Why does it predict this class?",
        check_heatmap("why", "lesser panda"),
    ),
    "Explain the second-best class.": (
        "What is the evidence for the second-best class?",
        check_heatmap("second", "red fox"),
    ),
    "Why a panda, and not a fox?": (
        "Why this class and not that one?",
        check_heatmap("rather", "lesser panda rather than red fox"),
    ),
    "Is this heatmap to be trusted?": (
        "Is this heatmap to be trusted?",
        prints("deletion", "insertion", "randomisation", "random-logit"),
    ),
    "Find the panda in the picture.": ("Where is the object?", check_box),
    "Which neurons matter for this answer?": (
        "Which units does the prediction depend on?",
        prints("unit", "absolute", "lesser panda in photo.jpg"),
    ),
    "Which neurons would turn this cat into a panda?": (
        "Which units make the prediction of one image that of another?",
        check_patching,
    ),
    "What does unit 7 of blocks.4 look for?": ("What does a unit respond to?", prints("blocks.4 7", "score of noise")),
    "Which units does my data set excite most at blocks.4?": (
        "Which units does a data set excite most, and which images excite a unit?",
        check_scan,
    ),
}
"""What users ask for, the heading that answers it, and a check of what is printed and written."""


@pytest.fixture
def folder(tmp_path: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch, lite0: convscope.Model) -> Path:
    """Enter a folder with the images that the skill names; the network is loaded once."""
    for number, path in enumerate(photos):
        is_panda = "panda" in path
        target = tmp_path / ("photo.jpg" if is_panda else f"photos/{'cats' if number == 0 else 'others'}/{number}.jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.thumbnail((320, 320))
        image.save(target, quality=95)
    Image.open(tmp_path / "photos/cats/0.jpg").save(tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convscope.cli.parsing.load_model", lambda *_, **__: lite0)
    monkeypatch.setattr("convscope.cli.options.load_model", lambda *_, **__: lite0)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_task(task: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heading, check = TASKS[task]
    output = ""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", SECTIONS[heading], re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(text, heading, "exec"), {})
            output += capsys.readouterr().out
            continue
        for words in shell_commands(text.replace("--steps 64", "--steps 4").replace("-o trust", "-o trust --steps 4")):
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, result.output
            output += result.stdout
    check(output)


def test_skill_has_a_header_and_names_commands_that_exist() -> None:
    _, header, text = skill_text().split("---\n", 2)
    assert set(yaml.safe_load(header)) == {"name", "description"}
    names = set(re.findall(r"convscope ([a-z]+) (?:MODEL|lite0|-o|publish|store)", text))
    assert {"heatmap", "evaluate", "serve"} <= names
    for name in names | {"publish", "patch"}:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_skill_is_printed_and_written(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["skill"]).stdout == skill_text()
    assert CliRunner().invoke(app, ["skill", "-o", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "convscope" / "SKILL.md").read_text(encoding="utf-8") == skill_text()
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["skill", "-o", str(tmp_path / "file")])
    assert isinstance(result.exception, convscope.ConvscopeError)


def test_scores_that_the_skill_calls_suspicious_are_those_of_the_metrics() -> None:
    from convscope.evaluation.registry import get_metric

    for name, bound in (("randomisation", 0.5), ("random-logit", 0.9)):
        assert f"`{name}` above {bound}" in skill_text()
        assert get_metric(name).is_suspect(bound + 0.01, None)
        assert not get_metric(name).is_suspect(bound - 0.01, None)
