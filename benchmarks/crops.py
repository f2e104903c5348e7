"""Random crops of photographs, one folder per photograph, as data for a scan.

python benchmarks/crops.py FOLDER IMAGES_OR_FOLDERS... --each 24
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

SIDE, SMALLEST = 256, 160  # pixels of a finished crop; of the smallest region
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in files if file.suffix.lower() in SUFFIXES and "mask" not in file.name)


def cut(image: Image.Image, generator: random.Random) -> Image.Image:
    """Cut a square of random size (log-uniform) and position, and resize it to `SIDE`."""
    longest = min(image.size)
    side = round(min(SMALLEST, longest) * (max(longest / SMALLEST, 1)) ** generator.random())
    left, top = (generator.randint(0, length - side) for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def crops(paths: Iterable[Path], out: Path, each: int) -> int:
    """Write the crops, the same ones every time; return their number."""
    count, names = 0, set[str]()
    for file in image_files(paths):
        name = f"{file.parent.name}-{file.stem}"
        if name in names:
            continue
        names.add(name)
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        image.thumbnail((2048, 2048))
        (out / name).mkdir(parents=True, exist_ok=True)
        generator = random.Random(name)
        for number in range(each):
            cut(image, generator).save(out / name / f"{number:03d}.jpg", quality=92)
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--each", type=int, default=24)
    arguments = parser.parse_args()
    if not crops(arguments.images, arguments.folder, arguments.each):
        parser.error("no images found")


if __name__ == "__main__":
    main()
