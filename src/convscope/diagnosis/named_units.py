"""Names of units in findings, where the store has names that are better than chance."""

from __future__ import annotations

from dataclasses import replace

from convscope.diagnosis.finding import Finding
from convscope.diagnosis.search import Search
from convscope.diagnosis.wording import list_units
from convscope.store.unit_names import UnitNames


def name_units_of(search: Search, names: UnitNames | None, layer: str) -> Search:
    """Add names to the units of a layer in the evidence of findings, and where their sentences list units."""
    if names is None:
        return search
    return replace(search, findings=tuple(_with_names(finding, names, layer) for finding in search.findings))


def _with_names(finding: Finding, names: UnitNames, layer: str) -> Finding:
    units = list(finding.evidence.get("units", ()))
    known = {row["unit"]: name for row in units if (name := names.get(layer, row["unit"])) is not None}
    named = [{**row, "name": known[row["unit"]]} if row["unit"] in known else row for row in units]
    summary, recommendation = finding.summary, finding.recommendation
    for count in range(len(units), 0, -1):
        numbers = [row["unit"] for row in units[:count]]
        plain, described = list_units(numbers), list_units(numbers, known)
        if plain in summary:
            summary, recommendation = (text.replace(plain, described) for text in (summary, recommendation))
            break
    evidence = {**finding.evidence, "units": named} if units else finding.evidence
    return replace(finding, summary=summary, recommendation=recommendation, evidence=evidence)
