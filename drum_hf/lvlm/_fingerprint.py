"""What a score depends on, as one hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .prompts import ChatFormat

__all__ = ["compute_fingerprint"]


def compute_fingerprint(model: Any, chat: ChatFormat, weights: str | None) -> str:
    """32 hex digits of the model, its processor and the format of its conversations.

    Args:
        weights: what identifies the model's weights; None: they are hashed.
    """
    image_processor = getattr(chat.processor, "image_processor", None)
    tokenizer = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # what the last call left behind
        tokenizer.pop(state, None)
    parts = [
        type(model).__name__,
        weights or _hash_weights(model),
        str(model.dtype),
        _settings(model.config.to_dict()),
        chat.processor.chat_template,
        tokenizer,
        _settings({k: v for k, v in chat.processor.to_dict().items() if not isinstance(v, dict)}),
        _settings(image_processor.to_dict()) if image_processor is not None else None,
        [chat.image_position, chat.system, chat.score_end_of_turn],
    ]
    return _hash(*(json.dumps(part, sort_keys=True, default=str).encode() for part in parts))[:32]


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part)
    return digest.hexdigest()


def _settings(config: Any) -> Any:
    """A configuration without what says where it came from, or who read it."""
    if isinstance(config, dict):
        left_out = ("name_or_path", "transformers_version")
        return {k: _settings(v) for k, v in config.items() if not str(k).startswith("_") and k not in left_out}
    return config


def _hash_weights(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
