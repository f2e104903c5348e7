"""Words to name units by: lists in the package, the data set's classes, and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from convscope.errors import ConvscopeError
from convscope.suggestions import suggest

TEXTURES = (
    "banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked", "crosshatched",
    "crystalline", "dotted", "fibrous", "flecked", "freckled", "frilly", "gauzy", "grid", "grooved", "honeycombed",
    "interlaced", "knitted", "lacelike", "lined", "marbled", "matted", "meshed", "paisley", "perforated", "pitted",
    "pleated", "polka-dotted", "porous", "potholed", "scaly", "smeared", "spiralled", "sprinkled", "stained",
    "stratified", "striped", "studded", "swirly", "veined", "waffled", "woven", "wrinkled", "zigzagged",
)  # fmt: skip
"""The words of the Describable Textures Dataset (Cimpoi et al., CVPR 2014)."""

COLORS = ("black", "white", "gray", "red", "green", "blue", "yellow", "orange", "brown", "pink", "purple")
"""The basic color terms (Berlin and Kay, 1969)."""


def _imagenet(subset: str) -> tuple[str, ...]:
    """Return the labels of ImageNet; those that stand for several classes with their definition in WordNet."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    labels = [info.index_to_description(i) for i in range(info.num_classes())]
    counts = Counter(labels)
    unique = [
        info.index_to_description(i, detailed=True) if counts[label] > 1 else label for i, label in enumerate(labels)
    ]
    return tuple(dict.fromkeys(unique))


VOCABULARIES: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "colors": lambda: COLORS,
    "textures": lambda: TEXTURES,
    "imagenet": lambda: _imagenet("imagenet-1k"),
    "wordnet": lambda: _imagenet("imagenet-22k"),
}
"""Vocabularies by name. "wordnet" are the 21,841 nouns of ImageNet's whole hierarchy: classes and what they are kinds
of."""


def check_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return words as a tuple. Raises ConvscopeError for fewer than two, for repeated ones and for what is no text."""
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ConvscopeError(f"words has {word!r}; expected texts such as 'striped fur'")
    if len(words) < 2:
        raise ConvscopeError(f"words has {len(words)} entries; expected two or more to choose from")
    if len(set(words)) < len(words):
        repeated, _ = Counter(words).most_common(1)[0]
        raise ConvscopeError(f"words has {repeated!r} more than once; give each word once, with one column of scores")
    return tuple(words)


def read_words(name: str) -> tuple[str, ...]:
    """Return the words of vocabularies, such as "textures,colors", or of a text file with one word on each line.

    Raises
    ------
    ConvscopeError
        For an unknown name, and a file that cannot be read.
    """
    parts = [part.strip() for part in name.split(",")]
    if all(part in VOCABULARIES for part in parts):
        return check_words(tuple(dict.fromkeys(word for part in parts for word in VOCABULARIES[part]())))
    if not Path(name).is_file():
        known = [*VOCABULARIES, "labels", "classes"]
        raise ConvscopeError(f"words is {name!r}, neither a vocabulary nor a text file; {suggest(name, known)}")
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConvscopeError(f"words: {name} cannot be read as a text file: {error}") from error
    return check_words([line.strip() for line in lines if line.strip()])
