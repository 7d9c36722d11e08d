"""Renders one person as a surveillance crop (figure, scene, occluder, camera) together with its part mask.

The figure is drawn once, as an image of region numbers; a palette turns the regions into colours and into body
parts, so picture and mask cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from agatool.data.figure import COLORS, HAIR_COLORS, PARTS, RGB, SKIN_TONES, STATURES, VIEWS, Canvas, Figure

SUPERSAMPLING = 2
VISIBLE_SHARE = 0.0011  # of the crop's pixels; a part shown by fewer is not there for a viewer
BUSH = (52, 88, 44)
GRASS = (84, 112, 66)


@dataclass(frozen=True)
class Render:
    """One crop, its part mask (values index PARTS) and what a viewer can see in it (parts, and "logo")."""

    image: Image.Image
    mask: NDArray[np.uint8]
    visible: frozenset[str]
    view: str


def wardrobe(attributes: Mapping[str, str], rng: np.random.Generator) -> dict[str, RGB]:
    """The colour of everything a person wears, each drawn around its name's centre; 0-255, keys as attributes."""
    tables = {"hair_color": HAIR_COLORS, "skin": SKIN_TONES}
    colours = {}
    for name, value in attributes.items():
        table = tables.get(name, COLORS)
        if (name == "skin" or name.endswith("_color")) and value in table:
            colours[name] = _jitter(table[value], rng, 9.0)
    return colours


def render(
    attributes: Mapping[str, str],
    colours: Mapping[str, RGB],
    camera: np.random.Generator,
    rng: np.random.Generator,
    height: int,
    width: int,
) -> Render:
    """Draw one person as `camera` sees them; `rng` draws pose, place and accidents. Sizes in pixels."""
    h, w = height * SUPERSAMPLING, width * SUPERSAMPLING
    worn = {name: _jitter(rgb, rng, 4.0) for name, rgb in colours.items()}
    view = str(rng.choice(VIEWS, p=(0.42, 0.26, 0.32)))
    canvas = _place(attributes, view, rng, h, w)
    Figure(canvas, attributes, worn, view, rng).draw()
    picture = _scene(camera, rng, h, w)
    _paint(picture, canvas, worn.get("pattern_color"), attributes["top_pattern"], rng)
    index = np.asarray(canvas.image)
    hidden = _occlude(picture, rng)
    labels = np.where(hidden, 0, index)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    names = [name for name, _ in canvas.regions]
    parts = np.array([PARTS.index("top" if name == "logo" else name) for name in names], np.uint8)
    counts = dict.fromkeys(names, 0)
    for region, count in enumerate(np.bincount(labels.ravel(), minlength=len(names))):
        counts[names[region]] += int(count)
    enough = VISIBLE_SHARE * height * width
    visible = frozenset(name for name, count in counts.items() if count >= enough and name != "background")
    image = _film(picture.reduce(SUPERSAMPLING), camera, rng)
    return Render(image, parts[labels], visible, view)


def _jitter(rgb: RGB, rng: np.random.Generator, spread: float) -> RGB:
    light = 1.0 + rng.normal(0.0, spread / 120.0)
    r, g, b = (float(np.clip(v * light + rng.normal(0.0, spread), 0, 255)) for v in rgb)
    return r, g, b


def _place(attributes: Mapping[str, str], view: str, rng: np.random.Generator, h: int, w: int) -> Canvas:
    """Where the person stands in the crop: umbrellas need room above, a badly cut crop loses the feet."""
    scale = STATURES[attributes["stature"]][0] * rng.uniform(0.84, 0.96) * h
    top = rng.uniform(0.02, 0.06) * h
    if attributes["umbrella_color"] != "none":
        scale, top = scale * 0.84, top + 0.13 * h
    if rng.random() < 0.06:
        scale = scale * 1.16
    slack = h - top - scale
    top += max(0.0, slack) * rng.uniform(0.2, 0.8)
    centre = w * (0.5 + rng.normal(0.0, 0.035))
    return Canvas(w, h, centre, top, scale, 1 if rng.random() < 0.5 else -1)


def _smooth_noise(rng: np.random.Generator, h: int, w: int, cells: int) -> NDArray[np.float32]:
    """Values of about -1..1 that vary over a `cells`-th of the width."""
    coarse = rng.uniform(0, 255, (2 * cells, cells)).astype(np.uint8)
    fine = Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)
    return np.asarray(fine, np.float32) / 127.5 - 1.0


