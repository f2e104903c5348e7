"""Run convscope on one network of each family of timm, torchvision, keras.applications and transformers.

Each network is loaded, its default layer compared with its last stage, its default Grad-CAM with one computed by hooks
of this file, four images with each alone, one pattern computed, and four images scanned. The results are lines of a
JSON file; docs/zoo.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import header
from torch import Tensor, nn
from zoo_networks import COLLECTIONS, Network, build, count_parameters, families

import convscope

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "zoo" / "results.jsonl"
PARAMETERS = RESULTS.with_name("parameters.json")
PAGE = ROOT / "docs" / "zoo.md"
IMAGES = 4
PATTERN_STEPS = 2
SCANNED_UNITS = 8
PREFIX_TOKENS = 8
TOLERANCE = 1e-3  # of two maps, relative to the larger one's largest value
HEADINGS = (
    *("family", "network", "million parameters", "input", "layers", "default layer"),
    *("last stage", "by hand", "alone", "scan", "pattern"),
)
COLUMNS = """\
Columns:

- `input`: size of the input; `default layer`: the layer that is chosen for heatmaps, with the size of its map;
- `last stage`: whether this is the size of the network's last stage. The last stage is what `forward_features` of timm
  returns, or given by the configuration of transformers, or else the last convolution, linear layer or normalisation
  with several positions;
- `by hand`: largest difference of the default Grad-CAM from one computed by a hook at this layer and one backward pass,
  relative to its largest value;
- `alone`: largest difference between the maps of images in a batch of four and alone;
- `scan`: largest difference of the units' maxima from maxima computed by hand;
- `pattern`: whether two steps of gradient ascent gave an image with a finite score."""

REMARKS = """\
The scores of `efficientvim` are the sum of one head per stage. Its default layer is the last one that every path to the
scores passes through, which lies before the later stages; `layer_reason` names a layer of these, which can be chosen
with `layer=`. `crossvit` resizes images itself, and its last block returns two branches. `mobilenetv5` ends with a
fusion of stages on the grid of an earlier one. The blocks of `coat`, `crossvit` and `tnt` return several maps, and the
default layer is the last of these.

The maps of `mobilevit` differ between batches and single images because its activations with random weights are as
small as 1e-40, where single precision has few digits left; in double precision they are equal. The maps of `cvt` also
differ in double precision and in PyTorch alone: for a batch of one, PyTorch's gradient of one of its batch
normalisations does not agree with finite differences; for a batch of four it does. The maps of `EfficientNetV2S`, `M`
and `L` differ in PyTorch alone as well; the reason was not investigated.

`shieldgemma2`, `siglip2` and `imagegpt` take inputs that are not images (`forward=`). What `forward_features` of `coat`
returns is not a map of its last stage. Detectors and quantised networks were not run with this version."""


@dataclass
class Result:
    """What happened with one network; `errors` has the kind and the text of the error of each step that failed."""

    collection: str
    family: str
    name: str = ""
    size: list[int] = field(default_factory=list)
    parameters: int = 0
    layers: int = 0
    layer: str = ""
    reason: str = ""
    grid: list[int] = field(default_factory=list)
    last_stage: list[int] | None = None
    difference: float | None = None
    batch_difference: float | None = None
    batch_difference_by_hand: float | None = None
    zero_maps: int = 0
    zero_maps_by_hand: int | None = None
    notes: list[str] = field(default_factory=list)
    pattern_score: float | None = None
    scan_difference: float | None = None
    scan_batch_difference: float | None = None
    errors: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record an exception of the block: "refused" for convscope's own, else "foreign" with where it was raised."""
        try:
            yield
        except convscope.ConvscopeError as error:
            self.errors[name] = ["refused", str(error)]
        except Exception as error:  # noqa: BLE001 what a network raises is the result
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            self.errors[name] = ["foreign", f"{type(error).__name__}: {str(error)[:300]} ({where})"]


# --- one network -----------------------------------------------------------------------------------------------------


