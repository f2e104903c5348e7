"""The page that documents the JSON API."""

from __future__ import annotations

from typing import Any

from convscope.explorer.views.page import Page, PageContext


def build(context: PageContext, schema: dict[str, Any]) -> Page:
    """Build the page from the application's OpenAPI schema."""
    variables = {"network": context.explorer.first, "schema": schema}
    return Page("api.html", "API", context.page_data("api"), variables)
