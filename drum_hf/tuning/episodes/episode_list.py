"""Conversations that exist already: held without their pictures, which are decoded when one is read."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ...data import MAX_PIXELS
from ...data.images import ImageCache, decode_as
from ...data.rows import Columns, RowCheck
from ...errors import EmptySupportError, RowError
from .files import OnBadRows, read_each, read_json, undecoded
from .tables import Contents, contents_of
from .types import FORMS, IMAGE_SLOT, Conversation, ConversationKind, Turn

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class Pictures:
    """Pictures by the hash of their pixels, held as the path or the bytes they came as."""

    def __init__(self, *, image_root: str | os.PathLike[str] | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self._root = image_root
        self._max_pixels = max_pixels
        self._sources: dict[str, Any] = {}
        self._cache = ImageCache(256)

    @functools.cached_property
    def _check(self) -> RowCheck:
        names = {"image": "image", "prompt": "prompt", "response": "response"}
        return RowCheck(Columns(names), root=self._root, max_pixels=self._max_pixels)

    def __getstate__(self) -> dict[str, Any]:
        # What checks rows can't go to another process, and isn't needed to read pictures there.
        return {name: value for name, value in vars(self).items() if name != "_check"}

    def add(self, image: Any) -> str:
        """Check a picture and give its key.

        Raises:
            RowError, ImageError: there is none, or it can't be read.
        """
        record, source = self._check({"image": image, "prompt": "-", "response": "-"}, None)
        if source is None:
            raise RowError("column 'image': expected an image, got none")
        self._sources.setdefault(record.image_key, source)
        return record.image_key

    def __getitem__(self, key: str) -> Image:
        image = self._cache.get(key)
        if image is None:
            source = self._sources[key]
            name = source["path"] or key[:16]
            image = decode_as(source, key, id=name, max_pixels=self._max_pixels, where=name)
            self._cache.put(key, image)
        return image


class ConversationList(Sequence[Conversation]):
    """Conversations read from a file or a table; each is given its pictures when it is read.

    Attributes:
        skipped: (row number, reason) of each row that `on_bad_rows="skip"` left out.
    """

    def __init__(
        self, talks: Iterable[Conversation], pictures: Pictures, skipped: Sequence[tuple[int, str]] = ()
    ) -> None:
        self.skipped = list(skipped)
        self._talks = list(talks)
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._talks)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> ConversationList: ...
    def __getitem__(self, index: int | slice) -> Conversation | ConversationList:
        if isinstance(index, slice):
            return ConversationList(self._talks[index], self._pictures)
        return self._talks[index].with_images(self._pictures)

    def peek(self, index: int) -> Conversation:
        """A conversation without its pictures."""
        return self._talks[index]

    def contents(self) -> Contents:
        """Hashes of the pictures and the (concept, value) pairs."""
        return contents_of(self._talks)

    def __repr__(self) -> str:
        return f"ConversationList({len(self)} conversations, {len(self.contents().images)} images)"


def pair_turns(messages: Sequence[tuple[str, str, int]], images: Sequence[Any], pictures: Pictures) -> list[Turn]:
    """Turns without pictures from (role, text, image slots) messages and the images that fill the slots in order.

    Raises:
        RowError: roles don't alternate, images and slots differ in number, or a human turn has several.
    """
    roles = [role for role, _, _ in messages]
    if not messages or roles != ["user", "assistant"] * (len(messages) // 2):
        raise RowError(f"expected human and assistant turns, alternating and in full pairs, got {roles}")
    slots = sum(count for _, _, count in messages)
    if slots != len(images):
        raise RowError(f"expected as many image slots as images, got {slots} slots for {len(images)} images")
    remaining = iter(images)
    turns: list[Turn] = []
    for (_, prompt, count), (_, answer, in_answer) in zip(messages[::2], messages[1::2], strict=True):
        if count > 1 or in_answer:
            raise RowError(
                f"expected at most one image a human turn and none in an answer, turn {len(turns)} has "
                f"{count} and {in_answer}"
            )
        key = pictures.add(next(remaining)) if count else ""
        turns.append(Turn(None, prompt, answer, image_key=key))
    return turns


def read_parts(content: Any) -> tuple[str, list[Any]]:
    """Text and image slots of a message's content: a text with `<image>` in it, or a list of parts.

    A slot holds the image that its part brings along, or None where the row's list of images has it.
    """
    if isinstance(content, str):
        return content.replace(IMAGE_SLOT, "").strip(), [None] * content.count(IMAGE_SLOT)
    if not isinstance(content, Sequence) or not all(isinstance(part, dict) and "type" in part for part in content):
        raise RowError(f"expected a message's content as a text or a list of typed parts, got {content!r:.80}")
    texts, slots = [], []
    for part in content:
        if part["type"] == "image":
            slots.append(part.get("image"))
        elif part["type"] == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RowError(f"expected parts of type 'image' and 'text', got {part!r:.80}")
    return "\n".join(texts), slots


def read_llava(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    kind: ConversationKind = "replay",
    source: str = "",
    image_root: str | os.PathLike[str] | None = None,
    on_bad_rows: OnBadRows = "raise",
    max_pixels: int = MAX_PIXELS,
) -> ConversationList:
    """LLaVA-style JSON: rows with `conversations` ([{"from": "human" or "gpt", "value": text}]) and `image`.

    `image` (or `images`) is one image or a list, in the order of the `<image>` placeholders in the texts; a row of
    text only has neither.

    Args:
        data: the JSON or JSONL file, or its rows.
        kind: what the conversations are in a mix: ordinary instruction data to "replay", or an "episode".
        source: the name of the data, noted in every conversation.
        image_root: folder of the image files; the JSON's own folder where left out.
        on_bad_rows, max_pixels: as in `ConceptTable.from_dataset`.

    Raises:
        SavedFileError: there is no such file, or it is no JSON list.
        RowError, ImageError: images and placeholders differ in number, a human turn has two of them, roles don't
            alternate, a text is empty, or an image can't be read.

    Example:
        >>> rows = [{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}]
        >>> read_llava(rows)[0].turns[0].answer
        '4'
    """
    if isinstance(data, (str, os.PathLike)):
        image_root = image_root or Path(data).parent
        data = read_json(data)

    def read(row: Mapping[str, Any], pictures: Pictures) -> Conversation:
        messages = []
        for message in _said(row, "conversations"):
            role, text = (message.get("from"), message.get("value")) if isinstance(message, Mapping) else (None, None)
            if not (isinstance(role, str) and role in _ROLES and isinstance(text, str)):
                raise RowError(
                    f"'conversations': expected 'from' human or gpt and a text 'value', got {message!r:.80}"
                )
            text, slots = read_parts(text)
            messages.append((_ROLES[role], text, len(slots)))
        images = row.get("images", row.get("image"))
        images = [] if images is None else images if isinstance(images, Sequence) else [images]
        images = [images] if isinstance(images, (str, bytes)) else images
        return Conversation(tuple(pair_turns(messages, images, pictures)), "", "", "open", source, kind)

    return _conversations(data, read, image_root, on_bad_rows, max_pixels)


def read_messages(
    data: datasets.Dataset | Sequence[Mapping[str, Any]],
    *,
    kind: ConversationKind = "replay",
    source: str = "",
    image_root: str | os.PathLike[str] | None = None,
    on_bad_rows: OnBadRows = "raise",
    max_pixels: int = MAX_PIXELS,
) -> ConversationList:
    """Rows of chat messages, as Hugging Face's trainers take them and `to_dataset` writes them.

    Columns: `messages` (role and content; content a text with `<image>` in it or a list of parts), `images` in the
    order of the slots unless the parts bring them along; optional `concept`, `value`, `form`, `source`, `kind` and
    `turns`.

    Args:
        kind, source: of rows that don't say theirs.
        data, image_root, on_bad_rows, max_pixels: as in `read_llava`.

    Raises:
        As `read_llava`.
    """

    def read(row: Mapping[str, Any], pictures: Pictures) -> Conversation:
        messages, inline = [], []
        for message in _said(row, "messages"):
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in ("user", "assistant"):
                raise RowError(f"'messages': expected the roles user and assistant, got {role!r}; leave others out")
            text, slots = read_parts(message.get("content"))
            inline += [slot for slot in slots if slot is not None]
            messages.append((role, text, len(slots)))
        turns = pair_turns(messages, row.get("images") or inline, pictures)
        about = row.get("turns") or [{}] * len(turns)
        if len(about) != len(turns):
            raise RowError(f"'turns': expected one for each of {len(turns)} exchanges, got {len(about)}")
        turns = [
            dataclasses.replace(
                t,
                concept=a.get("concept") or "",
                value=a.get("value") or "",
                options=tuple(a.get("options") or ()),
            )
            for t, a in zip(turns, about, strict=True)
        ]
        form = row.get("form") or "open"
        if form not in FORMS:
            raise RowError(f"'form': expected one of {', '.join(map(repr, FORMS))}, got {form!r}")
        concept, value = row.get("concept") or "", row.get("value") or ""
        return Conversation(tuple(turns), concept, value, form, row.get("source") or source, row.get("kind") or kind)

    return _conversations(undecoded(data), read, image_root, on_bad_rows, max_pixels)


def _said(row: Mapping[str, Any], column: str) -> Sequence[Any]:
    found = row.get(column)
    if found is not None and (not isinstance(found, Sequence) or isinstance(found, (str, bytes))):
        raise RowError(f"{column!r}: expected a list of messages, got {type(found).__name__}")
    return found or ()


def _conversations(
    data: Sequence[Any], read: Callable[[Any, Pictures], Conversation], root: Any, on_bad_rows: Any, max_pixels: int
) -> ConversationList:
    pictures = Pictures(image_root=root, max_pixels=max_pixels)
    talks: dict[str, Conversation] = {}  # of the same conversation twice one is enough
    skipped = []

    def read_row(row: Any) -> Conversation:
        if not isinstance(row, Mapping):
            raise RowError(f"expected a dict of columns, got {type(row).__name__}")
        return read(row, pictures)

    for number, talk, reason in read_each(data, len(data), read_row, on_bad_rows):
        if talk is None:
            skipped.append((number, reason))
        else:
            talks.setdefault(talk.key, talk)
    if skipped:
        logger.warning("%d rows can't be read and were left out; the first is row %d: %s", len(skipped), *skipped[0])
    if not talks:
        raise EmptySupportError("expected at least one conversation, got none that can be used; give more rows")
    return ConversationList(talks.values(), pictures, skipped)


def to_dataset(talks: Iterable[Conversation]) -> datasets.Dataset:
    """Conversations as a table, in memory; `read_messages` reads it back.

    Columns: `messages` and `images` as Hugging Face's trainers take them; `concept`, `value`, `form`, `source` and
    `kind`; `turns`, each with its own `concept`, `value` and `options`.

    Raises:
        EmptySupportError: there is no conversation.
    """
    import datasets

    text = datasets.Value("string")
    parts = [{"type": text, "text": text}]
    about = ("concept", "value", "form", "source", "kind")
    features = datasets.Features(
        {
            "messages": [{"role": text, "content": parts}],
            "images": datasets.List(datasets.Image()),
            **dict.fromkeys(about, text),
            "turns": [{"concept": text, "value": text, "options": datasets.List(text)}],
        }
    )
    encode = datasets.Image().encode_example
    rows = []
    for talk in talks:
        messages = [
            {"role": m["role"], "content": [{"type": p["type"], "text": p.get("text")} for p in m["content"]]}
            for m in talk.messages()
        ]
        turns = [{"concept": t.concept, "value": t.value, "options": list(t.options)} for t in talk.turns]
        own = {name: getattr(talk, name) for name in about}
        rows.append({"messages": messages, "images": [encode(image) for image in talk.images], **own, "turns": turns})
    if not rows:
        raise EmptySupportError("expected at least one conversation, got none; ask for more")
    return datasets.Dataset.from_list(rows, features=features)
