"""The command that prints one unit of a store: the same numbers as the store's record, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import convscope
from convscope.cli import app
from tests.attribution.helpers import load_module
from tests.oracles.nets import SmallConvNet, randomized


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> convscope.Store:
    model = load_module(randomized(SmallConvNet()), classes=["hen", "red fox", "lesser panda", "espresso", "crane"])
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), np.uint8)
    folder = tmp_path_factory.mktemp("unit") / "store"
    return convscope.scan(model, images, folder, layers=["relu2", "logits"], k=4, workers=0)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["unit", *(str(a) for a in arguments)])


def test_json_has_the_numbers_of_the_record(store: convscope.Store) -> None:
    result = run(store.address, "relu2", "3", "-n", "2", "--json")
    assert result.exit_code == 0, result.output
    printed, record = json.loads(result.stdout), store.unit("relu2", 3)
    assert printed["top"] == record.examples(2).rows()
    assert [row["activation"] for row in printed["top"]] == sorted(
        (row["activation"] for row in record.examples(None).rows()), reverse=True
    )[:2]
    assert printed["mean"] == record.statistics["mean"]


def test_table_lists_the_images_of_a_class_by_name(store: convscope.Store, tmp_path: Path) -> None:
    result = run(store.address, "logits", "red fox", "--kind", "bottom", "-o", tmp_path / "fox.png")
    assert result.exit_code == 0, result.output
    rows = store.unit("logits", 1).examples(9, "bottom").rows()
    table = [line.split("\t") for line in result.stdout.splitlines() if line.count("\t") == 3]
    assert table == [
        ["image", "activation", "row", "column"],
        *([str(row["image"]), f"{row['activation']:.3f}", str(row["row"]), str(row["column"])] for row in rows),
    ]
    with Image.open(tmp_path / "fox.png") as figure:
        assert np.asarray(figure).std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("relu2", "99"), "unit 99 is out of range"),
        (("relu9", "1"), "layer 'relu9' is not in this store; nearest: relu2"),
        (("relu2", "1", "--kind", "middle"), "kind is 'middle'; expected top, bottom, decile"),
    ],
)
def test_what_does_not_exist_is_refused(store: convscope.Store, arguments: tuple[str, ...], message: str) -> None:
    result = run(store.address, *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)
