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
from convscope.explorer.service.images import ImageRegistry, NotFound, Picture, encoded, unused
from convscope.explorer.service.jobs import Client, Job, JobQueue
from convscope.explorer.service.model_copy import twin
from convscope.explorer.service.patterns import PatternCache, PatternSpec, draw
from convscope.explorer.service.stored_patterns import StoredPatterns
from convscope.featurevis.layer_story import Story, story
from convscope.samples import photographs

if TYPE_CHECKING:
    from convscope.store.store import Store

T = TypeVar("T")
ROOM = 1 << 28  # bytes of results that are kept
LOOK = 0.2  # seconds between two looks at whether a user has changed the weights
SLOW = ("rise", "score-cam", "ablation-cam", "occlusion", "smooth-grad", "var-grad", "integrated-gradients")


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
            self._background_model = twin(model)
        except ConvscopeError as error:
            self._background_model = str(error)

    @property
    def version(self) -> str:
        """Another one once the user has changed the weights of a model in hand."""
        if not self.model.loaded_by_convscope and time.monotonic() >= self._look:
            marks, self._look = _weight_fingerprint(self.model), time.monotonic() + LOOK
            self._version = self._began if marks == self._marks else _short(f"{self._began} {self._run} {marks}")
        return self._version

    @property
    def store(self) -> Store | None:
        """What was found with these weights; None where nothing was, or they are others by now."""
        return self._store if self.version == self._began else None

    @property
    def stored(self) -> StoredPatterns | None:
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
            raise NotFound(f"{self.model.name} has no layer {name[:80]!r}")
        return self.model.layers.find(name)

    def units(self, layer: str) -> int:
        return (self.model.num_outputs or 0) if layer == LOGITS else self.layer(layer).units

    def require_unit(self, layer: str, unit: int) -> None:
        if not 0 <= unit < self.units(layer):
            raise NotFound(f"layer {layer!r} has units 0 to {self.units(layer) - 1}; there is no {unit}")

    def require_class(self, index: int) -> None:
        if not 0 <= index < (self.model.num_outputs or 0):
            raise NotFound(
                f"{self.model.name} has classes 0 to {(self.model.num_outputs or 0) - 1}; there is no {index}"
            )

    def classifies(self) -> bool:
        return bool(self.model.num_outputs)

    @cached_property
    def class_numbers(self) -> dict[str, int]:
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
        self, models: Mapping[str, Model], *, store: Store | None = None, keep: Path | None = None, room: int = ROOM
    ) -> None:
        if not models:
            raise ConvscopeError("the explorer needs a model; give at least one")
        self.networks: dict[str, Network] = {}
        for name, model in models.items():
            key = unused(address(name), self.networks)
            self.networks[key] = Network(key, model, name, store)
        if store is not None and not any(net.store for net in self.networks.values()):
            made = store.manifest["model"]["name"]
            raise ConvscopeError(f"{store.address} was made with {made} and other weights than the models given")
        self.shelf = ImageRegistry()
        self.album = PatternCache(keep)
        self.cache = Cache(room)
        self.quick = JobQueue("quick", self.cache, limit=64, each=24)
        self.slow = JobQueue("slow", self.cache, limit=32, each=8)
        self.cutting = JobQueue("cutting", self.cache, limit=256, each=96)

    def add_samples(self) -> None:
        """The photographs that come with the package."""
        self.shelf.add_samples(sorted(photographs(), key=lambda path: "red_panda" not in path))

    def close(self) -> None:
        self.quick.close()
        self.slow.close()
        self.cutting.close()

    def network(self, key: str) -> Network:
        if key not in self.networks:
            raise NotFound(f"there is no model {key[:40]!r} here; there are {', '.join(self.networks)}")
        return self.networks[key]

    @property
    def first(self) -> Network:
        return next(iter(self.networks.values()))

    # --- quick answers ---

    def predictions(self, asker: Client, net: Network, image: Picture, top: int = 5) -> list[dict[str, Any]]:
        key = ("predictions", net.version, image.key, top)
        return self._quickly(asker, key, lambda work: compute.predictions(net.model, self._input(net, image), top))

    def heatmap(
        self,
        asker: Client,
        net: Network,
        image: Picture,
        targets: Sequence[int],
        layer: str | None = None,
        method: str = "grad-cam",
        against: int | None = None,
    ) -> list[dict[str, Any]]:
        lane, model = (self.slow, net.background_model) if method in SLOW else (self.quick, net.model)
        key = ("heat", net.version, image.key, tuple(targets), layer, method, against)
        return self._asked(
            lane,
            asker,
            key,
            lambda work: compute.heatmap(
                model,
                self._input(net, image),
                targets,
                layer=layer,
                method=method,
                against=against,
                tell=work.tell,
            ),
        )

    def maps(self, asker: Client, net: Network, image: Picture, layer: str) -> np.ndarray:
        key = ("maps", net.version, image.key, layer)
        return self._quickly(asker, key, lambda work: compute.maps(net.model, self._input(net, image), layer))

    def relevance(self, asker: Client, net: Network, image: Picture, layer: str, target: int) -> np.ndarray:
        key = ("relevance", net.version, image.key, layer, target)
        return self._quickly(
            asker, key, lambda work: compute.relevance(net.model, self._input(net, image), layer, target)
        )

    def concept_heatmap(
        self, asker: Client, net: Network, image: Picture, layer: str, bank: np.ndarray, version: str
    ) -> np.ndarray:
        """How much of each concept of a bank (R, C) is at each place of a picture, float32 (R, h, w)."""
        maps = self.maps(asker, net, image, layer)
        key = ("concepts", net.version, version, image.key)
        return self._quickly(asker, key, lambda work: compute.concept_heatmap(maps, bank))

    def sheet(self, asker: Client, net: Network, picture: Picture, layer: str) -> tuple[bytes, dict[str, int]]:
        """All channels of a layer on one PNG, and its measures."""
        maps = self.maps(asker, net, picture, layer)

        def make(work: Job) -> tuple[bytes, dict[str, int]]:
            image, measures = compute.sheet(maps)
            return encoded(image, "PNG"), measures

        return self._quickly(asker, ("sheet", net.version, picture.key, layer), make)

    def summaries(self, asker: Client, net: Network, image: Picture) -> dict[str, dict[str, float]]:
        """What is measured of each layer on a picture."""

        def make(work: Job) -> dict[str, dict[str, float]]:
            names = [row.name for row in net.layers]
            return compute.layer_summaries(net.background_model, self._input(net, image), names, work.tell)

        return self._asked(self.slow, asker, ("summaries", net.version, image.key), make)

    # --- long work ---

    def faithfulness(
        self,
        asker: Client,
        net: Network,
        image: Picture,
        target: int,
        layer: str | None,
        method: str,
        against: int | None,
    ) -> dict[str, Any]:
        key = ("faithfulness", net.version, image.key, target, layer, method, against)
        return self._asked(
            self.slow,
            asker,
            key,
            lambda work: compute.faithfulness(
                net.background_model,
                self._input(net, image),
                target,
                layer=layer,
                method=method,
                against=against,
                tell=work.tell,
            ),
        )

    def begin_drawing(self, client: str, net: Network, what: PatternSpec, references: list[np.ndarray]) -> Job:
        """A pattern: kept, or under way from now on. Raises FullError. Who began it has to leave it."""

        def make(work: Job) -> dict[str, Any]:
            found = self.drawn(net, what)
            if found is None:
                found = draw(net.background_model, what, references, work)
                self.album.put(net.version, what, found)
            return found

        return self.slow.ask(("pattern", net.version, what), make, client)

    def drawn(self, net: Network, what: PatternSpec) -> dict[str, Any] | None:
        """A pattern that is there already; the store's as it is now."""
        stored, found = net.stored, None
        stamp = None if stored is None else stored.stamp(what)
        if stored is not None and stamp is not None:
            key = ("stored", net.version, what, stamp)
            found = self.cache.get(key) or stored.pattern(what)
            self.cache.put(key, found)
        return found or self.cache.get(("pattern", net.version, what)) or self.album.get(net.version, what)

    def resolve_pattern(
        self,
        net: Network,
        layer: str,
        unit: int,
        look: str = "positive",
        recipe: str | None = None,
        seed: int | None = None,
    ) -> PatternSpec:
        """The pattern that is asked for; where recipe or seed are left open, as the store's own was drawn."""
        own = (net.stored and net.stored.how(layer, unit)) or PatternSpec(layer, unit)
        return PatternSpec(layer, unit, look, recipe or own.recipe, own.seed if seed is None else seed)

    def begin_story(self, client: str, net: Network) -> Job:
        """The story of the network, chapter by chapter; minutes. Who began it has to leave it."""

        def make(work: Job) -> Story:
            told = self.get_story(net)
            if told is None:
                told = story(net.background_model, units=12, shown=6, progress=work.tell)
                self.album.put_story(net.version, told)
            return told

        return self.slow.ask(self._story_key(net), make, client)

    def get_story(self, net: Network) -> Story | None:
        """The story, if it has been told: here, into the store, or into the folder where things are kept."""
        key = self._story_key(net)
        told: Story | None = self.cache.get(key)
        if told is None:
            told = None if net.stored is None else net.stored.story(net.model)
            told = told or self.album.story(net.version, net.model)
            if told is not None:
                self.cache.put(key, told)
        return told

    # --- pictures of the data set ---

    def cached_image(self, asker: Client, net: Network, what: tuple[Any, ...], make: Callable[[], bytes]) -> bytes:
        """A picture that is made of others: of the store's, say."""
        return self._asked(self.cutting, asker, ("cut", net.version, *what), lambda work: make())

    def _story_key(self, net: Network) -> tuple[str, str]:
        return ("story", net.version)

    def _quickly(self, asker: Client, key: tuple[Any, ...], run: Callable[[Job], T]) -> T:
        return self._asked(self.quick, asker, key, run)

    def _asked(self, lane: JobQueue, asker: Client, key: tuple[Any, ...], run: Callable[[Job], T]) -> T:
        found: T = asker.wait(lane.ask(key, run, asker.client))
        return found

    def _input(self, net: Network, image: Picture) -> Tensor:
        if not net.takes_images:
            raise ConvscopeError(f"{net.model.name} takes no ordinary pictures, but {net.model.preprocessing}")
        key = ("input", net.version, image.key)
        x: Tensor | None = self.cache.get(key)
        if x is None:
            x = compute.prepared(net.model, image.pixels)
            self.cache.put(key, x)
        return x


def address(name: str) -> str:
    """A model's part of addresses: letters, digits, dots, hyphens and underscores of what it was loaded as."""
    last = name.rpartition("/")[2] if "/" in name or os.sep in name else name
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last).strip(".") or "model"


def followed(net: Network) -> list[str]:
    """The layers to begin with: the last of each resolution."""
    return [row.name for row in last_per_resolution(net.model)]
