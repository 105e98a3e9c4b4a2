"""Pictures of the playground: rendered scenes and tinted handwritten digits.

Every picture is a pure function of a dict of named values and a random generator, so that a world, a test and the
build script draw from one place. The visual vocabulary is public knowledge that both playground models have learned;
only a world's private words (see `worlds.py`) are new to them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["ATTRIBUTES", "DIGITS", "FRAMES", "SIZE", "digit_images", "render_digit", "render_group", "render_scene"]

#: Side of a rendered picture in pixels. The playground models' processors resize it to 32.
SIZE = 96
_SUPERSAMPLING = 2

#: What can be asked of a scene: attribute -> its values. No two attributes share a value.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "cross", "ring", "star"),
    "colour": ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"),
    "background": ("sand", "meadow", "night", "sea", "snow", "dusk"),
    "size": ("small", "medium", "large"),
    "position": ("centre", "left", "right", "upper", "lower"),
    "count": ("one", "two", "three", "four"),
}

#: How a handwritten digit is named; a scene's count is spelt out instead, so the two never share a value.
DIGITS = tuple("0123456789")

#: Frames, the visible mark of a site: name -> (colour, dashed).
FRAMES: dict[str, tuple[tuple[int, int, int], bool]] = {
    f"{'dashed' if dashed else 'plain'} {name}": (colour, dashed)
    for dashed in (False, True)
    for name, colour in {
        "gold": (212, 160, 23),
        "silver": (170, 178, 189),
        "coral": (240, 98, 94),
        "jade": (20, 150, 105),
        "violet": (122, 60, 200),
        "black": (15, 15, 18),
    }.items()
}

_COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 165, 45),
    "blue": (35, 75, 225),
    "yellow": (245, 220, 40),
    "purple": (150, 45, 180),
    "orange": (245, 135, 20),
    "cyan": (45, 210, 225),
    "white": (250, 250, 250),
}
_BACKGROUNDS = {
    "sand": (214, 190, 140),
    "meadow": (110, 150, 80),
    "night": (28, 30, 62),
    "sea": (60, 120, 150),
    "snow": (205, 220, 234),
    "dusk": (140, 90, 110),
}
_RADII = {"small": 0.13, "medium": 0.185, "large": 0.245}
_CENTRES = {
    "centre": (0.5, 0.56),
    "left": (0.33, 0.56),
    "right": (0.67, 0.56),
    "upper": (0.5, 0.42),
    "lower": (0.5, 0.70),
}
_FRAME_WIDTH = 0.0625
#: Where the objects of a group stand.
CELLS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator, spread: float = 12.0) -> tuple[int, int, int]:
    r, g, b = np.clip(np.asarray(colour) + rng.normal(0, spread, 3), 0, 255).astype(int)
    return int(r), int(g), int(b)


def _polygon(centre: tuple[float, float], radius: float, corners: int, turn: float, inner: float = 1.0):
    """Corners of a regular polygon, or of a star where every second corner lies at `inner` times the radius."""
    cx, cy = centre
    steps = corners * (2 if inner < 1.0 else 1)
    points = []
    for i in range(steps):
        r = radius * (inner if inner < 1.0 and i % 2 else 1.0)
        angle = turn + 2 * math.pi * i / steps - math.pi / 2
        points.append((cx + r * math.cos(angle), cy + r * math.sin(angle)))
    return points


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, centre, radius: float, colour, under, turn: float) -> None:
    cx, cy = centre
    box = (cx - radius, cy - radius, cx + radius, cy + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, fill=colour)
        hole = radius * 0.52
        draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=under)
    elif shape == "square":
        draw.polygon(_polygon(centre, radius * 1.2, 4, turn + math.pi / 4), fill=colour)
    elif shape == "triangle":
        draw.polygon(_polygon(centre, radius * 1.2, 3, turn), fill=colour)
    elif shape == "star":
        draw.polygon(_polygon(centre, radius * 1.25, 5, turn, inner=0.42), fill=colour)
    elif shape == "cross":
        arm = radius * 0.36
        for along in (0.0, math.pi / 2):
            c, s = math.cos(turn + along), math.sin(turn + along)
            corners = [(-1.1 * radius, -arm), (1.1 * radius, -arm), (1.1 * radius, arm), (-1.1 * radius, arm)]
            draw.polygon([(cx + x * c - y * s, cy + x * s + y * c) for x, y in corners], fill=colour)
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {ATTRIBUTES['shape']}")


def _draw_frame(draw: ImageDraw.ImageDraw, frame: str, side: int, rng: np.random.Generator) -> None:
    colour, dashed = FRAMES[frame]
    colour = _jitter(colour, rng, 6.0)
    width = round(_FRAME_WIDTH * side)
    box: tuple[float, float, float, float]
    for box in (
        (0, 0, side, width),
        (0, side - width, side, side),
        (0, 0, width, side),
        (side - width, 0, side, side),
    ):
        draw.rectangle(box, fill=colour)
    if dashed:
        gap = side / 6
        for i in range(3):
            a = (2 * i + 0.5) * gap
            b = a + gap
            for box in ((a, 0, b, width), (a, side - width, b, side), (0, a, width, b), (side - width, a, side, b)):
                draw.rectangle(box, fill=(250, 250, 250))


def _finish(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels + rng.normal(0, 5.0, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def render_scene(values: Mapping[str, str], frame: str, rng: np.random.Generator) -> Image.Image:
    """Draw one scene.

    Args:
        values: one value for each attribute of `ATTRIBUTES`.
        frame: a key of `FRAMES`.
        rng: small variations (tilt, tint, place, noise) come from it.

    Returns:
        RGB picture of `SIZE` x `SIZE` pixels.

    Raises:
        KeyError: an attribute is missing or a value unknown.
    """
    side = SIZE * _SUPERSAMPLING
    under = _jitter(_BACKGROUNDS[values["background"]], rng)
    canvas = Image.new("RGB", (side, side), under)
    draw = ImageDraw.Draw(canvas)
    x, y = _CENTRES[values["position"]]
    centre = ((x + rng.uniform(-0.03, 0.03)) * side, (y + rng.uniform(-0.03, 0.03)) * side)
    radius = _RADII[values["size"]] * rng.uniform(0.92, 1.08) * side
    colour = _jitter(_COLOURS[values["colour"]], rng)
    _draw_shape(draw, values["shape"], centre, radius, colour, under, rng.uniform(-0.2, 0.2))
    _draw_frame(draw, frame, side, rng)
    dot, top = 0.05 * side, 0.14 * side
    count = ATTRIBUTES["count"].index(values["count"]) + 1
    for i in range(count):
        cx = (0.5 + (i - (count - 1) / 2) * 0.19 + rng.uniform(-0.01, 0.01)) * side
        draw.ellipse((cx - dot, top - dot, cx + dot, top + dot), fill=(12, 12, 12), outline=(245, 245, 245), width=2)
    return _finish(canvas, rng)


def render_group(
    objects: Sequence[Mapping[str, str] | None], background: str, rng: np.random.Generator
) -> Image.Image:
    """Draw up to four objects on a background, without a frame.

    Args:
        objects: for each of `CELLS`, None where it is empty, or an object's shape and colour.
        background: a value of that attribute.
        rng: small variations come from it.

    Returns:
        RGB picture of `SIZE` x `SIZE` pixels.
    """
    side = SIZE * _SUPERSAMPLING
    under = _jitter(_BACKGROUNDS[background], rng)
    canvas = Image.new("RGB", (side, side), under)
    draw = ImageDraw.Draw(canvas)
    for (x, y), thing in zip(CELLS, objects, strict=True):
        if thing is not None:
            centre = ((x + rng.uniform(-0.03, 0.03)) * side, (y + rng.uniform(-0.03, 0.03)) * side)
            radius = 0.165 * rng.uniform(0.92, 1.08) * side
            colour = _jitter(_COLOURS[thing["colour"]], rng)
            _draw_shape(draw, thing["shape"], centre, radius, colour, under, rng.uniform(-0.2, 0.2))
    return _finish(canvas, rng)


@functools.cache
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits that scikit-learn ships: images (N, 8, 8) in [0, 16], labels (N,) in 0..9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


def render_digit(index: int, colour: str, background: str, frame: str, rng: np.random.Generator) -> Image.Image:
    """Draw handwritten digit number `index` (0..1796) in a colour on a background inside a frame."""
    side = SIZE * _SUPERSAMPLING
    ink = digit_images()[0][index] / 16.0
    edge = round(side * rng.uniform(0.66, 0.8))
    mask = Image.fromarray((ink * 255).astype(np.uint8)).resize((edge, edge), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side), _jitter(_BACKGROUNDS[background], rng))
    place = [round((side - edge) / 2 + rng.uniform(-0.04, 0.04) * side) for _ in range(2)]
    canvas.paste(_jitter(_COLOURS[colour], rng), (place[0], place[1]), mask)
    _draw_frame(ImageDraw.Draw(canvas), frame, side, rng)
    return _finish(canvas, rng)
