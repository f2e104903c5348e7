"""Responses that routes share: images with ETags, files to download, errors."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Request, Response
from pydantic import BaseModel

from convscope.results import write_npz

IMMUTABLE = "public, max-age=31536000, immutable"
REVALIDATE = "private, no-cache"  # the same URL may show other pixels once a sample or the store is replaced


class ErrorMessage(BaseModel):
    """Why a request failed."""

    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorMessage, "description": description}
    for status, description in {
        401: "the token is missing or wrong",
        403: "the request comes from another site",
        404: "there is no such model, image, layer, unit or result",
        422: "the request is not valid",
        503: "the queue is full",
        504: "the result was not ready in time",
    }.items()
}


def image_response(content: bytes, request: Request) -> Response:
    """Return an image, or status 304 if the client has it already."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = {"Cache-Control": REVALIDATE, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    media_type = "image/png" if content[:4] == b"\x89PNG" else "image/webp"
    return Response(content, media_type=media_type, headers=headers)


def file_response(content: bytes, name: str, media_type: str = "application/octet-stream") -> Response:
    """Return a file to download."""
    return Response(content, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'})


def csv_response(header: Sequence[str], rows: Iterable[Sequence[object]], name: str) -> Response:
    """Return a table to download."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file_response(out.getvalue().encode(), name, "text/csv; charset=utf-8")


def npz_response(arrays: Mapping[str, np.ndarray], name: str) -> Response:
    """Return arrays to download."""
    buffer = io.BytesIO()
    write_npz(buffer, dict(arrays))
    return file_response(buffer.getvalue(), name)
