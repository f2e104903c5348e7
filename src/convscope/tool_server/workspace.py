"""What all tools share: the networks, the files, the limits, and one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from convscope.errors import ConvscopeError
from convscope.suggestions import suggest
from convscope.tool_server.files import AllowedFiles
from convscope.tool_server.limits import Limits
from convscope.tool_server.responses import Answer, describe, figure_image

if TYPE_CHECKING:
    from convscope.engine.model import Model
    from convscope.results import Result
    from convscope.store.store import Store


@dataclass(eq=False)
class Workspace:
    """The networks, files and limits of a server.

    Attributes
    ----------
    loaders : mapping of str to callable
        For each network that the server offers a function that loads it; the first is the default.
    files : AllowedFiles
    limits : Limits
    lock : Lock
        Held while a tool computes.
    """

    loaders: Mapping[str, Callable[[], Model]]
    files: AllowedFiles
    limits: Limits
    lock: threading.Lock = field(default_factory=threading.Lock)
    _models: dict[str, Model] = field(default_factory=dict)

    @property
    def model_names(self) -> list[str]:
        """The names of the networks."""
        return list(self.loaders)

    def model(self, name: str | None) -> Model:
        """Return a network, loaded when it is first used; raise ConvscopeError for one that is not offered."""
        name = name or self.model_names[0]
        if name not in self.loaders:
            raise ConvscopeError(
                f"model {name!r} is not offered by this server; {suggest(name, self.model_names)}; "
                "the person who runs the server adds networks: `convscope mcp MODEL MODEL ...`"
            )
        if name not in self._models:
            self._models[name] = self.loaders[name]()
        return self._models[name]

    def images(self, paths: Sequence[str]) -> list[str]:
        """Return the image files that paths name, within the limits."""
        return self.files.images(paths, self.limits.images)

    def optional_store(self, path: str | None) -> Store | None:
        """Open a store if a path is given, as `store` does."""
        return None if path is None else self.store(path)

    def store(self, path: str) -> Store:
        """Open a store that may be read; originals of its images are shown only where they may be read too."""
        from convscope.store.store import open_store
        from convscope.tool_server.store_images import RestrictedImages

        store = open_store(self.files.existing(path))
        store.images = RestrictedImages(store, self.files)
        return store

    def answer(self, result: Result, save: str | None) -> Answer:
        """Save a result if a name is given, and describe it with its figure."""
        return describe(result, self.limits, images=figure_image(result), saved=self.save(result, save))

    def save(self, result: Result, name: str | None) -> Path | None:
        """Save a result in a folder of this name inside of the output folder; do nothing without a name."""
        return None if name is None else result.save(self.files.output(name))


def parse_class(model: Model, name: str | int | None) -> int | None:
    """Return the index of a class, or None."""
    return None if name is None else model.class_index(name)
