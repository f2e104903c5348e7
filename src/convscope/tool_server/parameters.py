"""Parameters that several tools share, with the descriptions that clients see."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

ModelName: TypeAlias = Annotated[
    str | None, Field(description="A network that `overview` lists. Default: the first of them.")
]
ImagePaths: TypeAlias = Annotated[
    list[str],
    Field(description="Image files or folders, absolute or relative to a folder that `overview` lists.", min_length=1),
]
OneImage: TypeAlias = Annotated[str, Field(description="An image file.")]
LayerName: TypeAlias = Annotated[str, Field(description="A layer, by a name that `layers` lists.")]
Units: TypeAlias = Annotated[list[int] | None, Field(description="Numbers of units (channels). Default: all.")]
TargetNames: TypeAlias = Annotated[
    list[str | int] | None,
    Field(description="Classes to explain, by name or index, for every image. Default: each image's top class."),
]
Against: TypeAlias = Annotated[
    str | int | None,
    Field(description="A class to contrast with: evidence for the target rather than for this class."),
]
Fit: TypeAlias = Annotated[
    str,
    Field(description="squash: show the network the whole image; pad: with a border; crop: its evaluation's crop."),
]
Seed: TypeAlias = Annotated[int, Field(description="Random seed.", ge=0)]
SaveName: TypeAlias = Annotated[
    str | None,
    Field(description="Also save the result: name of a folder inside of the server's output folder."),
]
StorePath: TypeAlias = Annotated[
    str, Field(description="A store that `scan` or the command `convscope scan` has written: a folder.")
]
OptionalStore: TypeAlias = Annotated[
    str | None, Field(description="A store of the network with the layer: names units in the answer and its figure.")
]
