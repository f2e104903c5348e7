"""Many pictures out of few: random crops of photographs, a folder for each, to try a scan on real data.

python benchmarks/crops.py FOLDER PICTURES_OR_FOLDERS... --each 24
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

SIDE, SMALLEST = 256, 160  # pixels of a finished crop; of the smallest that is cut out
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def found(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (file for file in files if file.suffix.lower() in SUFFIXES and "mask" not in file.name)


def cut(picture: Image.Image, draw: random.Random) -> Image.Image:
    """A square of random size (all sizes on a logarithmic scale alike) and place, brought to `SIDE`."""
    longest = min(picture.size)
    side = round(min(SMALLEST, longest) * (max(longest / SMALLEST, 1)) ** draw.random())
    left, top = (draw.randint(0, length - side) for length in picture.size)
    return picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def crops(places: Iterable[Path], out: Path, each: int) -> int:
    """Writes them, and returns how many; the same crops every time."""
    count, names = 0, set[str]()
    for file in found(places):
        name = f"{file.parent.name}-{file.stem}"
        if name in names:
            continue
        names.add(name)
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((2048, 2048))
        (out / name).mkdir(parents=True, exist_ok=True)
        draw = random.Random(name)
        for number in range(each):
            cut(picture, draw).save(out / name / f"{number:03d}.jpg", quality=92)
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--each", type=int, default=24)
    given = parser.parse_args()
    if not crops(given.pictures, given.folder, given.each):
        parser.error("no pictures found")


if __name__ == "__main__":
    main()
