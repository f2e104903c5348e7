"""The page of a diagnosis: its findings with images, and links to the pages of images, units and classes."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.diagnosis.finding import Finding
from convscope.explorer.service import diagnosis_data
from convscope.explorer.service.concept_data import Arrays, dataset_ids, load_arrays
from convscope.explorer.service.diagnosis_data import IMAGES_PER_FINDING, SIDE
from convscope.explorer.service.display_names import display_name
from convscope.explorer.service.networks import Network
from convscope.explorer.views import snippets, store_views
from convscope.explorer.views.page import Page, PageContext, Values
from convscope.explorer.views.saved_results_page import store_name
from convscope.explorer.views.store_views import UnitPatch
from convscope.plotting.diagnosis_page import HEATMAP_KINDS, KIND_TITLES, format_effect, format_p_value, quoted
from convscope.store.saved_results import SavedResult

TIMES = ("before", "after")


@dataclass(frozen=True)
class ImageTile:
    """An image on a sheet, `x` pixels from the left, and its page in the data set."""

    x: int
    name: str
    text: str
    is_right: bool
    page: str


@dataclass(frozen=True)
class Sheet:
    """A sheet of images: one or two rows of tiles."""

    src: str
    width: int
    height: int
    tiles: list[ImageTile]


@dataclass(frozen=True)
class UnitTile:
    """A unit, its page, and its best patch, if the store has examples of its layer."""

    text: str
    page: str
    patch: UnitPatch | None


@dataclass(frozen=True)
class FindingSection:
    """A finding on the page."""

    number: int
    title: str
    summary: str
    recommendation: str
    effect: str
    measure: str
    p_value: str
    num_images: int
    images: Sheet
    changes: Sheet | None
    units: list[UnitTile]
    classes: list[tuple[str, str]]


@dataclass(frozen=True)
class _Diagnosis:
    """A saved diagnosis, and what its page is built from; `ids` are the images' numbers in the store's data set."""

    context: PageContext
    network: Network
    result: SavedResult
    arrays: Arrays
    ids: list[int | None]

    def sheet(self, name: str, tiles: list[ImageTile], rows: int) -> Sheet:
        """Describe a sheet of images with `rows` rows."""
        src = self.context.urls.saved_sheet(self.network, self.result, name)
        return Sheet(src, SIDE * len(tiles), SIDE * rows, tiles)

    def tile(self, column: int, image: int, text: str, is_right: bool) -> ImageTile:
        """Describe an image in a column of a sheet."""
        index = self.ids[image]
        page = "" if index is None else self.context.urls.page("m", self.network.key, "data", index)
        return ImageTile(SIDE * column, display_name(self.result.image_names[image]), text, is_right, page)


def build(context: PageContext, network: Network, name: str | None) -> Page:
    """Build the page of a diagnosis, by default of the first. Raises UnknownResource if the store has none."""
    result = diagnosis_data.find_diagnosis(network, name)
    diagnosis = _Diagnosis(
        context,
        network,
        result,
        load_arrays(context.explorer, result),
        dataset_ids(context.explorer, network, result),
    )
    findings, parameters = diagnosis_data.findings_of(result), result.manifest["parameters"]
    kinds = {finding.kind for finding in findings}
    sections = [_section(diagnosis, number, finding) for number, finding in enumerate(findings, start=1)]
    variables: Values = {
        "layer": result.layer,
        "sections": sections,
        "overview": parameters["overview"],
        "overview_src": context.urls.saved_sheet(network, result, diagnosis_data.OVERVIEW),
        "empty": [
            (KIND_TITLES.get(search["kind"], search["kind"]), search["detectable"] or search["question"])
            for search in parameters["searches"]
            if search["kind"] not in kinds
        ],
        "others": [
            (other.layer, context.urls.page("m", network.key, "diagnosis", *((other.name,) if position else ())))
            for position, other in enumerate(diagnosis_data.saved_diagnoses(network))
            if other.name != result.name
        ],
        "notes": result.manifest["notes"],
        "side": SIDE,
        "code": snippets.diagnose(context.urls.source(network.source), store_name(context.urls, network)),
    }
    title = f"Why {network.model.name} errs"
    return Page("diagnosis.html", title, network, context.page_data("diagnosis"), variables)


def _section(diagnosis: _Diagnosis, number: int, finding: Finding) -> FindingSection:
    network, urls, layer = diagnosis.network, diagnosis.context.urls, diagnosis.result.layer
    return FindingSection(
        number=number,
        title=KIND_TITLES.get(finding.kind, finding.kind),
        summary=quoted(finding.summary),
        recommendation=quoted(finding.recommendation),
        effect=format_effect(finding),
        measure=str(finding.evidence.get("effect", "effect")),
        p_value=format_p_value(finding.p_value),
        num_images=len(finding.images),
        images=_images(diagnosis, number, finding),
        changes=_changes(diagnosis, number),
        units=[
            UnitTile(
                _unit_text(row),
                urls.page("m", network.key, "unit", layer, int(row["unit"])),
                store_views.best_patch(network, urls, layer, int(row["unit"])),
            )
            for row in finding.evidence.get("units", ())
        ],
        classes=[(network.model.class_name(k), urls.page("m", network.key, "class", k)) for k in finding.classes],
    )


def _images(diagnosis: _Diagnosis, number: int, finding: Finding) -> Sheet:
    """Describe the sheet of a finding's first images."""
    arrays, class_name = diagnosis.arrays, diagnosis.network.model.class_name
    tiles = []
    for column, image in enumerate(finding.images[:IMAGES_PER_FINDING]):
        label, prediction = int(arrays["labels"][image]), int(arrays["predictions"][image])
        text = f"network: {class_name(prediction)}, {100 * arrays['confidence'][image]:.0f} % sure"
        if label >= 0:
            text = f"label: {class_name(label)}; {text}"
        tiles.append(diagnosis.tile(column, image, text, label == prediction))
    return diagnosis.sheet(f"finding-{number}", tiles, 2 if finding.kind in HEATMAP_KINDS else 1)


def _changes(diagnosis: _Diagnosis, number: int) -> Sheet | None:
    """Describe the sheet of images before and after a change; None if there are none for this finding."""
    arrays, class_name = diagnosis.arrays, diagnosis.network.model.class_name
    rows = diagnosis_data.changed_rows(arrays, number)
    if not len(rows):
        return None
    tiles = []
    for column, row in enumerate(rows.tolist()):
        names = [class_name(int(arrays[f"changed.prediction_{when}"][row])) for when in TIMES]
        sure = [f"{100 * float(arrays[f'changed.confidence_{when}'][row]):.0f} %" for when in TIMES]
        action = "added" if arrays["changed.inserted"][row] else "removed"
        text = f"{action}: {names[0]}, {sure[0]} sure, becomes {names[1]}, {sure[1]}"
        tiles.append(diagnosis.tile(column, int(arrays["changed.image"][row]), text, True))
    return diagnosis.sheet(f"changes-{number}", tiles, 2)


def _unit_text(row: dict[str, object]) -> str:
    return f"unit {row['unit']}" + (f" ({row['name']})" if "name" in row else "")
