"""The tools over a client in memory: the numbers are those of the Python functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from mcp import Client
from PIL import Image

import convscope
from convscope.errors import ConvscopeError
from convscope.tool_server.app import build_server
from convscope.tool_server.limits import Limits
from convscope.tool_server.responses import to_json
from tests.oracles.names import name_units
from tests.tool_server.conftest import Call, error_of, images_of, run

A, B = "a.png", "more/b.png"


def content_of(result: Any) -> dict[str, Any]:
    assert not result.is_error, result.content[0].text
    content: dict[str, Any] = result.structured_content
    return content


def test_the_tools_and_their_descriptions(tiny: convscope.Model, folder: Path, tmp_path: Path) -> None:
    server = build_server({"tiny": lambda: tiny}, roots=[folder], out=tmp_path)

    async def request() -> Any:
        async with Client(server) as client:
            return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in run(request)}
    assert set(tools) == {
        "overview", "list_images", "layers", "predict", "activations", "strongest_units", "detect", "heatmap", "locate",
        "evaluate", "effects", "explain", "patch", "patterns", "scan", "diagnose",
        "store_summary", "store_units", "store_unit", "store_image",
    }  # fmt: skip
    for tool in tools.values():
        assert tool.description
        assert not {"progress", "context"} & set(tool.input_schema["properties"])
        assert all("description" in value for value in tool.input_schema["properties"].values())
    writing = {name for name, tool in tools.items() if not tool.annotations.read_only_hint}
    assert writing == {
        "activations", "detect", "diagnose", "effects", "evaluate", "explain", "heatmap", "locate", "patch", "patterns",
        "scan",
    }  # fmt: skip


def test_overview_and_images(call: Call, folder: Path, tmp_path: Path) -> None:
    overview = content_of(call("overview"))
    assert overview["models"] == ["tiny"]
    assert overview["reads"][0] == str(folder)
    assert overview["writes"] == str(tmp_path / "out")
    assert {"grad-cam", "rise"} <= set(overview["heatmap_methods"])
    images = content_of(call("list_images"))["images"]
    assert images[:2] == [str(folder / A), str(folder / B)]
    assert content_of(call("list_images", folder="more"))["images"] == [str(folder / B)]
    assert "only the first 1" in content_of(call("list_images", Limits(rows=1)))["more"]


def test_layers(call: Call, tiny: convscope.Model) -> None:
    rows = content_of(call("layers", every=True))["layers"]
    assert [row["name"] for row in rows] == tiny.layers.names
    assert rows[0]["shape"] == [8, 32, 32]
    page = content_of(call("layers", Limits(rows=2), every=True, start=2))
    assert [row["name"] for row in page["layers"]] == tiny.layers.names[2:4]
    assert "start=4" in page["more"]


def test_predict_equals_the_function(call: Call, tiny: convscope.Model, folder: Path) -> None:
    result = content_of(call("predict", images=[A, B], top=2))
    assert result["rows"] == to_json(convscope.predict(tiny, [folder / A, folder / B], 2).rows())


def test_activations_and_strongest_units(call: Call, tiny: convscope.Model, folder: Path, tmp_path: Path) -> None:
    expected = convscope.activations(tiny, folder / A, "conv2")
    result = call("activations", images=[A], layers=["conv2"], save="maps")
    assert content_of(result)["rows"] == to_json(expected.rows())
    assert len(images_of(result)) == 1
    opened = convscope.open(tmp_path / "out" / "maps")
    np.testing.assert_array_equal(opened["conv2"], expected["conv2"])
    rows = content_of(call("strongest_units", images=[A], layer="conv2", count=3))["rows"]
    maxima = expected["conv2"][0].max((1, 2))
    assert [row["unit"] for row in rows] == np.argsort(-maxima)[:3].tolist()
    np.testing.assert_allclose([row["maximum"] for row in rows], np.sort(maxima)[::-1][:3], rtol=1e-4)


def test_heatmap_equals_the_function_and_writes_nothing_without_save(
    call: Call, tiny: convscope.Model, folder: Path, tmp_path: Path
) -> None:
    arguments = {"targets": [["bee", "dog"]], "layer": "conv2", "method": "layer-cam", "against": "cat"}
    expected = convscope.heatmaps(tiny, folder / A, **arguments)
    request = {**arguments, "targets": ["bee", "dog"], "images": [A]}
    result = call("heatmap", **request)
    content = content_of(result)
    assert content["layer"] == "conv2"
    for row, values in zip(content["rows"], expected.rows(), strict=True):
        assert {name: row[name] for name in values} == {**to_json(values), "image": str(folder / A)}
    assert [image.size for image in images_of(result)] == [(48, 40)] * 2
    assert not (tmp_path / "out").exists()
    assert content_of(call("heatmap", **request, save="x/y"))["saved"] == str(tmp_path / "out" / "x" / "y")
    np.testing.assert_array_equal(convscope.open(tmp_path / "out" / "x" / "y").values, expected.values)


def test_locate_evaluate_effects_and_patch_equal_the_functions(call: Call, tiny: convscope.Model, folder: Path) -> None:
    paths = [str(folder / A), str(folder / B)]
    located = content_of(call("locate", images=[A, B], targets=["bee"]))
    assert located["rows"] == to_json(convscope.locate(tiny, paths, ["bee", "bee"]).rows())
    evaluated = content_of(call("evaluate", images=[A, B], metrics=["deletion", "sparseness"], steps=4))
    heatmaps = convscope.heatmaps(tiny, paths)
    assert evaluated["rows"] == to_json(
        convscope.evaluate(tiny, paths, heatmaps, ["deletion", "sparseness"], steps=4).rows()
    )
    effects = content_of(call("effects", images=[A, B], layer="conv2", units=[1, 4], targets=["ant"]))
    assert effects["rows"] == to_json(convscope.effects(tiny, paths, "conv2", [1, 4], targets=["ant", "ant"]).rows())
    explained = content_of(call("explain", images=[A], layer="conv2", features=2))
    assert explained["rows"] == to_json(convscope.explain(tiny, paths[:1], layer="conv2", features=2).rows())
    patched = content_of(call("patch", source=A, destination=B, layer="conv2", target="emu"))
    assert patched["rows"] == to_json(convscope.patch(tiny, paths[0], paths[1], "conv2", targets="emu").rows())


def test_patterns_are_bounded(call: Call) -> None:
    result = call("patterns", layer="conv2", units=[0, 3], steps=4, size=32)
    assert [row["unit"] for row in content_of(result)["rows"]] == [0, 3]
    assert len(images_of(result)) == 1
    few = Limits(units=1, steps=10)
    assert "the number of units is 2" in error_of(call("patterns", few, layer="conv2", units=[0, 3]))
    assert "steps is 11" in error_of(call("patterns", few, layer="conv2", units=[0], steps=11))


def test_scan_and_queries(call: Call, folder: Path, tmp_path: Path, tiny: convscope.Model) -> None:
    dataset = tmp_path / "out" / "data"  # the output folder may be read, too
    for name, source in (("x/a.png", A), ("y/b.png", B)):
        (dataset / name).parent.mkdir(parents=True)
        (dataset / name).write_bytes((folder / source).read_bytes())
    summary = content_of(call("scan", dataset="data", name="store", layers=["conv2"], k=2))
    assert (summary["images"], summary["labels"]) == (2, ["x", "y"])
    assert summary["layers"] == [{"name": "conv2", "units": 12}, {"name": "logits", "units": 5}]
    assert content_of(call("store_summary", store="store")) == summary
    store = convscope.open_store(tmp_path / "out" / "store")
    rows = content_of(call("store_units", store="store", layer="conv2", count=3, by="mean"))["rows"]
    means = store.units(["mean"])["mean"].to_numpy()[:12]
    assert [row["unit"] for row in rows] == np.argsort(-means)[:3].tolist()
    unit = call("store_unit", store="store", layer="conv2", unit=rows[0]["unit"])
    assert content_of(unit)["examples"] == to_json(store.unit("conv2", rows[0]["unit"]).examples().rows())
    assert len(images_of(unit)) == 1
    image = call("store_image", store="store", image=1)
    assert content_of(image)["label"] == "y"
    assert len(images_of(image)) == 1
    assert "by is 'x'" in error_of(call("store_units", store="store", layer="conv2", by="x"))
    name_units(store, "conv2", {unit: f"word {unit}" for unit in range(12)})
    named = call("effects", images=[A], layer="conv2", units=[1, 4], store="store")
    assert {row["name"] for row in content_of(named)["rows"]} == {"word 1", "word 4"}
    explained = content_of(call("explain", images=[A], layer="conv2", features=2, store="store"))
    assert all(row["name"] == f"word {row['unit']}" for row in explained["rows"])


def test_originals_of_a_store_outside_are_not_shown(call: Call, folder: Path, tmp_path: Path, tiny: Any) -> None:
    outside = folder.parent / "outside"
    convscope.scan(tiny, outside, tmp_path / "out" / "store", ["conv2"], 1, workers=0, progress=False)
    content_of(call("store_image", store="store", image=0))
    from convscope.tool_server.files import AllowedFiles
    from convscope.tool_server.workspace import Workspace

    workspace = Workspace({}, AllowedFiles([folder], tmp_path / "out"), Limits())
    assert workspace.store("store").image(0).view().source == "thumbnail"
    assert convscope.open_store(tmp_path / "out" / "store").image(0).view().source == "original"


@pytest.mark.parametrize(
    ("tool", "arguments", "reason"),
    [
        ("predict", {"images": ["link.png"]}, "outside of the folders"),
        ("predict", {"images": ["a.png"], "model": "torchvision:vgg16"}, "not offered by this server"),
        ("predict", {"images": ["a.png"], "model": "os:getcwd"}, "not offered by this server"),
        ("predict", {"images": []}, "at least 1 item"),
        ("predict", {}, "Field required"),
        ("heatmap", {"images": ["a.png"], "targets": ["zebra"]}, "zebra"),
        ("heatmap", {"images": ["a.png"], "options": {"no": 1}}, "no"),
        ("heatmap", {"images": ["a.png"], "save": "../x"}, "not a folder inside of"),
        ("detect", {"images": ["a.png"]}, "detector"),
        ("store_summary", {"store": "."}, "manifest"),
        ("scan", {"dataset": "linked", "name": "s"}, "outside of the folders"),
    ],
)
def test_refusals(call: Call, tmp_path: Path, tool: str, arguments: dict[str, Any], reason: str) -> None:
    assert reason in error_of(call(tool, **arguments))
    assert not (tmp_path / "out").exists()


def test_calls_stop_at_the_time_limit(call: Call, tmp_path: Path) -> None:
    message = error_of(call("patterns", Limits(seconds=0.2), layer="conv2", units=[0], steps=500, save="x"))
    assert "stopped after 0.2 seconds" in message
    assert not (tmp_path / "out").exists()


def test_a_cancelled_call_stops(tiny: convscope.Model, folder: Path, tmp_path: Path) -> None:
    """The thread ends at its next report, so that the next call finds the server free."""
    server = build_server({"tiny": lambda: tiny}, roots=[folder], out=tmp_path / "out")

    async def request() -> Any:
        async with Client(server) as client:
            with anyio.move_on_after(0.5) as scope:
                await client.call_tool("patterns", {"layer": "conv2", "units": [0], "steps": 512, "size": 256})
            assert scope.cancelled_caught
            with anyio.fail_after(5):
                return await client.call_tool("predict", {"images": [A]})

    assert not run(request).is_error
    assert not (tmp_path / "out").exists()


def test_a_server_needs_a_network(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvscopeError, match="no networks"):
        build_server({}, roots=[folder], out=tmp_path)


def test_diagnose_equals_the_function(call: Call, tmp_path: Path, tiny: convscope.Model) -> None:
    rng = np.random.default_rng(0)
    for n in range(8):
        path = tmp_path / "out" / "data" / ("ant", "bee")[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    expected = convscope.diagnose(tiny, tmp_path / "out" / "data", workers=0)
    content = content_of(call("diagnose", dataset="data", save="report"))
    assert content["result"] == str(expected).partition("\n")[0]
    assert content["rows"] == to_json(expected.rows())
    assert content["saved"] == str(tmp_path / "out" / "report")
