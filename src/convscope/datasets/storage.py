"""List and read files at local paths and fsspec URLs, with retries for remote ones."""

from __future__ import annotations

import glob
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Literal, TypeVar

from convscope.errors import ConvscopeError, require_extra
from convscope.images.decoding import open_checked

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 30  # of one image's file
RETRIES = 3
_FIRST_PAUSE = 0.1  # seconds before the first retry; each later one waits four times as long
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ConvscopeError)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_GLOB = re.compile(r"[*?\[]")


def expand_ranges(location: str) -> list[str]:
    """Expand brace ranges: "part-{00..02}.tar" gives part-00.tar, part-01.tar and part-02.tar."""
    match = _RANGE.search(location)
    if not match:
        return [location]
    first, last = match.groups()
    if int(last) < int(first):
        raise ConvscopeError(f"{location!r}: the range {match.group()} ends before it begins")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [part for n in numbers for part in expand_ranges(location[: match.start()] + n + location[match.end() :])]


def is_glob(location: str) -> bool:
    """Whether a location contains wildcards."""
    return bool(_GLOB.search(location))


def absolute_location(location: str) -> str:
    """Return a local path as an absolute one, without a slash at its end, and a URL as it is."""
    return location if "://" in location or not location else os.path.abspath(os.path.expanduser(location))


def with_retries(action: Callable[[], T]) -> T:
    """Call `action`, and call it again up to three times after errors that may be temporary."""
    for attempt in range(RETRIES):
        try:
            return action()
        except _PERMANENT:
            raise
        except Exception:  # noqa: BLE001 - each fsspec backend raises errors of its own
            time.sleep(_FIRST_PAUSE * 4**attempt)
    return action()


@dataclass(frozen=True)
class Storage:
    """Open locations, which are local paths or fsspec URLs. Picklable.

    Attributes
    ----------
    options : mapping
        Options for fsspec, such as keys and endpoints. Not part of the repr, because they may be secret.
    base_folder : str
        The folder that relative local paths start from.
    """

    options: Mapping[str, object] = field(default_factory=dict, repr=False)
    base_folder: str = field(default_factory=os.getcwd)

    def local_path(self, location: str) -> str | None:
        """Return the local path of a location, or None for a remote one."""
        if location.startswith("file://"):
            return location.removeprefix("file://")
        return None if "://" in location else os.path.join(self.base_folder, location)

    def kind(self, location: str) -> Literal["folder", "file"] | None:
        """Return whether a location is a folder, a file, or does not exist (None).

        Raises ConvscopeError if the storage cannot be reached.
        """
        path = self.local_path(location)
        if path is not None:
            return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None
        try:
            system, inner = self._filesystem(location)
            return "folder" if with_retries(lambda: system.info(inner)["type"]) == "directory" else "file"
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _unreachable(location, error) from error

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield every file in a folder, at any depth: its name within the folder and its size in bytes.

        The order is arbitrary. Hidden files and folders are left out; links are followed.
        """
        path = self.local_path(folder)
        if path is not None:
            yield from _walk_local(path)
            return
        try:
            system, inner = self._filesystem(folder)
            files = with_retries(lambda: system.find(inner, detail=True))
        except Exception as error:
            raise _unreachable(folder, error) from error
        for path, info in files.items():
            name = path[len(inner.rstrip("/")) :].lstrip("/")
            if not _is_hidden(name):
                yield name, int(info.get("size") or 0)

    def glob(self, pattern: str) -> list[tuple[str, int]]:
        """Return the files that match a glob and their sizes in bytes; hidden files are left out."""
        path = self.local_path(pattern)
        if path is not None:
            prefix = max(len(path) - len(pattern), 0)  # of the base folder
            names = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
            return [(name[prefix:], os.path.getsize(name)) for name in names]
        try:
            system, inner = self._filesystem(pattern)
            matches = with_retries(lambda: system.glob(inner, detail=True))
        except Exception as error:
            raise _unreachable(pattern, error) from error
        start = _GLOB.split(inner)[0].rfind("/") + 1
        return [
            (system.unstrip_protocol(name), int(info.get("size") or 0))
            for name, info in matches.items()
            if info["type"] == "file" and not _is_hidden(name[start:])
        ]

    def size(self, location: str) -> int:
        """Return the size of a local file in bytes; 0 for remote, missing and unreadable files."""
        path = self.local_path(location)
        if path is None:
            return 0  # one request per file would be slow
        try:
            return os.stat(path).st_size
        except (OSError, ValueError):
            return 0

    def read(self, location: str, offset: int | None = None, count: int = 0) -> bytes:
        """Return a whole file, or `count` bytes of it from `offset`.

        Raises ConvscopeError, or an error of the file system, if the file is missing, cut off, too large or unreadable.
        """
        if count > MAX_FILE_BYTES:
            raise ConvscopeError(f"has {count:,} bytes; image files of up to {MAX_FILE_BYTES:,} bytes are read")
        path = self.local_path(location)
        if path is None:
            system, inner = self._filesystem(location)
            end = None if offset is None else offset + count
            data = with_retries(lambda: system.cat_file(inner, start=offset, end=end))
        else:
            with open_checked(path) as file:
                file.seek(offset or 0)
                data = file.read(MAX_FILE_BYTES + 1 if offset is None else count)
        if len(data) > MAX_FILE_BYTES:
            raise ConvscopeError(f"image files of up to {MAX_FILE_BYTES:,} bytes are read; this one is larger")
        if offset is not None and len(data) < count:
            raise ConvscopeError(f"is cut off: {len(data):,} of {count:,} bytes are left")
        return bytes(data)

    def open(self, location: str) -> IO[bytes]:
        """Open a file for reading and seeking. Raises ConvscopeError if it is missing, empty or unreadable."""
        path = self.local_path(location)
        if path is not None:
            try:
                return open_checked(path)
            except ConvscopeError as error:
                raise ConvscopeError(f"{location}: {error}") from error
        system, inner = self._filesystem(location)
        try:
            file: IO[bytes] = with_retries(lambda: system.open(inner, "rb"))
        except Exception as error:
            raise _unreachable(location, error) from error
        return file

    def _filesystem(self, location: str) -> tuple[AbstractFileSystem, str]:
        """Return the fsspec file system of a URL and the path in it."""
        core = require_extra("fsspec.core")
        head, chained, _ = location.partition("::")
        if chained and "://" in head:
            raise ConvscopeError(f"{location}: chained URLs are not supported; unpack the archive first")
        try:
            system, path = core.url_to_fs(location, **self.options)
        except Exception as error:  # unknown protocols, missing packages, wrong options
            raise _unreachable(location, error) from error
        return system, str(path)


def _unreachable(location: str, error: Exception) -> ConvscopeError:
    if isinstance(error, ConvscopeError):
        return error
    return ConvscopeError(
        f"{location} cannot be opened ({type(error).__name__}: {error}); check the address and the storage options"
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _walk_local(root: str) -> Iterator[tuple[str, int]]:
    def refuse(error: OSError) -> None:
        raise ConvscopeError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        inner = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        real = os.path.realpath(folder) + os.sep
        subfolders[:] = [
            name
            for name in subfolders
            # A link to a folder that contains this one would recurse for ever.
            if not name.startswith(".") and not real.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)
        ]
        for name in files:
            if not name.startswith("."):
                try:
                    status = os.stat(os.path.join(folder, name))
                except OSError:
                    yield inner.removeprefix("./") + name, 0  # a broken link fails when its image is read
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield inner.removeprefix("./") + name, status.st_size
