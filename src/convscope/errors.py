"""The one exception for what a user can put right."""


class ConvscopeError(ValueError):
    """Input that convscope refuses. The message is one line: what was given, what was expected, what to do."""


def nearest(word: str, known: list[str], count: int = 4) -> str:
    """Up to `count` known names that resemble `word`, best first, joined for an error message."""
    import difflib

    found = difflib.get_close_matches(word, known, n=count, cutoff=0.4)
    return ", ".join(found or known[:count])
