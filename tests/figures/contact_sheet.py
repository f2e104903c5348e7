"""Draw every kind of figure for the bundled network, and one sheet of all: ``contact_sheet.py FOLDER``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import convscope
from convscope.plotting.grids import captioned_tile
from convscope.plotting.panels import to_image
from tests.figures.gallery import Gallery, draw_all, sheets

THUMBNAIL = 480


def main() -> None:
    """Write the figures and the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    images, results = {}, {}

    def save(name: str, image: Image.Image) -> None:
        images[name] = image
        image.save(folder / f"{name.replace(' ', '_').replace(',', '')}.png")

    with tempfile.TemporaryDirectory() as scratch:
        gallery = Gallery(
            model=convscope.load("lite0"),
            images=convscope.samples.photographs(),
            first="blocks.2.0.bn1",
            last="blocks.4",
            target=387,
            other=277,
            steps=16,
            folder=Path(scratch),
        )
        for name, result, options in draw_all(gallery):
            results[name] = result
            save(name, to_image(result.figure(**options), 100))
    for name, image in sheets(results).items():
        save(name, image)
    contact_sheet(images).save(folder / "contact_sheet.png")


def contact_sheet(images: dict[str, Image.Image]) -> Image.Image:
    """Arrange thumbnails of all images, with their names."""
    tiles = []
    for image in images.values():
        square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
        thumbnail = image.convert("RGB")
        thumbnail.thumbnail((THUMBNAIL - 10, THUMBNAIL - 10))
        square.paste(thumbnail, (5, 5))
        tiles.append(np.asarray(square))
    return captioned_tile(np.stack(tiles), list(images), columns=6, margin=4)


if __name__ == "__main__":
    main()
