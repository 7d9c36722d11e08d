"""Draws one person as a surveillance crop (figure, scene, occluder, camera) together with its part mask.

The figure is drawn once, as an image of region numbers; a palette turns the regions into colours and into body
parts, so picture and mask cannot disagree. Lengths are fractions of the person's height: x to the side the
person faces, y downwards from the top of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[float, float, float]
Point = tuple[float, float]
Joint = tuple[float, float, float]  # x, y, half width

# The mask's values, in order.
PARTS = (
    "background", "hair", "face", "skin", "top", "inner", "bottom", "shoes",
    "bag", "hat", "glasses", "umbrella", "phone", "scarf",
)  # fmt: skip

COLORS: dict[str, RGB] = {
    "black": (26, 26, 30),
    "white": (236, 236, 232),
    "gray": (128, 129, 132),
    "red": (200, 28, 34),
    "blue": (40, 92, 205),
    "green": (36, 138, 60),
    "yellow": (240, 212, 45),
    "orange": (240, 122, 22),
    "purple": (118, 52, 156),
    "pink": (244, 146, 182),
    "brown": (108, 66, 36),
    "beige": (218, 198, 160),
    "navy": (24, 36, 92),
    "teal": (0, 142, 142),
    "khaki": (142, 138, 82),
}
HAIR_COLORS: dict[str, RGB] = {
    "black": (24, 20, 20),
    "brown": (98, 58, 30),
    "blond": (222, 184, 104),
    "gray": (158, 158, 160),
    "red": (168, 66, 26),
}
SKIN_TONES: dict[str, RGB] = {
    "pale": (240, 205, 185),
    "light": (226, 178, 148),
    "olive": (196, 148, 112),
    "brown": (140, 94, 64),
    "dark": (92, 62, 46),
}
VIEWS = ("front", "back", "side")

# How far a top reaches down, how wide its hem is (times the hips), and how much of the arm it covers.
HEMS = {"t-shirt": 0.505, "shirt": 0.525, "sweater": 0.515, "hoodie": 0.535, "jacket": 0.53, "coat": 0.715,
        "vest": 0.5, "dress": 0.7}  # fmt: skip
FLARES = {"coat": 1.15, "dress": 1.55, "hoodie": 1.08, "sweater": 1.04}
SLEEVES = {"vest": 0.0, "dress": 0.35, "t-shirt": 0.5}
BUILDS = {"slim": 0.84, "average": 1.0, "heavy": 1.3}
STATURES = {"short": (0.91, 1.1), "average": (0.97, 1.0), "tall": (1.02, 0.92)}  # crop height, head size

SUPERSAMPLING = 2
VISIBLE_SHARE = 0.0011  # of the crop's pixels; a part shown by fewer is not there for a viewer


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
    _Figure(canvas, attributes, worn, view, rng).draw()
    index = np.asarray(canvas.image)
    scene = _scene(camera, rng, h, w)
    picture = Image.composite(_textured(canvas, index, worn.get("pattern_color"), attributes["top_pattern"], rng),
                              scene, Image.fromarray(np.where(index > 0, 255, 0).astype(np.uint8)))  # fmt: skip
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


def _shaded(rgb: RGB, shade: float) -> RGB:
    return rgb[0] * shade, rgb[1] * shade, rgb[2] * shade


class _Canvas:
    """An image of region numbers; every region has a name (a part, or "logo") and a colour."""

    def __init__(self, width: int, height: int, centre: float, top: float, unit: float, sign: int) -> None:
        self.image = Image.new("L", (width, height))
        self.ink = ImageDraw.Draw(self.image)
        self.regions: list[tuple[str, RGB]] = [("background", (0.0, 0.0, 0.0))]
        self.patterned: list[int] = []
        self.centre, self.top, self.unit, self.sign = centre, top, unit, sign

    def region(self, name: str, rgb: RGB, shade: float = 1.0) -> int:
        self.regions.append((name, _shaded(rgb, shade)))
        return len(self.regions) - 1

    def pixel(self, point: Point) -> Point:
        return self.centre + self.sign * point[0] * self.unit, self.top + point[1] * self.unit

    def polygon(self, region: int, *points: Point) -> None:
        self.ink.polygon([self.pixel(point) for point in points], fill=region)

    def box(self, region: int, x0: float, y0: float, x1: float, y1: float) -> None:
        self.polygon(region, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def ellipse(self, region: int, x: float, y: float, rx: float, ry: float) -> None:
        px, py = self.pixel((x, y))
        self.ink.ellipse((px - rx * self.unit, py - ry * self.unit, px + rx * self.unit, py + ry * self.unit),
                         fill=region)  # fmt: skip

    def dome(self, region: int, x: float, y: float, rx: float, ry: float) -> None:
        px, py = self.pixel((x, y))
        box = (px - rx * self.unit, py - ry * self.unit, px + rx * self.unit, py + ry * self.unit)
        self.ink.pieslice(box, 180, 360, fill=region)

    def line(self, region: int, a: Point, b: Point, thickness: float) -> None:
        pixels = max(1, round(thickness * self.unit))
        self.ink.line([self.pixel(a), self.pixel(b)], fill=region, width=pixels)

    def limb(self, region: int, *joints: Joint) -> None:
        """A chain of tapered bones with round joints."""
        for (x0, y0, w0), (x1, y1, w1) in zip(joints, joints[1:], strict=False):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            nx, ny = (y1 - y0) / length, -(x1 - x0) / length
            self.polygon(region, (x0 + nx * w0, y0 + ny * w0), (x1 + nx * w1, y1 + ny * w1),
                         (x1 - nx * w1, y1 - ny * w1), (x0 - nx * w0, y0 - ny * w0))  # fmt: skip
            self.ellipse(region, x1, y1, w1, w1)


def _place(attributes: Mapping[str, str], view: str, rng: np.random.Generator, h: int, w: int) -> _Canvas:
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
    return _Canvas(w, h, centre, top, scale, 1 if rng.random() < 0.5 else -1)


class _Figure:
    """Draws the person back to front onto a canvas."""

    def __init__(
        self,
        canvas: _Canvas,
        attributes: Mapping[str, str],
        worn: Mapping[str, RGB],
        view: str,
        rng: np.random.Generator,
    ) -> None:
        self.c, self.a, self.worn, self.view = canvas, attributes, worn, view
        woman, side = attributes["gender"] == "woman", view == "side"
        build = BUILDS[attributes["build"]]
        self.build = build
        self.shoulder = (0.066 if side else 0.1 if woman else 0.115) * (0.6 + 0.4 * build)
        self.waist = (0.058 if side else 0.068 if woman else 0.084) * build
        self.hip = (0.066 if side else 0.086 if woman else 0.08) * (0.4 + 0.6 * build)
        self.head = STATURES[attributes["stature"]][1] * 0.066
        self.phase = rng.uniform(0, 2 * math.pi)
        self.swing = rng.uniform(0.15, 0.5)
        self.top = attributes["top_type"]
        self.skin = worn["skin"]

    def draw(self) -> None:
        side = self.view == "side"
        if self.a["bag_type"] == "suitcase":
            self.suitcase()
        if self.a["bag_type"] == "backpack" and side:
            self.backpack()
        self.arm(-1) if side else self.raised_arm_behind()
        for leg in (-1, 1):
            self.leg(leg)
        self.lower_garment()
        if self.view == "front":
            self.hair_behind()
        self.torso()
        if self.a["bag_type"] == "backpack" and self.view == "front":
            self.straps()
        self.head_and_hair()
        for arm in (1,) if side else (-1, 1):
            if not (self.view == "back" and arm == 1 and self.raised()):
                self.arm(arm)
        self.scarf()
        if self.a["bag_type"] == "backpack" and self.view == "back":
            self.backpack()
        self.long_hair()
        self.hat()
        self.glasses()
        self.bag()
        self.umbrella()

    # Limbs

    def leg_joints(self, leg: int) -> tuple[Point, Point, Point]:
        """Hip, knee and ankle; the far leg (-1) is half a gait cycle away."""
        phase = self.phase + (0 if leg == 1 else math.pi)
        if self.view == "side":
            angle = self.swing * math.sin(phase)
            lower = angle - 0.08 - 0.45 * max(0.0, math.cos(phase)) * self.swing / 0.5 - max(0.0, -angle) * 0.5
            knee = (0.23 * math.sin(angle), 0.5 + 0.225 * math.cos(angle))
            return (0.0, 0.5), knee, (knee[0] + 0.225 * math.sin(lower), knee[1] + 0.225 * math.cos(lower))
        lift = 0.05 * self.swing / 0.5 * max(0.0, math.sin(phase))
        x = leg * self.hip * 0.56
        return (x, 0.5), (x * 1.02, 0.725 - lift * 0.4), (x * 0.96, 0.948 - lift)

    def leg(self, leg: int) -> None:
        hip, knee, ankle = self.leg_joints(leg)
        width = 0.62 + 0.38 * self.build
        shade = 0.8 if leg == -1 else 1.0
        skin = self.c.region("skin", self.skin, shade)
        self.c.limb(skin, (*hip, 0.046 * width), (*knee, 0.032 * width), (*ankle, 0.02))
        self.shoe(ankle, shade)
        kind = self.a["bottom_type"]
        if kind in ("trousers", "jeans"):
            cloth = self.c.region("bottom", self.worn["bottom_color"], shade)
            wide = 1.12 if kind == "trousers" else 0.98
            thin = 0.04 if kind == "trousers" else 0.029
            self.c.limb(cloth, (*hip, 0.052 * width * wide), (*knee, 0.041 * width * wide),
                        (ankle[0], ankle[1] - 0.004, thin * wide))  # fmt: skip
            self.denim(hip, knee, ankle, shade) if kind == "jeans" else self.crease(knee, ankle, shade)
        elif kind == "shorts":
            cloth = self.c.region("bottom", self.worn["bottom_color"], shade)
            end = (hip[0] + 0.72 * (knee[0] - hip[0]), hip[1] + 0.72 * (knee[1] - hip[1]))
            self.c.limb(cloth, (*hip, 0.054 * width), (*end, 0.052 * width))

    def denim(self, hip: Point, knee: Point, ankle: Point, shade: float) -> None:
        """Jeans fade on the thigh and are rolled up at the ankle."""
        fade = _blend(self.worn["bottom_color"], (235, 235, 245), 0.22)
        light = self.c.region("bottom", fade, shade)
        mid = ((hip[0] + knee[0]) / 2, (hip[1] + knee[1]) / 2)
        self.c.ellipse(light, mid[0], mid[1] + 0.02, 0.016, 0.065)
        cuff = self.c.region("bottom", _blend(fade, (235, 235, 245), 0.3), shade)
        self.c.limb(cuff, (ankle[0], ankle[1] - 0.03, 0.032), (ankle[0], ankle[1] - 0.012, 0.032))

    def crease(self, knee: Point, ankle: Point, shade: float) -> None:
        dark = self.c.region("bottom", self.worn["bottom_color"], shade * 0.75)
        self.c.line(dark, (knee[0], knee[1] - 0.1), ankle, 0.008)

    def shoe(self, ankle: Point, shade: float) -> None:
        kind, (x, y) = self.a["shoe_type"], ankle
        colour = self.worn["shoe_color"]
        leather = self.c.region("shoes", colour, shade)
        sole = self.c.region("shoes", (232, 232, 228) if kind == "sneakers" else _shaded(colour, 0.6), shade)
        long = 0.088 if self.view == "side" else 0.036
        back = 0.026 if self.view == "side" else 0.036
        foot = ((x - back, y - 0.012), (x + back * 0.8, y - 0.012), (x + long, y + 0.022), (x + long, y + 0.042),
                (x - back, y + 0.042))  # fmt: skip
        if kind == "sandals":
            self.c.polygon(self.c.region("skin", self.skin, shade), *foot)
            self.c.line(leather, (x - back, y + 0.01), (x + long * 0.6, y + 0.014), 0.016)
            self.c.box(leather, x - back, y + 0.03, x + long, y + 0.046)
            return
        if kind == "boots":
            self.c.limb(leather, (x, y - 0.1, 0.034), (x, y, 0.034))
        self.c.polygon(leather, *foot)
        thick = {"sneakers": 0.016, "boots": 0.014, "loafers": 0.006}[kind]
        self.c.box(sole, x - back - 0.003, y + 0.044 - thick, x + long + 0.003, y + 0.046)

    def raised(self) -> bool:
        return self.a["umbrella_color"] != "none" or self.a["phone"] != "none"

    def raised_arm_behind(self) -> None:
        """Seen from behind, a hand held before the chest is hidden by the body."""
        if self.view == "back" and self.raised():
            self.arm(1)

    def arm_joints(self, arm: int) -> tuple[Point, Point, Point]:
        side = self.view == "side"
        start = (0.0 if side else arm * (self.shoulder - 0.016), 0.2)
        if arm == 1 and self.raised():
            return start, ((0.03, 0.335) if side else (start[0] + 0.035, 0.335)), self.raised_hand()
        if side:
            angle = -arm * self.swing * 1.1 * math.sin(self.phase)
            elbow = (0.15 * math.sin(angle), 0.2 + 0.15 * math.cos(angle))
            return start, elbow, (elbow[0] + 0.14 * math.sin(angle + 0.3), elbow[1] + 0.14 * math.cos(angle + 0.3))
        return start, (start[0] + arm * 0.028, 0.345), (start[0] + arm * 0.026, 0.485)

    def raised_hand(self) -> Point:
        return (0.14, 0.25) if self.view == "side" else (self.shoulder * 0.45, 0.25)

    def arm(self, arm: int) -> None:
        shoulder, elbow, hand = self.arm_joints(arm)
        width = 0.7 + 0.3 * self.build
        shade = 0.74 if arm == -1 and self.view == "side" else 0.9
        skin = self.c.region("skin", self.skin, shade)
        self.c.limb(skin, (*shoulder, 0.03 * width), (*elbow, 0.024 * width), (*hand, 0.019))
        self.c.ellipse(skin, *hand, 0.022, 0.024)
        reach = SLEEVES.get(self.top, 1.0)
        if reach:
            cloth = self.cloth(shade)
            bulk = 1.2 if self.top in ("coat", "jacket", "hoodie", "sweater") else 1.0
            self.c.ellipse(cloth, *shoulder, 0.034 * width * bulk, 0.034 * width * bulk)
            upper = min(1.0, reach / 0.5)
            mid = (shoulder[0] + upper * (elbow[0] - shoulder[0]), shoulder[1] + upper * (elbow[1] - shoulder[1]))
            self.c.limb(cloth, (*shoulder, 0.035 * width * bulk), (*mid, 0.029 * width * bulk))
            if reach == 1.0:
                wrist = (elbow[0] + 0.86 * (hand[0] - elbow[0]), elbow[1] + 0.86 * (hand[1] - elbow[1]))
                self.c.limb(cloth, (*elbow, 0.029 * width * bulk), (*wrist, 0.024 * width * bulk))
        if arm == 1 and self.a["phone"] != "none" and self.view != "back":
            self.c.box(self.c.region("phone", (20, 20, 24)), hand[0] - 0.022, hand[1] - 0.07, hand[0] + 0.03, hand[1])
            screen = self.c.region("phone", (170, 215, 245))
            self.c.box(screen, hand[0] - 0.012, hand[1] - 0.058, hand[0] + 0.02, hand[1] - 0.012)

    # Garments

    def cloth(self, shade: float = 1.0, patterned: bool = True) -> int:
        region = self.c.region("top", self.worn["top_color"], shade)
        if patterned:
            self.c.patterned.append(region)
        return region

    def lower_garment(self) -> None:
        kind = self.a["bottom_type"]
        if kind == "none":
            return
        cloth = self.c.region("bottom", self.worn["bottom_color"])
        hip = self.hip
        if kind == "skirt":
            self.c.polygon(cloth, (-hip * 0.9, 0.47), (hip * 0.9, 0.47), (hip * 1.5, 0.7), (-hip * 1.5, 0.7))
            fold = self.c.region("bottom", self.worn["bottom_color"], 0.75)
            for x in (-0.5, 0.3):
                self.c.line(fold, (hip * x, 0.52), (hip * x * 1.6, 0.7), 0.008)
        else:
            self.c.polygon(cloth, (-hip, 0.46), (hip, 0.46), (hip * 1.04, 0.54), (-hip * 1.04, 0.54))

    def torso(self) -> None:
        hem, flare = HEMS[self.top], FLARES.get(self.top, 1.0)
        s, w, hip = self.shoulder, self.waist, self.hip
        bulk = 1.12 if self.top in ("coat", "jacket", "hoodie") else 1.0
        slim = 0.78 if self.top == "vest" else 1.0
        edge = hip * flare * (1.04 if hem < 0.6 else 1.1)
        self.c.limb(self.c.region("skin", self.skin, 0.85), (0.0, 0.1, 0.03), (0.0, 0.17, 0.034))
        if self.top == "vest":
            self.c.ellipse(self.c.region("skin", self.skin), 0.0, 0.2, s * 0.98, 0.036)
        outline = [(s * 0.42 * slim, 0.158), (s * slim, 0.19), (s * 0.94 * slim, 0.27), (w * bulk, 0.37),
                   (hip * bulk, 0.5), (edge * bulk, hem)]  # fmt: skip
        outline = [point for point in outline if point[1] <= hem]
        self.c.polygon(self.cloth(), *outline, *((-x, y) for x, y in reversed(outline)))
        getattr(self, f"detail_{self.top.replace('-', '_')}", self.no_detail)(hem, edge * bulk)
        if self.a["top_pattern"] == "logo" and self.view == "front":
            logo = self.c.region("logo", self.worn["pattern_color"])
            self.c.ellipse(logo, 0.0, 0.275, 0.04, 0.04)
            self.c.box(logo, -0.052, 0.262, 0.052, 0.288)

    def no_detail(self, hem: float, edge: float) -> None:
        """T-shirts are plain but for the neck."""
        if self.view == "front":
            self.c.ellipse(self.c.region("skin", self.skin, 0.9), 0.0, 0.158, 0.034, 0.02)

    detail_t_shirt = no_detail

    def detail_vest(self, hem: float, edge: float) -> None:
        if self.view != "side":
            self.c.ellipse(self.c.region("skin", self.skin, 0.95), 0.0, 0.165, 0.042, 0.045)

    def detail_dress(self, hem: float, edge: float) -> None:
        self.no_detail(hem, edge)
        belt = self.cloth(0.6, patterned=False)
        self.c.box(belt, -self.waist * 1.02, 0.385, self.waist * 1.02, 0.402)

    def detail_shirt(self, hem: float, edge: float) -> None:
        dark = self.cloth(0.62, patterned=False)
        light = self.c.region("top", _blend(self.worn["top_color"], (255, 255, 255), 0.3))
        if self.view == "front":
            self.c.polygon(light, (-0.05, 0.148), (0.0, 0.2), (-0.052, 0.205))
            self.c.polygon(light, (0.05, 0.148), (0.0, 0.2), (0.052, 0.205))
            self.c.line(dark, (0.0, 0.2), (0.0, hem), 0.009)
        else:
            self.c.box(light, -0.042, 0.146, 0.042, 0.166)

    def detail_sweater(self, hem: float, edge: float) -> None:
        rib = self.cloth(0.72, patterned=False)
        self.c.box(rib, -edge, hem - 0.03, edge, hem)
        self.c.box(rib, -0.042, 0.142, 0.042, 0.166)

    def detail_hoodie(self, hem: float, edge: float) -> None:
        dark = self.cloth(0.7, patterned=False)
        self.c.box(dark, -edge, hem - 0.026, edge, hem)
        if self.view == "front":
            self.c.polygon(dark, (-0.05, 0.4), (0.05, 0.4), (0.072, 0.49), (-0.072, 0.49))
            self.c.ellipse(dark, 0.0, 0.155, 0.072, 0.032)
            self.c.ellipse(self.c.region("skin", self.skin, 0.8), 0.0, 0.148, 0.036, 0.026)
            for x in (-0.02, 0.02):
                self.c.line(self.c.region("top", (235, 235, 235)), (x, 0.18), (x, 0.25), 0.009)
        elif self.view == "back":
            self.c.ellipse(dark, 0.0, 0.185, 0.066, 0.06)
        else:
            self.c.ellipse(dark, -0.045, 0.165, 0.048, 0.042)

    def opening(self, hem: float, width: float) -> None:
        """A jacket or coat: open over an inner shirt, or closed with a zip; collar either way."""
        dark = self.cloth(0.6, patterned=False)
        inner = self.worn.get("inner_color")
        if self.view == "front" and inner is not None:
            shirt = self.c.region("inner", inner)
            low = min(hem, 0.52)
            self.c.polygon(shirt, (-0.036, 0.155), (0.036, 0.155), (width, low), (-width, low))
            if hem > low:
                self.c.polygon(self.c.region("bottom", self.worn["bottom_color"], 0.9), (-width, low), (width, low),
                               (width, hem), (-width, hem))  # fmt: skip
        elif self.view == "front":
            self.c.line(dark, (0.0, 0.16), (0.0, hem), 0.014)
        elif self.view == "side" and inner is not None:
            shirt = self.c.region("inner", inner)
            s, w = self.shoulder, self.waist
            self.c.polygon(shirt, (s * 0.4, 0.16), (s, 0.19), (w * 1.14, 0.37), (w * 1.14, 0.5), (w * 0.62, 0.5),
                           (w * 0.5, 0.3))  # fmt: skip
        if self.view == "front":
            self.c.polygon(dark, (-0.052, 0.145), (-0.03, 0.15), (-0.032, 0.25), (-0.066, 0.21))
            self.c.polygon(dark, (0.052, 0.145), (0.03, 0.15), (0.032, 0.25), (0.066, 0.21))
        else:
            self.c.box(dark, -0.046, 0.142, 0.046, 0.17)

    def detail_jacket(self, hem: float, edge: float) -> None:
        self.c.box(self.cloth(0.6, patterned=False), -edge, hem - 0.022, edge, hem)
        self.opening(hem, 0.05)

    def detail_coat(self, hem: float, edge: float) -> None:
        if self.view != "back":
            pocket = self.cloth(0.6, patterned=False)
            for x in (-0.62, 0.62):
                self.c.box(pocket, x * self.hip - 0.02, 0.47, x * self.hip + 0.02, 0.482)
        else:
            self.c.line(self.cloth(0.6, patterned=False), (0.0, 0.52), (0.0, hem), 0.012)
        self.opening(hem, 0.042)

    # Head

    def face_centre(self) -> Point:
        return (0.016 if self.view == "side" else 0.0), 0.086

    def hair_behind(self) -> None:
        """Seen from the front, long hair falls behind the neck before it falls over the shoulders."""
        if self.a["hair_length"] in ("long", "shoulder-length"):
            hair = self.c.region("hair", self.worn["hair_color"], 0.8)
            self.c.box(hair, -self.head, 0.07, self.head, 0.17)

    def head_and_hair(self) -> None:
        r, (fx, fy) = self.head, self.face_centre()
        face = self.c.region("face", self.skin)
        if self.a["hair_length"] == "bald":
            self.c.ellipse(face, fx * 0.5, 0.075, r * 0.86, r * 1.08)
        else:
            hair = self.c.region("hair", self.worn["hair_color"])
            self.c.ellipse(hair, -fx * 0.5, 0.07, r * (1.02 if self.view == "side" else 0.95), r * 1.08)
            if self.view == "back":
                self.c.limb(face, (0.0, 0.12, 0.026), (0.0, 0.15, 0.03))
                self.c.ellipse(hair, 0.0, 0.075, r * 0.92, r * 1.02)
            else:
                self.c.ellipse(face, fx, fy + 0.01, r * (0.74 if self.view == "side" else 0.78), r * 0.86)
        if self.view == "back":
            return
        dark = self.c.region("face", _shaded(self.skin, 0.35))
        if self.view == "front":
            for x in (-0.022, 0.022):
                self.c.ellipse(dark, x, fy - 0.004, 0.008, 0.006)
            self.c.line(self.c.region("face", (150, 60, 60)), (-0.016, fy + 0.036), (0.016, fy + 0.036), 0.008)
        else:
            self.c.polygon(face, (fx + r * 0.6, fy), (fx + r * 0.98, fy + 0.022), (fx + r * 0.6, fy + 0.03))
            self.c.ellipse(dark, fx + r * 0.45, fy - 0.004, 0.008, 0.006)

    def long_hair(self) -> None:
        length, r = self.a["hair_length"], self.head
        if length in ("bald", "short"):
            return
        hair = self.c.region("hair", self.worn["hair_color"], 0.9)
        if length in ("long", "shoulder-length"):
            end = 0.3 if length == "long" else 0.172
            if self.view == "front":
                for x in (-1, 1):
                    self.c.limb(hair, (x * r * 0.86, 0.06, 0.013), (x * r * 0.98, 0.12, 0.019), (x * r, end, 0.02))
            elif self.view == "back":
                self.c.limb(hair, (0.0, 0.07, r * 0.94), (0.0, end - 0.04, r * 1.0))
            else:
                self.c.limb(hair, (-r * 0.5, 0.06, r * 0.55), (-r * 0.75, end - 0.02, r * 0.5))
        elif length == "ponytail":
            x = {"front": r * 1.1, "back": 0.0, "side": -r * 1.35}[self.view]
            wide = 0.026 if self.view == "back" else 0.022
            self.c.limb(hair, (x * 0.75, 0.045, 0.016), (x * 1.05, 0.1, wide), (x * 1.1, 0.24, wide * 0.7))
        else:
            x, y = (-r * 0.95, 0.03) if self.view == "side" else (0.0, -0.006)
            self.c.ellipse(hair, x, y, 0.034, 0.032)

    def hat(self) -> None:
        kind, r = self.a["hat_type"], self.head
        if kind == "none":
            return
        cloth = self.c.region("hat", self.worn["hat_color"])
        dark = self.c.region("hat", self.worn["hat_color"], 0.7)
        self.c.dome(cloth, 0.0, 0.062, r * 1.08, r * 1.25)
        if kind == "beanie":
            self.c.box(dark, -r * 1.08, 0.04, r * 1.08, 0.066)
            self.c.ellipse(cloth, 0.0, -0.024, 0.022, 0.02)
        elif kind == "hat":
            self.c.ellipse(dark, 0.0, 0.056, r * 1.75, 0.02)
        elif self.view == "front":
            self.c.ellipse(dark, 0.0, 0.062, r * 0.95, 0.02)
        elif self.view == "side":
            self.c.polygon(dark, (r * 0.5, 0.044), (r * 1.95, 0.056), (r * 1.9, 0.07), (r * 0.4, 0.068))

    def glasses(self) -> None:
        kind = self.a["glasses"]
        if kind == "none" or self.view == "back":
            return
        fx, fy = self.face_centre()
        frame = self.c.region("glasses", (18, 18, 22))
        lens = frame if kind == "sunglasses" else self.c.region("glasses", _blend(self.skin, (230, 240, 250), 0.6))
        centres = (-0.026, 0.026) if self.view == "front" else (fx + self.head * 0.42,)
        for x in centres:
            self.c.ellipse(frame, x, fy, 0.024, 0.02)
            self.c.ellipse(lens, x, fy, 0.015, 0.012)
        far = -0.026 if self.view == "front" else fx - self.head * 0.4
        self.c.line(frame, (far, fy - 0.006), (centres[-1], fy - 0.006), 0.009)

    def scarf(self) -> None:
        if self.a["scarf_color"] == "none":
            return
        wool = self.c.region("scarf", self.worn["scarf_color"])
        fold = self.c.region("scarf", self.worn["scarf_color"], 0.75)
        wide = 0.056 if self.view == "side" else 0.066
        if self.view != "back":
            x = 0.03 if self.view == "front" else self.shoulder * 0.75
            self.c.limb(fold, (x, 0.17, 0.024), (x + 0.01, 0.31, 0.028))
        self.c.ellipse(wool, 0.0, 0.158, wide, 0.028)
        self.c.line(fold, (-wide * 0.8, 0.164), (wide * 0.8, 0.164), 0.008)

    # Things carried

    def leather(self, shade: float = 1.0) -> int:
        return self.c.region("bag", self.worn["bag_color"], shade)

    def backpack(self) -> None:
        dark = self.leather(0.65)
        if self.view == "back":
            w = self.shoulder * 0.86
            self.c.ellipse(self.leather(), 0.0, 0.215, w, 0.04)
            self.c.box(self.leather(), -w, 0.215, w, 0.43)
            self.c.box(dark, -w * 0.7, 0.33, w * 0.7, 0.41)
            self.c.line(dark, (-w, 0.25), (w, 0.25), 0.01)
        else:
            x = -self.shoulder - 0.04
            self.c.ellipse(self.leather(), x, 0.3, 0.075, 0.125)
            self.c.ellipse(dark, x - 0.03, 0.34, 0.04, 0.06)

    def straps(self) -> None:
        for x in (-1, 1):
            top, low = x * self.shoulder * 0.62, x * self.shoulder * 0.72
            self.c.limb(self.leather(0.9), (top, 0.17, 0.017), (low, 0.36, 0.016))
        self.c.box(self.leather(0.7), -self.waist * 1.16, 0.3, -self.waist * 0.95, 0.44)
        self.c.box(self.leather(0.7), self.waist * 0.95, 0.3, self.waist * 1.16, 0.44)

    def bag(self) -> None:
        kind = self.a["bag_type"]
        if kind == "handbag":
            hand = self.arm_joints(1 if self.view == "side" and not self.raised() else -1)[2]
            x, y = hand
            strap = self.leather(0.6)
            self.c.line(strap, (x - 0.035, y + 0.06), hand, 0.012)
            self.c.line(strap, (x + 0.035, y + 0.06), hand, 0.012)
            self.c.polygon(self.leather(), (x - 0.052, y + 0.05), (x + 0.052, y + 0.05), (x + 0.064, y + 0.145),
                           (x - 0.064, y + 0.145))  # fmt: skip
            self.c.box(strap, x - 0.054, y + 0.05, x + 0.054, y + 0.066)
        elif kind == "shoulder-bag":
            s = self.shoulder
            self.c.line(self.leather(0.8), (s * 0.6, 0.17), (-self.hip * 1.05, 0.45), 0.022)
            x = -self.hip * 1.1
            self.c.box(self.leather(), x - 0.062, 0.43, x + 0.05, 0.53)
            self.c.box(self.leather(0.7), x - 0.062, 0.43, x + 0.05, 0.465)
        elif self.view == "side" and kind == "backpack":
            self.c.line(self.leather(0.85), (self.shoulder * 0.3, 0.17), (-self.shoulder * 0.2, 0.34), 0.022)

    def suitcase(self) -> None:
        x = -0.17 if self.view == "side" else -self.hip - 0.085
        self.c.line(self.leather(0.5), (x, 0.5), (x, 0.7), 0.014)
        self.c.box(self.leather(0.5), x - 0.03, 0.49, x + 0.03, 0.505)
        self.c.box(self.leather(), x - 0.075, 0.68, x + 0.075, 0.95)
        self.c.box(self.leather(0.7), x - 0.075, 0.77, x + 0.075, 0.785)
        self.c.box(self.leather(0.7), x - 0.075, 0.86, x + 0.075, 0.875)
        for wheel in (-0.05, 0.05):
            self.c.ellipse(self.leather(0.3), x + wheel, 0.96, 0.016, 0.016)

    def umbrella(self) -> None:
        if self.a["umbrella_color"] == "none":
            return
        colour = self.worn["umbrella_color"]
        x, y = self.raised_hand()
        self.c.line(self.c.region("umbrella", (60, 60, 64)), (x, y + 0.04), (x, -0.12), 0.012)
        self.c.dome(self.c.region("umbrella", colour), x * 0.6, 0.0, 0.27, 0.17)
        self.c.dome(self.c.region("umbrella", colour, 0.8), x * 0.6, 0.0, 0.1, 0.17)
        self.c.dome(self.c.region("umbrella", colour), x * 0.6, 0.0, 0.05, 0.17)


def _blend(a: RGB, b: RGB, share: float) -> RGB:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


def _smooth_noise(rng: np.random.Generator, h: int, w: int, cells: int) -> NDArray[np.float32]:
    """Values of about -1..1 that vary over a `cells`-th of the width."""
    coarse = rng.uniform(0, 255, (2 * cells, cells)).astype(np.uint8)
    fine = Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)
    return np.asarray(fine, np.float32) / 127.5 - 1.0


def _textured(
    canvas: _Canvas, index: NDArray[np.uint8], second: RGB | None, pattern: str, rng: np.random.Generator
) -> Image.Image:
    """Regions to colours: pattern, folds, a light from one side, dark seams where regions meet."""
    h, w = index.shape
    palette = np.array([rgb for _, rgb in canvas.regions], np.float32)
    picture = palette[index]
    if second is not None and pattern in ("striped", "checked"):
        y = ((np.arange(h, dtype=np.float32) - canvas.top) / canvas.unit)[:, None]
        x = ((np.arange(w, dtype=np.float32) - canvas.centre) / canvas.unit)[None, :]
        on = y % 0.064 < 0.03 if pattern == "striped" else (y % 0.062 < 0.022) | (x % 0.062 < 0.022)
        picture[np.isin(index, canvas.patterned) & on] = second
    x_ramp = np.linspace(-1, 1, w, dtype=np.float32)[None, :] * np.float32(rng.uniform(-0.12, 0.12))
    light = 1.0 + x_ramp + 0.1 * _smooth_noise(rng, h, w, 7)
    light[:, 1:][index[:, 1:] != index[:, :-1]] *= 0.72
    light[1:][index[1:] != index[:-1]] *= 0.72
    return Image.fromarray(np.clip(picture * light[..., None], 0, 255).astype(np.uint8))


def _muted(rng: np.random.Generator, low: float, high: float) -> tuple[int, int, int]:
    """A colour as streets have: hardly saturated."""
    level = rng.uniform(low, high)
    r, g, b = (int(np.clip(level + rng.normal(0, 11), 0, 255)) for _ in range(3))
    return r, g, b


def _scene(camera: np.random.Generator, rng: np.random.Generator, h: int, w: int) -> Image.Image:
    """The place a camera watches (its own draw) and who and what passes by (the image's draw)."""
    kind = str(camera.choice(["street", "wall", "tiles", "shop", "park"]))
    horizon = int(h * camera.uniform(0.12, 0.62))
    ground = (84, 112, 66) if kind == "park" else _muted(camera, 90, 175)
    image = Image.new("RGB", (w, h), _muted(camera, 80, 200))
    ink = ImageDraw.Draw(image)
    if kind == "wall":
        for row, y in enumerate(range(0, horizon, max(4, h // 16))):
            ink.line((0, y, w, y), fill=_muted(camera, 70, 110), width=2)
            for x in range((row % 2) * w // 8, w, w // 4):
                ink.line((x, y, x, y + h // 16), fill=_muted(camera, 70, 110))
    elif kind == "shop":
        for x in range(int(camera.uniform(-w / 3, 0)), w, w // 3):
            ink.rectangle((x, h // 30, x + w // 4, horizon - h // 20), fill=_muted(camera, 40, 220))
    elif kind == "park":
        for _ in range(7):
            x, y, r = camera.uniform(0, w), camera.uniform(0, horizon + 1), camera.uniform(w / 8, w / 3)
            green = int(camera.uniform(60, 130))
            ink.ellipse((x - r, y - r, x + r, y + r), fill=(green // 2, green, green // 2))
    ink.rectangle((0, horizon, w, h), fill=ground)
    if kind == "tiles":
        seam = _muted(camera, 70, 130)
        for step in range(0, h, max(6, h // 14)):
            ink.line((0, horizon + step, w, horizon + step), fill=seam)
        for x in range(-w, 2 * w, w // 4):
            ink.line((w // 2 + (x - w // 2) // 2, horizon, x, h), fill=seam)
    elif kind == "street":
        edge = int(camera.uniform(0.2, 0.8) * w)
        ink.polygon([(edge, horizon), (edge + w // 12, horizon), (edge + w // 2, h), (edge + w // 4, h)],
                    fill=_muted(camera, 190, 225))  # fmt: skip
    _clutter(ink, rng, horizon, h, w)
    level = 1.0 + 0.09 * _smooth_noise(rng, h, w, 5) + np.linspace(-0.08, 0.08, h, dtype=np.float32)[:, None]
    pixels = np.asarray(image, np.float32) * level[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(h / 256))


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
    draw = rng.random()
    if draw >= 0.16:
        return np.zeros((h, w), np.bool_)
    for ink, bush, plain in ((ImageDraw.Draw(picture), (52, 88, 44), _muted(rng, 60, 150)),
                             (ImageDraw.Draw(cover), 255, 255)):  # fmt: skip
        place = np.random.default_rng(int(draw * 1e9))  # the same shapes in both images
        if draw < 0.05:
            x = w * place.uniform(0.1, 0.85)
            ink.rectangle((x, 0, x + w * 0.09, h), fill=plain)
        elif draw < 0.11:
            for _ in range(6):
                x, y, r = w * place.uniform(0, 0.6), h * place.uniform(0.86, 1), w * place.uniform(0.08, 0.2)
                ink.ellipse((x - r, y - r, x + r, y + r), fill=bush)
        else:
            x = place.choice([-0.1, 0.5]) * w
            ink.rectangle((x, h * place.uniform(0.72, 0.85), x + w * 0.6, h), fill=plain)
    return np.asarray(cover) > 0


def _film(image: Image.Image, camera: np.random.Generator, rng: np.random.Generator) -> Image.Image:
    """What the camera makes of it: resolution, blur, light, colour cast, contrast and noise."""
    w, h = image.size
    cast = 1.0 + camera.uniform(-0.07, 0.07, 3)
    gain, contrast = camera.uniform(0.78, 1.12) * rng.uniform(0.93, 1.07), camera.uniform(0.82, 1.1)
    blur, grain = camera.uniform(0.0, 0.7) * h / 128, camera.uniform(2.0, 7.0)
    if rng.random() < 0.2:
        shrink = rng.uniform(0.6, 0.85)
        image = image.resize((max(1, int(w * shrink)), max(1, int(h * shrink))), Image.Resampling.BILINEAR)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(image, np.float32) * (cast * gain).astype(np.float32)
    pixels = (pixels - 118.0) * np.float32(contrast) + 118.0
    pixels += rng.normal(0.0, grain, (h, w, 1)).astype(np.float32) + rng.normal(0.0, 1.5, (h, w, 3)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
