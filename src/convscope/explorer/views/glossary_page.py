"""The glossary page."""

from __future__ import annotations

from convscope.explorer.views.page import Page, PageContext


def build(context: PageContext) -> Page:
    """Build the glossary page."""
    return Page("glossary.html", "Glossary", context.explorer.first, context.page_data("glossary"), {})
