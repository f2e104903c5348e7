"""Records that the explorer's API returns as JSON, and that its pages show."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict  # pydantic demands it in place of typing's before Python 3.12

JsonObject = dict[str, Any]


class Prediction(TypedDict):
    """A class that a model predicts."""

    index: int
    name: str
    probability: float
    logit: float


class DetectedBox(TypedDict):
    """An object that a detector finds; `number` counts as in `convscope.detect`, `edges` are fractions of the image."""

    number: int
    index: int
    name: str
    score: float
    edges: tuple[float, float, float, float]


class PackedMap(TypedDict):
    """A map (height, width) as 16-bit little-endian integers in base64; value = integer / 32767 * peak."""

    height: int
    width: int
    peak: float
    data: str


class HeatmapRecord(TypedDict):
    """A heatmap of a target, in contrast with `against`; `signed`: whether it also holds evidence against it.

    `box` is the number of a detected box, if the target is one.
    """

    target: int
    box: int | None
    name: str
    logit: float
    layer: str
    layer_reason: str
    method: str
    against: int | None
    signed: bool
    map: PackedMap
    notes: list[str]


class MetricRecord(TypedDict):
    """A faithfulness metric; `better` is "higher" or "lower"."""

    metric: str
    mean: float
    better: str
    description: str
    curve: list[float]


class FaithfulnessRecord(TypedDict):
    """Faithfulness metrics of a heatmap."""

    rows: list[MetricRecord]
    notes: list[str]


class ChannelStatistics(TypedDict):
    """Statistics of each channel of a layer; `active` is the fraction of positions above 0."""

    mean: list[float]
    max: list[float]
    active: list[float]
    dead: list[bool]


LayerSummary = dict[str, float]
"""Statistics of a layer, each a fraction.

"dead": channels that are constant; "sparsity": values that are not above 0; "top_decile_share": activation held by the
tenth of the channels with the largest sums.
"""


class SheetLayout(TypedDict):
    """Layout of a sheet of feature maps: its columns and rows, and the size of each map in pixels."""

    columns: int
    rows: int
    height: int
    width: int


class UnitValue(TypedDict):
    """A unit and its activation."""

    unit: int
    value: float


class PositionRecord(TypedDict):
    """The strongest units at a position; `receptive_field` is top, left, bottom, right as fractions of the image."""

    layer: str
    row: int
    column: int
    units: list[UnitValue]
    receptive_field: list[float] | None


class LogitChange(TypedDict):
    """How the removal of a unit changes a class's logit."""

    index: int
    name: str
    before: float
    after: float
    change: float


class ExplainingUnit(TypedDict):
    """A unit that carries a part of a logit; `map` is what each position contributes."""

    unit: int
    name: str
    effect: float
    share: float | None
    position: str
    map: PackedMap | None


class ExplanationRecord(TypedDict):
    """The few units that carry a logit; the logit before and after their removal, and without as many other units."""

    target: int
    layer: str
    sentence: str
    before: float
    after: float
    random_logits: list[float]
    units: list[ExplainingUnit]


class ReceptiveFieldGrid(TypedDict):
    """Receptive fields of a layer's positions, (vertical, horizontal), as fractions of the image.

    `origin` is the first position's start, `stride` the distance between neighbours, `size` the extent of each.
    """

    origin: list[float]
    stride: list[float]
    size: list[float]


class PatternFigures(TypedDict):
    """Figures of a pattern; the scores are of the pattern, of noise, and of the best reference image."""

    height: int
    width: int
    score: float | None
    noise_score: float | None
    reference_score: float | None
    notes: list[str]
    steps: int
    layer: str
    unit: int
    variant: str
    recipe: str
    seed: int


class PatternRecord(PatternFigures):
    """A pattern with its image, a PNG file."""

    image: bytes
