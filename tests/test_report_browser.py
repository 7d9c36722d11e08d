"""What headless Chromium shows of report.html: phone and desktop, light and dark. Skipped where there is no browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agatool.data.prepare import prepare_sample, sample_spec
from agatool.html_report import write_report
from tests.test_report import HOSTILE, Reader, edited, evaluated

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Shows the page in frames of a phone's and a desktop's width and writes down what came out.
PROBE = """<!doctype html><body><script>
const text = %s, seen = {};
const load = width => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "800px"; frame.srcdoc = text;
  frame.onload = () => {
    const page = frame.contentDocument, view = frame.contentWindow;
    const colour = (selector, what) => view.getComputedStyle(page.querySelector(selector))[what];
    const images = [...page.images];
    seen[width] = {
      title: page.title, inner: view.innerWidth, wide: page.documentElement.scrollWidth,
      overflowing: [...page.querySelectorAll("main > *, .card, .sheet, .chart, .tile")]
        .filter(e => e.getBoundingClientRect().right > view.innerWidth + 0.5).length,
      images: images.length, drawn: images.filter(i => i.naturalWidth > 0 && i.clientWidth > 20).length,
      page: colour("body", "backgroundColor"), text: colour("body", "color"),
      frame: colour(".tile.hit .frame", "borderTopColor"),
      other: colour(".tile:not(.hit):not(.wanted) .frame", "borderTopColor"),
      heading: page.querySelector("h1").innerText, card: page.querySelector(".card").innerText,
      first: page.querySelector(".sheet h3").innerText, hits: page.querySelectorAll(".tile.hit").length,
      loaded: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
      small: [...page.querySelectorAll("p, a, li, td, th, svg text")].filter(
        e => e.checkVisibility() && parseFloat(view.getComputedStyle(e).fontSize) < 12).length,
    };
    done();
  };
  document.body.append(frame);
});
Promise.all([load(390), load(1280)]).then(() => {
  const result = document.createElement("pre"); result.id = "seen"; result.textContent = JSON.stringify(seen);
  document.body.replaceChildren(result);
});
</script>"""


def chromium(tmp_path: Path, address: Path, *flags: str) -> str:
    """What headless Chromium prints for a local file."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, address.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def brightness(colour: str) -> float:
    """Of `rgb(r, g, b)`, 0 to 255."""
    return float(np.mean([int(value) for value in re.findall(r"\d+", colour)[:3]]))


@pytest.fixture(scope="module")
def shown_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("browser")
    folder = evaluated(base / "run", prepare_sample(base / "d", sample_spec(20)))
    edited(folder, query=HOSTILE, ap="0.0001", first_hit="30")
    return write_report(folder)


@pytest.mark.parametrize("dark", [False, True])
def test_what_a_browser_shows(tmp_path: Path, shown_run: Path, dark: bool) -> None:
    text = shown_run.read_text()
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % json.dumps(text).replace("</", "<\\/"), encoding="utf-8")
    mode = ["--force-dark-mode"] if dark else []
    dom = chromium(tmp_path, probe, "--dump-dom", "--virtual-time-budget=5000", *mode)
    (printed,) = re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.S)
    seen = json.loads(html.unescape(printed))
    source = Reader(text)
    for width in ("390", "1280"):
        view = seen[width]
        assert view["wide"] <= view["inner"] == int(width)
        assert view["overflowing"] == 0
        assert view["images"] == view["drawn"] == len(source.all("img")) > 0
        assert view["title"] == "run - agatool report"  # no script of the caption ran
        assert view["first"] == f"“{HOSTILE}”"
        assert view["heading"] == "run: sample, test"
        assert re.fullmatch(
            r"R@1 cosine, text to image\s+[\d.]+ %\s+95 % CI [\d.]+ to [\d.]+", view["card"].replace("\xa0", " ")
        )
        assert view["hits"] == len(source.all("li", "hit"))
        red, green, blue = (int(value) for value in re.findall(r"\d+", view["frame"])[:3])
        assert green > max(red, blue) + 30
        assert view["other"] == "rgba(0, 0, 0, 0)"
        assert view["loaded"] == []
        assert view["small"] == 0
        assert (brightness(view["page"]) < 60) == dark
        assert (brightness(view["text"]) > 180) == dark


@pytest.mark.parametrize(("size", "dark"), [((390, 844), False), ((1280, 900), True)])
def test_screenshots(tmp_path: Path, shown_run: Path, size: tuple[int, int], dark: bool) -> None:
    picture = tmp_path / "page.png"
    mode = ["--force-dark-mode"] if dark else []
    chromium(tmp_path, shown_run, f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}", *mode)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (size[1], size[0], 3)
    paper = np.median(pixels.reshape(-1, 3), axis=0)
    assert (paper.mean() < 60) == dark
    inked = np.abs(pixels - paper).max(-1) > 40
    assert 0.01 < inked.mean() < 0.6
    assert inked[: size[1] // 2].any(1).mean() > 0.2  # text and cards from the top on
