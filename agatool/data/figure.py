"""Draws a person's figure: shapes with region numbers, each region with a body part and a colour.

Lengths are fractions of the person's height: x to the side the person faces, y downwards from the top of the head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

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
# The attribute that gives a part its colour.
COLOR_OF = {"skin": "skin", "face": "skin", "hair": "hair_color", "top": "top_color", "inner": "inner_color",
            "logo": "pattern_color", "bottom": "bottom_color", "shoes": "shoe_color", "bag": "bag_color",
            "hat": "hat_color", "umbrella": "umbrella_color", "scarf": "scarf_color"}  # fmt: skip
VIEWS = ("front", "back", "side")

# How far a top reaches down, how wide its hem is (times the hips), and how much of the arm it covers.
HEMS = {"t-shirt": 0.505, "shirt": 0.525, "sweater": 0.515, "hoodie": 0.535, "jacket": 0.53, "coat": 0.715,
        "vest": 0.5, "dress": 0.7}  # fmt: skip
RUBBER: RGB = (232, 232, 228)
FRAME: RGB = (18, 18, 22)
SCREEN: RGB = (170, 215, 245)
STEEL: RGB = (60, 60, 64)
LIPS: RGB = (150, 60, 60)
PALE: RGB = (235, 235, 245)  # what jeans fade to and lenses reflect
FLARES = {"coat": 1.15, "dress": 1.55, "hoodie": 1.08, "sweater": 1.04}
SLEEVES = {"vest": 0.0, "dress": 0.35, "t-shirt": 0.5}
BUILDS = {"slim": 0.84, "average": 1.0, "heavy": 1.3}
STATURES = {"short": (0.91, 1.1), "average": (0.97, 1.0), "tall": (1.02, 0.92)}  # crop height, head size


class Canvas:
    """An image of region numbers; every region has a name (a part, or "logo") and a colour."""

    def __init__(self, width: int, height: int, centre: float, top: float, unit: float, sign: int) -> None:
        self.image = Image.new("L", (width, height))
        self.ink = ImageDraw.Draw(self.image)
        self.regions: list[tuple[str, RGB]] = [("background", (0.0, 0.0, 0.0))]
        self.patterned: list[int] = []
        self.centre, self.top, self.unit, self.sign = centre, top, unit, sign

    def region(self, name: str, rgb: RGB, shade: float = 1.0) -> int:
        self.regions.append((name, (rgb[0] * shade, rgb[1] * shade, rgb[2] * shade)))
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
        arc = [math.pi * step / 16 for step in range(17)]
        self.polygon(region, *((x + rx * math.cos(angle), y - ry * math.sin(angle)) for angle in arc))

    def line(self, region: int, a: Point, b: Point, thickness: float) -> None:
        pixels = max(1, round(thickness * self.unit))
        self.ink.line([self.pixel(a), self.pixel(b)], fill=region, width=pixels)

    def limb(self, region: int, *joints: Joint) -> None:
        """A chain of tapered bones with round joints."""
        for (x0, y0, w0), (x1, y1, w1) in itertools.pairwise(joints):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            nx, ny = (y1 - y0) / length, -(x1 - x0) / length
            self.polygon(
                region,
                (x0 + nx * w0, y0 + ny * w0),
                (x1 + nx * w1, y1 + ny * w1),
                (x1 - nx * w1, y1 - ny * w1),
                (x0 - nx * w0, y0 - ny * w0),
            )
            self.ellipse(region, x1, y1, w1, w1)


class Figure:
    """Draws the person back to front onto a canvas."""

    def __init__(
        self,
        canvas: Canvas,
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

    def paint(self, part: str, shade: float = 1.0) -> int:
        """A new region of that part in the colour in which this person has it."""
        return self.c.region(part, self.worn[COLOR_OF[part]], shade)

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
        skin = self.paint("skin", shade)
        self.c.limb(skin, (*hip, 0.046 * width), (*knee, 0.032 * width), (*ankle, 0.02))
        self.shoe(ankle, shade)
        kind = self.a["bottom_type"]
        if kind in ("trousers", "jeans"):
            cloth = self.paint("bottom", shade)
            wide = 1.12 if kind == "trousers" else 0.98
            thin = 0.04 if kind == "trousers" else 0.029
            self.c.limb(cloth, (*hip, 0.052 * width * wide), (*knee, 0.041 * width * wide),
                        (ankle[0], ankle[1] - 0.004, thin * wide))  # fmt: skip
            self.denim(hip, knee, ankle, shade) if kind == "jeans" else self.crease(knee, ankle, shade)
        elif kind == "shorts":
            cloth = self.paint("bottom", shade)
            end = (hip[0] + 0.72 * (knee[0] - hip[0]), hip[1] + 0.72 * (knee[1] - hip[1]))
            self.c.limb(cloth, (*hip, 0.054 * width), (*end, 0.052 * width))

    def denim(self, hip: Point, knee: Point, ankle: Point, shade: float) -> None:
        """Jeans fade along the thigh, show a seam and are rolled up at the ankle."""
        blue = self.worn["bottom_color"]
        middle = ((hip[0] + knee[0]) / 2, (hip[1] + knee[1]) / 2)
        self.c.limb(self.c.region("bottom", _blend(blue, PALE, 0.1), shade), (*middle, 0.014), (*knee, 0.016))
        cuff = self.c.region("bottom", _blend(blue, PALE, 0.4), shade)
        self.c.box(cuff, ankle[0] - 0.036, ankle[1] - 0.032, ankle[0] + 0.036, ankle[1] - 0.006)
        if self.view == "back":
            self.c.box(self.paint("bottom", shade * 0.75), hip[0] - 0.026, 0.53, hip[0] + 0.026, 0.575)

    def crease(self, knee: Point, ankle: Point, shade: float) -> None:
        dark = self.paint("bottom", shade * 0.75)
        self.c.line(dark, (knee[0], knee[1] - 0.1), ankle, 0.008)

    def shoe(self, ankle: Point, shade: float) -> None:
        kind, (x, y) = self.a["shoe_type"], ankle
        leather = self.paint("shoes", shade)
        sole = self.c.region("shoes", RUBBER, shade) if kind == "sneakers" else self.paint("shoes", shade * 0.6)
        long = 0.088 if self.view == "side" else 0.036
        back = 0.026 if self.view == "side" else 0.036
        foot = ((x - back, y - 0.012), (x + back * 0.8, y - 0.012), (x + long, y + 0.022), (x + long, y + 0.042),
                (x - back, y + 0.042))  # fmt: skip
        if kind == "sandals":
            self.c.polygon(self.paint("skin", shade), *foot)
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
        skin = self.paint("skin", shade)
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
            self.c.box(self.c.region("phone", FRAME), hand[0] - 0.022, hand[1] - 0.07, hand[0] + 0.03, hand[1])
            screen = self.c.region("phone", SCREEN)
            self.c.box(screen, hand[0] - 0.012, hand[1] - 0.058, hand[0] + 0.02, hand[1] - 0.012)

    # Garments

    def cloth(self, shade: float = 1.0, patterned: bool = True) -> int:
        region = self.paint("top", shade)
        if patterned:
            self.c.patterned.append(region)
        return region

    def lower_garment(self) -> None:
        kind = self.a["bottom_type"]
        if kind == "none":
            return
        cloth = self.paint("bottom")
        hip = self.hip
        if kind == "skirt":
            self.c.polygon(cloth, (-hip * 0.9, 0.47), (hip * 0.9, 0.47), (hip * 1.5, 0.7), (-hip * 1.5, 0.7))
            fold = self.paint("bottom", 0.75)
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
        self.c.limb(self.paint("skin", 0.85), (0.0, 0.1, 0.03), (0.0, 0.17, 0.034))
        if self.top == "vest":
            self.c.ellipse(self.paint("skin"), 0.0, 0.2, s * 0.98, 0.036)
        outline = [(s * 0.42 * slim, 0.158), (s * slim, 0.19), (s * 0.94 * slim, 0.27), (w * bulk, 0.37),
                   (hip * bulk, 0.5), (edge * bulk, hem)]  # fmt: skip
        outline = [point for point in outline if point[1] <= hem]
        self.c.polygon(self.cloth(), *outline, *((-x, y) for x, y in reversed(outline)))
        getattr(self, f"detail_{self.top.replace('-', '_')}", self.no_detail)(hem, edge * bulk)
        if self.a["top_pattern"] == "logo" and self.view == "front":
            logo = self.paint("logo")
            self.c.ellipse(logo, 0.0, 0.275, 0.04, 0.04)
            self.c.box(logo, -0.052, 0.262, 0.052, 0.288)

    def no_detail(self, hem: float, edge: float) -> None:
        """T-shirts are plain but for the neck."""
        if self.view == "front":
            self.c.ellipse(self.paint("skin", 0.9), 0.0, 0.158, 0.034, 0.02)

    detail_t_shirt = no_detail

    def detail_vest(self, hem: float, edge: float) -> None:
        if self.view != "side":
            self.c.ellipse(self.paint("skin", 0.95), 0.0, 0.165, 0.042, 0.045)

    def detail_dress(self, hem: float, edge: float) -> None:
        self.no_detail(hem, edge)
        belt = self.cloth(0.6, patterned=False)
        self.c.box(belt, -self.waist * 1.02, 0.385, self.waist * 1.02, 0.402)

    def detail_shirt(self, hem: float, edge: float) -> None:
        dark = self.cloth(0.62, patterned=False)
        light = self.c.region("top", _blend(self.worn["top_color"], PALE, 0.3))
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
            self.c.ellipse(self.paint("skin", 0.8), 0.0, 0.148, 0.036, 0.026)
            for x in (-0.02, 0.02):
                self.c.line(self.c.region("top", RUBBER), (x, 0.18), (x, 0.25), 0.009)
        elif self.view == "back":
            self.c.ellipse(dark, 0.0, 0.185, 0.066, 0.06)
        else:
            self.c.ellipse(dark, -0.045, 0.165, 0.048, 0.042)

    def opening(self, hem: float, width: float) -> None:
        """A jacket or coat: open over an inner shirt, or closed with a zip; collar either way."""
        dark = self.cloth(0.6, patterned=False)
        opened = "inner_color" in self.worn
        if self.view == "front" and opened:
            shirt = self.paint("inner")
            low = min(hem, 0.52)
            self.c.polygon(shirt, (-0.036, 0.155), (0.036, 0.155), (width, low), (-width, low))
            if hem > low:
                self.c.polygon(self.paint("bottom", 0.9), (-width, low), (width, low),
                               (width, hem), (-width, hem))  # fmt: skip
        elif self.view == "front":
            self.c.line(dark, (0.0, 0.16), (0.0, hem), 0.014)
        elif self.view == "side" and opened:
            shirt = self.paint("inner")
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
            hair = self.paint("hair", 0.8)
            self.c.box(hair, -self.head, 0.07, self.head, 0.17)

    def head_and_hair(self) -> None:
        r, (fx, fy) = self.head, self.face_centre()
        face = self.paint("face")
        if self.a["hair_length"] == "bald":
            self.c.ellipse(face, fx * 0.5, 0.075, r * 0.86, r * 1.08)
        else:
            hair = self.paint("hair")
            self.c.ellipse(hair, -fx * 0.5, 0.07, r * (1.02 if self.view == "side" else 0.95), r * 1.08)
            if self.view == "back":
                self.c.limb(face, (0.0, 0.12, 0.026), (0.0, 0.15, 0.03))
                self.c.ellipse(hair, 0.0, 0.075, r * 0.92, r * 1.02)
            else:
                self.c.ellipse(face, fx, fy + 0.01, r * (0.74 if self.view == "side" else 0.78), r * 0.86)
        if self.view == "back":
            return
        dark = self.paint("face", 0.35)
        if self.view == "front":
            for x in (-0.022, 0.022):
                self.c.ellipse(dark, x, fy - 0.004, 0.008, 0.006)
            self.c.line(self.c.region("face", LIPS), (-0.016, fy + 0.036), (0.016, fy + 0.036), 0.008)
        else:
            self.c.polygon(face, (fx + r * 0.6, fy), (fx + r * 0.98, fy + 0.022), (fx + r * 0.6, fy + 0.03))
            self.c.ellipse(dark, fx + r * 0.45, fy - 0.004, 0.008, 0.006)

    def long_hair(self) -> None:
        length, r = self.a["hair_length"], self.head
        if length in ("bald", "short"):
            return
        hair = self.paint("hair", 0.9)
        if length in ("long", "shoulder-length"):
            end = 0.3 if length == "long" else 0.172
            if self.view == "front":
                for x in (-r, r):
                    self.c.limb(hair, (x * 0.86, 0.06, 0.013), (x * 0.98, 0.12, 0.019), (x, end, 0.02))
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
        cloth = self.paint("hat")
        dark = self.paint("hat", 0.7)
        self.c.dome(cloth, 0.0, 0.062, r * 1.08, r * 1.32)
        if kind == "beanie":
            self.c.box(dark, -r * 1.08, 0.04, r * 1.08, 0.066)
            self.c.ellipse(cloth, 0.0, -0.028, 0.018, 0.017)
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
        frame = self.c.region("glasses", FRAME)
        lens = frame if kind == "sunglasses" else self.c.region("glasses", _blend(self.worn["skin"], PALE, 0.6))
        centres = (-0.026, 0.026) if self.view == "front" else (fx + self.head * 0.42,)
        for x in centres:
            self.c.ellipse(frame, x, fy, 0.024, 0.02)
            self.c.ellipse(lens, x, fy, 0.015, 0.012)
        far = -0.026 if self.view == "front" else fx - self.head * 0.4
        self.c.line(frame, (far, fy - 0.006), (centres[-1], fy - 0.006), 0.009)

    def scarf(self) -> None:
        if self.a["scarf_color"] == "none":
            return
        wool = self.paint("scarf")
        fold = self.paint("scarf", 0.75)
        wide = 0.056 if self.view == "side" else 0.066
        if self.view != "back":
            x = 0.03 if self.view == "front" else self.shoulder * 0.75
            self.c.limb(fold, (x, 0.17, 0.024), (x + 0.01, 0.31, 0.028))
        self.c.ellipse(wool, 0.0, 0.158, wide, 0.028)
        self.c.line(fold, (-wide * 0.8, 0.164), (wide * 0.8, 0.164), 0.008)

    # Things carried

    def backpack(self) -> None:
        dark = self.paint("bag", 0.65)
        if self.view == "back":
            w = self.shoulder * 0.86
            self.c.ellipse(self.paint("bag"), 0.0, 0.215, w, 0.04)
            self.c.box(self.paint("bag"), -w, 0.215, w, 0.43)
            self.c.box(dark, -w * 0.7, 0.33, w * 0.7, 0.41)
            self.c.line(dark, (-w, 0.25), (w, 0.25), 0.01)
        else:
            x = -self.shoulder - 0.04
            self.c.ellipse(self.paint("bag"), x, 0.3, 0.075, 0.125)
            self.c.ellipse(dark, x - 0.03, 0.34, 0.04, 0.06)

    def straps(self) -> None:
        for x in (-self.shoulder, self.shoulder):
            self.c.limb(self.paint("bag", 0.9), (x * 0.62, 0.17, 0.017), (x * 0.72, 0.36, 0.016))
        self.c.box(self.paint("bag", 0.7), -self.waist * 1.16, 0.3, -self.waist * 0.95, 0.44)
        self.c.box(self.paint("bag", 0.7), self.waist * 0.95, 0.3, self.waist * 1.16, 0.44)

    def bag(self) -> None:
        kind = self.a["bag_type"]
        if kind == "handbag":
            hand = self.arm_joints(1 if self.view == "side" and not self.raised() else -1)[2]
            x, y = hand
            strap = self.paint("bag", 0.6)
            self.c.line(strap, (x - 0.035, y + 0.06), hand, 0.012)
            self.c.line(strap, (x + 0.035, y + 0.06), hand, 0.012)
            self.c.polygon(self.paint("bag"), (x - 0.052, y + 0.05), (x + 0.052, y + 0.05), (x + 0.064, y + 0.145),
                           (x - 0.064, y + 0.145))  # fmt: skip
            self.c.box(strap, x - 0.054, y + 0.05, x + 0.054, y + 0.066)
        elif kind == "shoulder-bag":
            s = self.shoulder
            self.c.line(self.paint("bag", 0.8), (s * 0.6, 0.17), (-self.hip * 1.05, 0.45), 0.022)
            x = -self.hip * 1.1
            self.c.box(self.paint("bag"), x - 0.062, 0.43, x + 0.05, 0.53)
            self.c.box(self.paint("bag", 0.7), x - 0.062, 0.43, x + 0.05, 0.465)
        elif self.view == "side" and kind == "backpack":
            self.c.line(self.paint("bag", 0.85), (self.shoulder * 0.3, 0.17), (-self.shoulder * 0.2, 0.34), 0.022)

    def suitcase(self) -> None:
        x = -0.17 if self.view == "side" else -self.hip - 0.085
        self.c.line(self.paint("bag", 0.5), (x, 0.5), (x, 0.7), 0.014)
        self.c.box(self.paint("bag", 0.5), x - 0.03, 0.49, x + 0.03, 0.505)
        self.c.box(self.paint("bag"), x - 0.075, 0.68, x + 0.075, 0.95)
        self.c.box(self.paint("bag", 0.7), x - 0.075, 0.77, x + 0.075, 0.785)
        self.c.box(self.paint("bag", 0.7), x - 0.075, 0.86, x + 0.075, 0.875)
        for wheel in (-0.05, 0.05):
            self.c.ellipse(self.paint("bag", 0.3), x + wheel, 0.96, 0.016, 0.016)

    def umbrella(self) -> None:
        if self.a["umbrella_color"] == "none":
            return
        x, y = self.raised_hand()
        self.c.line(self.c.region("umbrella", STEEL), (x, y + 0.04), (x, -0.12), 0.012)
        self.c.dome(self.paint("umbrella"), x * 0.6, 0.0, 0.27, 0.17)
        self.c.dome(self.paint("umbrella", 0.8), x * 0.6, 0.0, 0.1, 0.17)
        self.c.dome(self.paint("umbrella"), x * 0.6, 0.0, 0.05, 0.17)


def _blend(a: RGB, b: RGB, share: float) -> RGB:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share
