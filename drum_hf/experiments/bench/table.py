"""`drum-hf bench table`: what a saved table takes when it is loaded, and when it is mapped."""

from __future__ import annotations

import io
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from ...data import TripletTable
from .machine import measure_memory, resident_mb

__all__ = ["measure_load", "measure_table", "write_rows"]

#: Distinct pictures; rows take turns with them, and are told apart by their texts.
_PICTURES = 500


def measure_table(rows: int, *, side: int = 32, reads: int = 1000) -> dict[str, dict[str, Any]]:
    """Save a table, and load it in a fresh process each: into memory, mapped for the first time, and mapped again.

    Args:
        rows: of the table, each with a picture of its own file's bytes.
        side: of the pictures, in pixels.
        reads: demonstrations that are then read, at random places.

    Returns:
        For "loaded", "mapped first" and "mapped again" what `measure_load` returns, and `peak_mb`, the most memory
        the process had; for "disk" the MiB of the table's file and of the mapped one.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "table.parquet")
        measure_memory(write_rows, os.fspath(file), rows, side)
        found: dict[str, dict[str, Any]] = {}
        for name, mmap in (("loaded", False), ("mapped first", True), ("mapped again", True)):
            measured = measure_memory(measure_load, os.fspath(file), mmap, folder, reads)
            found[name] = measured.result | {"peak_mb": round(measured.peak_mb)}
        (mapped,) = Path(folder, "drum_hf").iterdir()
        found["disk"] = {
            name: round(path.stat().st_size / 2**20) for name, path in (("file", file), ("mapped", mapped))
        }
    return found


def write_rows(file: str, rows: int, side: int) -> None:
    """Save a table of so many rows."""
    import numpy as np
    from PIL import Image

    pictures = []
    for number in range(_PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    TripletTable.from_dataset(
        [
            {
                "id": f"row-{i}",
                "image": pictures[i % _PICTURES],
                "prompt": f"What is the name of what is shown here, of kind {i % 977}?",
                "response": f"answer {i}",
                "group": f"picture-{i // 4}",
            }
            for i in range(rows)
        ]
    ).save(file)


def measure_load(file: str, mmap: bool, cache_dir: str, reads: int) -> dict[str, Any]:
    """Load a table and read some of it.

    Returns:
        `seconds` to load it, `memory_mb` that the process then holds more, and `read_us`, microseconds for one
        demonstration, its picture included.
    """
    TripletTable.from_dataset([{"id": "a", "prompt": "a", "response": "a"}])  # libraries are loaded now
    before = resident_mb()
    began = time.perf_counter()
    table = TripletTable.load(file, mmap=mmap, cache_dir=cache_dir, cache_images=0)
    seconds, memory = time.perf_counter() - began, resident_mb() - before
    places = random.Random(0).choices(table.ids, k=reads)
    began = time.perf_counter()
    for id in places:
        table[id]
    read = (time.perf_counter() - began) / reads
    return {"seconds": round(seconds, 2), "memory_mb": round(memory), "read_us": round(1e6 * read)}
