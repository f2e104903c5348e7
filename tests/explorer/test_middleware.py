"""Security: other sites, other host names, tokens, headers."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from convscope.explorer.web import security
from tests.oracles.explorer import encode_image, smooth_image

TOKEN = "secret-secret-secret"


@pytest.fixture(scope="module")
def explorer(tiny):
    return Explorer({"tiny": tiny})


@pytest.fixture(scope="module")
def client(explorer):
    return TestClient(create_app(explorer), base_url="http://localhost")


@pytest.fixture
def client_with_token(explorer):
    return TestClient(create_app(explorer, hosts=["*"], token=TOKEN), base_url="http://there")


def test_requests_from_other_sites_are_refused(client):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/api/models", headers=headers).status_code == 403
    assert client.get("/", headers=headers | {"sec-fetch-mode": "navigate"}).status_code == 200
    upload = client.post(
        "/api/images", content=encode_image(smooth_image(0)), headers={"origin": "http://evil.example"}
    )
    assert upload.status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "", "127.0.0.1.nip.io", "[::2]:80"])
def test_other_host_names_are_refused(client, host):
    assert client.get("/api/models", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:9999", "[::1]", "[::1]:8420"])
def test_host_names_of_this_machine_are_allowed_with_any_port(client, host):
    assert client.get("/api/models", headers={"host": host}).status_code == 200


def test_token_is_required(client_with_token):
    assert client_with_token.get("/api/models").status_code == 401
    assert client_with_token.get("/api/models?token=wrong").status_code == 401
    assert client_with_token.get("/api/models", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_token_moves_from_the_url_to_a_cookie(client_with_token):
    redirect = client_with_token.get(f"/glossary?token={TOKEN}&x=1", follow_redirects=False)
    assert (redirect.status_code, redirect.headers["location"]) == (303, "/glossary?x=1")
    assert client_with_token.get("/api/models").status_code == 200


def test_token_redirect_does_not_lead_to_another_host(client_with_token):
    response = client_with_token.get(f"//evil.example/x?token={TOKEN}", follow_redirects=False)
    assert not response.headers.get("location", "/x").startswith("//")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback_hosts(host, expected):
    assert security.is_loopback(host) is expected
