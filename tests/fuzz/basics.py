"""What every kind of artefact is made with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROWS = 24


@dataclasses.dataclass(frozen=True)
class Artefact:
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    sign: Callable[[Path], None] | None = None
    sealed: bool = False
    anywhere: bool = False  # it names files as a command line does, wherever they lie
    given: tuple[str, ...] = ()  # files and folders that the reader names, which may be links
    share: float = 1.0  # of all mutations, beside the others'


def picture(seed: int, side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{i}",
            "image": picture(i),
            "prompt": f"what is {i}?",
            "response": f"word{i % 5}",
            "references": [f"word{i % 5}"],
            "group": f"g{i // 3}" if i % 2 else None,
            "label": f"l{i % 3}",
        }
        for i in range(count)
    ]
