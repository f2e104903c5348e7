"""Names on the explorer's pages, live and published, and on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

import convscope
from convscope.cli import app
from convscope.explorer.app import create_app
from convscope.explorer.publish import publish
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import HOSTILE_NAME, tiny_model

WORDS = ["red", "green", HOSTILE_NAME]


@pytest.fixture(scope="module")
def model() -> convscope.Model:
    return tiny_model()


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> convscope.Store:
    images = np.random.default_rng(0).integers(0, 40, (60, 32, 32, 3)).astype(np.uint8)
    images[np.arange(60), ..., np.arange(60) % 3] += 200
    folder = tmp_path_factory.mktemp("scan") / "store"
    store = convscope.scan(model, images, folder, layers=["relu2"], k=3, workers=0)
    convscope.name_units(store, WORDS, np.eye(3)[np.arange(60) % 3])
    return store


def test_live_pages_show_names(model, store):
    names = store.names()
    unit = next(
        u for u, layer, ok in zip(names.units, names.layer, names.named, strict=True) if ok and layer != "logits"
    )
    word = names.get("relu2", unit)
    escaped = word.replace("<", "&lt;").replace(">", "&gt;")
    with TestClient(create_app(Explorer({"tiny": model}, store=store)), base_url="http://localhost") as client:
        page = client.get("/m/tiny/names")
        assert page.status_code == 200
        assert f'<a href="/m/tiny/unit/relu2/{unit}">{escaped}</a>' in page.text
        assert HOSTILE_NAME not in page.text
        assert client.get("/static/names.js").status_code == 200
        assert f"<strong>{escaped}</strong>" in client.get(f"/m/tiny/unit/relu2/{unit}").text
        assert f"<span>{unit} {escaped}</span>" in client.get("/m/tiny/layer/relu2").text
        assert 'href="/m/tiny/names"' in client.get("/m/tiny").text


def test_pages_without_names(model):
    with TestClient(create_app(Explorer({"tiny": model})), base_url="http://localhost") as client:
        assert "has no names" in client.get("/m/tiny/names").text
        assert 'href="/m/tiny/names"' not in client.get("/m/tiny").text


@pytest.mark.slow
def test_published_pages_show_names(model, store, tmp_path):
    publish({"tiny": model}, store, tmp_path / "site", workers=0)
    page = (tmp_path / "site/m/tiny/names.html").read_text()
    assert "unit/relu2/" in page
    assert "static/names.js" in page
    assert "<strong>red</strong>" in "".join(
        p.read_text() for p in (tmp_path / "site/m/tiny/unit/relu2").glob("*.html")
    )


def test_commands(store, tmp_path):
    np.save(tmp_path / "scores.npy", np.eye(3)[np.arange(60) % 3])
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\n")
    arguments = ["name", store.address, "--words", str(tmp_path / "words.txt"), "--layers", "relu2"]
    result = CliRunner().invoke(app, [*arguments, "--scores", str(tmp_path / "scores.npy"), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len(rows) == store.unit_counts["relu2"]
    assert {row["name"] for row in rows if row["named"]} <= {"red", "green", "blue"}
    table = CliRunner().invoke(app, [*arguments, "--scores", str(tmp_path / "scores.npy")])
    assert table.stdout.startswith("layer\tunit\tname\tscore")
    found = CliRunner().invoke(app, ["search", store.address, "red", "--json"])
    assert json.loads(found.stdout) == [dict(m._asdict()) for m in store.search("red")]
    assert "red" in CliRunner().invoke(app, ["search", store.address, "red", "-n", "1"]).stdout
    convscope.name_units(store, WORDS, np.eye(3)[np.arange(60) % 3])


def test_commands_refuse_files_that_are_no_arrays(store, tmp_path):
    (tmp_path / "scores.npy").write_text("no array")
    result = CliRunner().invoke(
        app, ["name", store.address, "--words", "colors", "--scores", str(tmp_path / "scores.npy")]
    )
    assert "cannot be read as an .npy file" in str(result.exception)
