"""State of an explorer: its models, images, job queues and caches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import Tensor

from convscope.attribution.registry import default_method
from convscope.engine.model import Model
from convscope.errors import ConvscopeError
from convscope.explorer.service import compute, removals
from convscope.explorer.service.cache import Cache
from convscope.explorer.service.compute import HeatmapOptions
from convscope.explorer.service.images import (
    ImageRegistry,
    RegisteredImage,
    UnknownResource,
    encode_image,
    unique_key,
)
from convscope.explorer.service.jobs import Client, Job, JobQueue
from convscope.explorer.service.networks import Network, url_key
from convscope.explorer.service.patterns import PatternCache, PatternSpec, compute_pattern
from convscope.explorer.service.schemas import (
    DetectedBox,
    ExplanationRecord,
    FaithfulnessRecord,
    HeatmapRecord,
    LayerSummary,
    LogitChange,
    PatternRecord,
    Prediction,
    SheetLayout,
)
from convscope.featurevis.layer_story import Story, story
from convscope.samples import photographs

if TYPE_CHECKING:
    from convscope.store.search import Match
    from convscope.store.store import Store

T = TypeVar("T")
CACHE_BYTES = 1 << 28
MAX_MATCHES = 100  # units that an image finds
SLOW_METHODS = (
    "rise", "score-cam", "ablation-cam", "occlusion", "smooth-grad", "var-grad", "integrated-gradients",
)  # fmt: skip


class Explorer:
    """Models and everything that is computed with them.

    Requests for the same result share one job. Short computations run in the interactive queue; long ones in the
    background queue, on a copy of the model, so that they do not delay the short ones.

    Parameters
    ----------
    models : mapping of str to Model
        Models by what they were loaded from.
    store : Store, optional
        Written by `convscope.scan` with one of the models.
    cache_dir : Path, optional
        Folder that keeps patterns and stories.
    cache_bytes : int
        Size of the cache in memory.

    Raises
    ------
    ConvscopeError
        Without a model, or if the store was made with other weights.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        store: Store | None = None,
        cache_dir: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not models:
            raise ConvscopeError("the explorer needs at least one model")
        self.networks: dict[str, Network] = {}
        for name, model in models.items():
            key = unique_key(url_key(name), self.networks)
            self.networks[key] = Network(key, model, name, store)
        if store is not None and not any(net.store for net in self.networks.values()):
            raise ConvscopeError(store.mismatch(self.first.model))
        self.images = ImageRegistry()
        self.pattern_cache = PatternCache(cache_dir)
        self.cache = Cache(cache_bytes)
        self.interactive_queue = JobQueue("interactive", self.cache, max_jobs=64, max_jobs_per_client=24)
        self.background_queue = JobQueue("background", self.cache, max_jobs=32, max_jobs_per_client=8)
        self.image_queue = JobQueue("images", self.cache, max_jobs=256, max_jobs_per_client=96)

    def add_samples(self) -> None:
        """Add the photographs that come with the package."""
        self.images.add_samples(sorted(photographs(), key=lambda path: "red_panda" not in path))

    def close(self) -> None:
        """End all jobs."""
        for queue in (self.interactive_queue, self.background_queue, self.image_queue):
            queue.close()

    def network(self, key: str) -> Network:
        """Return the model of a key. Raises UnknownResource."""
        if key not in self.networks:
            raise UnknownResource(f"there is no model {key[:40]!r} here; there are {', '.join(self.networks)}")
        return self.networks[key]

    @property
    def first(self) -> Network:
        """The model that the explorer opens with."""
        return next(iter(self.networks.values()))

    # --- short computations ---

    def predictions(self, client: Client, net: Network, image: RegisteredImage, top: int = 5) -> list[Prediction]:
        """Return the most likely classes of an image."""
        key = ("predictions", net.version, image.key, top)
        return self._run_interactive(
            client, key, lambda _: compute.predictions(net.model, self._input(net, image), top)
        )

    def detections(self, client: Client, net: Network, image: RegisteredImage) -> list[DetectedBox]:
        """Return the boxes that a detector finds in an image; none of other networks."""
        if not net.detects:
            return []
        key = ("detections", net.version, image.key)
        return self._run_interactive(client, key, lambda _: compute.detections(net.model, self._input(net, image)))

    def heatmap(
        self,
        client: Client,
        net: Network,
        image: RegisteredImage,
        targets: Sequence[int],
        options: HeatmapOptions | None = None,
    ) -> list[HeatmapRecord]:
        """Return a heatmap of each target, by the network's default method if there are no options."""
        options = options or HeatmapOptions(method=default_method(net.model))
        slow = options.method in SLOW_METHODS
        queue, model = (self.background_queue, net.background_model) if slow else (self.interactive_queue, net.model)
        key = ("heatmap", net.version, image.key, tuple(targets), options)
        return self._run(
            queue,
            client,
            key,
            lambda job: compute.heatmap(model, self._input(net, image), targets, options, job.report_progress),
        )

    def feature_maps(self, client: Client, net: Network, image: RegisteredImage, layer: str) -> np.ndarray:
        """Return the feature maps of a layer, float32 (C, H, W)."""
        key = ("feature_maps", net.version, image.key, layer)
        return self._run_interactive(
            client, key, lambda _: compute.feature_maps(net.model, self._input(net, image), layer)
        )

    def relevance(self, client: Client, net: Network, image: RegisteredImage, layer: str, target: int) -> np.ndarray:
        """Return each channel's contribution to a logit, (C,)."""
        key = ("relevance", net.version, image.key, layer, target)
        return self._run_interactive(
            client, key, lambda _: compute.relevance(net.model, self._input(net, image), layer, target)
        )

    def logit_changes(
        self, client: Client, net: Network, image: RegisteredImage, layer: str, unit: int, how: removals.How = "zero"
    ) -> list[LogitChange]:
        """Return the classes whose logits fall and rise most on an image if a unit is removed."""
        value = float(self._replacements(client, net, layer, how)[unit])
        key = ("logit_changes", net.version, image.key, layer, unit, value)
        return self._run_interactive(
            client, key, lambda _: removals.logit_changes(net.model, self._input(net, image), layer, unit, value)
        )

    def _replacements(self, client: Client, net: Network, layer: str, how: removals.How) -> np.ndarray:
        """Return what takes the place of each unit of a layer (C,): 0, or its mean.

        Means are over the data set of the store if it has the layer, else over the sample images. Raises ConvscopeError
        without both.
        """
        if how == "zero":
            return np.zeros(net.num_units(layer))
        means: np.ndarray
        if net.store is not None and layer in net.store.layers:
            start = net.store.row_of_unit(layer, 0)
            means = net.store.units(["mean"]).column("mean").to_numpy()[start : start + net.num_units(layer)]
            return means
        if not self.images.samples:
            raise ConvscopeError(
                f"how is 'mean', but there is neither a store with layer {layer!r} nor a sample image to take the mean "
                "of; expected 'zero'"
            )
        maps = [self.feature_maps(client, net, image, layer) for image in self.images.samples]
        means = np.stack([compute.channel_means(values) for values in maps]).mean(0)
        return means

    def units_of_image(self, client: Client, net: Network, image: RegisteredImage) -> tuple[Match, ...]:
        """Return the units of the store that an image excites more than most images of its sample, the best first.

        At most `MAX_MATCHES`, as by `Store.search`. Raises UnknownResource without a store.
        """
        store = net.store
        if store is None or not net.takes_images:
            raise UnknownResource(f"{net.model.name} has no store here, whose units an image could find")
        scanned = store  # for the function below, where it cannot be None

        def rank(_: Job[tuple[Match, ...]]) -> tuple[Match, ...]:
            from convscope.store.image_search import rank_units

            return rank_units(scanned, image.pixels, MAX_MATCHES, net.model).items

        return self._run_interactive(client, ("units_of_image", net.version, image.key), rank)

    def concept_heatmap(
        self, client: Client, net: Network, image: RegisteredImage, layer: str, bank: np.ndarray, version: str
    ) -> np.ndarray:
        """Return the amount of each concept of a bank (R, C) at each position, float32 (R, h, w)."""
        maps = self.feature_maps(client, net, image, layer)
        key = ("concept_heatmap", net.version, version, image.key)
        return self._run_interactive(client, key, lambda _: compute.concept_heatmap(maps, bank))

    def feature_map_sheet(
        self, client: Client, net: Network, image: RegisteredImage, layer: str
    ) -> tuple[bytes, SheetLayout]:
        """Return a PNG of all channels of a layer, and its layout."""
        maps = self.feature_maps(client, net, image, layer)

        def draw(_: Job[tuple[bytes, SheetLayout]]) -> tuple[bytes, SheetLayout]:
            sheet, layout = compute.channel_sheet(maps)
            return encode_image(sheet, "PNG"), layout

        return self._run_interactive(client, ("feature_map_sheet", net.version, image.key, layer), draw)

    # --- long computations ---

    def layer_summaries(self, client: Client, net: Network, image: RegisteredImage) -> dict[str, LayerSummary]:
        """Return statistics of every layer on an image."""

        def summarize(job: Job[dict[str, LayerSummary]]) -> dict[str, LayerSummary]:
            names = [layer.name for layer in net.layers]
            return compute.layer_summaries(net.background_model, self._input(net, image), names, job.report_progress)

        return self._run(self.background_queue, client, ("layer_summaries", net.version, image.key), summarize)

    def faithfulness(
        self, client: Client, net: Network, image: RegisteredImage, target: int, options: HeatmapOptions
    ) -> FaithfulnessRecord:
        """Return faithfulness metrics of a heatmap."""
        key = ("faithfulness", net.version, image.key, target, options)

        def measure(job: Job[FaithfulnessRecord]) -> FaithfulnessRecord:
            x = self._input(net, image)
            return compute.faithfulness(net.background_model, x, target, options, job.report_progress)

        return self._run(self.background_queue, client, key, measure)

    def explanation(
        self, client: Client, net: Network, image: RegisteredImage, target: int, layer: str | None
    ) -> ExplanationRecord:
        """Return the few units that carry a class's logit on an image, and the proof."""
        key = ("explanation", net.version, image.key, target, layer)

        def compute_once(job: Job[ExplanationRecord]) -> ExplanationRecord:
            x = self._input(net, image)
            return removals.explanation(net.background_model, x, target, layer, net.store, job.report_progress)

        return self._run(self.background_queue, client, key, compute_once)

    def logits_without_units(
        self, client: Client, net: Network, image: RegisteredImage, layer: str, how: removals.How = "zero"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits (K,) on an image, and those without each unit of a layer (C, K)."""
        values = self._replacements(client, net, layer, how)
        key = ("logits_without_units", net.version, image.key, layer, how)

        def compute_once(job: Job[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
            x = self._input(net, image)
            return removals.logits_without_units(net.background_model, x, layer, values, job.report_progress)

        return self._run(self.background_queue, client, key, compute_once)

    def unit_effects(self, client: Client, net: Network, image: RegisteredImage, layer: str, target: int) -> np.ndarray:
        """Return how far a class's logit falls on an image if each unit of a layer is set to 0, (C,)."""
        before, after = self.logits_without_units(client, net, image, layer)
        effects: np.ndarray = before[target] - after[:, target]
        return effects

    def start_pattern(
        self, client_id: str, net: Network, spec: PatternSpec, references: list[np.ndarray]
    ) -> Job[PatternRecord]:
        """Return the job of a pattern, which the caller has to release. Raises QueueFull."""

        def compute_once(job: Job[PatternRecord]) -> PatternRecord:
            pattern = self.get_pattern(net, spec)
            if pattern is None:
                pattern = compute_pattern(net.background_model, spec, references, job)
                self.pattern_cache.put(net.version, spec, pattern)
            return pattern

        return self.background_queue.submit(_pattern_key(net, spec), compute_once, client_id)

    def get_pattern(self, net: Network, spec: PatternSpec) -> PatternRecord | None:
        """Return a pattern that exists already, in the store, in memory or in the cache folder; else None."""
        pattern: PatternRecord | None = None
        stored = net.stored_patterns
        revision = None if stored is None else stored.get_revision(spec)
        if stored is not None and revision is not None:
            key = ("stored_pattern", net.version, spec, revision)
            pattern = self.cache.get_or_compute(key, lambda: stored.get_pattern(spec))
        return pattern or self.cache.get(_pattern_key(net, spec)) or self.pattern_cache.get(net.version, spec)

    def resolve_pattern(
        self,
        net: Network,
        layer: str,
        unit: int,
        variant: str = "positive",
        recipe: str | None = None,
        seed: int | None = None,
    ) -> PatternSpec:
        """Return the spec of a pattern; a missing recipe or seed is that of the store's pattern of the unit."""
        stored = None if net.stored_patterns is None else net.stored_patterns.get_spec(layer, unit)
        default = stored or PatternSpec(layer, unit)
        return PatternSpec(layer, unit, variant, recipe or default.recipe, default.seed if seed is None else seed)

    def start_story(self, client_id: str, net: Network) -> Job[Story]:
        """Return the job of a model's story, which takes minutes. The caller has to release it. Raises QueueFull."""

        def compute_once(job: Job[Story]) -> Story:
            result = self.get_story(net)
            if result is None:
                result = story(net.background_model, units=12, num_displayed=6, progress=job.report_progress)
                self.pattern_cache.put_story(net.version, result)
            return result

        return self.background_queue.submit(("story", net.version), compute_once, client_id)

    def get_story(self, net: Network) -> Story | None:
        """Return a story that exists already, in memory, in the store or in the cache folder; else None."""

        def load() -> Story | None:
            stored = None if net.stored_patterns is None else net.stored_patterns.get_story(net.model)
            return stored or self.pattern_cache.get_story(net.version, net.model)

        return self.cache.get_or_compute(("story", net.version), load)

    # --- images ---

    def cached_image(
        self, client: Client, net: Network, key: tuple[Hashable, ...], render: Callable[[], bytes]
    ) -> bytes:
        """Return an encoded image, rendered in the image queue unless it is cached."""
        return self._run(self.image_queue, client, ("image", net.version, *key), lambda _: render())

    def _run_interactive(self, client: Client, key: Hashable, run: Callable[[Job[T]], T]) -> T:
        return self._run(self.interactive_queue, client, key, run)

    def _run(self, queue: JobQueue, client: Client, key: Hashable, run: Callable[[Job[T]], T]) -> T:
        return client.wait(queue.submit(key, run, client.id))

    def _input(self, net: Network, image: RegisteredImage) -> Tensor:
        """Return the preprocessed image, (1, C, H, W)."""
        if not net.takes_images:
            raise ConvscopeError(
                f"{net.model.name} takes no ordinary images; its preprocessing: {net.model.preprocessing}"
            )
        key = ("input", net.version, image.key)
        return self.cache.get_or_compute(key, lambda: compute.preprocess(net.model, image.pixels))


def _pattern_key(net: Network, spec: PatternSpec) -> tuple[str, str, PatternSpec]:
    return ("pattern", net.version, spec)
