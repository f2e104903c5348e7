"""Requests that the OpenAPI schema allows never cause a server error."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from starlette.testclient import TestClient

from convscope.explorer.app import create_app
from convscope.explorer.service.state import Explorer
from tests.oracles.explorer import smooth_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def app(tiny):
    explorer = Explorer({"tiny": tiny})
    explorer.images.add_sample(smooth_image(0), "first.png", "first.png")
    return create_app(explorer)


def request_operation(client, operation, statuses: list[int]) -> None:
    """Make requests that the schema allows; every other one about a model and an image that exist."""

    @given(case=operation.as_strategy())
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def request(case):
        if len(statuses) % 2:
            existing = {"model": "tiny", "image": "first"}
            case.path_parameters = {k: existing.get(k, v) for k, v in (case.path_parameters or {}).items()}
        arguments = case.as_transport_kwargs(base_url="http://localhost")
        body = arguments.get("data")
        allowed = {k: v for k, v in arguments.items() if k in ("method", "url", "params", "headers")}
        response = client.request(**allowed, content=body if isinstance(body, bytes) else None)
        statuses.append(response.status_code)
        assert response.status_code < 500

    request()


def test_no_valid_request_causes_a_server_error(app):
    statuses: list[int] = []
    with TestClient(app, base_url="http://localhost") as client:
        for result in schemathesis.openapi.from_dict(app.openapi()).get_all_operations():
            operation = result.ok()
            if not operation.path.endswith("/events"):
                request_operation(client, operation, statuses)
    assert len(statuses) > 100
    assert {200, 404, 422} <= set(statuses)
