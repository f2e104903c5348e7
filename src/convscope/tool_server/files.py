"""Which files the tools may read, and where they may write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from convscope import samples
from convscope.errors import ConvscopeError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".jp2", ".avif", ".npy")
ARCHIVE_SUFFIX = ".tar"


class AllowedFiles:
    """Checks paths of clients: files are read inside of some folders, and written inside of one.

    Symbolic links are followed before a path is checked. URLs, globs and lists of files are refused.

    Parameters
    ----------
    roots : sequence of path
        Folders that may be read; relative paths start in each of them in turn.
    out : path
        The folder for output, which may also be read.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
        sample_folder = Path(samples.photographs()[0]).parent
        self.out = Path(os.path.realpath(out))
        folders = [*(Path(os.path.realpath(root)) for root in roots), self.out, Path(os.path.realpath(sample_folder))]
        self.roots = tuple(dict.fromkeys(folders))
        for root in self.roots[: len(roots)]:
            if not root.is_dir():
                raise ConvscopeError(f"root {str(root)!r} is not a folder; give folders that exist")

    def contains(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path, its links followed, lies in a folder that may be read."""
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(root) for root in self.roots)

    def existing(self, path: str) -> Path:
        """Return a file or folder that may be read; raise ConvscopeError for any other."""
        if "://" in path or "\0" in path:
            raise ConvscopeError(f"{path!r} is not a local path; this server reads files in {self._folders()}")
        expanded = os.path.expanduser(path)
        candidates = [Path(expanded)] if os.path.isabs(expanded) else [root / expanded for root in self.roots]
        present = next((candidate for candidate in candidates if os.path.lexists(candidate)), None)
        if not any(map(self.contains, candidates)) or (present is not None and not self.contains(present)):
            raise ConvscopeError(
                f"{path!r} is outside of the folders that this server reads: {self._folders()}; move it there, or "
                "restart the server with --root FOLDER"
            )
        if present is None or not present.exists():
            raise ConvscopeError(f"{path!r} does not exist in {self._folders()}; list_images shows what there is")
        return Path(os.path.realpath(present))

    def images(self, paths: Sequence[str], maximum: int) -> list[str]:
        """Return the image files that paths of files and folders name, at most `maximum`; raise ConvscopeError else."""
        files: list[str] = []
        for path in [paths] if isinstance(paths, str) else paths:
            resolved = self.existing(path)
            if resolved.is_file() and resolved.suffix.lower() not in IMAGE_SUFFIXES:
                raise ConvscopeError(f"{path!r} is not an image; expected one of {', '.join(IMAGE_SUFFIXES)}")
            files += [str(resolved)] if resolved.is_file() else [str(file) for file in self.images_in(resolved)]
            if len(files) > maximum:
                raise ConvscopeError(f"these are more than {maximum} images; give fewer, or scan a folder")
        if not files:
            raise ConvscopeError("there are no images in these paths; list_images shows what there is")
        return files

    def dataset(self, path: str, maximum: int) -> str:
        """Return a folder of images, or a tar file, that may be scanned; raise ConvscopeError for any other."""
        resolved = self.existing(path)
        if resolved.is_file():
            if resolved.suffix.lower() != ARCHIVE_SUFFIX:
                raise ConvscopeError(f"{path!r} is a file; expected a folder of images, or a {ARCHIVE_SUFFIX} file")
            return str(resolved)
        for count, file in enumerate(self.images_in(resolved, skip_outside=False), 1):
            if not self.contains(file):
                raise ConvscopeError(f"{file} is a link to a file outside of the folders that this server reads")
            if count > maximum:
                raise ConvscopeError(f"{path!r} holds more than {maximum} images; scan it with `convscope scan`")
        return str(resolved)

    def images_in(self, folder: Path, skip_outside: bool = True) -> Iterator[Path]:
        """Yield the image files in a folder, at any depth, in the order of their names; hidden ones are left out."""
        visited: set[str] = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            inside = {name for name in folders if not name.startswith(".") and self.contains(Path(parent, name))}
            if not skip_outside and any(not self.contains(Path(parent, name)) for name in folders):
                raise ConvscopeError(f"{parent} holds a link to a folder outside of those that this server reads")
            folders[:] = [] if real in visited else sorted(inside)
            files = [] if real in visited else sorted(name for name in names if not name.startswith("."))
            visited.add(real)
            for name in files:
                path = Path(parent, name)
                if path.suffix.lower() in IMAGE_SUFFIXES and (not skip_outside or self.contains(path)):
                    yield path

    def output(self, name: str) -> Path:
        """Return the folder of this name inside of the output folder; raise ConvscopeError if it lies outside."""
        path = self.out / name
        real = Path(os.path.realpath(path))
        if os.path.isabs(name) or real == self.out or not real.is_relative_to(self.out) or path.is_file():
            raise ConvscopeError(f"{name!r} is not a folder inside of {self.out}; give a name such as 'heatmaps'")
        return real

    def _folders(self) -> str:
        return ", ".join(map(str, self.roots))
