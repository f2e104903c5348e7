"""Images of a store that a client may see: originals only inside of the folders that may be read."""

from __future__ import annotations

from PIL import Image

from convscope.errors import ConvscopeError
from convscope.store.io import Json
from convscope.store.store import Store
from convscope.store.views import StoredImages
from convscope.tool_server.files import AllowedFiles


class RestrictedImages(StoredImages):
    """Shows thumbnails in place of originals that lie outside of the allowed folders.

    Parameters
    ----------
    store : Store
    files : AllowedFiles
    """

    def __init__(self, store: Store, files: AllowedFiles) -> None:
        super().__init__(store.thumbnails, store.input_size, store.manifest)
        self._files = files

    def original(self, row: Json) -> Image.Image:
        """Load the original file of a row of images.parquet; raise ConvscopeError if it may not be read."""
        name = str(row["name"])
        if not self._files.contains(name.removeprefix("file://")):
            raise ConvscopeError(f"{name} is outside of the folders that this server reads")
        return super().original(row)
