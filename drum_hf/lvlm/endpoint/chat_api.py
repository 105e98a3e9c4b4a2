"""Requests as messages of OpenAI's chat API, and its answers as text."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal

from ...types import ICLRequest, image_key
from ..prompts import ImagePosition, build_messages

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ChatMessages", "answer_text"]

#: Bytes of encoded images that are kept: a demonstration's is sent again with each of its queries.
_KEPT_IMAGES = 256 << 20


class ChatMessages:
    """Writes requests as chat messages; safe for several threads. Arguments are those of `OpenAILVLM`.

    Raises:
        ValueError: a format or a position is unknown.
    """

    def __init__(
        self,
        *,
        image_format: Literal["png", "jpeg"],
        image_detail: str | None,
        image_position: ImagePosition,
        system: str | None,
    ) -> None:
        if image_format not in ("png", "jpeg"):
            raise ValueError(f'expected image_format "png" or "jpeg", got {image_format!r}')
        if image_position not in ("first", "last"):
            raise ValueError(f'expected image_position "first" or "last", got {image_position!r}')
        self.image_format = image_format
        self.image_detail = image_detail
        self.image_position: ImagePosition = image_position
        self.system = system
        self._lock = threading.Lock()
        self._encoded: OrderedDict[str, str] = OrderedDict()
        self._encoded_size = 0

    def messages(self, request: ICLRequest) -> list[dict[str, Any]]:
        """Messages whose content is a plain string where it is text alone."""
        messages = []
        for message in build_messages(request, image_position=self.image_position, system=self.system):
            parts = [self._part(part) for part in message["content"]]
            only_text = len(parts) == 1 and parts[0]["type"] == "text"
            messages.append({"role": message["role"], "content": parts[0]["text"] if only_text else parts})
        return messages

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        image: dict[str, Any] = {"url": self._data_url(part["image"])}
        if self.image_detail is not None:
            image["detail"] = self.image_detail
        return {"type": "image_url", "image_url": image}

    def _data_url(self, image: Image) -> str:
        key = image_key(image)
        with self._lock:
            if key in self._encoded:
                self._encoded.move_to_end(key)
                return self._encoded[key]
        data = io.BytesIO()
        image.save(data, self.image_format.upper(), **({"quality": 95} if self.image_format == "jpeg" else {}))
        url = f"data:image/{self.image_format};base64,{base64.b64encode(data.getvalue()).decode()}"
        with self._lock:
            if key not in self._encoded:
                self._encoded[key] = url
                self._encoded_size += len(url)
            while self._encoded_size > _KEPT_IMAGES:
                _, oldest = self._encoded.popitem(last=False)
                self._encoded_size -= len(oldest)
        return url


def answer_text(answer: dict[str, Any]) -> str:
    """The text of a chat completion, stripped; a refusal's, where there is one instead.

    Raises:
        ValueError: it is no chat completion, or one that was cut off before it began to answer.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        text = text.strip()
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected an answer in choices[0].message.content, got {json.dumps(answer)[:300]}; is it a chat endpoint?"
        ) from error
    thought = message.get("reasoning") or message.get("reasoning_content")
    details = (answer.get("usage") or {}).get("completion_tokens_details") or {}
    if not text and choice.get("finish_reason") == "length" and (thought or details.get("reasoning_tokens")):
        raise ValueError(
            "expected an answer, but all tokens were spent on reasoning; raise max_new_tokens, or switch it off "
            "with extra_body="
        )
    return text
