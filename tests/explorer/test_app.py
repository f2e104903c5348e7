"""The explorer's addresses: pages, JSON, pictures, progress; who may ask; what happens to bad input."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from pkgutil import resolve_name

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from starlette.testclient import TestClient

import convscope
from convscope.explorer.app import create_app
from convscope.explorer.service import compute
from convscope.explorer.service.patterns import PatternSpec
from convscope.explorer.service.state import Explorer, url_key
from convscope.explorer.service.uploads import Decoder, plain_name
from tests.oracles.explorer import CLASSES, HOSTILE_FILE_NAME, HOSTILE_NAME, encode_image, smooth_image, tiny_model


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    made = Explorer({"tiny": tiny_model()}, cache_dir=tmp_path_factory.mktemp("kept"))
    made.images.add_sample(smooth_image(0), "first.png", "first.png")
    made.images.add_sample(smooth_image(1), HOSTILE_FILE_NAME, HOSTILE_FILE_NAME)
    return made


@pytest.fixture(scope="module")
def app(explorer):
    return create_app(explorer, decoder=Decoder(most_bytes=300_000, most_pixels=400_000, seconds=20))


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, base_url="http://localhost") as opened:
        yield opened


def data_of(page) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.text, re.S)[1])


def assert_same_map(sent: dict, known: np.ndarray) -> None:
    assert compute.unpack_map(sent) == pytest.approx(known, abs=float(np.abs(known).max()) / 30000)


def test_the_first_address_shows_a_picture_already_analysed(client, explorer):
    page = client.get("/")
    assert page.url.path == "/m/tiny/picture/first"
    told = data_of(page)
    known = convscope.predict(explorer.first.model, [smooth_image(0)])
    assert told["target"] == known.indices[0, 0]
    assert set(map(int, told["heats"])) == set(known.indices[0].tolist())
    best = known.indices[0, 0]
    heat = convscope.heatmaps(explorer.first.model, [smooth_image(0)], int(best)).values[0, 0]
    assert compute.unpack_map(told["heats"][str(best)]["map"]) == pytest.approx(
        heat, abs=float(np.abs(heat).max()) / 30000
    )
    assert f"{100 * known.probabilities[0, 0]:.1f} %" in page.text


@pytest.mark.parametrize(
    ("path", "holds"),
    [
        ("/m/tiny", "From first to last"),
        ("/m/tiny/picture/first/class/2", "Where it sees"),
        ("/m/tiny/layer/relu2", "12"),
        ("/m/tiny/layer/fc", "units"),
        ("/m/tiny/layer/relu3?picture=first&target=2", 'class <span id="relevant">blue</span>'),
        ("/m/tiny/unit/relu2/3", "Draw it now"),
        ("/m/tiny/unit/relu2/3?look=negative&recipe=maco&seed=4", "Draw it now"),
        ("/m/tiny/class/4", "gray"),
        ("/m/tiny/story", "Tell it now"),
        ("/glossary", "receptive field"),
        ("/docs", "/api/pictures"),
    ],
)
def test_every_page_has_an_address(client, path, holds):
    answer = client.get(path)
    assert answer.status_code == 200
    assert holds in answer.text
    assert answer.headers["content-security-policy"].startswith(
        "default-src 'none'; script-src 'self'; style-src 'self'"
    )
    assert not re.search(r"<script(?![^>]*(?:src=|application/json))|<style|\son\w+=\"|style=|https?://", answer.text)


@pytest.mark.parametrize(
    "path",
    [
        "/m/none", "/m/tiny/layer/none", "/m/tiny/unit/relu2/12", "/m/tiny/unit/none/0", "/m/tiny/class/5",
        "/m/tiny/picture/none", "/m/tiny/picture/first/class/99", "/m/tiny/data/0", "/static/none.js", "/none",
        "/static/..%2fapp.py", "/m/..%2f..%2fetc/passwd", "/image/photo?picture=../../etc/passwd",
        "/image/sheet?model=tiny&picture=first&layer=relu2&v=old", 
        "/image/pattern?model=tiny&layer=fc&unit=0&look=positive&recipe=robust&seed=9&v=x",
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_to_be_missing(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "Traceback" not in answer.text


def test_hostile_names_are_text(client):
    for path in ("/m/tiny/picture/first", "/m/tiny/class/3", "/m/tiny/picture/" + explorer_key(client)):
        page = client.get(path).text
        assert HOSTILE_NAME not in page
        assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in client.get("/m/tiny/class/3").text


def explorer_key(client) -> str:
    return re.search(r'/m/tiny/picture/([^"]*onerror[^"]*)"', client.get("/m/tiny/picture/first").text)[1]


def test_json_says_what_the_library_says(client, explorer):
    base, model = "/api/models/tiny/pictures/first", explorer.first.model
    heat = client.get(f"{base}/heatmap?target=2&method=layer-cam&layer=relu2&against=1").json()
    known = convscope.heatmaps(model, [smooth_image(0)], 2, method="layer-cam", layer="relu2", against=1)
    assert compute.unpack_map(heat["map"]) == pytest.approx(
        known.values[0, 0], abs=float(np.abs(known.values).max()) / 30000
    )
    maps = convscope.activations(model, [smooth_image(0)], ["relu2"])["relu2"][0]
    arrays = np.load(io.BytesIO(client.get(f"{base}/activations.npz?layer=relu2").content))
    assert arrays["activations"] == pytest.approx(maps)
    rows = client.get(f"{base}/activations.csv?layer=relu2").text.splitlines()
    assert rows[0] == "unit,mean,max,active,dead"
    assert float(rows[4].split(",")[2]) == pytest.approx(maps[3].max(), rel=1e-3)
    every = client.get(f"{base}/predictions.csv").text.splitlines()
    assert len(every) == 1 + len(CLASSES)
    assert client.get("/api/models/tiny/classes?search=BLUE").json()["classes"] == [{"index": 2, "name": "blue"}]


def test_the_downloaded_overlay_is_the_librarys(client, explorer):
    png = client.get("/api/models/tiny/pictures/first/heatmap.png?target=1&opacity=0.4&colours=jet").content
    known = convscope.heatmaps(explorer.first.model, [smooth_image(0)], 1).overlay()[0]
    assert np.abs(np.asarray(Image.open(io.BytesIO(png)), int) - np.asarray(known, int)).max() <= 2


def test_the_overlay_of_a_large_picture_is_bounded(client):
    key = client.post("/api/pictures?name=x", content=encode_image(smooth_image(2, 40, 3000))).json()["key"]
    png = client.get(f"/api/models/tiny/pictures/{key}/heatmap.png?target=1").content
    assert Image.open(io.BytesIO(png)).size == (2048, 27)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/api/models/tiny/pictures/first/heatmap.png?target=1&opacity=0.7", "web.routes_api.blend"),
        ("/api/models/tiny/pictures/first/heatmap.npz?target=1", "web.routes_api.write_npz"),
        ("/api/models/tiny/pictures/first/activations.npz?layer=relu2", "web.routes_api.write_npz"),
        ("/api/models/tiny/pictures/first/activations?layer=relu2", "service.compute.channel_table"),
        ("/api/models/tiny/pictures/first/activations.csv?layer=relu2", "service.compute.channel_table"),
        (
            "/image/pattern?model=tiny&layer=relu2&unit=7&look=positive&recipe=robust&seed=0&v=V",
            "service.state.Explorer.drawn",
        ),
        ("/image/chapter?model=tiny&number=0&v=V", "service.state.Explorer.told"),
        ("/image/story?model=tiny&v=V", "service.state.Explorer.told"),
    ],
)
def test_what_takes_a_while_does_not_keep_the_other_visitors(client, explorer, monkeypatch, path, where):
    loops = []
    own = resolve_name(f"convscope.explorer.{where}")

    def watched(*given, **more):
        loops.append(asyncio._get_running_loop())
        return own(*given, **more)

    monkeypatch.setattr(f"convscope.explorer.{where}", watched)
    client.get(path.replace("v=V", f"v={explorer.first.version}"))
    assert loops == [None]


@pytest.mark.parametrize(
    "query",
    ["target=99", "target=-1", "target=x", "", "target=1&method=none", "target=1&layer=none", "target=1&layer=fc",
     "target=1&against=77", "target=1&method=saliency&layer=relu2"],
)  # fmt: skip
def test_bad_requests_are_refused_with_a_reason(client, query):
    answer = client.get(f"/api/models/tiny/pictures/first/heatmap?{query}")
    assert answer.status_code in (404, 422)
    assert len(answer.json()["error"]) > 10


def test_a_picture_that_the_browser_has_is_not_sent_again(client):
    page = client.get("/m/tiny/layer/relu2").text
    src = re.search(r'href="(/image/sheet[^"]*)"', page)[1].replace("&amp;", "&")
    first = client.get(src)
    again = client.get(src, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_another_server_at_the_same_address_shows_its_own_pictures(client, explorer):
    other = Explorer({"tiny": explorer.first.model})
    other.images.add_sample(smooth_image(5), "first.png", "first.png")  # the same name, other pixels
    later = TestClient(create_app(other), base_url="http://localhost")
    sheet = f"/image/sheet?model=tiny&picture=first&layer=relu2&v={other.first.version}"
    for src in ("/image/photo?picture=first&longest=1024", sheet):
        kept = client.get(src)
        assert "no-cache" in kept.headers["cache-control"]  # the browser asks before it shows what it has
        now = later.get(src, headers={"If-None-Match": kept.headers["etag"]})
        assert now.status_code == 200
        assert now.content != kept.content
    other.close()


# --- pictures that people bring ---


def test_the_same_pixels_get_the_same_address(client):
    shown = smooth_image(7)
    png, bmp = (client.post(f"/api/pictures?name=x.{k}", content=encode_image(shown, k)) for k in ("PNG", "BMP"))
    assert png.json()["key"] == bmp.json()["key"]
    assert png.json() | {"key": "", "name": ""} == {"key": "", "name": "", "height": 40, "width": 60}
    page = client.get(f"/m/tiny/picture/{png.json()['key']}")
    assert page.status_code == 200


def test_bad_pictures_cost_nothing_but_themselves(client, app):
    good = encode_image(smooth_image(3), "JPEG")
    png = encode_image(smooth_image(3))
    draw = np.random.default_rng(0)
    bad = [
        b"",
        b"x",
        b"\x89PNG\r\n\x1a\n",
        encode_image(smooth_image(1, 700, 700)),
        b"GIF89a" + b"\xff" * 100,
        b"%!PS-Adobe",
        b"\x93NUMPY" * 9,
    ]
    bad += [good[: int(n)] for n in draw.integers(1, len(good), 12)]
    bad += [png[: int(n)] for n in draw.integers(1, len(png), 12)]
    for n in range(24):
        broken = bytearray(png if n % 2 else good)
        for place in draw.integers(0, len(broken), 6):
            broken[place] = draw.integers(256)
        bad.append(bytes(broken))
    for content in bad:
        answer = client.post("/api/pictures?name=bad", content=content)
        assert answer.status_code in (200, 422), content[:40]
        assert set(answer.json()) in ({"error"}, {"key", "name", "height", "width"})
    assert client.post("/api/pictures?name=good", content=good).status_code == 200


def test_uploads_are_bounded_in_bytes(client):
    answer = client.post("/api/pictures?name=x", content=b"0" * 300_001)
    assert answer.status_code == 422
    assert "300,000 bytes" in answer.json()["error"]


def test_a_bomb_is_refused_before_it_goes_off(client):
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    answer = client.post("/api/pictures?name=bomb.png", content=buffer.getvalue())
    assert answer.status_code == 422
    assert "400,000,000 pixels" in answer.json()["error"]


def test_a_decoder_that_takes_too_long_is_killed_and_replaced():
    decoder = Decoder(seconds=20)
    try:
        decoder.warm()
        first = decoder._process
        decoder._seconds = 0.0
        with pytest.raises(convscope.ConvscopeError, match="longer than 0 s"):
            decoder.decode(encode_image(smooth_image(0, 2000, 2000)))
        assert first.poll() is not None
        decoder._seconds = 20
        assert (decoder.decode(encode_image(smooth_image(0))) == smooth_image(0)).all()
        assert decoder._process.pid != first.pid
    finally:
        decoder.close()
    assert decoder._process is None


def test_a_server_has_its_decoder_ready():
    decoder = Decoder()
    explorer = Explorer({"tiny": tiny_model()})
    with TestClient(create_app(explorer, decoder=decoder), base_url="http://localhost"):
        for _ in range(200):
            if decoder._process is not None:
                break
            time.sleep(0.05)
        assert decoder._process is not None
        assert decoder._process.poll() is None
    assert decoder._process is None


@pytest.mark.parametrize(
    ("given", "shown"),
    [("C:\\x\\cat.png", "cat.png"), ("/etc/passwd", "passwd"), ("a\u202egnp.exe\n\x1b[2J", "agnp.exe[2J"),
     ("", "picture"), ("../..", ".."), ("x" * 200, "x" * 71 + "…" + "x" * 8)],
)  # fmt: skip
def test_names_are_shown_in_one_plain_line(given, shown):
    assert plain_name(given) == shown


# --- who may ask ---


def test_other_sites_may_not_ask(client):
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get("/api/models", headers=elsewhere).status_code == 403
    assert client.get("/", headers=elsewhere | {"sec-fetch-mode": "navigate"}).status_code == 200
    foreign = client.post(
        "/api/pictures", content=encode_image(smooth_image(0)), headers={"origin": "http://evil.example"}
    )
    assert foreign.status_code == 403


def test_other_names_are_refused(client):
    for name in ("evil.example", "localhost.evil.example:80", "", "127.0.0.1.nip.io"):
        assert client.get("/api/models", headers={"host": name}).status_code == 421
    assert client.get("/api/models", headers={"host": "127.0.0.1:9999"}).status_code == 200


def test_a_token_is_asked_for_and_then_remembered(explorer):
    guarded = TestClient(create_app(explorer, hosts=["*"], token="secret-secret-secret"), base_url="http://there")
    assert guarded.get("/api/models").status_code == 401
    assert guarded.get("/api/models?token=wrong").status_code == 401
    assert guarded.get("/api/models", headers={"authorization": "Bearer secret-secret-secret"}).status_code == 200
    welcomed = guarded.get("/glossary?token=secret-secret-secret&x=1", follow_redirects=False)
    assert (welcomed.status_code, welcomed.headers["location"]) == (303, "/glossary?x=1")
    assert guarded.get("/api/models").status_code == 200
    away = guarded.get("//evil.example/x?token=secret-secret-secret", follow_redirects=False)
    assert not away.headers.get("location", "/x").startswith("//")


# --- long work ---


def events(client, path):
    with client.stream("GET", path) as answer:
        text = "".join(answer.iter_text())
    found = [part.split("\n", 1) for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), data.removeprefix("data: ")) for name, data in found]


def test_a_pattern_is_drawn_frame_by_frame_and_kept(client, explorer):
    path = "/api/models/tiny/pattern/events?layer=relu2&unit=3"
    told = events(client, path)
    assert told[-1][0] == "done"
    assert any(name == "frame" and data.startswith("data:image/webp;base64,") for name, data in told)
    assert all(json.loads(data)["ahead"] == 0 for name, data in told if name == "progress")
    result = json.loads(told[-1][1])
    shown = [explorer.shelf.samples[0].pixels, explorer.shelf.samples[1].pixels]
    known = convscope.patterns(explorer.first.model, "relu2", [3], reference=shown)
    assert result["score"] == pytest.approx(float(known.scores[0]), rel=0.01)
    page = client.get("/m/tiny/unit/relu2/3").text
    src = re.search(r'src="(/image/pattern[^"]*)"', page)[1].replace("&amp;", "&")
    assert np.asarray(Image.open(io.BytesIO(client.get(src).content))).shape == known.images[0].shape
    explorer.cache.put(
        ("pattern", explorer.first.version, PatternSpec("relu2", 3)), None
    )  # forgotten: the folder has it
    start = time.perf_counter()
    again = events(client, path)
    assert json.loads(again[-1][1]) == result
    assert time.perf_counter() - start < 1


def test_a_pattern_that_nobody_waits_for_ends(explorer):
    work = explorer.begin_drawing("a", explorer.first, PatternSpec("relu3", 5), [])
    while not work.begun:
        time.sleep(0.01)
    work.lane.leave(work)
    assert work.future.exception(20) is not None
    assert explorer.drawn(explorer.first, PatternSpec("relu3", 5)) is None


@pytest.mark.parametrize(
    "query", ["layer=relu2&unit=99", "layer=no&unit=0", "layer=relu2&unit=0&look=no", "layer=relu2&unit=0&recipe=dream"]
)
def test_patterns_that_cannot_be_are_refused_before_work_starts(client, explorer, query):
    assert client.get(f"/api/models/tiny/pattern/events?{query}").status_code in (404, 422)
    assert len(explorer.slow) == 0


def test_addresses_of_models():
    assert [url_key(name) for name in ("lite0", "torchvision:vgg16", "/home/me/my net.keras", "..")] == [
        "lite0", "torchvision-vgg16", "my-net.keras", "model",
    ]  # fmt: skip


def test_networks_of_the_same_file_name_have_addresses_and_names_of_their_own():
    sources = ["runs/1/net.keras", "runs/2/net.keras", "net.keras-2"]
    explorer = Explorer({source: tiny_model() for source in sources})
    assert list(explorer.networks) == ["net.keras", "net.keras-2", "net.keras-2-2"]
    assert [net.source for net in explorer.networks.values()] == sources
    page = TestClient(create_app(explorer), base_url="http://localhost").get("/glossary").text
    shown = re.findall(r'<a href="/m/([^"]*)" title="([^"]*)"[^>]*>([^<]*)</a>', page)
    assert shown == [(key, net.source, key) for key, net in explorer.networks.items()]


# --- whatever the description allows ---


def asked_anyhow(client, operation, asked):
    """The requests that the description allows for an operation; every other one about what is there."""

    @given(case=operation.as_strategy())
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def ask(case):
        if len(asked) % 2:
            there = {"model": "tiny", "picture": "first"}
            case.path_parameters = {k: there.get(k, v) for k, v in (case.path_parameters or {}).items()}
        sent = case.as_transport_kwargs(base_url="http://localhost")
        body = sent.get("data")
        allowed = {k: v for k, v in sent.items() if k in ("method", "url", "params", "headers")}
        answer = client.request(**allowed, content=body if isinstance(body, bytes) else None)
        asked.append(answer.status_code)
        assert answer.status_code < 500

    ask()


def test_nothing_that_the_description_allows_ends_in_a_500(client, app):
    asked: list[int] = []
    for found in schemathesis.openapi.from_dict(app.openapi()).get_all_operations():
        operation = found.ok()
        if not operation.path.endswith("/events"):
            asked_anyhow(client, operation, asked)
    assert len(asked) > 100
    assert {200, 404, 422} <= set(asked)
