"""Pictures of every kind of page, live and published, at three widths, light and dark; names what is wrong with them.

    python tests/browser/screenshots.py OUT [--model MODEL] [--store STORE] [--only KIND]...

MODEL: tiny (made for tests, the default), or anything that `convscope.load` takes. STORE: what `convscope scan` wrote
for it; without one, a small data set is scanned. Ends with status 1 if a page is wider than its window, complains on
the console, lacks a picture, or writes labels over each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))  # for tests.oracles

from playwright.sync_api import Browser, Page, sync_playwright

import convscope
from convscope.engine.model import LOGITS
from convscope.explorer import server
from convscope.explorer.publish import publish
from convscope.explorer.service.state import url_key
from convscope.explorer.urls import Parts, file_of
from convscope.results import file_names
from convscope.samples import photographs
from tests.explorer.browser import browsers
from tests.oracles.explorer import data_folder, tiny_model

SIZES = ((1440, 1000), (1024, 900), (390, 844))
SCHEMES = ("light", "dark")
WRONG = """() => {
  const found = [], wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) found.push(`is ${wide} pixels wide`);
  for (const image of document.images) {
    if (image.getAttribute("src") && image.complete && !image.naturalWidth) found.push(`lacks ${image.src}`);
  }
  const labels = [...document.querySelectorAll("svg text")];
  const boxes = labels.map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const apart = a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    if (!apart) found.push(`${one} and ${other} overlap`);
  }));
  return found;
}"""


def kinds(store: Any, key: str, picture: str, layer: str) -> dict[str, Parts]:
    """A page of each kind; the unit is one with a pattern."""
    best = int(store.top_pictures(layer, 1, 2)[0, 0])
    return {
        "picture": ("m", key, "picture", picture),
        "network": ("m", key),
        "layer": ("m", key, "layer", layer),
        "unit": ("m", key, "unit", layer, 1),
        "class": ("m", key, "class", 1),
        "concepts": ("m", key, "concepts"),
        "story": ("m", key, "story"),
        "example": ("m", key, "data", best),
        "glossary": ("glossary",),
    }


def prepared(model: Any, store: str | None, where: Path) -> Any:
    """A store with a pattern and a story in it."""
    if store is not None:
        return convscope.open_store(store)
    spatial = [row.name for row in model.layers.distinct()]
    layers = [spatial[len(spatial) // 3], model.layers.last_spatial().name]
    tiny = model.preprocessing.size[0] < 64
    data = str(data_folder(where / "data")) if tiny else [str(path) for path in photographs()]
    made = convscope.scan(model, data, where / "store", layers=layers, k=9, workers=0)
    folders = file_names(made.layers)
    for layer in (layers[-1], LOGITS):
        drawn = convscope.patterns(model, layer, [0, 1], steps=24)
        drawn.save(where / "store" / "patterns" / folders[layer])
    convscope.story(model, [*layers, LOGITS], units=4, num_shown=3).save(where / "store" / "story")
    return made


@contextmanager
def sites(model: Any, name: str, store: Any, where: Path) -> Iterator[dict[str, Any]]:
    """Of the live and of the published pages: a function that gives a page's address."""
    built = server.build_app({name: model}, store=store)
    listening = server.bind_socket("127.0.0.1", 0)
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = server.serve_in_thread(built, listening)
    publish({name: model}, store, where / "site", workers=2)
    try:
        yield {
            "live": lambda parts: "/".join((base, *map(str, parts))),
            "published": lambda parts: (where / "site" / file_of(*parts)).as_uri(),
        }
    finally:
        running.should_exit = True


def shot(page: Page, url: str, file: Path) -> list[str]:
    """Take one picture; what is wrong with the page."""
    said: list[str] = []

    def listen(message: Any) -> None:
        if message.type in ("error", "warning"):
            said.append(f"says {message.text}")

    def failed(error: Any) -> None:
        said.append(f"fails: {error}")

    page.on("console", listen)
    page.on("pageerror", failed)
    try:
        page.goto(url)
        page.wait_for_load_state("networkidle", timeout=60_000)
        page.wait_for_function("() => !document.querySelector('.stage.waiting')")
        page.screenshot(path=file, full_page=True)
        return [*said, *page.evaluate(WRONG)]
    finally:
        page.remove_listener("console", listen)
        page.remove_listener("pageerror", failed)


def walk(browser: Browser, pages: dict[str, Parts], places: dict[str, Any], out: Path) -> list[str]:
    """Take all pictures; what is wrong, each with its picture's name."""
    wrong = []
    for scheme in SCHEMES:
        for width, height in SIZES:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            for kind, parts in pages.items():
                for site, url in places.items():
                    name = f"{kind}-{site}-{width}-{scheme}.png"
                    wrong += [f"{name} {what}" for what in shot(page, url(parts), out / name)]
            context.close()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--store")
    parser.add_argument("--only", action="append", metavar="KIND", default=[])
    given = parser.parse_args()
    chromium = browsers.chromium()
    if chromium is None:
        parser.error("there is no chromium on this machine (apt-get install chromium)")
    model = tiny_model() if given.model == "tiny" else convscope.load(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        where = Path(folder)
        store = prepared(model, given.store, where)
        layer = [name for name in store.layers if name != LOGITS][-1]
        pages = kinds(store, url_key(given.model), "red_panda", layer)
        unknown = [kind for kind in given.only if kind not in pages]
        if unknown:
            parser.error(f"kind {unknown[0]!r} is not known; there are {', '.join(pages)}")
        chosen = {kind: parts for kind, parts in pages.items() if not given.only or kind in given.only}
        browser = playwright.chromium.launch(executable_path=chromium, args=browsers.ARGUMENTS)
        with sites(model, given.model, store, where) as places:
            wrong = walk(browser, chosen, places, given.out)
        browser.close()
    taken = len(chosen) * len(SIZES) * len(SCHEMES) * 2
    told = [f"{taken} pictures in {given.out}; {len(wrong)} complaints", *wrong]
    sys.stdout.write("\n".join(told) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
