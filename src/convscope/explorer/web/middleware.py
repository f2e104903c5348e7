"""Middleware that refuses requests from elsewhere, and adds security headers to all responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convscope.explorer.web import security

SAFE_METHODS = ("GET", "HEAD")


class SecurityMiddleware:
    """ASGI middleware.

    Parameters
    ----------
    app : ASGI application
    hosts : sequence of str
        Host names that requests may address.
    token : str or None
        Secret that clients have to send: as a bearer token, a cookie, or the query parameter `token`.
    frame_ancestors : sequence of str
        Origins of pages that may embed the application in a frame.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], token: str | None, frame_ancestors: Sequence[str]
    ) -> None:
        self._app, self._hosts, self._token = app, hosts, token
        self._headers = security.security_headers(frame_ancestors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        is_new_client = security.COOKIE not in request.cookies

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store" if message["status"] >= 400 else "no-cache")
                if is_new_client:
                    headers.append("Set-Cookie", security.cookie(security.COOKIE, security.new_token()))
            await send(message)

        response = self._refusal(request) or self._token_redirect(request)
        await (response or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """Return the response to a request that is not allowed; None for all others."""
        headers: Mapping[str, str] = request.headers
        if not security.host_allowed(headers.get("host", ""), self._hosts):
            return JSONResponse({"error": "this server does not answer to this host name"}, 421)
        is_unsafe = request.method not in SAFE_METHODS
        if security.is_cross_site(headers) or (is_unsafe and security.is_cross_origin(headers)):
            return JSONResponse({"error": "pages of other sites may not make this request"}, 403)
        if self._token is not None and not self._has_token(request, self._token):
            reason = "a token is required: open the URL with ?token=... that the server printed when it started"
            return JSONResponse({"error": reason}, 401, headers={"WWW-Authenticate": "Bearer"})
        return None

    def _has_token(self, request: Request, token: str) -> bool:
        candidates = (
            request.query_params.get("token"),
            request.cookies.get(security.TOKEN_COOKIE),
            security.bearer_token(request.headers),
        )
        return any(security.token_matches(candidate, token) for candidate in candidates)

    def _token_redirect(self, request: Request) -> Response | None:
        """Return a redirect that moves the token from the URL to a cookie; None if it is not in the URL."""
        if self._token is None or request.method != "GET" or "token" not in request.query_params:
            return None
        query = [(k, v) for k, v in parse_qsl(request.url.query, keep_blank_values=True) if k != "token"]
        # One slash: after two of them, the rest of the path would be a host name.
        path = "/" + request.scope["raw_path"].decode("ascii").lstrip("/")
        response = RedirectResponse(path + (f"?{urlencode(query)}" if query else ""), 303)
        response.headers.append("Set-Cookie", security.cookie(security.TOKEN_COOKIE, self._token))
        return response
