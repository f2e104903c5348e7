"""The door: refuses what may not be asked, and puts on every answer what the browser has to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convscope.explorer.web import security


class SecurityMiddleware:
    """Around the application. hosts: the names under which it may be asked; token: what a visitor has to know."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], token: str | None, frames: Sequence[str]) -> None:
        self._app, self._hosts, self._token = app, hosts, token
        self._headers = security.security_headers(frames)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        new = security.COOKIE not in request.cookies

        async def finish(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store" if message["status"] >= 400 else "no-cache")
                if new:
                    headers.append("Set-Cookie", _cookie(security.COOKIE, security.new_token()))
            await send(message)

        answer = self._refused(request) or self._welcomed(request)
        await (answer or self._app)(scope, receive, finish)

    def _refused(self, request: Request) -> Response | None:
        """The answer to a request that may not be made; None for all others."""
        headers: Mapping[str, str] = request.headers
        if not security.host_allowed(headers.get("host", ""), self._hosts):
            return JSONResponse({"error": "this is not the name of this server"}, 421)
        if security.is_cross_site(headers) or (request.method not in ("GET", "HEAD") and _foreign(headers)):
            return JSONResponse({"error": "another site's page may not ask this"}, 403)
        given = (request.query_params.get("token"), request.cookies.get(security.TOKEN), _bearer(headers))
        if self._token is not None and not any(security.token_matches(one, self._token) for one in given):
            words = "open the address with ?token=... that the server printed when it started"
            return JSONResponse({"error": words}, 401, headers={"WWW-Authenticate": "Bearer"})
        return None

    def _welcomed(self, request: Request) -> Response | None:
        """Who comes with the token in the address gets it as a cookie, and an address without it."""
        if self._token is None or request.method != "GET" or "token" not in request.query_params:
            return None
        rest = [(k, v) for k, v in parse_qsl(request.url.query, keep_blank_values=True) if k != "token"]
        # One slash: two would make the rest of the path a host's name.
        path = "/" + request.scope["raw_path"].decode("ascii").lstrip("/")
        answer = RedirectResponse(path + (f"?{urlencode(rest)}" if rest else ""), 303)
        answer.headers.append("Set-Cookie", _cookie(security.TOKEN, self._token))
        return answer


def _foreign(headers: Mapping[str, str]) -> bool:
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _bearer(headers: Mapping[str, str]) -> str | None:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else None


def _cookie(name: str, value: str) -> str:
    return f"{name}={value}; Path=/; Max-Age=2592000; HttpOnly; SameSite=Strict"