def check(collection: str, family: str) -> Result:
    """Run every step on a family's network."""
    result, start = Result(collection, family), time.perf_counter()
    torch.manual_seed(0)
    try:
        network = build(collection, family, PARAMETERS)
    except Exception as error:  # noqa: BLE001 other libraries and missing extras
        result.errors["build"] = ["unavailable", f"{type(error).__name__}: {str(error)[:200]}"]
        return result
    result.name, result.size = network.name, list(network.size)
    result.parameters = count_parameters(network.module)
    model = None
    with result.step("load"):
        model = convscope.load(network.module, preprocessing=network.preprocessing)
        result.layers = len(model.layers)
    if model is not None:
        _check_model(result, network, model)
    result.seconds = time.perf_counter() - start
    return result


def _check_model(result: Result, network: Network, model: convscope.Model) -> None:
    images, batch = _images(model, network)
    heatmaps = None
    with result.step("heatmaps"):
        heatmaps = convscope.heatmaps(model, images, progress=False)
        _describe(result, model, heatmaps)
    if heatmaps is None:
        return
    with result.step("alone"):
        alone = [convscope.heatmaps(model, images[i : i + 1], heatmaps.targets[i, 0], progress=False) for i in (0, 3)]
        result.batch_difference = max(
            _difference(one.values[0], heatmaps.values[i]) for one, i in zip(alone, (0, 3), strict=True)
        )
    maps = None
    if model.task == "detection":
        return
    with result.step("by hand"):
        maps, by_hand = grad_cam_by_hand(network.module, model, heatmaps.layer, batch, heatmaps.targets[:, 0])
        result.difference = max(_difference(a, b) for a, b in zip(heatmaps.values[:, 0], by_hand.numpy(), strict=True))
        _, alone_by_hand = grad_cam_by_hand(network.module, model, heatmaps.layer, batch[:1], heatmaps.targets[:1, 0])
        result.batch_difference_by_hand = _difference(alone_by_hand[0].numpy(), by_hand[0].numpy())
        result.zero_maps_by_hand = int((by_hand.flatten(1).abs().amax(1) == 0).sum())
    with result.step("last stage"):
        result.last_stage = list(network.grid or last_stage_by_hooks(network.module, tuple(result.grid), batch[:2]))
    with result.step("pattern"):
        pattern = convscope.patterns(model, heatmaps.layer, [0], steps=PATTERN_STEPS, progress=False)
        result.pattern_score = float(pattern.scores[0])
        if not math.isfinite(result.pattern_score):
            raise ValueError(f"the pattern's score is {result.pattern_score}")
    if len(network.size) == 2:
        with result.step("scan"):
            _scan(result, model, heatmaps.layer, images, maps)


def _describe(result: Result, model: convscope.Model, heatmaps: convscope.Heatmaps) -> None:
    result.layer, result.reason = heatmaps.layer, heatmaps.layer_reason
    result.grid = list(model.layers[heatmaps.layer].shape[1:])
    result.zero_maps = int((np.abs(heatmaps.values).reshape(len(heatmaps.values), -1).max(1) == 0).sum())
    result.notes = [*model.notes, *heatmaps.notes]


def _images(model: convscope.Model, network: Network) -> tuple[Any, Tensor]:
    """Return images for convscope, and the batch that the network takes, computed here."""
    generator = np.random.default_rng(0)
    if len(network.size) > 2:
        clips = torch.from_numpy(generator.random((IMAGES, 3, *network.size), dtype=np.float32))
        return clips, clips
    images = generator.integers(0, 256, (IMAGES, *network.size, 3), dtype=np.uint8)
    preprocessing = model.preprocessing
    low, high = preprocessing.range
    pixels = torch.from_numpy(images).float() / 255 * (high - low) + low
    pixels = (pixels - torch.tensor(preprocessing.mean)) / torch.tensor(preprocessing.std)
    return images, pixels.permute(0, 3, 1, 2)


