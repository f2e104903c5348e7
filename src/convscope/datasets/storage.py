"""Where the bytes of a data set lie: local files and fsspec's addresses, listed, and read with patience."""

from __future__ import annotations

import glob
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

from convscope.errors import ConvscopeError, require_extra
from convscope.images.decoding import open_checked

T = TypeVar("T")

LARGEST = 1 << 30  # bytes of one picture's file: what is larger is no picture
RETRIES = 3
_PAUSE = 0.1  # seconds before the first retry; each later one waits four times as long
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ConvscopeError)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC = re.compile(r"[*?\[]")


def expanded(address: str) -> list[str]:
    """The addresses that brace ranges stand for: "part-{00..02}.tar" is part-00.tar, part-01.tar and part-02.tar."""
    found = _RANGE.search(address)
    if not found:
        return [address]
    first, last = found.groups()
    if int(last) < int(first):
        raise ConvscopeError(f"{address!r}: the range {found.group()} ends before it begins")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [part for n in numbers for part in expanded(address[: found.start()] + n + address[found.end() :])]


def is_glob(address: str) -> bool:
    return bool(_MAGIC.search(address))


def with_retries(action: Callable[[], T]) -> T:
    """What the action gives; a failure that may pass by itself is answered by three more tries."""
    for attempt in range(RETRIES):
        try:
            return action()
        except _FINAL:
            raise
        except Exception:  # each of fsspec's backends raises errors of its own
            time.sleep(_PAUSE * 4**attempt)
    return action()


@dataclass(frozen=True)
class Storage:
    """How addresses are opened: fsspec's options, and the folder that relative local paths start from.

    Goes to worker processes. Everything that is remote is tried anew when it fails for a passing reason.
    """

    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold keys
    base: str = field(default_factory=os.getcwd)

    def local(self, address: str) -> str | None:
        """The path of a local address, None of a remote one."""
        if address.startswith("file://"):
            return address.removeprefix("file://")
        return None if "://" in address else os.path.join(self.base, address)

    def kind(self, address: str) -> str | None:
        """ "folder", "file" or None: nothing is there. Raises ConvscopeError where that cannot be found out."""
        path = self.local(address)
        if path is not None:
            return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None
        try:
            system, inner = self._remote(address)
            return {"directory": "folder"}.get(with_retries(lambda: system.info(inner)["type"]), "file")
        except FileNotFoundError:
            return None
        except ConvscopeError:
            raise
        except Exception as error:
            raise _unreachable(address, error) from error

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        """Every file in a folder, at any depth: its name within it, with slashes, and its size in bytes.

        In no order. Hidden files and folders are left out, links are followed.
        """
        path = self.local(folder)
        if path is not None:
            yield from _walk(path)
            return
        try:
            system, inner = self._remote(folder)
            found = with_retries(lambda: system.find(inner, detail=True))
        except Exception as error:
            raise _unreachable(folder, error) from error
        for path, info in found.items():
            name = path[len(inner.rstrip("/")) :].lstrip("/")
            if not _hidden(name):
                yield name, int(info.get("size") or 0)

    def matches(self, pattern: str) -> list[tuple[str, int]]:
        """The addresses of the files that a glob names, and their sizes; hidden ones are left out."""
        path = self.local(pattern)
        if path is not None:
            cut = len(path) - len(pattern)
            names = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
            return [(name[max(cut, 0) :], os.path.getsize(name)) for name in names]
        try:
            system, inner = self._remote(pattern)
            found = with_retries(lambda: system.glob(inner, detail=True))
        except Exception as error:
            raise _unreachable(pattern, error) from error
        start = _MAGIC.split(inner)[0].rfind("/") + 1
        files = {name: info for name, info in found.items() if info["type"] == "file" and not _hidden(name[start:])}
        return [(system.unstrip_protocol(name), int(info.get("size") or 0)) for name, info in files.items()]

    def size(self, address: str) -> int:
        """Bytes of a file, 0 where that is not known: the file may not even be there."""
        path = self.local(address)
        if path is None:
            return 0  # not worth a request for each
        try:
            return os.stat(path).st_size
        except (OSError, ValueError):
            return 0

    def read(self, address: str, start: int | None = None, count: int = 0) -> bytes:
        """A whole file, or `count` bytes of it from `start`.

        Raises ConvscopeError, or what the address's own system raises, if it is not there or cannot be read.
        """
        if count > LARGEST:
            raise ConvscopeError(f"has {count:,} bytes: no picture is that large")
        path = self.local(address)
        if path is None:
            system, inner = self._remote(address)
            stop = None if start is None else start + count
            data = with_retries(lambda: system.cat_file(inner, start=start, end=stop))
        else:
            with open_checked(path) as file:
                file.seek(start or 0)
                data = file.read(LARGEST + 1 if start is None else count)
        if len(data) > LARGEST:
            raise ConvscopeError(f"has more than {LARGEST:,} bytes: no picture is that large")
        if start is not None and len(data) < count:
            raise ConvscopeError(f"is cut off: {len(data):,} of {count:,} bytes are left")
        return bytes(data)

    def open(self, address: str) -> IO[bytes]:
        """A file to read from and to seek in. Raises ConvscopeError, which names it, if it is not there or is empty."""
        path = self.local(address)
        if path is not None:
            try:
                return open_checked(path)
            except ConvscopeError as error:
                raise ConvscopeError(f"{address}: {error}") from error
        system, inner = self._remote(address)
        try:
            file: IO[bytes] = with_retries(lambda: system.open(inner, "rb"))
        except Exception as error:
            raise _unreachable(address, error) from error
        return file

    def _remote(self, address: str) -> tuple[Any, str]:
        core = require_extra("fsspec.core")
        head, chained, _ = address.partition("::")
        if chained and "://" in head:
            raise ConvscopeError(f"{address}: what lies in an archive is not read, but for tars; unpack it")
        try:
            system, path = core.url_to_fs(address, **self.options)
        except Exception as error:  # unknown protocols, packages that are missing, options that do not fit
            raise _unreachable(address, error) from error
        return system, str(path)


def _unreachable(address: str, error: Exception) -> ConvscopeError:
    if isinstance(error, ConvscopeError):
        return error
    return ConvscopeError(f"{address} cannot be opened ({type(error).__name__}: {error}); check it and storage=")


def _hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _walk(root: str) -> Iterator[tuple[str, int]]:
    def refuse(error: OSError) -> None:
        raise ConvscopeError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        inner = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        real = os.path.realpath(folder) + os.sep
        # A link to a folder that this one lies in would go round for ever.
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not real.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep)
        ]
        for name in files:
            if not name.startswith("."):
                try:
                    status = os.stat(os.path.join(folder, name))
                except OSError:
                    yield inner.removeprefix("./") + name, 0  # a broken link: the picture's own failure
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield inner.removeprefix("./") + name, status.st_size
