"""Find the names that a misspelled or incomplete one may stand for.

This module imports nothing but the standard library, as `errors`, which uses it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

MIN_SIMILARITY = 0.75  # difflib's ratio from which two names are spelled alike
MIN_COMMON_WORD = 3  # letters of a word that makes two names similar
UNRELATED = 3  # rank of names that do not contain the words
PLURAL = re.compile(r"(?:(?<=[xz])|(?<=[cs]h)|(?<=ss))es$|(?<=\w[^\Wsu])s$")


def suggest(name: str, known: Sequence[str], count: int = 4) -> str:
    """Return the end of a message about an unknown name: what it may stand for, or what there is.

    Examples
    --------
    >>> suggest("foxes", ["red fox", "fox squirrel", "tabby"])
    'nearest: red fox, fox squirrel'
    >>> suggest("bn3", ["conv1", "bn1", "block.conv3", "block.bn3"])
    'nearest: block.bn3'
    >>> suggest("house", ["red fox", "fox squirrel", "tabby"], count=1)
    'known: red fox and 2 more'
    """
    matches = similar_names(name, known)
    label, names = ("nearest", matches) if matches else ("known", list(dict.fromkeys(known)))
    count = len(names) if len(names) <= 2 * count else count
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{label}: {', '.join(names[:count])}{more}"


def similar_names(name: str, known: Sequence[str]) -> list[str]:
    """Return the names that `name` may stand for, the likeliest first.

    Names of the same words, in any case and number ("foxes" for "fox"), with any separators; names that end in these
    words, short ones first; names that contain them. If there are none, names that have a word in common, contain
    `name` inside of a word, or are spelled alike. Letters and digits are different words: "block4" is "blocks.4".
    """
    words, text = _words(name), name.casefold()
    ranks = {entry: (_rank(words, _words(entry)), len(_words(entry))) for entry in known}
    inside = [entry for entry in ranks if len(text) >= MIN_COMMON_WORD and text in entry.casefold()]
    matches = sorted((entry for entry in ranks if ranks[entry][0] != UNRELATED), key=ranks.__getitem__)
    if matches:
        return list(dict.fromkeys([*matches, *inside]))
    long_words = {word for word in words if len(word) >= MIN_COMMON_WORD}
    related = {entry for entry in ranks if long_words & set(_words(entry))}.union(inside)
    scores = {entry: _similarity(text, entry.casefold()) for entry in ranks}
    alike = [entry for entry in ranks if entry in related or scores[entry] >= MIN_SIMILARITY]
    return sorted(alike, key=scores.__getitem__, reverse=True)


def _rank(words: Sequence[str], others: Sequence[str]) -> int:
    """Return 0 for the same words, 1 for others that end in them, 2 for others that contain them."""
    if "".join(words) == "".join(others):
        return 0
    count = len(words)
    if count and list(others[-count:]) == list(words):
        return 1
    contains = any(list(others[i : i + count]) == list(words) for i in range(len(others) - count + 1))
    return 2 if count and contains else UNRELATED


def _similarity(text: str, other: str) -> float:
    """Return how alike two names are spelled, 0 to 1; also of a part of the other one, if that is a single word."""
    parts = [other] if " " in text else [other, *(part for part in other.split() if len(part) > len(text) - 2)]
    return max(SequenceMatcher(None, text, part).ratio() for part in parts)


def _words(text: str) -> list[str]:
    """Split a text into words of letters, without a plural s, and numbers."""
    return [PLURAL.sub("", word) for word in re.findall(r"[^\W\d_]+|\d+", text.casefold())]
