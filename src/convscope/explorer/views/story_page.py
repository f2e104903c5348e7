"""The story page: patterns of each stage of the network, with their image statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convscope.engine.layer_table import format_receptive_field
from convscope.explorer.service.networks import Network
from convscope.explorer.views.page import Page, PageContext
from convscope.featurevis.layer_story import Chapter


@dataclass(frozen=True)
class ChapterView:
    """A chapter: its patterns lie side by side on the sheet `src`; `quartiles` are of each image statistic."""

    src: str
    layer: str
    receptive_field: str
    names: tuple[str, ...]
    units: list[int]
    quartiles: dict[str, list[float]]
    count: int
    height: int
    width: int


def build(context: PageContext, network: Network) -> Page:
    """Build the story page; without a story, it offers to generate one."""
    urls = context.urls
    story = context.explorer.get_story(network)
    chapters = [] if story is None else story.chapters
    variables = {
        "chapters": [_chapter(chapter, urls.story_chapter(network, i)) for i, chapter in enumerate(chapters)],
        "stages": network.main_layers,
        "figure": "" if story is None else urls.story_figure(network),
    }
    data = context.page_data("story", events=f"/api/models/{network.key}/story/events")
    return Page("story.html", f"Story of {network.model.name}", network, data, variables)


def _chapter(chapter: Chapter, src: str) -> ChapterView:
    return ChapterView(
        src=src,
        layer=chapter.layer,
        receptive_field=format_receptive_field(chapter.receptive_field, " × "),
        names=chapter.names,
        units=[int(unit) for unit in chapter.units],
        quartiles={name: np.percentile(v, (25, 50, 75)).tolist() for name, v in chapter.statistics.items()},
        count=len(chapter.images),
        height=chapter.images.shape[1],
        width=chapter.images.shape[2],
    )
