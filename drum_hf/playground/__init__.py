"""A small offline world: pictures, private words, a tiny CLIP and a tiny LVLM, so that everything runs without a Hub.

>>> from drum_hf.playground import encoder_path, lvlm_path, make_world
>>> world = make_world(3, task="vqa", difficulty="easy")
>>> len(world.support), len(world.queries)
(240, 240)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils.optional import resolve_name as resolve

if TYPE_CHECKING:
    from .worlds import DIFFICULTIES, World, make_world, world_rows

__all__ = ["DIFFICULTIES", "World", "encoder_path", "lvlm_path", "make_world", "resolve", "world_rows"]


def encoder_path() -> str:
    """Folder of the tiny CLIP."""
    return resolve("playground/clip")


def lvlm_path() -> str:
    """Folder of the tiny LVLM."""
    return resolve("playground/lvlm")


def __getattr__(name: str) -> Any:
    if name in ("DIFFICULTIES", "World", "make_world", "world_rows"):
        from . import worlds

        return getattr(worlds, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
