"""Check that names in the source are in the terms of the field: python tools/check_names.py [FOLDER].

Reads definitions: modules, classes, functions, parameters, variables and attributes that are assigned. A name must not
contain a participle or pronoun that stands for a noun, or a metaphor; and no module may have the name of a public
function, which would hide it from ``import convscope.MODULE``. Exits with status 1 if there are any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

WORDS = frozenset(
    {
        *("found", "told", "said", "asked", "asking", "asks", "given", "own", "seen", "looked", "looking", "looks"),
        *("kept", "held", "drawn", "made", "meant", "behind", "beside", "heard", "handed", "handing", "settled"),
        *("lent", "redrawn", "telling", "tells", "teacher", "insisting", "wanted", "worth", "again", "whence", "sees"),
        *("says", "excited", "awakened", "woken", "picture", "pictures", "heat", "heats", "place", "places", "shown"),
        *("forgiving", "opinion", "eye", "apart", "nature", "convince", "beat", "mates", "elsewhere", "spare"),
    }
)
"""Words that a name must not contain."""

FUNCTION_NAMES = frozenset(
    {
        *("activations", "atlas", "compare", "concepts", "detect", "diagnose", "dictionary", "edit", "effects"),
        *("evaluate", "explain", "heatmaps", "load", "locate", "name_units", "patch", "patterns", "predict", "scan"),
        *("show", "story"),
    }
)
"""Names of public functions, which modules must not have."""

NAMED_AFTER_FUNCTIONS = frozenset({"cli", "explorer", "views", "plotting"})
"""Packages whose modules are named after the command, page or result that they are for."""


def words(name: str) -> list[str]:
    """Split a name in snake case or camel case into lower-case words."""
    parts = (part for part in name.strip("_").split("_") if part)
    return [word.lower() for part in parts for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]


def definitions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a module defines, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def problems(root: Path) -> Iterator[str]:
    """Yield a line for each name in the source below `root` that has to change."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        stem = path.parent.name if path.name == "__init__.py" and path.parent != root else path.stem
        if stem in FUNCTION_NAMES and not NAMED_AFTER_FUNCTIONS & set(relative.parts):
            yield f"{path}:1: the module {stem!r} has the name of a public function"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, line in sorted({(stem, 1), *definitions(tree)}, key=lambda item: (item[1], item[0])):
            if unclear := WORDS.intersection(words(name)):
                yield f"{path}:{line}: the name {name!r} contains {', '.join(sorted(unclear))!r}; say what it holds"


def main() -> int:
    """Print the problems; return the exit status."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "src/convscope")
    lines = list(problems(root))
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
