"""What the explorer holds: networks, pictures, a store, the lanes of work and what came out of them."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import Tensor

from convscope import __version__
from convscope.engine.layer_selection import last_per_resolution
from convscope.engine.layer_table import Layer
from convscope.engine.model import LOGITS, Model
from convscope.errors import ConvscopeError
from convscope.explorer.service import compute
from convscope.explorer.service.cache import Cache
from convscope.explorer.service.images import ImageRegistry, RegisteredImage, UnknownResource, encode_image, unique_key
from convscope.explorer.service.jobs import Client, Job, JobQueue
from convscope.explorer.service.model_copy import copy_model
from convscope.explorer.service.patterns import PatternCache, PatternSpec, compute_pattern
from convscope.explorer.service.stored_patterns import StoredPatterns
from convscope.featurevis.layer_story import Story, story
from convscope.samples import photographs

if TYPE_CHECKING:
    from convscope.store.store import Store

T = TypeVar("T")
CACHE_BYTES = 1 << 28  # bytes of results that are kept
WEIGHT_CHECK_INTERVAL = 0.2  # seconds between two looks at whether a user has changed the weights
SLOW_METHODS = ("rise", "score-cam", "ablation-cam", "occlusion", "smooth-grad", "var-grad", "integrated-gradients")


class Network:
    """A model under its address. `version` tells weights and program apart: it is part of what is asked for."""

    def __init__(self, key: str, model: Model, source: str, store: Store | None = None) -> None:
        self.key, self.model, self.source = key, model, source
        self._marks, self._look = _weight_fingerprint(model), 0.0
        self._run = uuid.uuid4()  # marks mean nothing to another process, which may read what this one kept
        weights = model.weights_hash()
        self._store = store if store is not None and store.manifest["model"]["weights_sha256"] == weights else None
        self._stored = None if self._store is None else StoredPatterns(self._store)
        self._began = self._version = _short(f"{weights} {__version__} {model.preprocessing}")
        # Now, before anything runs: a copy made beside a running answer would have that answer's hooks.
        self._background_model: Model | str
        try:
            self._background_model = copy_model(model)
        except ConvscopeError as error:
            self._background_model = str(error)

    @property
    def version(self) -> str:
        """Another one once the user has changed the weights of a model in hand."""
        if not self.model.loaded_by_convscope and time.monotonic() >= self._look:
            marks, self._look = _weight_fingerprint(self.model), time.monotonic() + WEIGHT_CHECK_INTERVAL
            self._version = self._began if marks == self._marks else _short(f"{self._began} {self._run} {marks}")
        return self._version

    @property
    def store(self) -> Store | None:
        """What was found with these weights; None where nothing was, or they are others by now."""
        return self._store if self.version == self._began else None

    @property
    def stored_patterns(self) -> StoredPatterns | None:
        """What was drawn with these weights into the store."""
        return self._stored if self.version == self._began else None

    @property
    def background_model(self) -> Model:
        """The same network with modules of its own, for work beside the quick answers. Raises ConvscopeError."""
        if isinstance(self._background_model, str):
            raise ConvscopeError(self._background_model)
        return self._background_model

    @property
    def takes_images(self) -> bool:
        like = self.model.preprocessing
        return like.axes == 2 and like.channel_order != "channels"

    @property
    def layers(self) -> list[Layer]:
        """The layers with maps of their own, from first to last."""
        return self.model.layers.unique_spatial()

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """How data flows between the `layers`: pairs of their numbers."""
        numbers = {row.name: i for i, row in enumerate(self.layers)}
        return [(numbers[start], numbers[end]) for start, end in self.model.layers.edges(numbers)]

    def layer(self, name: str) -> Layer:
        """Raises MissingError for a name that none of the layers has."""
        if name not in self.model.layers.names:
            raise UnknownResource(f"{self.model.name} has no layer {name[:80]!r}")
        return self.model.layers.find(name)

    def num_units(self, layer: str) -> int:
        return (self.model.num_outputs or 0) if layer == LOGITS else self.layer(layer).units

    def require_unit(self, layer: str, unit: int) -> None:
        if not 0 <= unit < self.num_units(layer):
            raise UnknownResource(f"layer {layer!r} has units 0 to {self.num_units(layer) - 1}; there is no {unit}")

    def require_class(self, index: int) -> None:
        if not 0 <= index < (self.model.num_outputs or 0):
            raise UnknownResource(
                f"{self.model.name} has classes 0 to {(self.model.num_outputs or 0) - 1}; there is no {index}"
            )

    def classifies(self) -> bool:
        return bool(self.model.num_outputs)

    @cached_property
    def class_indices(self) -> dict[str, int]:
        """The classes by their names as they are; the first of those that share one."""
        return {self.model.class_name(k): k for k in reversed(range(self.model.num_outputs or 0))}


def _weight_fingerprint(model: Model) -> list[tuple[int, int, int]]:
    """What differs once weights are others, found without reading them: which they are, how often written to."""
    weights = [*model.adapter.parameters(model.module), *model.module.buffers()]
    return [(id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]


def _short(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:12]


class Explorer:
    """Networks by address, each loaded once. `asker` is who waits for an answer; the same is worked on once."""

    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        store: Store | None = None,
        cache_dir: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not models:
            raise ConvscopeError("the explorer needs a model; give at least one")
        self.networks: dict[str, Network] = {}
        for name, model in models.items():
            key = unique_key(url_key(name), self.networks)
            self.networks[key] = Network(key, model, name, store)
        if store is not None and not any(net.store for net in self.networks.values()):
            made = store.manifest["model"]["name"]
            raise ConvscopeError(f"{store.address} was made with {made} and other weights than the models given")
        self.images = ImageRegistry()
        self.pattern_cache = PatternCache(cache_dir)
        self.cache = Cache(cache_bytes)
        self.interactive_queue = JobQueue("quick", self.cache, max_jobs=64, max_jobs_per_client=24)
        self.background_queue = JobQueue("slow", self.cache, max_jobs=32, max_jobs_per_client=8)
        self.image_queue = JobQueue("cutting", self.cache, max_jobs=256, max_jobs_per_client=96)

    def add_samples(self) -> None:
        """The photographs that come with the package."""
        self.images.add_samples(sorted(photographs(), key=lambda path: "red_panda" not in path))

    def close(self) -> None:
        self.interactive_queue.close()
        self.background_queue.close()
        self.image_queue.close()

    def network(self, key: str) -> Network:
        if key not in self.networks:
            raise UnknownResource(f"there is no model {key[:40]!r} here; there are {', '.join(self.networks)}")
        return self.networks[key]

    @property
    def first(self) -> Network:
        return next(iter(self.networks.values()))

    # --- quick answers ---

    def predictions(self, client: Client, net: Network, image: RegisteredImage, top: int = 5) -> list[dict[str, Any]]:
        key = ("predictions", net.version, image.key, top)
        return self._quickly(client, key, lambda work: compute.predictions(net.model, self._input(net, image), top))

    def heatmap(
        self,
        client: Client,
        net: Network,
        image: RegisteredImage,
        targets: Sequence[int],
        layer: str | None = None,
        method: str = "grad-cam",
        against: int | None = None,
    ) -> list[dict[str, Any]]:
        lane, model = (
            (self.background_queue, net.background_model)
            if method in SLOW_METHODS
            else (self.interactive_queue, net.model)
        )
        key = ("heat", net.version, image.key, tuple(targets), layer, method, against)
        return self._asked(
            lane,
            client,
            key,
            lambda work: compute.heatmap(
                model,
                self._input(net, image),
                targets,
                layer=layer,
                method=method,
                against=against,
                report_progress=work.report_progress,
            ),
        )

    def feature_maps(self, client: Client, net: Network, image: RegisteredImage, layer: str) -> np.ndarray:
        key = ("maps", net.version, image.key, layer)
        return self._quickly(client, key, lambda work: compute.feature_maps(net.model, self._input(net, image), layer))

    def relevance(self, client: Client, net: Network, image: RegisteredImage, layer: str, target: int) -> np.ndarray:
        key = ("relevance", net.version, image.key, layer, target)
        return self._quickly(
            client, key, lambda work: compute.relevance(net.model, self._input(net, image), layer, target)
        )

    def concept_heatmap(
        self, client: Client, net: Network, image: RegisteredImage, layer: str, bank: np.ndarray, version: str
    ) -> np.ndarray:
        """How much of each concept of a bank (R, C) is at each place of a picture, float32 (R, h, w)."""
        maps = self.feature_maps(client, net, image, layer)
        key = ("concepts", net.version, version, image.key)
        return self._quickly(client, key, lambda work: compute.concept_heatmap(maps, bank))

    def feature_map_sheet(
        self, client: Client, net: Network, image: RegisteredImage, layer: str
    ) -> tuple[bytes, dict[str, int]]:
        """All channels of a layer on one PNG, and its measures."""
        maps = self.feature_maps(client, net, image, layer)

        def make(work: Job) -> tuple[bytes, dict[str, int]]:
            image, measures = compute.channel_sheet(maps)
            return encode_image(image, "PNG"), measures

        return self._quickly(client, ("sheet", net.version, image.key, layer), make)

    def layer_summaries(self, client: Client, net: Network, image: RegisteredImage) -> dict[str, dict[str, float]]:
        """What is measured of each layer on a picture."""

        def make(work: Job) -> dict[str, dict[str, float]]:
            names = [row.name for row in net.layers]
            return compute.layer_summaries(net.background_model, self._input(net, image), names, work.report_progress)

        return self._asked(self.background_queue, client, ("summaries", net.version, image.key), make)

    # --- long work ---

    def faithfulness(
        self,
        client: Client,
        net: Network,
        image: RegisteredImage,
        target: int,
        layer: str | None,
        method: str,
        against: int | None,
    ) -> dict[str, Any]:
        key = ("faithfulness", net.version, image.key, target, layer, method, against)
        return self._asked(
            self.background_queue,
            client,
            key,
            lambda work: compute.faithfulness(
                net.background_model,
                self._input(net, image),
                target,
                layer=layer,
                method=method,
                against=against,
                report_progress=work.report_progress,
            ),
        )

    def start_pattern(self, client_id: str, net: Network, spec: PatternSpec, references: list[np.ndarray]) -> Job:
        """A pattern: kept, or under way from now on. Raises FullError. Who began it has to leave it."""

        def make(work: Job) -> dict[str, Any]:
            found = self.get_pattern(net, spec)
            if found is None:
                found = compute_pattern(net.background_model, spec, references, work)
                self.pattern_cache.put(net.version, spec, found)
            return found

        return self.background_queue.submit(("pattern", net.version, spec), make, client_id)

    def get_pattern(self, net: Network, spec: PatternSpec) -> dict[str, Any] | None:
        """A pattern that is there already; the store's as it is now."""
        stored, found = net.stored_patterns, None
        stamp = None if stored is None else stored.get_revision(spec)
        if stored is not None and stamp is not None:
            key = ("stored", net.version, spec, stamp)
            found = self.cache.get(key) or stored.get_pattern(spec)
            self.cache.put(key, found)
        return found or self.cache.get(("pattern", net.version, spec)) or self.pattern_cache.get(net.version, spec)

    def resolve_pattern(
        self,
        net: Network,
        layer: str,
        unit: int,
        variant: str = "positive",
        recipe: str | None = None,
        seed: int | None = None,
    ) -> PatternSpec:
        """The pattern that is asked for; where recipe or seed are left open, as the store's own was drawn."""
        own = (net.stored_patterns and net.stored_patterns.get_spec(layer, unit)) or PatternSpec(layer, unit)
        return PatternSpec(layer, unit, variant, recipe or own.recipe, own.seed if seed is None else seed)

    def start_story(self, client_id: str, net: Network) -> Job:
        """The story of the network, chapter by chapter; minutes. Who began it has to leave it."""

        def make(work: Job) -> Story:
            told = self.get_story(net)
            if told is None:
                told = story(net.background_model, units=12, shown=6, progress=work.report_progress)
                self.pattern_cache.put_story(net.version, told)
            return told

        return self.background_queue.submit(self._story_key(net), make, client_id)

    def get_story(self, net: Network) -> Story | None:
        """The story, if it has been told: here, into the store, or into the folder where things are kept."""
        key = self._story_key(net)
        told: Story | None = self.cache.get(key)
        if told is None:
            told = None if net.stored_patterns is None else net.stored_patterns.get_story(net.model)
            told = told or self.pattern_cache.get_story(net.version, net.model)
            if told is not None:
                self.cache.put(key, told)
        return told

    # --- pictures of the data set ---

    def cached_image(self, client: Client, net: Network, key: tuple[Any, ...], make: Callable[[], bytes]) -> bytes:
        """A picture that is made of others: of the store's, say."""
        return self._asked(self.image_queue, client, ("cut", net.version, *key), lambda work: make())

    def _story_key(self, net: Network) -> tuple[str, str]:
        return ("story", net.version)

    def _quickly(self, asker: Client, key: tuple[Any, ...], run: Callable[[Job], T]) -> T:
        return self._asked(self.interactive_queue, asker, key, run)

    def _asked(self, lane: JobQueue, asker: Client, key: tuple[Any, ...], run: Callable[[Job], T]) -> T:
        found: T = asker.wait(lane.submit(key, run, asker.id))
        return found

    def _input(self, net: Network, image: RegisteredImage) -> Tensor:
        if not net.takes_images:
            raise ConvscopeError(f"{net.model.name} takes no ordinary pictures, but {net.model.preprocessing}")
        key = ("input", net.version, image.key)
        x: Tensor | None = self.cache.get(key)
        if x is None:
            x = compute.preprocess(net.model, image.pixels)
            self.cache.put(key, x)
        return x


def url_key(name: str) -> str:
    """A model's part of addresses: letters, digits, dots, hyphens and underscores of what it was loaded as."""
    last = name.rpartition("/")[2] if "/" in name or os.sep in name else name
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last).strip(".") or "model"


def main_layers(net: Network) -> list[str]:
    """The layers to begin with: the last of each resolution."""
    return [row.name for row in last_per_resolution(net.model)]
