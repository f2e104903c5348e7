"""Paths that tools accept and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from convscope import samples
from convscope.errors import ConvscopeError
from convscope.tool_server.files import AllowedFiles


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> AllowedFiles:
    return AllowedFiles([folder], tmp_path / "out")


def test_images_of_files_and_folders(files: AllowedFiles, folder: Path) -> None:
    expected = [str(folder / "a.png"), str(folder / "more" / "b.png")]
    assert files.images([str(folder / "a.png"), "more"], 5) == expected
    assert files.images([str(folder)], 5) == expected  # links to the outside are left out
    assert files.images(["red_panda.jpg"], 5) == [p for p in samples.photographs() if "panda" in p]


@pytest.mark.parametrize(
    "path",
    [
        "link.png", "linked", "linked/secret.png", "../outside/secret.png", "more/../../outside/secret.png",
        "/etc/hostname", "~/.ssh", "/", "..",
    ],
)  # fmt: skip
def test_paths_outside_are_refused(files: AllowedFiles, path: str) -> None:
    with pytest.raises(ConvscopeError, match="outside of the folders"):
        files.images([path], 5)


@pytest.mark.parametrize("path", ["https://example.org/a.png", "file:///etc/hostname", "s3://bucket/a.png", "a\0b"])
def test_addresses_are_refused(files: AllowedFiles, path: str) -> None:
    with pytest.raises(ConvscopeError, match="not a local path"):
        files.images([path], 5)


def test_missing_files_lists_and_too_many_images_are_refused(files: AllowedFiles, folder: Path) -> None:
    for path, reason in (("no.png", "does not exist"), ("notes.txt", "not an image"), ("*.png", "does not exist")):
        with pytest.raises(ConvscopeError, match=reason):
            files.images([path], 5)
    with pytest.raises(ConvscopeError, match="more than 1 images"):
        files.images([str(folder)], 1)


def test_data_sets_with_links_to_the_outside_are_refused(files: AllowedFiles, folder: Path) -> None:
    assert files.dataset("more", 5) == str(folder / "more")
    with pytest.raises(ConvscopeError, match="outside"):
        files.dataset(str(folder), 5)
    for path in ("notes.txt", "a.png"):
        with pytest.raises(ConvscopeError, match="expected a folder of images"):
            files.dataset(path, 5)


def test_output_stays_in_its_folder(files: AllowedFiles, tmp_path: Path) -> None:
    assert files.output("maps/panda") == tmp_path / "out" / "maps" / "panda"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "away").symlink_to(tmp_path)
    (tmp_path / "out" / "file").write_text("")
    for name in ("../x", "/elsewhere/x", ".", "", "away", "away/x", "a/../../x", "file"):
        with pytest.raises(ConvscopeError, match="not a folder inside of"):
            files.output(name)


def test_roots_exist(tmp_path: Path) -> None:
    with pytest.raises(ConvscopeError, match="is not a folder"):
        AllowedFiles([tmp_path / "no"], tmp_path)
