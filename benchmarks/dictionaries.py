"""Sparse dictionaries: planted atoms, and reconstruction and speed beside the package overcomplete."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import matplotlib
import numpy as np
import skimage.data
import torch
from PIL import Image
from timing import interleaved
from torch import Tensor
from torch.utils.data import DataLoader

import convscope
from convscope.dictionaries.encoder import FeatureEncoder
from convscope.dictionaries.methods.base import Settings, Start
from convscope.dictionaries.methods.registry import METHODS
from convscope.dictionaries.positions import PositionStore
from convscope.dictionaries.training import _Loop, train

CPU = torch.device("cpu")
CROPS = 5  # per image
BATCH = 1024
LAYERS = (("lite0", "blocks.4"), ("lite0", "blocks.5"))
SKIMAGE = (
    "astronaut", "chelsea", "coffee", "rocket", "cat", "colorwheel", "immunohistochemistry", "retina",
    "hubble_deep_field", "brick", "grass", "gravel", "camera", "coins", "moon", "page", "text", "clock",
)  # fmt: skip


def images(seed: int = 0) -> list[np.ndarray]:
    """Return the sample photographs and the images of scikit-image, each with random crops."""
    whole = [np.asarray(Image.open(path).convert("RGB")) for path in convscope.samples.photographs()]
    for name in SKIMAGE:
        image = np.asarray(getattr(skimage.data, name)())
        whole.append(np.dstack([image] * 3) if image.ndim == 2 else image[..., :3])
    generator = np.random.default_rng(seed)
    return [crop for image in whole for crop in (image, *crops_of(image, generator))]


def crops_of(image: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    height, width = image.shape[:2]
    for _ in range(CROPS):
        side = generator.uniform(0.35, 0.8)
        top, left = (int(generator.uniform(0, n * (1 - side))) for n in (height, width))
        yield image[top : top + int(height * side), left : left + int(width * side)]


def overcomplete() -> ModuleType:
    """Import overcomplete 0.3.0, which looks for a function that matplotlib 3.9 has removed."""
    matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap
    return importlib.import_module("overcomplete.sae")


# --- planted atoms ---------------------------------------------------------------------------------------------------


def planted(channels: int, count: int, seed: int) -> tuple[PositionStore, np.ndarray]:
    """Make vectors of 3 out of 2 C random directions in C dimensions."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(2 * channels, channels, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    chosen = torch.rand(count, len(atoms), generator=generator).topk(3).indices
    weights = torch.zeros(count, len(atoms)).scatter_(1, chosen, 0.5 + torch.rand(count, 3, generator=generator))
    store = PositionStore(count, channels, 1 << 30)
    store.append(weights @ atoms)
    return store, atoms.numpy()


def recovered(steps: int = 1000) -> dict[str, float]:
    """Return the mean over planted atoms of the largest cosine with a learned one, for each method."""
    store, atoms = planted(64, 50_000, seed=0)
    results = {}
    for method in METHODS:
        if METHODS[method].is_sparse:
            trained = train(store, method, Settings(len(atoms), 3, steps), 0, CPU, lambda done: None)
            results[method] = float((atoms @ trained.weights.atoms.numpy().T).max(1).mean())
    return results


# --- activations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One dictionary: its explained variance and L0 on held-out images, dead features, and CPU seconds."""

    layer: str
    package: str
    steps: int
    r2: float
    l0: float
    dead: float
    seconds: float


def vectors(source: str, layer: str) -> tuple[Tensor, Tensor]:
    """Return vectors (n, C) of training and of held-out images, one in ten of the originals with its crops."""
    crops = images()
    maps = torch.from_numpy(convscope.activations(source, crops, layer)[layer])
    is_test = torch.arange(len(maps)) // (CROPS + 1) % 10 == 0
    train_maps, test_maps = maps[~is_test], maps[is_test]
    return tuple(m.movedim(1, -1).reshape(-1, maps.shape[1]) for m in (train_maps, test_maps))


def measure(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], x: Tensor, test: Tensor) -> tuple:
    """Return explained variance and L0 on held-out vectors, and the fraction of features never active on the others."""
    with torch.no_grad():
        features = encode(test)
        error = (test - decode(features)).square().sum() / (test - test.mean(0)).square().sum()
        fired = sum((encode(part) > 0).sum(0) for part in x.split(4096))
    return float(1 - error), float((features > 0).sum(1).float().mean()), float((fired == 0).float().mean())


