"""The local page: its answers, what it refuses, and a real browser that types a query and looks closer."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from agatool.data.prepare import Prepared
from agatool.errors import UsageError
from agatool.indexing import build_index
from agatool.search import Query, Searcher, open_searcher
from tests.browser import CHROMIUM, Browser

pytest.importorskip("starlette", reason="the extra `web` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `web` is not installed")

from agatool import serve  # noqa: E402 - needs the extra

SECRET = b"nobody may read this"


@pytest.fixture(scope="module")
def gallery(sample: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the sample's people beside a file that must never be served."""
    folder = tmp_path_factory.mktemp("serve") / "gallery"
    folder.mkdir()
    for path in sample.split("test")[0]["path"]:
        (folder / path).write_bytes((sample.image_root / path).read_bytes())
    (folder / "<b>bold.png").write_bytes(b"")
    Image.new("RGB", (40, 60), (10, 200, 10)).save(folder / "<b>bold.png")
    (folder / "secret.txt").write_bytes(SECRET)
    (folder.parent / "secret.txt").write_bytes(SECRET)
    return folder


@pytest.fixture(scope="module")
def searcher(gallery: Path, tiny_run: Path) -> Searcher:
    return open_searcher(build_index(gallery, checkpoint=tiny_run, device="cpu").folder, device="cpu")


@pytest.fixture(scope="module")
def port(searcher: Searcher) -> Iterator[int]:
    """A running server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(serve.build_app(searcher), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """The path goes out exactly as it is given."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def get_json(port: int, path: str) -> Any:
    status, _, body = get(port, path)
    assert status == 200, body
    return json.loads(body)


# --- answers ---


def test_search_answers_as_the_command_does(port: int, searcher: Searcher) -> None:
    answer = get_json(port, f"/search?k=5&q={quote('a man in blue jeans')}")
    wanted = searcher.search([Query("a man in blue jeans")], 5)[0]
    assert [hit["row"] for hit in answer["hits"]] == [hit.row for hit in wanted.hits]
    assert answer["made_up_as_good"] == wanted.as_good
    assert bool(answer["note"]) == wanted.probably_absent


def test_search_by_an_image_of_the_gallery(port: int, searcher: Searcher) -> None:
    answer = get_json(port, "/search?like=2&k=3")
    assert answer["hits"][0]["row"] == 2
    assert answer["image"] == 2
    both = get_json(port, "/search?like=2&q=red&k=3")
    assert both["text"] == "red"
    assert both["hits"][0]["match"] is not None


def test_every_image_comes_as_a_small_jpeg(port: int, searcher: Searcher) -> None:
    for row in range(len(searcher.index)):
        status, headers, body = get(port, f"/image/{row}")
        assert (status, headers["content-type"], headers["x-content-type-options"]) == (200, "image/jpeg", "nosniff")
        assert Image.open(io.BytesIO(body)).format == "JPEG"


