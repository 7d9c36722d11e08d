"""`aga serve`: a local page to search an index in the browser. Needs the extra `web`."""

from __future__ import annotations

import html
import io
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from agatool import console
from agatool.attention import Look, Pair, explain
from agatool.data.images import decode_image
from agatool.errors import AgatoolError, UsageError
from agatool.page import STYLE
from agatool.results import as_record, explained
from agatool.search import Searcher, as_query, open_searcher

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise UsageError("aga serve needs a web server, which is not installed", "pip install 'agatool[web]'") from error

MAX_QUERY = 2000  # characters
MAX_HITS, HITS = 200, 40
MAX_SIDE = 640  # pixels of an image that is sent
_WEB = Path(__file__).parent / "web"
_HEADERS = {
    # Nothing from elsewhere, no markup that could run, no frame around the page, nothing for other sites to read.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # pictures of people stay out of the browser's cache
}


class _Pages:
    """The addresses of the page. Images are named by their row in the index, never by a path."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self.index = searcher, searcher.index
        self.look = Look().settled(searcher.model)
        self.lock = threading.Lock()  # one query computes at a time: more would only wait for each other's cores
        about = f"{len(self.index):,} images in {self.index.folder.name}"
        page = (_WEB / "page.html").read_text(encoding="utf-8")
        self.page = page.replace("{{about}}", html.escape(about)).replace("{{longest}}", str(MAX_QUERY))
        self.style = STYLE + (_WEB / "search.css").read_text(encoding="utf-8")
        self.script = (_WEB / "search.js").read_text(encoding="utf-8")

    def home(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    def stylesheet(self, request: Request) -> Response:
        return PlainTextResponse(self.style, media_type="text/css")

    def code(self, request: Request) -> Response:
        return PlainTextResponse(self.script, media_type="text/javascript")

    def search(self, request: Request) -> Response:
        """Hits of ?q=TEXT, of ?like=ROW, or of both; ?k= says how many."""
        text, like = _text(request), request.query_params.get("like")
        count = _number(request.query_params.get("k", str(HITS)), 1, MAX_HITS + 1)
        row = None if like is None else _number(like, 0, len(self.index))
        started = time.monotonic()
        with self.lock:
            query = as_query(text, None if row is None else self.index.path(row))
            answer = self.searcher.search([query], count)[0]
        told = {"image": row, "note": explained(answer), "seconds": round(time.monotonic() - started, 3)}
        return _json({**as_record(answer), **told})

    def image(self, request: Request) -> Response:
        """A row's image, decoded and written anew: what the browser gets is a JPEG and nothing else."""
        image = decode_image(self.index.path(self._row(request)))
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=88)
        return Response(stream.getvalue(), media_type="image/jpeg")

    def attention(self, request: Request) -> Response:
        """Where the model looks in a row's image for each word of ?q=TEXT."""
        row = self._row(request)
        query = as_query(_text(request))
        with self.lock:
            pair = Pair("pair", self.index.path(row), query.text or "")
            explanation = explain(self.searcher.model, pair, self.look, ("all",))
        words = [
            {
                "text": word.text, "start": word.span[0], "end": word.span[1], "attention": float(word.attention),
                "heat": None if word.heat is None else word.heat.astype(float).tolist(),
            }
            for word in explanation.words
        ]  # fmt: skip
        return _json({"caption": query.text, "match": explanation.match, "words": words})

    def _row(self, request: Request) -> int:
        row = request.path_params["row"]
        if row >= len(self.index):
            raise HTTPException(404, "There is no such image in the index")
        return int(row)


def _text(request: Request) -> str | None:
    text = request.query_params.get("q")
    if text is not None and len(text) > MAX_QUERY:
        raise UsageError(f"The description is longer than {MAX_QUERY} characters")
    return text


def _number(text: str, low: int, end: int) -> int:
    """A whole number from `low` up to `end`, excluded. Raises UsageError."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) < end):
        raise UsageError(f"{text[:20]!r} is not a number from {low} to {end - 1}")
    return int(text)


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document, ensure_ascii=True), status, media_type="application/json")


def _refused(request: Request, error: Exception) -> Response:
    """An expected failure as a message that the page shows."""
    if isinstance(error, HTTPException):
        return _json({"error": error.detail}, error.status_code)
    assert isinstance(error, AgatoolError)
    return _json({"error": error.message}, 400)


class _Guard:
    """Answers only requests to this machine by its address or a known name, and adds the protective headers.

    A page elsewhere could give its own name our address (DNS rebinding) and read the gallery through its visitor's
    browser; the Host header gives that away. An address cannot be rebound.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] != "http" or self._knows(Headers(scope=scope).get("host", "")):
            await self.app(scope, receive, send_guarded)
        else:
            refusal = PlainTextResponse("This name is not one of this server's; use its address.", 421)
            await refusal(scope, receive, send_guarded)

    def _knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def build_app(searcher: Searcher, host: str = "127.0.0.1") -> Starlette:
    """The application, for any ASGI server; `host` is a further name under which it may be reached."""
    pages = _Pages(searcher)
    addresses: dict[str, Callable[[Request], Response]] = {
        "/": pages.home,
        "/style.css": pages.stylesheet,
        "/search.js": pages.code,
        "/search": pages.search,
        "/image/{row:int}": pages.image,
        "/attention/{row:int}": pages.attention,
    }
    names = frozenset({"localhost", socket.gethostname().lower(), host.lower()})
    return Starlette(
        routes=[Route(address, page) for address, page in addresses.items()],
        middleware=[Middleware(_Guard, names=names)],
        exception_handlers={AgatoolError: _refused, HTTPException: _refused},
    )


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    checkpoint: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Serve an index until Ctrl-C. Raises UsageError where the address cannot be used."""
    searcher = open_searcher(folder, checkpoint, device=device, precision=precision)
    app = build_app(searcher, host)
    with _bound(host, port) as listener:
        at = f"[{host}]" if ":" in host else host
        console.result(f"Searching {len(searcher.index):,} images at http://{at}:{listener.getsockname()[1]}")
        if not _is_local(host):
            console.warn("There is no password: whoever reaches this address can look at the gallery")
        console.info("Ctrl-C stops it.")
        console.configure(quiet=True)  # no progress bars for each query
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has answered what was under way
            return


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"Cannot listen on {host}, port {port}: {reason}", "Choose another --port or --host."
        ) from error
