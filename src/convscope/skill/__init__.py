"""The skill for agents: instructions, in ``SKILL.md``, for using convscope from a shell."""

from __future__ import annotations

from importlib.resources import files

FILE_NAME = "SKILL.md"


def skill_text() -> str:
    """Return the text of the skill: Markdown with a YAML header that says when to use it."""
    return files(__name__).joinpath(FILE_NAME).read_text(encoding="utf-8")
