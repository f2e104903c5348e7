"""Security headers, host names, tokens."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence

from convscope.errors import ConvscopeError

COOKIE, TOKEN_COOKIE = "convscope_client", "convscope_token"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MIN_TOKEN_LENGTH = 12


def content_security_policy(frame_ancestors: Sequence[str] = ()) -> str:
    """Return a policy that allows only the server's own scripts, styles and images, and no inline code."""
    ancestors = " ".join(frame_ancestors) or "'none'"
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        f"form-action 'self'; base-uri 'none'; frame-ancestors {ancestors}"
    )


def security_headers(frame_ancestors: Sequence[str] = ()) -> dict[str, str]:
    """Return the headers of every response."""
    return {
        "Content-Security-Policy": content_security_policy(frame_ancestors),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",  # "no-referrer" would make the Origin of forms null
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        **({} if frame_ancestors else {"X-Frame-Options": "DENY"}),
    }


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_token(host: str, token: str | None) -> None:
    """Raise ConvscopeError if other machines could connect without a token, or the token is too short."""
    if not is_loopback(host) and not token:
        raise ConvscopeError(
            f"with --host {host} other machines can connect: give --token with a secret, or --token auto"
        )
    if token is not None and len(token) < MIN_TOKEN_LENGTH:
        raise ConvscopeError(
            f"the token has {len(token)} characters and could be guessed; give at least {MIN_TOKEN_LENGTH}, or auto"
        )


def new_token() -> str:
    """Return a random token."""
    return secrets.token_urlsafe(24)


def host_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Return whether a Host header names this server. Refusing others prevents DNS rebinding.

    Starlette's TrustedHostMiddleware splits the header at its first colon up to version 1.0, which refuses "[::1]".
    """
    name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    return "*" in hosts or name.lower() in hosts


def is_cross_site(headers: Mapping[str, str]) -> bool:
    """Return whether a page of another site makes the request, other than by a link."""
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
    return site in ("cross-site", "same-site") and mode != "navigate"


def is_cross_origin(headers: Mapping[str, str]) -> bool:
    """Return whether the Origin header names another host."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def token_matches(candidate: str | None, token: str) -> bool:
    """Compare a token in constant time."""
    return candidate is not None and hmac.compare_digest(candidate.encode(), token.encode())


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """Return the token of an Authorization header."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def cookie(name: str, value: str) -> str:
    """Return the value of a Set-Cookie header."""
    return f"{name}={value}; Path=/; Max-Age=2592000; HttpOnly; SameSite=Strict"