def compare(source: str, layer: str, features: int = 2048, active: int = 32, steps: int = 300) -> list[Fit]:
    """Train both packages for the same CPU time on the same vectors; overcomplete at two learning rates."""
    x, test = vectors(source, layer)
    mean, scale = x.mean(0), float((x - x.mean(0)).norm(dim=1).mean())
    x, test = (x - mean) / scale, (test - mean) / scale
    store = PositionStore(len(x), x.shape[1], 1 << 31)
    store.append(x)
    begin = time.process_time()
    trained = train(store, "topk", Settings(features, active, steps), 0, CPU, lambda done: None)
    seconds = time.process_time() - begin
    encoder = FeatureEncoder(trained.weights, trained.activation, active)
    name = f"{source}, `{layer}`"
    fits = [Fit(name, "convscope", steps, *measure(encoder, encoder.decode, x, test), seconds)]
    sae = overcomplete()
    for rate in (5e-4, 2e-3):
        torch.manual_seed(0)
        network = sae.TopKSAE(x.shape[1], features, top_k=active)
        done, used = train_overcomplete(sae, network, x, rate, seconds)
        network.eval()
        quality = measure(lambda v, n=network: n.encode(v)[1], network.decode, x, test)
        fits.append(Fit(name, f"overcomplete, Adam {rate:g}", done, *quality, used))
    return fits


def train_overcomplete(sae: ModuleType, network: torch.nn.Module, x: Tensor, rate: float, seconds: float) -> tuple:
    """Run the package's own training loop until the CPU time is used up; return steps and time."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    loader = DataLoader(x, BATCH, shuffle=True, drop_last=True)
    done, begin = 0, time.process_time()
    while time.process_time() - begin < seconds:
        sae.train_sae(network, loader, squared_error, optimizer, nb_epochs=1, monitoring=0)
        done += len(loader)
    return done, time.process_time() - begin


def squared_error(x: Tensor, reconstruction: Tensor, *_: Tensor) -> Tensor:
    return (x - reconstruction).square().mean()


def step_times(threads: int, rounds: int, channels: int = 112, features: int = 4096, active: int = 32) -> float:
    """Return the time of overcomplete's training steps relative to convscope's: CPU time of the main thread.

    With several threads that wait for each other without spinning, it is the time that as many free processors take.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, channels, generator=generator)
    x /= x.norm(dim=1, keepdim=True)
    atoms = torch.randn(features, channels, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    settings = Settings(features, active, 1000)
    loop = _Loop(METHODS["topk"](settings, Start(atoms, torch.zeros(channels), x)), settings, generator)
    sae = overcomplete()
    network = sae.TopKSAE(channels, features, top_k=active)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)

    def theirs() -> None:
        sae.train_sae(network, [x] * 4, squared_error, optimizer, nb_epochs=1, monitoring=0)

    def ours() -> None:
        for n in range(4):
            loop.step(n, x)

    contenders = {"convscope": ours, "overcomplete": theirs}
    timed = interleaved(contenders, "convscope", rounds, threads=threads, clock=time.thread_time)
    return timed["overcomplete"].ratio


def throughput(threads: int, rounds: int) -> float:
    """Run `step_times` in a process of its own, whose threads do not spin."""
    command = [sys.executable, __file__, str(threads), str(rounds)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output.splitlines()[-1])


@dataclass(frozen=True)
class Results:
    """All measurements."""

    recovered: dict[str, float]
    fits: list[Fit]
    throughput: dict[int, float]


def run(rounds: int) -> Results:
    fits = [fit for source, layer in LAYERS for fit in compare(source, layer)]
    faster = {threads: throughput(threads, rounds) for threads in (1, 2)}
    return Results(recovered(), fits, faster)


def table(results: Results) -> list[str]:
    lines = [
        "Planted directions: each vector is a sum of 3 of 128 random directions in 64 dimensions. The mean over",
        "directions of the largest cosine with one of 128 learned atoms, after 1000 steps: "
        + ", ".join(f"{method} {value:.3f}" for method, value in results.recovered.items())
        + ".",
        "",
        f"Activations of {len(images())} images and crops (the sample photographs and images of scikit-image), 2048",
        "features, 32 active, the same vectors and CPU time for both packages; a tenth of the images is held out.",
        "",
        "| layer | package | steps | CPU seconds | r2, held out | L0 | dead |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {f.layer} | {f.package} | {f.steps} | {f.seconds:.0f} | {f.r2:.3f} | {f.l0:.1f} | {f.dead:.1%} |"
        for f in results.fits
    ]
    lines += [
        "",
        f"A step on {BATCH} positions with 112 units and 4096 features takes overcomplete",
        f"{results.throughput[1]:.1f} times as long in one thread, {results.throughput[2]:.1f} times in two: CPU time",
        "of the main thread, with threads that wait without spinning, which is the time on free processors.",
    ]
    return lines


if __name__ == "__main__":
    sys.stdout.write(f"{step_times(*map(int, sys.argv[1:3]))}\n")
