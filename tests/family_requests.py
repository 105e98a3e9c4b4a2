"""Requests of every kind, which each LVLM family answers as a plain forward does."""

from __future__ import annotations

import numpy as np
from PIL import Image

from drum_hf.types import Demonstration, ICLRequest, Query

NOISE = np.random.default_rng(0)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8))


SQUARE, WIDE, TALL, SMALL = picture(32, 32), picture(90, 30), picture(40, 64), picture(9, 7)
WUG = Demonstration("wug", WIDE, "what colour is this?", "red wug")
DAX = Demonstration("dax", None, "which word?", "dax")
ROUND = Demonstration("round", TALL, "", "a round shape")
CHOICES = ("red", "red wug", "seven", "größe")

#: Zero, one and three demonstrations; with and without images, on either side; all kinds of responses.
REQUESTS = [
    ICLRequest(Query(SQUARE, "what?", id="alone"), (), ("red",)),
    ICLRequest(Query(None, "which word?", id="text alone"), (), ("blick blick dax",)),
    ICLRequest(Query(WIDE, "", id="image alone"), (), ("größe 紅色 🙂 naïve",)),
    ICLRequest(Query(SMALL, "what colour?", id="one shot"), (WUG,), ("seven", "a b", "红 ?!"), (3.0, 1.0, 0.5)),
    ICLRequest(Query(None, "what colour?", id="only the shot's image"), (WUG,), ("red wug",)),
    ICLRequest(Query(TALL, "what shape?", id="only the query's image"), (DAX,), ("a", "a round", "a round shape")),
    ICLRequest(Query(SQUARE, "what shape is in this picture?", id="three"), (WUG, DAX, ROUND), ("seven",)),
    ICLRequest(Query(None, "which?", id="three, text"), (ROUND, DAX, WUG), ("dax", "🙂")),
    ICLRequest(Query(WIDE, "what?", id="shown twice"), (WUG,), ("red",)),
    ICLRequest(Query(TALL.copy(), "what?", id="shown thrice"), (ROUND, WUG, ROUND), ("...", "?!")),
    ICLRequest(Query(SMALL, "which?", id="choices"), (WUG, ROUND), ("red", "größe"), (1.0, 3.0), CHOICES),
    ICLRequest(Query(None, "which?", id="choices, text"), (DAX,), ("red wug",), (), CHOICES),
]
#: Eight queries with each of three demonstrations, in no order.
GRID = [
    ICLRequest(Query(image, prompt, id=str(i)), (shot,), (("red", "seven", "a wug", "紅")[i % 4],))
    for i, (image, prompt) in enumerate(
        (image, prompt) for image in (SQUARE, SMALL, None, WIDE) for prompt in ("what?", "which word is this?")
    )
    for shot in (WUG, DAX, ROUND)
]
GRID = [GRID[i] for i in np.random.default_rng(1).permutation(len(GRID))]