def _paint(picture: Image.Image, canvas: Canvas, second: RGB | None, pattern: str, rng: np.random.Generator) -> None:
    """The figure onto the scene, in colours: pattern, folds, a light from one side, dark seams between regions."""
    box = canvas.image.getbbox()
    assert box is not None, "a figure always touches its crop"
    figure = canvas.image.crop(box)
    index = np.asarray(figure)
    h, w = index.shape
    pixels = np.array([rgb for _, rgb in canvas.regions], np.float32)[index]
    if second is not None and pattern in ("striped", "checked"):
        x = (np.arange(box[0], box[2], dtype=np.float32)[None, :] - canvas.centre) / canvas.unit
        y = (np.arange(box[1], box[3], dtype=np.float32)[:, None] - canvas.top) / canvas.unit
        on = y % 0.064 < 0.03 if pattern == "striped" else (y % 0.062 < 0.022) | (x % 0.062 < 0.022)
        pixels[np.isin(index, canvas.patterned) & on] = second
    light = 1.0 + 0.1 * _smooth_noise(rng, h, w, 5)
    light += np.linspace(-1, 1, w, dtype=np.float32) * np.float32(rng.uniform(-0.1, 0.1))
    light[:, 1:][index[:, 1:] != index[:, :-1]] *= 0.72
    light[1:][index[1:] != index[:-1]] *= 0.72
    pixels *= light[..., None]
    painted = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture.paste(painted, box, figure.point([0] + [255] * 255))


def _muted(rng: np.random.Generator, low: float, high: float) -> tuple[int, int, int]:
    """A colour as streets have: hardly saturated."""
    level = rng.uniform(low, high)
    r, g, b = (int(np.clip(level + rng.normal(0, 11), 0, 255)) for _ in range(3))
    return r, g, b


def _scene(camera: np.random.Generator, rng: np.random.Generator, h: int, w: int) -> Image.Image:
    """The part that the crop shows of a camera's place, with what passes by; drawn coarsely, as it is out of focus."""
    half_h, half_w = h // 2, w // 2
    place, horizon = _place_of(camera, half_h, 2 * half_w)
    left = int(rng.integers(half_w))
    view = place.crop((left, 0, left + half_w, half_h))
    _clutter(ImageDraw.Draw(view), rng, horizon, half_h, half_w)
    light = 1.0 + 0.09 * _smooth_noise(rng, half_h, half_w, 5)
    light += np.linspace(-0.08, 0.08, half_h, dtype=np.float32)[:, None]
    pixels = np.clip(np.asarray(view, np.float32) * light[..., None], 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).resize((w, h), Image.Resampling.BILINEAR)


