"""Images of a story: its figure, and the patterns of each chapter."""

from __future__ import annotations

import io

from convscope.explorer.service.images import encode_image
from convscope.featurevis.layer_story import Story
from convscope.figures import draw
from convscope.plotting.grids import pattern_grid


def story_figure(story: Story) -> bytes:
    """Render the figure of the whole story as PNG."""
    buffer = io.BytesIO()
    draw(story).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def chapter_sheet(story: Story, index: int) -> bytes:
    """Render the patterns of a chapter side by side, without margins, as PNG."""
    images = story.chapters[index].images
    return encode_image(pattern_grid(images, columns=len(images), margin=0), "PNG")
