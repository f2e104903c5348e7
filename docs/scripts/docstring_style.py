"""Extension of griffe: write numpydoc's literal blocks and types as Markdown shows them best."""

from __future__ import annotations

import re
from typing import Any

import griffe

AFTER_WORDS = re.compile(r"(?<=[^\s.])\s?::$", re.MULTILINE)
ALONE = re.compile(r"[ ]*::$", re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Literal blocks become code, and types such as "int, str or path" stand without brackets."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        docstring = obj.docstring
        if docstring is None:
            return
        docstring.value = ALONE.sub("", AFTER_WORDS.sub(":", docstring.value))
        for section in docstring.parse("numpy"):
            for item in section.value if isinstance(section.value, list) else ():
                if isinstance(getattr(item, "annotation", None), griffe.ExprTuple):
                    item.annotation = str(item.annotation).removeprefix("(").removesuffix(")")
