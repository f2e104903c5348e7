"""What every answer says to the browser, and what no request may do."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence

from convscope.errors import ConvscopeError

COOKIE, TOKEN = "convscope_client", "convscope_token"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def policy(frames: Sequence[str] = ()) -> str:
    """The content security policy: nothing from elsewhere, no script or style in the page itself; who may frame it."""
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        f"form-action 'self'; base-uri 'none'; frame-ancestors {' '.join(frames) or chr(39) + 'none' + chr(39)}"
    )


def security_headers(frames: Sequence[str] = ()) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy(frames),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",  # none at all would make a form's Origin null
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        **({} if frames else {"X-Frame-Options": "DENY"}),
    }


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_token(host: str, token: str | None) -> None:
    """Raises ConvscopeError where others could reach the explorer and nothing would keep them out."""
    if not is_loopback(host) and not token:
        raise ConvscopeError(
            f"--host {host} lets other machines in: give --token with a secret of your own (or --token auto)"
        )
    if token is not None and len(token) < 12:
        raise ConvscopeError(f"a token of {len(token)} characters can be guessed; give at least 12, or auto")


def new_token() -> str:
    return secrets.token_urlsafe(24)


def host_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a request's Host is one of ours: a page elsewhere may have its own name point here (DNS rebinding)."""
    name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    return "*" in hosts or name.lower() in hosts


def is_cross_site(headers: Mapping[str, str]) -> bool:
    """Whether the browser says that another site's page makes this request, other than by a link to a page."""
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
    return site in ("cross-site", "same-site") and mode != "navigate"


def token_matches(given: str | None, token: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), token.encode())
