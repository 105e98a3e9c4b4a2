"""A small offline world: pictures, private words, a tiny CLIP and a tiny LVLM, so that everything runs without a Hub.

>>> from drum_hf.playground import encoder_path, lvlm_path, make_world
>>> world = make_world(3, task="vqa", difficulty="easy")
>>> len(world.support), len(world.queries)
(240, 240)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .worlds import DIFFICULTIES, TASKS, World, make_world

__all__ = ["DIFFICULTIES", "TASKS", "World", "encoder_path", "lvlm_path", "make_world", "resolve"]

_MODELS = Path(__file__).parent / "models"


def encoder_path() -> str:
    """Folder of the tiny CLIP."""
    return str(_MODELS / "clip")


def lvlm_path() -> str:
    """Folder of the tiny LVLM."""
    return str(_MODELS / "lvlm")


def resolve(name: str) -> str:
    """Folder of "playground/clip" or "playground/lvlm"; any other name is returned as it is."""
    return {"playground/clip": encoder_path(), "playground/lvlm": lvlm_path()}.get(name, name)


def __getattr__(name: str) -> Any:
    if name in ("DIFFICULTIES", "TASKS", "World", "make_world"):
        from . import worlds

        return getattr(worlds, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