def _scan(result: Result, model: convscope.Model, layer: str, images: np.ndarray, maps: Tensor | None) -> None:
    maxima = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in (IMAGES, 1):
            out = Path(folder, str(batch))
            store = convscope.scan(model, images, out, [layer], 2, batch=batch, workers=0, progress=False)
            units = range(min(SCANNED_UNITS, model.layers[layer].units))
            maxima[batch] = np.array([store.unit(layer, unit).statistics["maximum"] for unit in units])
    result.scan_batch_difference = _difference(maxima[1], maxima[IMAGES])
    if maps is not None:
        by_hand = maps.transpose(0, 1).flatten(1).amax(1)[: len(maxima[1])].numpy()
        result.scan_difference = _difference(maxima[IMAGES], by_hand)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    scale = max(float(np.abs(a).max()), float(np.abs(b).max()))
    return float(np.abs(a - b).max()) / scale if scale else 0.0


# --- by hand ---------------------------------------------------------------------------------------------------------


def grad_cam_by_hand(
    module: nn.Module, model: convscope.Model, layer: str, batch: Tensor, targets: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Compute a layer's maps (N, C, ...) and Grad-CAM (N, ...) with a hook and one backward pass."""
    row, outputs = model.layers[layer], []
    name, _, call = row.call.partition("#")

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensors = list(_tensors(output))
        first = next((t for t in tensors if _fits(t, row.shape)), None)
        outputs.append(first if row.tensor_index is None else tensors[row.tensor_index])
        # Operations in place that follow would change what is kept.
        return _cloned(output)

    handle = _submodules(module)[name].register_forward_hook(keep)
    try:
        with _logits(module) as run:
            scores = run(batch)
    finally:
        handle.remove()
    output = outputs[int(call or 1) - 1]
    chosen = scores.gather(1, torch.as_tensor(targets.astype(np.int64))[:, None])
    if chosen.requires_grad:
        gradient = torch.autograd.grad(chosen.sum(), output)[0]
    else:  # through integers no gradient passes
        output = output.dequantize()
        gradient = torch.zeros_like(output)
    maps, gradients = _channels_first(output.detach(), row.shape), _channels_first(gradient, row.shape)
    weights = gradients.flatten(2).mean(2)
    return maps, torch.einsum("nc,nc...->n...", weights, maps)


def last_stage_by_hooks(module: nn.Module, grid: tuple[int, ...], batch: Tensor) -> tuple[int, ...]:
    """Return the grid of the last convolution, linear layer or normalisation with more than one position.

    Of token sequences only the number of positions is known: `grid` is returned if it has as many, but for up to
    `PREFIX_TOKENS` tokens in front.
    """
    grids: list[tuple[int, ...]] = []

    def record(layer: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            positions = _positions(layer, tensor)
            if len(tensor) == len(batch) and len(positions) in {1, batch.ndim - 2} and math.prod(positions) > 1:
                grids.append(positions)

    handles = [layer.register_forward_hook(record) for layer in _submodules(module).values()]
    try:
        with torch.no_grad(), _logits(module) as run:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    last = grids[-1]
    others = math.prod(last) - math.prod(grid)
    return grid if 0 <= others <= (PREFIX_TOKENS if len(last) == 1 else 0) else last


def _positions(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Return the sizes of an output's axes that are neither the batch nor the channels; none for other layers."""
    kind = type(layer).__name__
    if not any(word in kind for word in ("Conv", "Norm", "Linear", "Dense")):
        return ()
    weight = getattr(layer, "weight", None)
    channels_last = _is_keras(layer) or "Linear" in kind
    if "Norm" in kind and isinstance(weight, Tensor):
        channels_last = output.shape[-1] == weight.numel() != output.shape[1]
    return tuple(output.shape[1:-1] if channels_last else output.shape[2:])


def _is_keras(module: nn.Module) -> bool:
    return type(module).__module__.startswith("keras.")


def _submodules(module: Any) -> dict[str, nn.Module]:
    if not _is_keras(module):
        return dict(module.named_modules())
    return {layer.name: layer for layer in module.layers}


@contextmanager
def _logits(module: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function from a batch to scores (N, K) in front of a final softmax; of class maps, the mean over them."""
    if _is_keras(module):
        import keras

        last = module.layers[-1]
        activation, last.activation = last.activation, keras.activations.linear
        try:
            yield lambda batch: module(batch.movedim(1, -1), training=False)
        finally:
            last.activation = activation
        return
    was_training = module.training
    module.eval()
    try:
        yield lambda batch: _scores(module(batch))
    finally:
        module.train(was_training)


def _scores(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        named = output if isinstance(output, dict) else {}
        output = next((named[key] for key in ("logits", "out") if key in named), next(_tensors(output)))
    return output if output.ndim == 2 else output.flatten(2).mean(2)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _cloned(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) in {tuple, list}:
        return type(output)(map(_cloned, output))
    return output


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    sizes, (channels, *grid) = list(tensor.shape[1:]), shape
    if tensor.ndim == len(shape) + 1:
        return sizes in ([channels, *grid], [*grid, channels])
    return tensor.ndim == 3 and channels in sizes and max(sizes) >= math.prod(grid)


def _channels_first(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return (N, C, ...) of maps in either layout, or of tokens with others in front."""
    channels, *grid = shape
    if tensor.ndim == len(shape) + 1:
        return tensor if list(tensor.shape[1:]) == [channels, *grid] else tensor.movedim(-1, 1)
    tokens = tensor.transpose(1, 2) if tensor.shape[2] == channels else tensor
    return tokens[:, :, -math.prod(grid) :].reshape(len(tensor), channels, *grid)


# --- many networks ---------------------------------------------------------------------------------------------------


def run(pairs: Iterable[tuple[str, str]], out: Path, timeout: float) -> None:
    """Check families in a child process, which is replaced after a crash or a timeout; append results to a file."""
    child: _Child | None = None
    for collection, family in pairs:
        child = child or _Child()
        result = child.check(collection, family, timeout)
        if result is None:
            child.stop()
            child, result = None, asdict(Result(collection, family, errors={"run": ["timeout", f"{timeout:.0f} s"]}))
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        errors = {step: ": ".join(error)[:200] for step, error in result["errors"].items()}
        sys.stdout.write(f"{collection}/{family} {result['name']} {result['seconds']:.0f} s {errors or ''}\n")
        sys.stdout.flush()
    if child is not None:
        child.stop()


class _Child:
    """A process that checks one family after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def check(self, collection: str, family: str, timeout: float) -> dict[str, Any] | None:
        """Return a result, or None after a crash or a timeout."""
        try:
            self.connection.send((collection, family))
            return self.connection.recv() if self.connection.poll(timeout) else None
        except (EOFError, ConnectionError):
            return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    while True:
        try:
            collection, family = connection.recv()
        except EOFError:
            return
        connection.send(asdict(check(collection, family)))


# --- the page --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """Read the last result of each family."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return list({(line["collection"], line["family"]): line for line in lines}.values())


def page(results: list[dict[str, Any]]) -> str:
    """Write the page of the documentation."""
    counts = Counter(result["collection"] for result in results)
    totals = {collection: len(families(collection)) for collection in COLLECTIONS}
    names = ", ".join(f"{c} {version(c)}" for c in COLLECTIONS)
    lines = [
        "# Networks that were tried",
        "",
        "Does convscope work with your network? One network of each family was tried: the member with the fewest",
        f"parameters, with random weights and the smallest input at which it runs. {names}.",
        "Written by `python benchmarks/zoo.py`.",
        "",
        f"Families that were run: {sum(counts.values())} of {sum(totals.values())} ("
        + ", ".join(f"{c} {counts[c]} of {totals[c]}" for c in COLLECTIONS)
        + ").",
        "",
        *_summary(results),
        "",
        *COLUMNS.splitlines(),
        "",
        *REMARKS.splitlines(),
    ]
    for collection in COLLECTIONS:
        rows = sorted((r for r in results if r["collection"] == collection), key=lambda r: r["family"])
        if rows:
            lines += ["", f"## {collection}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _summary(results: list[dict[str, Any]]) -> list[str]:
    kinds = {kind: [r for r in results if _has(r, kind)] for kind in ("foreign", "refused", "timeout", "unavailable")}
    explained = [r for r in results if r["grid"]]
    other_stage = [r for r in explained if r["last_stage"] and r["grid"] != r["last_stage"]]
    compared = [r for r in explained if r["difference"] is not None]
    different = [r for r in compared if r["difference"] > TOLERANCE]
    unexplained = [r for r in explained if r["zero_maps"] > (r["zero_maps_by_hand"] or 0)]
    batch = [r for r in explained if (r["batch_difference"] or 0) > TOLERANCE]
    in_pytorch = [r for r in batch if r["batch_difference"] <= 2 * (r.get("batch_difference_by_hand") or 0)]
    batch = [r for r in batch if r not in in_pytorch]
    rows = [
        ("networks with heatmaps", f"{len(explained)} of {len(results)}"),
        ("exceptions other than `ConvscopeError`", _names(kinds["foreign"])),
        ("steps refused with a reason", _names(kinds["refused"])),
        ("default layer of another size than the last stage", _names(other_stage)),
        (f"Grad-CAM by hand differs by more than {TOLERANCE:g} (of {len(compared)})", _names(different)),
        (f"batch and alone differ by more than {TOLERANCE:g}, and more than the maps by hand", _names(batch)),
        ("batch and alone differ as the maps by hand do", _names(in_pytorch)),
        ("maps of zeros where the one by hand is not", _names(unexplained)),
        ("longer than the time limit", _names(kinds["timeout"])),
        ("not built here", _names(kinds["unavailable"])),
    ]
    return ["| | |", "| --- | --- |", *[f"| {name} | {value} |" for name, value in rows]]


def _has(result: dict[str, Any], kind: str) -> bool:
    return any(error[0] == kind for error in result["errors"].values())


def _names(results: list[dict[str, Any]]) -> str:
    return f"{len(results)}: " + ", ".join(f"`{r['family']}`" for r in results) if results else "none"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = header(*HEADINGS)
    for row in rows:
        explained = bool(row["grid"])
        cells = [
            row["family"],
            f"`{row['name']}`" if row["name"] else "",
            f"{row['parameters'] / 1e6:.1f}" if row["parameters"] else "",
            _by(row["size"]),
            str(row["layers"] or ""),
            f"`{row['layer']}`, {_by(row['grid'])}" if explained else _first_error(row),
            _stage(row) if explained else "",
            _number(row, "difference", "by hand"),
            _number(row, "batch_difference", "alone"),
            _number(row, "scan_difference", "scan"),
            "yes" if row["pattern_score"] is not None and "pattern" not in row["errors"] else _error(row, "pattern"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _by(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _stage(row: dict[str, Any]) -> str:
    if not row["last_stage"]:
        return ""
    return "yes" if row["grid"] == row["last_stage"] else f"no, {_by(row['last_stage'])}"


def _number(row: dict[str, Any], key: str, step: str) -> str:
    return f"{row[key]:.0e}" if row[key] is not None else _error(row, step)


def _error(row: dict[str, Any], step: str) -> str:
    kind, text = row["errors"].get(step, ("", ""))
    return f"{kind}: {text[:160]}".replace("|", "\\|").replace("\n", " ") if kind else ""


def _first_error(row: dict[str, Any]) -> str:
    return next((_error(row, step) for step in row["errors"]), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collection", action="append", choices=COLLECTIONS, help="only these; default: all")
    parser.add_argument("--family", action="append", help="only these families")
    parser.add_argument("--limit", type=int, help="number of families")
    parser.add_argument("--resume", action="store_true", help="leave out families with a result")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a family")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results, one JSON object a line")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results")
    arguments = parser.parse_args()
    done = {(r["collection"], r["family"]) for r in read(arguments.results)} if arguments.resume else set()
    pairs = [
        (collection, family)
        for collection in arguments.collection or COLLECTIONS
        for family in families(collection)
        if (not arguments.family or family in arguments.family) and (collection, family) not in done
    ]
    if not arguments.page_only:
        run(pairs[: arguments.limit], arguments.results, arguments.timeout)
    PAGE.write_text(page(read(arguments.results)))


if __name__ == "__main__":
    main()
