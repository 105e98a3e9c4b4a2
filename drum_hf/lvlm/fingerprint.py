"""What an answer of an LVLM depends on: the LVLM as one hash with named parts, and a request as a key."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..types import ICLRequest
from ..utils.text import shown

if TYPE_CHECKING:
    from .prompts import ChatFormat

__all__ = ["Identity", "RequestKind", "RequestParts", "describe", "differences"]

RequestKind = Literal["score", "generate"]
#: Named parts of an LVLM, by which people tell it from others; what is large stands there as a hash.
Identity = dict[str, str | bool | None]


# ---- the LVLM ----


def describe(
    model: Any, chat: ChatFormat, *, name: str, revision: str | None, more: Identity | None = None
) -> tuple[str, Identity]:
    """An LVLM's fingerprint (32 hex digits of its model, processor and format of conversations), and its named parts.

    Args:
        name: what people call it; the fingerprint depends on it only together with a revision.
        revision: commit of the Hub repository `name` that identifies the weights; None: they are hashed.
        more: further named parts.
    """
    image_processor = getattr(chat.processor, "image_processor", None)
    tokenizer = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # what the last call left behind
        tokenizer.pop(state, None)
    # Scores that were paid for are kept under this hash: names may change here, order and content may not.
    parts = {
        "class": type(model).__name__,
        "weights": f"{name}@{revision}" if revision else _hash_weights(model),
        "dtype": str(model.dtype),
        "configuration": _settings(model.config.to_dict()),
        "chat_template": chat.processor.chat_template,
        "tokenizer": tokenizer,
        "processing": _settings({k: v for k, v in chat.processor.to_dict().items() if not isinstance(v, dict)}),
        "image_processing": _settings(image_processor.to_dict()) if image_processor is not None else None,
        "format": [chat.settings, more],
    }
    written = {part: json.dumps(value, sort_keys=True, default=str).encode() for part, value in parts.items()}
    hashed = ("configuration", "chat_template", "tokenizer", "processing", "image_processing")
    identity: Identity = {
        "name": name,
        "revision": revision,
        "class": parts["class"],
        "dtype": parts["dtype"].removeprefix("torch."),
        "weights": parts["weights"],
        **{part: None if parts[part] is None else _hash(written[part])[:32] for part in hashed},
        **{k: json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for k, v in chat.settings.items()},
        **(more or {}),
    }
    return _hash(*written.values())[:32], identity


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What tells two LVLMs apart, a phrase for each named part that differs.

    Example:
        >>> differences({"dtype": "float32", "system": None}, {"dtype": "bfloat16", "system": None})
        ['dtype differs: float32 here, bfloat16 there']
    """
    return [
        f"{_shown(name.replace('_', ' '))} differs: {_shown(here.get(name))} here, {_shown(there.get(name))} there"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    if len(text) >= 32 and not set(text) - set("0123456789abcdef"):
        return f"{text[:8]}…"
    return shown(text, most=58)


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


# ---- the request ----


class RequestParts(NamedTuple):
    """What a request's key is made of, beside the LVLM's fingerprint: content keys and texts, no picture.

    Attributes:
        query: content key of the query.
        demonstrations: content keys in the order shown.
        responses, weights, choices: as in `ICLRequest`.
        max_new_tokens: a generation's length limit; None: a score.
    """

    query: str
    demonstrations: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, request: ICLRequest, max_new_tokens: int | None = None) -> RequestParts:
        """The parts of a request."""
        shown = tuple([demonstration.key for demonstration in request.demonstrations])
        answers = tuple(request.responses), tuple(request.weights), tuple(request.choices)
        return cls(request.query.key, shown, *answers, max_new_tokens)

    @property
    def kind(self) -> RequestKind:
        """What was asked for."""
        return "score" if self.max_new_tokens is None else "generate"

    def key(self, fingerprint: str) -> bytes:
        """16 bytes of sha256; see `request_key`."""
        return hashlib.sha256(
            b"".join(
                (
                    _asked(self.kind, str(self.max_new_tokens), fingerprint),
                    _packed(self.query),
                    _length(len(self.demonstrations)),
                    *map(_packed, self.demonstrations),
                    _packed_list(self.responses),
                    _packed_list(self.choices),
                    struct.pack(f"<q{len(self.weights)}d", len(self.weights), *self.weights),
                )
            )
        ).digest()[:16]


_length = struct.Struct("<q").pack


def _packed(text: str) -> bytes:
    """A text as it is hashed: set apart by its length."""
    data = text.encode("utf-8", "surrogatepass")
    return _length(len(data)) + data


# Kept: these come back with every pair of a query, or with every query.


@functools.lru_cache(maxsize=1024)
def _packed_list(texts: tuple[str, ...]) -> bytes:
    return _length(len(texts)) + b"".join(map(_packed, texts))


@functools.lru_cache(maxsize=64)
def _asked(kind: str, limit: str, fingerprint: str) -> bytes:
    return _length(4) + _packed(kind) + _packed(limit) + _packed(fingerprint)  # the fourth is the query