def _place_of(camera: np.random.Generator, h: int, w: int) -> tuple[Image.Image, int]:
    """What a camera always sees (twice as wide as a crop) and the row where its ground begins."""
    kind = str(camera.choice(["street", "wall", "tiles", "shop", "park"]))
    horizon = int(h * camera.uniform(0.12, 0.62))
    image = Image.new("RGB", (w, h), _muted(camera, 80, 200))
    ink = ImageDraw.Draw(image)
    dark = _muted(camera, 70, 110)
    if kind == "wall":
        for row, top in enumerate(range(0, horizon, max(4, h // 16))):
            ink.line((0, top, w, top), fill=dark)
            for joint in range(row % 2 * w // 12, w, w // 6):
                ink.line((joint, top, joint, top + h // 16), fill=dark)
    elif kind == "shop":
        for left in range(int(camera.uniform(-w / 5, 0)), w, w // 5):
            ink.rectangle((left, h // 30, left + w // 7, horizon - h // 20), fill=_muted(camera, 40, 220))
    elif kind == "park":
        for _ in range(12):
            x, y, r = camera.uniform(0, w), camera.uniform(0, horizon + 1), camera.uniform(w / 16, w / 6)
            green = int(camera.uniform(60, 130))
            ink.ellipse((x - r, y - r, x + r, y + r), fill=(green // 2, green, green // 2))
    ink.rectangle((0, horizon, w, h), fill=GRASS if kind == "park" else _muted(camera, 90, 175))
    if kind == "tiles":
        for step in range(0, h, max(6, h // 14)):
            ink.line((0, horizon + step, w, horizon + step), fill=dark)
        for near in range(-w, 2 * w, w // 7):
            ink.line((w // 2 + (near - w // 2) // 2, horizon, near, h), fill=dark)
    elif kind == "street":
        edge, wide = int(camera.uniform(0.2, 0.8) * w), w // 10
        ink.polygon([(edge, horizon), (edge + wide // 3, horizon), (edge + 3 * wide, h), (edge + wide, h)],
                    fill=_muted(camera, 190, 225))  # fmt: skip
    return image, horizon


def _clutter(ink: ImageDraw.ImageDraw, rng: np.random.Generator, horizon: int, h: int, w: int) -> None:
    """Poles, parked cars and passers-by, all small and behind the person."""
    if rng.random() < 0.35:
        x, wide = rng.uniform(0, w), w * rng.uniform(0.03, 0.07)
        ink.rectangle((x, 0, x + wide, horizon + h * 0.15), fill=_muted(rng, 50, 120))
    if rng.random() < 0.3:
        x, y, size = rng.uniform(-w / 3, w), horizon + h * 0.02, w * rng.uniform(0.4, 0.7)
        body = tuple(int(v) for v in rng.uniform(40, 200, 3))
        ink.rounded_rectangle((x, y - size * 0.1, x + size, y + size * 0.3), size * 0.08, fill=body)
        ink.rectangle((x + size * 0.2, y - size * 0.28, x + size * 0.8, y), fill=(60, 70, 80))
        for wheel in (0.2, 0.8):
            cx, cy, r = x + size * wheel, y + size * 0.3, size * 0.1
            ink.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(25, 25, 25))
    if rng.random() < 0.35:
        x, tall = rng.choice([rng.uniform(0, 0.2), rng.uniform(0.8, 1)]) * w, h * rng.uniform(0.2, 0.35)
        y, third = horizon - tall * 0.55, tall / 3
        ink.rectangle((x, y + third * 0.5, x + third * 0.7, y + third * 1.6), fill=_muted(rng, 30, 160))
        ink.rectangle((x, y + third * 1.6, x + third * 0.7, y + tall), fill=_muted(rng, 30, 90))
        ink.ellipse((x + third * 0.1, y, x + third * 0.6, y + third * 0.5), fill=(170, 135, 115))


def _occlude(picture: Image.Image, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Sometimes a pole, a bush or a low wall stands before the person; True where it hides the picture."""
    w, h = picture.size
    cover = Image.new("L", (w, h))
    ink = ImageDraw.Draw(cover)
    kind = rng.random()
    if kind < 0.05:
        x = w * rng.uniform(0.1, 0.85)
        ink.rectangle((x, 0, x + w * 0.09, h), fill=255)
    elif kind < 0.11:
        for _ in range(6):
            x, y, r = w * rng.uniform(0, 0.6), h * rng.uniform(0.86, 1), w * rng.uniform(0.08, 0.2)
            ink.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif kind < 0.16:
        x = rng.choice([-0.1, 0.5]) * w
        ink.rectangle((x, h * rng.uniform(0.72, 0.85), x + w * 0.6, h), fill=255)
    if kind < 0.16:
        picture.paste(BUSH if 0.05 <= kind < 0.11 else _muted(rng, 60, 150), mask=cover)
    return np.asarray(cover) > 0


def _film(image: Image.Image, camera: np.random.Generator, rng: np.random.Generator) -> Image.Image:
    """What the camera makes of it: resolution, blur, light, colour cast, contrast and noise."""
    w, h = image.size
    cast = 1.0 + camera.uniform(-0.07, 0.07, 3)
    gain, contrast = camera.uniform(0.82, 1.15) * rng.uniform(0.93, 1.07), camera.uniform(0.82, 1.1)
    blur, grain = camera.uniform(0.0, 0.7) * h / 128, camera.uniform(2.0, 5.5)
    if rng.random() < 0.2:
        shrink = rng.uniform(0.6, 0.85)
        image = image.resize((max(1, int(w * shrink)), max(1, int(h * shrink))), Image.Resampling.BILINEAR)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(image, np.float32) * (cast * gain).astype(np.float32)
    pixels = (pixels - 118.0) * np.float32(contrast) + 118.0
    pixels += np.float32(grain) * rng.standard_normal((h, w, 1), np.float32)
    pixels += np.float32(1.5) * rng.standard_normal((h, w, 3), np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
