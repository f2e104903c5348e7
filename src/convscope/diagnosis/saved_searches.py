"""Finished searches, kept in the folder of a report until it is complete, so that an interrupted run loses none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.flat import from_json, to_json
from convscope.diagnosis.search import Search
from convscope.results import atomic_write, write_json

Outcome = tuple[Search, np.ndarray | None]
"""A search, and an array that goes with it: the label quality (N,)."""


@dataclass(frozen=True)
class SavedSearches:
    """A folder with a file for each search.

    Attributes
    ----------
    folder : Path or None
        None keeps nothing.
    identity : mapping
        What two runs must have in common to share searches, as JSON values.
    """

    folder: Path | None
    identity: Mapping[str, object]

    def load_or_run(self, name: str, run: Callable[[], Outcome]) -> Outcome:
        """Return a search that an earlier run with the same identity has finished, or else run it and keep it."""
        if self.folder is None:
            return run()
        saved = self._load(name)
        if saved is None:
            saved = run()
            self._save(name, *saved)
        return saved

    def clear(self) -> None:
        """Remove what is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, name: str) -> Outcome | None:
        assert self.folder is not None
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != self.identity:
            return None
        array = np.load(self.folder / f"{name}.npy", allow_pickle=False) if content["has_array"] else None
        return search_from_json(content["search"]), array

    def _save(self, name: str, search: Search, array: np.ndarray | None) -> None:
        """Write the array first: a search whose JSON file exists is complete."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if array is not None:
            with atomic_write(self.folder / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        content = {"identity": self.identity, "has_array": array is not None, "search": to_json(asdict(search))}
        write_json(self.folder / f"{name}.json", content)


def search_from_json(values: Mapping[str, Any]) -> Search:
    """Return the search that ``to_json(asdict(search))`` describes."""
    findings = tuple(finding_from_json(finding) for finding in values["findings"])
    return Search(**{**values, "notes": tuple(values["notes"]), "findings": findings})


def finding_from_json(values: Mapping[str, Any]) -> Finding:
    """Return the finding that ``to_json(asdict(finding))`` describes."""
    return Finding(**{name: from_json(value) if name != "evidence" else value for name, value in values.items()})
