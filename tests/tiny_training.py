"""A stub LVLM with a known taste, and small tables of pictures, for the training and evaluation rooms."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from drum_hf.data import TripletTable
from drum_hf.types import ICLRequest

COLOURS = {"bako": (220, 40, 40), "delu": (40, 200, 60), "fimo": (50, 70, 220), "gusa": (230, 210, 40)}
PROMPTS = ("what colour is the object?", "name the hue of the thing.")


class StubLVLM:
    """Likes a demonstration whose response is the gold one; answers what the last demonstration answers.

    Scores depend on texts alone; a little noise, a function of the pair, keeps them apart.
    """

    name = "stub"
    revision = None

    def __init__(self, *, fail_after: int | None = None) -> None:
        self.scored: list[tuple[str | None, tuple[str, ...]]] = []
        self.asked: list[ICLRequest] = []
        self.fail_after = fail_after

    @property
    def fingerprint(self) -> str:
        return "stub-1"

    def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
        if self.fail_after is not None and len(self.scored) + len(requests) > self.fail_after:
            raise KeyboardInterrupt
        self.scored += [(r.query.id, tuple(d.id for d in r.demonstrations)) for r in requests]
        return np.array([self.taste(r) for r in requests])

    @staticmethod
    def taste(request: ICLRequest) -> float:
        if not request.demonstrations:
            return -2.0
        right = np.mean([d.response in request.responses for d in request.demonstrations])
        pair = "|".join([request.query.prompt, *request.responses, *(d.key for d in request.demonstrations)])
        return float(-3.0 + 2.8 * right - 0.1 * (zlib.crc32(pair.encode()) / 2**32))

    def generate(self, requests: Sequence[ICLRequest], *, max_new_tokens: int = 32) -> list[str]:
        self.asked += requests
        return [r.demonstrations[-1].response if r.demonstrations else "unsure" for r in requests]


def coloured_rows(count: int, *, seed: int = 0, prefix: str = "r") -> list[dict]:
    """Noisy pictures of four colours, each named by its own private word; every third pair of rows is a group."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        word = list(COLOURS)[i % len(COLOURS)]
        pixels = rng.integers(0, 256, (32, 32, 3))
        top, left = rng.integers(0, 12, 2)
        pixels[top : top + 20, left : left + 20] = COLOURS[word]
        rows.append(
            {
                "id": f"{prefix}{i}",
                "image": Image.fromarray(pixels.astype(np.uint8)),
                "prompt": PROMPTS[int(rng.integers(2))],
                "response": word,
                "label": word,
                "group": f"{prefix}-group{i // 2}" if i // 2 % 3 == 0 else "",
            }
        )
    return rows


def coloured_table(count: int, *, seed: int = 0, prefix: str = "r") -> TripletTable:
    return TripletTable.from_dataset(coloured_rows(count, seed=seed, prefix=prefix))


def worded_table(count: int, *, groups: int = 0, prefix: str = "t") -> TripletTable:
    """Rows without pictures; where asked for, half of them in `groups` groups."""
    rows = [
        {
            "id": f"{prefix}{i}",
            "prompt": f"{prefix} question number {i}",
            "response": list(COLOURS)[i % 4],
            "group": f"g{i % groups}" if groups and i % 2 else "",
        }
        for i in range(count)
    ]
    return TripletTable.from_dataset(rows)


def forbidden(table: TripletTable, query_id: str) -> set[str]:
    """Ids that may not demonstrate a row: itself and its group."""
    group = table.groups[table.row(query_id)] if query_id in table else None
    return {query_id} | {i for i, g in zip(table.ids, table.groups, strict=True) if g is not None and g == group}
