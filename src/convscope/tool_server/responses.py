"""What tools answer: a table as JSON, and images as PNG files of bounded size."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent
from PIL import Image

from convscope.errors import ConvscopeError
from convscope.figures import draw
from convscope.results import map_json
from convscope.tool_server.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from convscope.results import Result

DIGITS = 6  # significant digits of numbers
FIGURE_DPI = 110


@dataclass(frozen=True)
class Answer:
    """The answer of a tool.

    Attributes
    ----------
    content : dict
        JSON values; numbers of numpy and paths are converted.
    images : sequence of (str, Image)
        Captions and images.
    """

    content: Mapping[str, Any]
    images: Sequence[tuple[str, Image.Image]] = field(default=())

    def to_result(self, limits: Limits) -> CallToolResult:
        """Return the answer as the protocol has it: text, then the images in the order of their captions."""
        content = to_json(self.content)
        images = self.images[: limits.returned_images]
        if images:
            content["images"] = [caption for caption, _ in images]
        if len(images) < len(self.images):
            content["images_left_out"] = len(self.images) - len(images)
        blocks: list[ContentBlock] = [TextContent(type="text", text=json.dumps(content, ensure_ascii=False))]
        blocks += [_image_block(image, limits) for _, image in images]
        return CallToolResult(content=blocks, structured_content=content)


def describe(
    result: Result,
    limits: Limits,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    images: Sequence[tuple[str, Image.Image]] = (),
    saved: Path | None = None,
    **more: Any,
) -> Answer:
    """Return the answer for a result: title, table, notes, failures, and where it was saved."""
    table = result.rows() if rows is None else rows
    content: dict[str, Any] = {"result": str(result).partition("\n")[0], **more, "rows": table[: limits.rows]}
    if len(table) > limits.rows:
        content["rows_left_out"] = len(table) - limits.rows
    if result.notes:
        content["notes"] = list(result.notes)
    if result.failed:
        content["failed"] = [str(failure) for failure in result.failed]
    if saved is not None:
        content["saved"] = str(saved)
    return Answer(content, images)


def figure_image(result: object, **options: Any) -> list[tuple[str, Image.Image]]:
    """Return the figure of a result with its caption; nothing for one that has no figure, such as that of a volume."""
    try:
        figure = draw(result, **options)
    except ConvscopeError:
        return []
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=FIGURE_DPI)
    return [("figure", Image.open(buffer).convert("RGB"))]


def to_json(value: Any) -> Any:
    """Return a value as JSON has it: numbers rounded, NaN and infinity as null, anything else as text."""
    return map_json(value, _rounded)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)


def bounded(image: Image.Image, limits: Limits) -> bytes:
    """Return an image as a PNG file: its longer side and its size in bytes are at most those of the limits."""
    side = limits.image_size
    while True:
        reduced = image.convert("RGB")
        reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        reduced.save(buffer, format="PNG", optimize=True)
        if buffer.tell() <= limits.image_bytes or side <= 32:
            return buffer.getvalue()
        side = max(32, side * 3 // 4)


def _image_block(image: Image.Image, limits: Limits) -> ImageContent:
    return ImageContent(type="image", data=base64.b64encode(bounded(image, limits)).decode(), mime_type="image/png")
