"""Diagnoses in a store: findings as plain data, and sheets of their images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.saved_searches import finding_from_json
from convscope.explorer.service import concept_data
from convscope.explorer.service.concept_data import Arrays, load_arrays
from convscope.explorer.service.images import UnknownResource, encode_image
from convscope.explorer.service.networks import Network
from convscope.explorer.service.state import Explorer
from convscope.plotting.diagnosis import overlay_evidence
from convscope.plotting.diagnosis_page import HEATMAP_KINDS
from convscope.store.saved_results import SavedResult

SIDE = 96  # pixels of an image on a sheet
IMAGES_PER_FINDING = 12
OVERVIEW = "overview"


def saved_diagnoses(net: Network) -> list[SavedResult]:
    """Return all diagnoses in the store of a network."""
    return [] if net.store is None else net.store.diagnoses()


def find_diagnosis(net: Network, name: str | None) -> SavedResult:
    """Return the diagnosis of a name, by default the first. Raises UnknownResource."""
    for result in saved_diagnoses(net):
        if name in (None, result.name):
            return result
    raise UnknownResource("the store has no diagnosis" + ("" if name is None else f" {name[:80]!r}"))


def findings_of(result: SavedResult) -> list[Finding]:
    """Return the findings, the most important first."""
    return [finding_from_json(values) for values in result.manifest["parameters"]["findings"]]


def changed_rows(arrays: Arrays, number: int) -> np.ndarray:
    """Return the rows of the images that were changed for a finding, given by its number from 1."""
    return np.flatnonzero(arrays["changed.finding"] == number)


def displayed_images(result: SavedResult, arrays: Arrays) -> list[int]:
    """Return the images of a diagnosis that its page shows."""
    changed: list[int] = arrays["changed.image"].tolist()
    return [*(image for f in findings_of(result) for image in f.images[:IMAGES_PER_FINDING]), *changed]


def sheet_names(result: SavedResult, arrays: Arrays) -> list[str]:
    """Return the names of all sheets of images."""
    numbers = range(1, len(findings_of(result)) + 1)
    changed = [f"changes-{n}" for n in numbers if len(changed_rows(arrays, n))]
    return [OVERVIEW, *(f"finding-{n}" for n in numbers), *changed]


def render_sheet(explorer: Explorer, result: SavedResult, sheet: str) -> bytes:
    """Render a sheet as WEBP.

    "overview" has the plots, "finding-3" the images of the third finding, in the second row with the evidence;
    "changes-3" images before and, in the second row, after they were changed. Raises UnknownResource.
    """
    arrays = load_arrays(explorer, result)
    if sheet not in sheet_names(result, arrays):
        raise UnknownResource("there are no such images")
    if sheet == OVERVIEW:
        return encode_image(Image.open(io.BytesIO(result.file("overview.png"))).convert("RGB"), quality=90)
    kind, _, number = sheet.partition("-")
    if kind == "changes":
        rows = changed_rows(arrays, int(number))
        return _encode_rows(arrays["changed.before"][rows], arrays["changed.after"][rows])
    finding = findings_of(result)[int(number) - 1]
    positions = np.searchsorted(arrays["examples"], finding.images[:IMAGES_PER_FINDING])
    thumbnails = arrays["thumbnails"][positions]
    if finding.kind not in HEATMAP_KINDS:
        return _encode_rows(thumbnails)
    evidence = arrays["evidence"][positions]
    return _encode_rows(
        thumbnails, np.stack([overlay_evidence(*pair) for pair in zip(thumbnails, evidence, strict=True)])
    )


def render_saved(explorer: Explorer, result: SavedResult, sheet: str) -> bytes:
    """Render a sheet of concepts, an atlas or a diagnosis."""
    if result.kind == "diagnosis":
        return render_sheet(explorer, result, sheet)
    return concept_data.render_sheet(load_arrays(explorer, result), sheet)


def _encode_rows(*rows: np.ndarray) -> bytes:
    """Place rows of equally many images (n, s, s, 3) below each other."""
    sheet = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            sheet.paste(image, (SIDE * x, SIDE * y))
    return encode_image(sheet, quality=85)
