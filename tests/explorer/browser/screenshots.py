"""Take screenshots of every kind of page, live and published, at three widths, light and dark, and report defects.

    python tests/explorer/browser/screenshots.py OUT [--model MODEL] [--store STORE] [--only KIND]...

MODEL: "tiny" (a test network, the default), or any source that `convscope.load` accepts. STORE: the output of
`convscope scan` for it; without a store, a small data set is scanned. The exit status is 1 if a page is wider than its
window, reports an error on the console, lacks an image or has overlapping labels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # for tests.oracles

from playwright.sync_api import Browser, Page, sync_playwright

import convscope
from convscope.engine.model import LOGITS
from convscope.explorer import server
from convscope.explorer.publish import publish
from convscope.explorer.service.state import url_key
from convscope.explorer.urls import Parts, page_file
from convscope.results import file_names
from convscope.samples import photographs
from tests.explorer.browser.chromium import ARGUMENTS, find_chromium
from tests.oracles.explorer import data_folder, tiny_model

SIZES = ((1440, 1000), (1024, 900), (390, 844))
SCHEMES = ("light", "dark")
FIND_DEFECTS = """() => {
  const defects = [], width = document.documentElement.scrollWidth;
  if (width > innerWidth) defects.push(`is ${width} pixels wide`);
  for (const image of document.images) {
    if (image.getAttribute("src") && image.complete && !image.naturalWidth) defects.push(`lacks ${image.src}`);
  }
  const labels = [...document.querySelectorAll("svg text")];
  const boxes = labels.map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([first, a], i) => boxes.slice(i + 1).forEach(([second, b]) => {
    const disjoint = a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    if (!disjoint) defects.push(`labels ${first} and ${second} overlap`);
  }));
  return defects;
}"""


def page_parts(store: convscope.Store, model: str, image: str, layer: str) -> dict[str, Parts]:
    """Return the address of a page of each kind; the unit is one with a pattern."""
    example = int(store.top_images(layer, 1, 2)[0, 0])
    return {
        "image": ("m", model, "image", image),
        "image_units": ("m", model, "image", image, "units"),
        "network": ("m", model),
        "layer": ("m", model, "layer", layer),
        "units": ("m", model, "units", layer),
        "unit": ("m", model, "unit", layer, 1),
        "class": ("m", model, "class", 1),
        "concepts": ("m", model, "concepts"),
        "story": ("m", model, "story"),
        "example": ("m", model, "data", example),
        "glossary": ("glossary",),
    }


def prepare_store(model: convscope.Model, address: str | None, folder: Path) -> convscope.Store:
    """Open a store, or scan a small data set into one with patterns and a story."""
    if address is not None:
        return convscope.open_store(address)
    spatial = [layer.name for layer in model.layers.unique_spatial()]
    layers = [spatial[len(spatial) // 3], model.layers.last_spatial().name]
    is_tiny = model.preprocessing.size[0] < 64
    data = str(data_folder(folder / "data")) if is_tiny else [str(path) for path in photographs()]
    store = convscope.scan(model, data, folder / "store", layers=layers, k=9, workers=0)
    folder_names = file_names(store.layers)
    for layer in (layers[-1], LOGITS):
        patterns = convscope.patterns(model, layer, [0, 1], steps=24)
        patterns.save(folder / "store" / "patterns" / folder_names[layer])
    convscope.story(model, [*layers, LOGITS], units=4, num_displayed=3).save(folder / "store" / "story")
    return store


@contextmanager
def serve_and_publish(
    model: convscope.Model, name: str, store: convscope.Store, folder: Path
) -> Iterator[dict[str, Callable[[Parts], str]]]:
    """Yield functions from the parts of a page to its live and its published address."""
    app = server.build_app({name: model}, store=store)
    listening = server.bind_socket("127.0.0.1", 0)
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = server.serve_in_thread(app, listening)
    publish({name: model}, store, folder / "site", workers=2)
    try:
        yield {
            "live": lambda parts: "/".join((base, *map(str, parts))),
            "published": lambda parts: (folder / "site" / page_file(*parts)).as_uri(),
        }
    finally:
        running.should_exit = True


def take_screenshot(page: Page, url: str, path: Path) -> list[str]:
    """Take one screenshot; return the defects of the page."""
    messages: list[str] = []
    on_console = lambda message: message.type in ("error", "warning") and messages.append(f"logs {message.text}")  # noqa: E731
    on_error = lambda error: messages.append(f"fails: {error}")  # noqa: E731
    page.on("console", on_console)
    page.on("pageerror", on_error)
    try:
        page.goto(url)
        page.wait_for_load_state("networkidle", timeout=60_000)
        page.wait_for_function("() => !document.querySelector('.stage.waiting')")
        page.screenshot(path=path, full_page=True)
        return [*messages, *page.evaluate(FIND_DEFECTS)]
    finally:
        page.remove_listener("console", on_console)
        page.remove_listener("pageerror", on_error)


def take_screenshots(
    browser: Browser, pages: dict[str, Parts], sites: dict[str, Callable[[Parts], str]], out: Path
) -> list[str]:
    """Take all screenshots; return the defects, each with the name of its screenshot."""
    defects = []
    for scheme in SCHEMES:
        for width, height in SIZES:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            for kind, parts in pages.items():
                for site, url in sites.items():
                    name = f"{kind}-{site}-{width}-{scheme}.png"
                    defects += [f"{name} {defect}" for defect in take_screenshot(page, url(parts), out / name)]
            context.close()
    return defects


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--store")
    parser.add_argument("--only", action="append", metavar="KIND", default=[])
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        parser.error("chromium is not installed (apt-get install chromium)")
    model = tiny_model() if arguments.model == "tiny" else convscope.load(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        store = prepare_store(model, arguments.store, folder)
        layer = [name for name in store.layers if name != LOGITS][-1]
        pages = page_parts(store, url_key(arguments.model), "red_panda", layer)
        unknown = [kind for kind in arguments.only if kind not in pages]
        if unknown:
            parser.error(f"unknown kind {unknown[0]!r}; choose from {', '.join(pages)}")
        pages = {kind: parts for kind, parts in pages.items() if not arguments.only or kind in arguments.only}
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        with serve_and_publish(model, arguments.model, store, folder) as sites:
            defects = take_screenshots(browser, pages, sites, arguments.out)
        browser.close()
    count = len(pages) * len(SIZES) * len(SCHEMES) * 2
    sys.stdout.write("\n".join([f"{count} screenshots in {arguments.out}; {len(defects)} defects", *defects]) + "\n")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
