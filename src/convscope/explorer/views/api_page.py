"""The page that documents the JSON API."""

from __future__ import annotations

from convscope.explorer.views.page import Page, PageContext, Values


def build(context: PageContext, schema: Values) -> Page:
    """Build the page from the application's OpenAPI schema."""
    return Page("api.html", "API", context.explorer.first, context.page_data("api"), {"schema": schema})
