"""Requests as messages of OpenAI's chat API, and its answers as text."""

from __future__ import annotations

import re
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...types import Demonstration, ICLRequest, Query, chat_messages, check_choices, data_url, image_key
from ...utils.text import shown
from ..answers import REASONING_MARKERS, without_reasoning
from ..prompts import ImagePosition

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ChatMessages", "PromptLengths", "answer_text"]

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
        check_choices(image_format, image_position)
        self.image_format = image_format
        self.image_detail = image_detail
        self.image_position: ImagePosition = image_position
        self.system = system
        self._lock = threading.Lock()
        self._encoded: OrderedDict[str, str] = OrderedDict()
        self._encoded_size = 0

    def messages(self, request: ICLRequest) -> list[dict[str, Any]]:
        """Messages whose content is a plain string where it is text alone."""
        return chat_messages(request, self._part, image_position=self.image_position, system=self.system)

    def _part(self, image: Image) -> dict[str, Any]:
        part: dict[str, Any] = {"url": self._data_url(image)}
        if self.image_detail is not None:
            part["detail"] = self.image_detail
        return {"type": "image_url", "image_url": part}

    def _data_url(self, image: Image) -> str:
        key = image_key(image)
        with self._lock:
            if key in self._encoded:
                self._encoded.move_to_end(key)
                return self._encoded[key]
        url = data_url(image, self.image_format)
        with self._lock:
            if key not in self._encoded:
                self._encoded[key] = url
                self._encoded_size += len(url)
            while self._encoded_size > _KEPT_IMAGES:
                _, oldest = self._encoded.popitem(last=False)
                self._encoded_size -= len(oldest)
        return url


def answer_text(answer: dict[str, Any], markers: Sequence[tuple[str, str]] = REASONING_MARKERS) -> str:
    """The text of a chat completion without its reasoning, stripped; a refusal's, where there is one instead.

    Args:
        markers: what begins and ends reasoning within the text.

    Raises:
        ValueError: it is no chat completion, or one that was cut off before it began to answer.
    """
    try:
        (choice,) = answer["choices"]
        message, ending = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        text = content or message.get("refusal") or ""
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        text = _storable(text.strip())
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected one answer in choices[0].message.content, got {shown(_repr.repr(answer))}; is it a chat "
            "endpoint?"
        ) from error
    plain = without_reasoning(text, markers, begun=None)
    if plain is None:
        raise ValueError(
            "expected an answer, but its reasoning was cut off; raise max_new_tokens (and the server's context), or "
            "switch it off with chat_template_kwargs={'enable_thinking': False} or extra_body="
        )
    if plain or (content == "" and not text and ending != "length"):
        return plain
    thought = message.get("reasoning") or message.get("reasoning_content") or text
    usage = answer.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    hidden = isinstance(details, dict) and details.get("reasoning_tokens")
    if ending == "length" and (thought or hidden or content is None):
        raise ValueError(
            "expected an answer, but all tokens were spent on reasoning; raise max_new_tokens, or switch it off "
            "with chat_template_kwargs= or extra_body="
        )
    if content is None and ending != "content_filter":
        raise ValueError(
            f"expected an answer in choices[0].message.content, got none (finish_reason {shown(_repr.repr(ending))}"
            f"{', after reasoning' if thought else ''}); is it the right model, and without tools?"
        )
    return plain


#: Short, however deeply an answer is nested.
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxstring, _repr.maxother = 4, 8, 100, 100


def _storable(text: str) -> str:
    """Without what no database holds: lone surrogates and NUL become U+FFFD."""
    return re.sub("[\ud800-\udfff\x00]", "\ufffd", text)


class PromptLengths:
    """Notices conversations that an endpoint cut: it counts fewer tokens than there must have been.

    Every word takes a token at least. What an image takes is learned from requests with a single one; until then it
    counts as one token. Safe for several threads.
    """

    #: A count below this share of what it must be, and by so many tokens, is no error of the estimate (our choice).
    share, margin = 0.75, 200

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: list[tuple[int, int]] = []  # pixels, and tokens that an image of so many takes at least

    def lost(self, request: ICLRequest, counted: int) -> int | None:
        """Tokens that the conversation has at least, where the endpoint counted far fewer; else None."""
        turns: list[Demonstration | Query] = [*request.demonstrations, request.query]
        texts = [turn.prompt for turn in turns] + [shot.response for shot in request.demonstrations]
        images = [turn.image.width * turn.image.height for turn in turns if turn.image is not None]
        with self._lock:
            if len(images) == 1 and not request.demonstrations:
                least = counted - sum(map(len, texts)) - self.margin  # no text has more tokens than characters
                if least > 0 and len(self._images) < 1000:
                    self._images.append((images[0], least))
            known = list(self._images)
        of_image = [min((tokens for size, tokens in known if size <= pixels), default=1) for pixels in images]
        least = sum(len(text.split()) for text in texts) + sum(of_image)
        return least if counted < min(self.share * least, least - self.margin) else None
