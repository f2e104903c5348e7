"""Error responses: JSON for programs, a page for people."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from convscope.errors import ConvscopeError
from convscope.explorer.service.images import UnknownResource
from convscope.explorer.service.jobs import ClientDisconnected, QueueFull, RequestTimeout
from convscope.explorer.views import error_page
from convscope.explorer.views.page import render
from convscope.explorer.web.requests import RequestRunner

STATUSES: dict[type[ConvscopeError], int] = {UnknownResource: 404, QueueFull: 503, RequestTimeout: 504}
RETRY_AFTER = 5  # seconds


def add_exception_handlers(app: FastAPI) -> None:
    """Turn exceptions of the routes into responses."""
    app.add_exception_handler(ConvscopeError, _convscope_error)
    app.add_exception_handler(ClientDisconnected, _client_disconnected)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _convscope_error(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in STATUSES.items() if type(error) is kind), 422)
    return _response(request, status, str(error))


async def _client_disconnected(request: Request, _: Exception) -> Response:
    return _response(request, 503, "the job was cancelled")


async def _http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    response = _response(request, error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    reasons = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return _response(request, 422, "; ".join(reasons))


def _response(request: Request, status: int, reason: str) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else None
    if request.url.path.startswith(("/api/", "/image/")):
        return JSONResponse({"error": reason}, status, headers=headers)
    runner: RequestRunner = request.app.state.runner
    context = runner.page_context()
    return HTMLResponse(render(error_page.build(context, status, reason), context), status, headers=headers)
