"""Tiny random LVLMs of every family with their processors, saved as any model on the Hub is, once for a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drum_hf.lvlm.local.model import TransformersLVLM

from .gemma import tiny_gemma3
from .idefics import tiny_idefics3, tiny_smolvlm
from .internvl import tiny_internvl
from .lfm import lfm2_vl_processor, tiny_lfm2_vl
from .llava import tiny_llava, tiny_llava_next, tiny_llava_onevision
from .qwen import tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl
from .texts import WORDS

__all__ = [
    "FAMILIES",
    "WORDS",
    "lfm2_vl_processor",
    "load_lvlm",
    "tiny_gemma3",
    "tiny_idefics3",
    "tiny_internvl",
    "tiny_lfm2_vl",
    "tiny_llava",
    "tiny_llava_next",
    "tiny_llava_onevision",
    "tiny_qwen2_5_vl",
    "tiny_qwen2_vl",
    "tiny_qwen3_vl",
    "tiny_smolvlm",
]

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": lambda tmp: tiny_idefics3(tmp, merging=True),
    "idefics3-splitting": lambda tmp: tiny_idefics3(tmp, splitting=True, merging=True),
    "idefics3-lfm2": lambda tmp: tiny_idefics3(tmp, "lfm2"),
    "smolvlm": tiny_smolvlm,
    "llava": tiny_llava,
    "llava-next": tiny_llava_next,
    "llava-onevision": tiny_llava_onevision,
    "qwen2-vl": tiny_qwen2_vl,
    "qwen2.5-vl": tiny_qwen2_5_vl,
    "qwen3-vl": tiny_qwen3_vl,
    "internvl": tiny_internvl,
    "gemma3": tiny_gemma3,
    "gemma3-short-window": lambda tmp: tiny_gemma3(tmp, window=24),
    "lfm2-vl": tiny_lfm2_vl,
}


def load_lvlm(family: str, tmp: Path, **kwargs: Any) -> TransformersLVLM:
    """The tiny LVLM of a family, from its folder; Lfm2-VL's processor can't be loaded without torchvision."""
    import torch
    from transformers import AutoModelForImageTextToText

    folder = FAMILIES[family](tmp)
    if family != "lfm2-vl":
        return TransformersLVLM.from_pretrained(folder, dtype=torch.float32, **kwargs)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return TransformersLVLM(model, lfm2_vl_processor(), **kwargs)
