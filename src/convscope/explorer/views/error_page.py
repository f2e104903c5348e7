"""The page that reports an error."""

from __future__ import annotations

from convscope.explorer.views.page import Page, PageContext


def build(context: PageContext, status: int, reason: str) -> Page:
    """Build the page for an HTTP status and the reason in words."""
    title = "Not found" if status == 404 else "Error"
    return Page("error.html", title, context.explorer.first, context.page_data("error"), {"reason": reason})