def test_attention_gives_a_map_for_each_word(port: int, searcher: Searcher) -> None:
    answer = get_json(port, "/attention/0?q=a+red%20coat")
    assert [word["text"] for word in answer["words"]] == ["a", "red", "coat"]
    assert [answer["caption"][word["start"] : word["end"]] for word in answer["words"]] == ["a", "red", "coat"]
    rows, columns = searcher.model.image_encoder.grid
    for word in answer["words"]:  # occlusion steps over the patches more finely than their grid
        assert len(word["heat"]) % rows == 0
        assert {len(line) for line in word["heat"]} == {columns * len(word["heat"]) // rows}


def test_the_page_and_its_parts_need_nothing_from_elsewhere(port: int) -> None:
    kinds = {"/": "text/html", "/style.css": "text/css", "/search.js": "text/javascript"}
    for path, kind in kinds.items():
        status, headers, body = get(port, path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert b"http://" not in body
        assert b"https://" not in body


# --- refusals ---


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/image/../secret.txt", "/image/../../secret.txt", "/image/%2e%2e%2fsecret.txt",
        "/image/..%2f..%2f..%2f..%2fetc%2fpasswd", "//etc/passwd", "/image//etc/passwd", "/secret.txt",
        "/image/secret.txt", "/image/%2fetc%2fpasswd", "/image/..\\secret.txt", "/static/../secret.txt",
        "/images.csv", "/index.json", "/web/page.html", "/image/0/../../secret.txt", "/image/secret.txt%00.jpg",
        "/serve.py", "/page.html", "/image/0%00",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(port: int, path: str) -> None:
    status, _, body = get(port, path)
    assert status == 404
    assert SECRET not in body
    assert b"root:" not in body


@pytest.mark.parametrize("row", ["-1", "99999", "9" * 400, "1.0", "1e0", "0x0", "%20", "", "٣", "NaN", "0;1", "+1"])
def test_odd_rows_are_not_found(port: int, row: str) -> None:
    for page in ("image", "attention"):
        assert get(port, f"/{page}/{quote(row, safe='%;+')}?q=red")[0] == 404


@pytest.mark.parametrize(
    "query",
    [
        "", "q=", "q=%00", "q=%20%20", f"q={'x' * 2001}", f"q={'red+' * 2000}", "like=-1", "like=9999999", "like=x",
        "like=", "q=red&k=0", "q=red&k=201", "q=red&k=-1", "q=red&k=1e3", "q=red&k=%D9%A3", f"q=red&k={'1' * 5000}",
    ],
)  # fmt: skip
def test_odd_queries_are_told_what_is_wrong(port: int, query: str) -> None:
    status, headers, body = get(port, f"/search?{query}")
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]


def test_huge_requests_are_refused_and_the_server_lives(port: int) -> None:
    try:
        status = get(port, f"/search?q={'x' * 10_000_000}")[0]
    except (ConnectionError, http.client.HTTPException):  # it hung up
        status = 400
    assert status in (400, 414, 431)
    assert get(port, "/")[0] == 200


def test_odd_bytes_in_a_query_do_no_harm(port: int) -> None:
    for query in ("q=%ff%fe", "q=%f0%9f%91%9f", "q=%3Cscript%3E", "q=red&q=blue", "q[]=x&q=red", "q=red&unknown=1"):
        assert get(port, f"/search?{query}&k=1")[0] == 200, query


def test_only_known_names_are_answered(port: int) -> None:
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", "[::1]:80", "192.168.1.7:8000", "LOCALHOST."):
        assert get(port, "/", Host=host)[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "@",
        "[x",
    ):
        status, _, body = get(port, "/search?q=red", Host=host)
        assert status == 421, host
        assert b"hits" not in body


def test_only_reading_is_possible(port: int) -> None:
    for method in ("POST", "PUT", "DELETE", "TRACE"):
        assert get(port, "/search?q=red", method)[0] == 405


def test_other_sites_may_not_use_the_images(port: int) -> None:
    headers = get(port, "/image/0")[1]
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers


def test_an_image_that_went_is_an_error_and_no_crash(
    port: int, searcher: Searcher, gallery: Path, tmp_path: Path
) -> None:
    path = searcher.index.path(1)
    kept = path.read_bytes()
    try:
        path.unlink()
        path.symlink_to(gallery.parent / "secret.txt")
        assert get(port, "/image/1")[0] == 400
        assert 1 not in [hit["row"] for hit in get_json(port, "/search?q=red")["hits"]]
    finally:
        path.unlink()
        path.write_bytes(kept)


def test_a_port_in_use_is_said_so(port: int, searcher: Searcher) -> None:
    with pytest.raises(UsageError, match=f"port {port}"):
        serve.serve(searcher.index.folder, port=port, device="cpu")


# --- a browser ---


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    tab = Browser(tmp_path / "profile")
    yield tab
    tab.close()


LOADED = "document.querySelectorAll('#results img').length > 0 && [...document.images].every(i => i.complete)"
FOCUS = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"


def test_type_a_query_look_closer_and_come_back(browser: Browser, port: int, searcher: Searcher) -> None:
    browser.go(f"http://127.0.0.1:{port}/")
    assert browser.read(FOCUS) == "q"
    browser.type("a man in blue jeans")
    browser.press("Enter")
    browser.until(LOADED)
    wanted = searcher.search([Query("a man in blue jeans")], serve.HITS)[0]
    titles = browser.read("[...document.querySelectorAll('#results button')].map(b => b.title)")
    assert titles == [hit.name for hit in wanted.hits]
    assert browser.read("[...document.querySelectorAll('#results img')].every(i => i.naturalWidth > 0)")
    assert browser.read("document.querySelector('#results b').closest('li').querySelector('b').textContent") == "1"
    assert browser.read("location.search") == "?q=a+man+in+blue+jeans"
    assert browser.read("document.getElementById('note').hidden") != wanted.probably_absent

    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert browser.read(FOCUS).startswith("Number 2, ")
    browser.press("Enter")
    browser.until("document.getElementById('heat').classList.contains('on')")
    words = browser.read("[...document.querySelectorAll('#words button')].map(b => b.textContent)")
    assert words == ["a", "man", "in", "blue", "jeans"]
    rows, columns = searcher.model.image_encoder.grid
    height, width = browser.read("[document.getElementById('heat').height, document.getElementById('heat').width]")
    assert height * columns == width * rows > 0
    browser.press("ArrowRight")
    browser.until("document.getElementById('detail-name').textContent.startsWith('3. ')")
    browser.press("Escape")
    browser.until("!document.getElementById('detail').open")
    browser.until(f"({FOCUS}).startsWith('Number 3, ')")  # a dialog's close event comes after it is closed

    browser.press("/")
    assert browser.read(FOCUS) == "q"
    browser.type("%")  # replaces the selected text
    browser.press("Enter")
    browser.until("location.search === '?q=%25'")
    browser("Page.navigateToHistoryEntry", entryId=browser("Page.getNavigationHistory")["entries"][-2]["id"])
    browser.until("document.getElementById('q').value === 'a man in blue jeans'")
    assert browser.problems == []


def test_more_like_this_and_errors_are_shown(browser: Browser, port: int) -> None:
    browser.go(f"http://127.0.0.1:{port}/?like=1")
    browser.until(LOADED)
    assert not browser.read("document.getElementById('like').hidden")
    browser.read("document.querySelectorAll('#results button')[1].click()")
    browser.until("document.getElementById('detail').open")
    row = browser.read("document.getElementById('shown').getAttribute('src')").removeprefix("image/")
    browser.read("document.getElementById('similar').click()")
    browser.until(f"location.search === '?like={row}' && {LOADED}")
    browser.until(f"document.querySelector('#results img').getAttribute('src') === 'image/{row}'")
    assert browser.problems == []
    browser.go(f"http://127.0.0.1:{port}/?like=77777")
    browser.until("document.getElementById('status').classList.contains('error')")
    assert "77777" in browser.read("document.getElementById('status').textContent")


def test_nothing_of_the_gallery_or_the_query_becomes_markup(browser: Browser, port: int) -> None:
    text = '<img src=x onerror="document.title=1"> red'
    browser.go(f"http://127.0.0.1:{port}/?q={quote(text)}")
    browser.until(LOADED)
    browser.read("document.querySelector('#results button[title=\"<b>bold.png\"]').click()")
    browser.until("document.getElementById('heat').classList.contains('on')")
    assert browser.read("document.getElementById('words').textContent") == text
    assert browser.read("document.querySelectorAll('#words img, #detail b').length") == 0
    assert browser.read("document.title") == "Person search"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_on_a_phone_in_dark_mode_nothing_is_cut_off(port: int, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile", size=(360, 740), dark=True, phone=True)
    try:
        browser.go(f"http://127.0.0.1:{port}/?q=a+man")
        browser.until(LOADED)
        assert browser.read("document.documentElement.scrollWidth <= innerWidth")
        background = browser.read("getComputedStyle(document.body).backgroundColor")
        assert sum(int(part) for part in background[4:-1].split(",")) < 120
        assert max(Image.open(browser.screenshot(tmp_path / "phone.png")).size) == 740
    finally:
        browser.close()
