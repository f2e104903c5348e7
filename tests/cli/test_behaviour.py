"""What users meet around the commands: start, early refusals, aliases, messages, and how much is printed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import convscope
from convscope import names
from convscope.cli import app, main
from convscope.cli.app import ALIASES
from convscope.cli.parsing import open_image_arguments
from convscope.cli.patterns import sum_up_notes
from convscope.errors import ConvscopeError, rename_arguments

HEAVY = {"torch", "numpy", "PIL", "matplotlib", "timm", "torchvision", "jinja2"}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the only line that `main` prints when it ends with status 2."""
    monkeypatch.setattr("sys.argv", ["convscope", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a network is loaded."""

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(convscope, "load", fail, raising=False)


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["heatmap", "--help"], ["heatmap", "x", "y", "--method", "gradcem"]])
def test_help_and_bad_methods_need_no_heavy_package(arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('heavy:', *sorted({HEAVY!r} & set(sys.modules))))\n"
        "from convscope.cli import main\n"
        f"sys.argv = ['convscope', *{arguments!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
    if "gradcem" in arguments:
        assert done.stderr.startswith("convscope: method 'gradcem' is not known; nearest: grad-cam")


def test_help_starts_fast() -> None:
    """Five times the time that Python itself takes to start is far more than needed, on a busy machine too."""

    def seconds(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return time.perf_counter() - start

    base = min(seconds("-c", "import inspect, json, typing, pathlib, rich.console, rich.markdown") for _ in range(3))
    assert min(seconds("-m", "convscope", "--help") for _ in range(3)) < 5 * base + 0.1


def test_version_and_module() -> None:
    done = subprocess.run([sys.executable, "-m", "convscope", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"convscope {convscope.__version__}\n"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alias", "command"), ALIASES.items())
def test_aliases(alias: str, command: str) -> None:
    ours, theirs = (run(name, "--help") for name in (alias, command))
    assert ours.exit_code == 0
    assert ours.output.replace(f" {alias} ", f" {command} ", 1).split() == theirs.output.split()


def test_misspelled_command_is_named_with_the_right_one() -> None:
    result = run("heatmapp")
    assert result.exit_code == 2
    assert "heatmap" in result.stderr


@pytest.mark.parametrize(
    ("command", "table"),
    [("heatmap", "method"), ("compare", "method"), ("evaluate", "metric"), ("patterns", "recipe")],
)
def test_lists_need_neither_model_nor_images(command: str, table: str) -> None:
    result = run(command, f"--list-{table}s")
    assert result.exit_code == 0
    header, *lines = result.stdout.splitlines()
    assert header == f"{table}\tdescription"
    assert [line.split("\t")[0] for line in lines] == list(getattr(names, f"{table}s")())


# --- refused before a network is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heatmap", "PHOTO", "--method", "gradcem"), "method 'gradcem' is not known; nearest: grad-cam"),
        (("heatmap", "PHOTO", "--fuse", "sum"), "--fuse is 'sum'; expected mean, max or product"),
        (("heatmap", "PHOTO", "--smooth", "blur"), "--smooth is 'blur'; expected flips or noise"),
        (("heatmap", "PHOTO", "--scale", "1,x"), "--scale 1,x: expected a number"),
        (("heatmap", "PHOTO", "--scale", "0"), "--scale is 0.0; expected a number above 0"),
        (("heatmap", "PHOTO", "--fit", "stretch"), "--fit is 'stretch'; expected squash, crop or pad"),
        (("heatmap", "PHOTO", "--alpha", "3"), "--alpha is 3; expected a number from 0 to 1"),
        (("heatmap", "PHOTO", "--colormap", "jett"), "colormap 'jett' is not known; nearest: jet"),
        (("heatmap", "PHOTO", "--option", "samples"), "--option samples: expected NAME=VALUE"),
        (("heatmap", "PHOTO", "--option", "samples=3"), "method 'grad-cam' has no option 'samples'"),
        (("heatmap", "PHOTO", "-o", "PHOTO"), "--out is 'PHOTO', an existing file; expected a folder"),
        (("predict", "PHOTO", "-o", "map.PNG"), "--out is 'map.PNG', the name of a file; expected a folder"),
        (("predict", "PHOTO", "-o", "table.csv"), "--out is 'table.csv', the name of a file; expected a folder"),
        (("predict", "PHOTO", "-o", "s3://bucket/maps"), "s3://bucket/maps is a URL"),
        (("heatmap", "gone.jpg"), "gone.jpg: No such file or directory"),
        (("heatmap", "gone.mp4"), "gone.mp4: No such file"),
        (("predict", "PHOTO", "--classes", "gone.txt"), "--classes gone.txt: there is no such file; expected a file"),
        (("predict", "PHOTO", "--preprocessing", "{"), "--preprocessing is not JSON"),
        (("predict", "PHOTO", "--task", "guessing"), "--task is 'guessing'; expected classification, binary,"),
        (("predict", "PHOTO", "--token-grid", "14"), "--token-grid is '14'; expected height and width, such as 14x14"),
        (("activations", "PHOTO", "--scaling", "log"), "--scaling is 'log'; expected standard or minmax"),
        (
            ("evaluate", "PHOTO", "--metrics", "iou,insertoin"),
            "metric 'insertoin' is not known; nearest: insert",
        ),
        (("evaluate", "PHOTO", "--metrics", "pointing"), "metric 'pointing' needs --masks"),
        (("compare", "PHOTO", "--methods", "rise,gradcem"), "method 'gradcem' is not known"),
        (("patterns", "--layer", "bn1", "--recipe", "robst"), "recipe 'robst' is not known; nearest: robust"),
        (("patterns", "--layer", "bn1", "--recipe", "dream"), "recipe 'dream' needs a photograph; give one as --start"),
        (("patterns", "--layer", "bn1", "--start", "a.png"), "recipe 'robust' takes no start image; leave out --start"),
        (("patterns", "--layer", "bn1", "--units", "9-3"), "--units 9-3: the end of the range is smaller"),
        (("patterns", "--layer", "bn1", "--steps", "0"), "--steps is 0; expected a whole number, 1 or more"),
        (("patterns",), "give a --layer, or --units logits:CLASSES"),
    ],
)
def test_refused_before_a_network_is_loaded(
    arguments: tuple[str, ...],
    message: str,
    photos: list[str],
    no_network: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = (photos[0] if argument == "PHOTO" else argument for argument in arguments)
    line = refusal(monkeypatch, capsys, command, "lite0", *rest)
    assert line.startswith(f"convscope: {message.replace('PHOTO', photos[0])}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("atlas", "umap", "atlas"),
        ("concepts", "sklearn", "concepts"),
        ("scan", "pyarrow", "scan"),
        ("serve", "fastapi", "serve"),
        ("publish", "fastapi", "serve"),
    ],
)
def test_missing_extra_is_named_whole(
    command: str,
    package: str,
    extra: str,
    no_network: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rich takes text in brackets for markup; it must not disappear from the message or the help."""
    monkeypatch.setattr("convscope.cli.parsing.find_spec", lambda name: None if name == package else object())
    arguments = {"concepts": ["x", "--target", "1"], "serve": [], "publish": []}.get(command, ["x"])
    line = refusal(monkeypatch, capsys, command, "lite0", *arguments)
    assert line == f'convscope: {package} is not installed; pip install "convscope[{extra}]"'
    assert f'pip install "convscope[{extra}]"' in run(command, "--help").output


def test_messages_name_options() -> None:
    named = {"start": "--start", "positions_per_image": "--positions", "fit": "--fit", "images": "IMAGES"}
    named |= {"fit=False": "--no-fit"}
    for message, expected in (
        ("start is 3; leave out start=", "--start is 3; leave out --start"),
        ("failed: a.jpg: positions_per_image has 3 rows", "failed: a.jpg: --positions has 3 rows"),
        ("give fit='crop', or size='x'", "give --fit crop, or size='x'"),
        ("the start is 3, restart=4, a.fit=3", "the start is 3, restart=4, a.fit=3"),
        ("name them: fit=[...]", "name them: --fit"),
        ("give fit=False, or start=True", "give --no-fit, or --start True"),
        ("give fit=dict(..., size=(3, 4))", "give --fit '{..., \"size\": [3, 4]}'"),
        ("with fit=lambda out: out[0], or load(..., start='a')", "with --fit, or --start a"),
        ("load('torchvision:resnet50', start='a.pth')", "torchvision:resnet50 --start a.pth"),
    ):
        assert rename_arguments(message, named) == expected


# --- images -----------------------------------------------------------------------------------------------------------


def test_folders_and_globs(photos: list[str], lite0: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    for i, name in enumerate(("b.png", "a.png", "more/c.png")):
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(name)
    (tmp_path / "film.mp4").write_bytes(b"film")
    opened = open_image_arguments(["more", "*.png", "gone.png", "none/*.png"])
    assert list(opened.names) == ["more/c.png", "a.png", "b.png", "gone.png", "none/*.png"]
    result = run("predict", "lite0", "more", "*.png", "gone.png", "none/*.png", "film.mp4", "--top", "1")
    assert result.exit_code == 1
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["more/c.png", "a.png", "b.png"]
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert [line.split(": ")[1] for line in failed] == ["gone.png", "none/*.png", "film.mp4"]
    assert "is a video, which is not read as an image; `convscope heatmap` samples frames" in failed[2]


def test_targets_hold_for_every_image_of_a_folder(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for photo in photos[:2]:
        (tmp_path / "photos" / Path(photo).name).symlink_to(photo)
    result = run("heatmap", "lite0", "photos", "--target", "387", "--target", "red fox", "-o", "out")
    assert result.exit_code == 0, result.output
    assert [line.split("\t")[1] for line in result.stdout.splitlines()[1:]] == ["lesser panda", "red fox"] * 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        f"{animal}_{target}.png" for animal in ("cat", "crab") for target in ("0_lesser-panda", "1_red-fox")
    ]


# --- what is printed and drawn ----------------------------------------------------------------------------------------


def test_quiet_prints_the_table_only(photos: list[str], tmp_path: Path) -> None:
    arguments = ("heatmap", "lite0", photos[0], tmp_path / "gone.jpg", "-o", tmp_path)
    loud, quiet = run(*arguments), run(*arguments, "--quiet")
    assert quiet.stdout == loud.stdout
    assert "written to" in loud.stderr
    assert quiet.stderr == f"failed: {tmp_path / 'gone.jpg'}: No such file or directory\n"


def test_verbose_prints_details(photos: list[str], tmp_path: Path) -> None:
    assert "layers on cpu" in run("predict", "lite0", photos[0], "-v").stderr


def test_verbose_shows_where_an_error_was_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["convscope", "layers", "lite9", "--verbose"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("convscope: no model is called 'lite9'")


def test_opacity_and_colormap(photos: list[str], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.open(photos[0]).convert("RGB").save(photo)
    for folder, options in (("clear", ["--alpha", "0"]), ("gray", ["--alpha", "1", "--colormap", "gray"])):
        assert run("heatmap", "lite0", photo, "-o", tmp_path / folder, *options).exit_code == 0
    clear, gray = (np.asarray(Image.open(tmp_path / f / "photo_0_Egyptian-cat.png")) for f in ("clear", "gray"))
    np.testing.assert_array_equal(clear, np.asarray(Image.open(photo)))
    assert (gray[..., 0] == gray[..., 1]).all()
    assert gray.max() == 255


def test_notes_of_several_layers_are_summed_up() -> None:
    dead = "looks dead: no activation from 8 starts. It has no pattern."
    notes = [
        ("conv1", f"unit 3 {dead}"),
        ("conv1", "unit 4 has a score of 0.3, not above the noise baseline (0.5)."),
        *[("conv2", f"unit {unit} {dead}") for unit in range(8)],
        ("logits", f"class 2 (cat) {dead}"),
        ("conv2", "unit 9 has a score of 1e-05, not above the noise baseline (2.5)."),
    ]
    assert sum_up_notes(notes[:1]) == [f"conv1: unit 3 {dead}"]
    assert sum_up_notes(notes) == [
        f"conv1: unit 3 {dead} Likewise 8 more: conv2 0, conv2 1, conv2 2, conv2 3, conv2 4, conv2 5, ...",
        "conv1: unit 4 has a score of 0.3, not above the noise baseline (0.5). Likewise 1 more: conv2 9",
        f"logits: class 2 (cat) {dead}",
    ]


def test_an_error_names_the_argument_in_python() -> None:
    with pytest.raises(ConvscopeError, match=r"^fuse is 'sum'"):
        convscope.heatmaps(convscope.load("lite0"), "x.png", fuse="sum")


def test_what_is_written_is_listed(photos: list[str], tmp_path: Path) -> None:
    """Maps and patterns are listed like heatmaps: what was computed, and whether it is of use."""
    result = run("activations", "lite0", photos[0], "--layers", "bn1,blocks.1.0.bn1", "-o", tmp_path / "maps")
    header, *rows = (line.split("\t") for line in result.stdout.splitlines())
    assert header == ["layer", "maps", "active", "maximum", "constant maps"]
    assert [row[:2] for row in rows] == [["bn1", "32 x 112 x 112"], ["blocks.1.0.bn1", "96 x 112 x 112"]]
    assert {p.name for p in (tmp_path / "maps").glob("*.png")} == {"cat_bn1.png", "cat_blocks.1.0.bn1.png"}
    result = run("patterns", "lite0", "--layer", "bn1", "--units", "3,1", "--steps", "1", "-o", tmp_path / "patterns")
    header, *rows = (line.split("\t") for line in result.stdout.splitlines())
    assert header == ["unit", "score", "score of noise", "status"]
    assert [row[0] for row in rows] == ["bn1 3", "bn1 1"]


def test_all_layers_on_request(lite0: object) -> None:
    main, every = (run("layers", "lite0", *option) for option in ([], ["--all"]))
    names = [[line.split("\t")[0] for line in result.stdout.splitlines()[1:]] for result in (main, every)]
    assert set(names[0]) < set(names[1])
    assert "bn1.drop" in names[1]
    assert "bn1.drop" not in names[0]
    assert main.stderr == f"{len(names[1]) - len(names[0])} layers are not shown: --all prints every layer\n"
    assert every.stderr == ""


def test_demo_shows_a_bar_from_the_start_and_one_for_each_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lite0: object
) -> None:
    labels: list[str] = []

    @contextmanager
    def record(label: str) -> Iterator[Callable[[float, int], None]]:
        labels.append(label)
        yield lambda *_: None

    def write(*_: object, progress_bar: Callable[[str], AbstractContextManager[object]], **__: object) -> list[object]:
        with progress_bar("predictions"):
            return []

    monkeypatch.setattr("convscope.cli.demo.progress_bar", record)
    monkeypatch.setattr("convscope.cli.options.load_model", lambda *_, **__: lite0)
    monkeypatch.setattr("convscope.reports.demo.write_demo", write)
    assert CliRunner().invoke(app, ["demo", "-o", str(tmp_path)]).exit_code == 0
    assert labels == ["load", "predictions"]
