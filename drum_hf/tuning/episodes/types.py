"""What a conversation is: turns that share a concept, each with at most one image."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from ...errors import RowError
from ...types import content_key, image_key
from ...utils.images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

Form = Literal["open", "choice", "caption"]
ConversationKind = Literal["episode", "replay"]
FORMS: tuple[Form, ...] = get_args(Form)
CONVERSATION_KINDS: tuple[ConversationKind, ...] = get_args(ConversationKind)

#: What stands for an image in texts of LLaVA's format, and in many chat templates.
IMAGE_SLOT = "<image>"


class ByKey(Protocol):
    """Pictures by their hash."""

    def __getitem__(self, key: str, /) -> Image: ...


@dataclasses.dataclass(frozen=True)
class Turn:
    """One exchange: a human turn with at most one image, and the assistant's answer.

    Attributes:
        image: the picture, or None.
        prompt: what is asked, options included as they are shown; may be empty beside an image.
        answer: what the assistant says; a letter in multiple choice.
        options: the options in the order shown, in multiple choice.
        image_key: hash of the pixels; computed where there is an image. A turn with a key and no image is one whose
            picture was not loaded.
        concept, value: what the turn is about, and what the image shows of it; "" where unknown.
    """

    image: Image | None = dataclasses.field(repr=False)
    prompt: str
    answer: str
    options: tuple[str, ...] = ()
    image_key: str = dataclasses.field(default="", repr=False)
    concept: str = ""
    value: str = ""

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "image", load_image(self.image))
            object.__setattr__(self, "image_key", image_key(self.image))
        if not (self.image_key or self.prompt.strip()):
            raise RowError("expected an image or a prompt in every turn, got one with neither; give it one of them")
        if not self.answer.strip():
            raise RowError(f"expected an answer in every turn, the one to {self.prompt!r} is empty; drop the turn")
        if IMAGE_SLOT in self.prompt or IMAGE_SLOT in self.answer:
            raise RowError(
                f"expected {int(bool(self.image_key))} image slots in a turn's texts and its image apart, but they "
                f"hold {IMAGE_SLOT!r}, so images and slots differ in number; take it out of {self.prompt[:60]!r}"
            )


@dataclasses.dataclass(frozen=True)
class Conversation:
    """An any-shot sample of in-context learning: its turn k is a (k - 1)-shot sample (Doveh et al., 2024).

    Attributes:
        turns: first to last; the last is the query, all before it are its demonstrations.
        concept: what the turns share and the assistant has to infer; "" in ordinary instruction data.
        value: what the last turn's image shows of the concept.
        form: how the answers look: "open" texts, the letter of a "choice", or a "caption".
        source: the name of the data it comes from.
        kind: "episode", made for in-context learning, or "replay", ordinary instruction data against forgetting.

    Raises:
        RowError: there is no turn, an episode shows an image twice, or its last turn is about something else.

    Example:
        >>> turns = Turn(None, "2 + 3 is", "5"), Turn(None, "4 + 1 is", "5")
        >>> talk = Conversation(turns, concept="sum", value="5", form="open")
        >>> talk.shots, [message["role"] for message in talk.messages()]
        (1, ['user', 'assistant', 'user', 'assistant'])
    """

    turns: tuple[Turn, ...]
    concept: str
    value: str
    form: Form
    source: str = ""
    kind: ConversationKind = "episode"

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        if not self.turns:
            raise RowError("expected at least one turn in a conversation, got none; leave it out")
        for name, value, known in (("form", self.form, FORMS), ("kind", self.kind, CONVERSATION_KINDS)):
            if value not in known:
                raise ValueError(f"expected {name} one of {', '.join(map(repr, known))}, got {value!r}")
        keys = [turn.image_key for turn in self.turns if turn.image_key]
        if self.kind == "episode" and len(set(keys)) < len(keys):
            raise RowError(
                f"expected every image once in an episode, one about {self.concept!r} shows the same twice: its "
                "answer could be copied; take another image"
            )
        last = self.turns[-1]
        if (last.concept, last.value) not in (("", ""), (self.concept, self.value)):
            raise RowError(
                f"expected a last turn about {self.concept!r} = {self.value!r}, as the conversation says, got one "
                f"about {last.concept!r} = {last.value!r}; a distractor stands before the last turn"
            )

    @property
    def shots(self) -> int:
        """Demonstrations that the last turn sees: one fewer than the turns."""
        return len(self.turns) - 1

    @property
    def images(self) -> list[Image]:
        """The pictures in the order shown.

        Raises:
            RowError: they were not loaded.
        """
        for turn in self.turns:
            if turn.image is None and turn.image_key:
                raise RowError(
                    "expected a conversation with its pictures, got one drawn without them; draw it again without "
                    "images=False"
                )
        return [turn.image for turn in self.turns if turn.image is not None]

    @property
    def key(self) -> str:
        """Hash of images, prompts and answers in order; 32 hex digits. Equal conversations have equal keys."""
        return content_key(*(part for t in self.turns for part in (t.image_key, t.prompt, t.answer)))

    def messages(self, *, image_position: Literal["first", "last"] = "first") -> list[dict[str, Any]]:
        """Hugging Face chat messages with the images in them; user and assistant turns alternate.

        Args:
            image_position: whether a turn's image stands before or after its text.

        Raises:
            RowError: the pictures were not loaded.
        """
        if image_position not in ("first", "last"):
            raise ValueError(f'expected image_position "first" or "last", got {image_position!r}')
        self.images  # noqa: B018 - raises where pictures are missing
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.prompt}] if turn.prompt else []
            if turn.image is not None:
                place = 0 if image_position == "first" else len(content)
                content.insert(place, {"type": "image", "image": turn.image})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return messages

    def without_images(self) -> Conversation:
        """The same texts and keys without the pictures: for counting and comparing."""
        return dataclasses.replace(self, turns=tuple(dataclasses.replace(t, image=None) for t in self.turns))

    def with_images(self, pictures: ByKey) -> Conversation:
        """The same with the picture of each turn's key."""
        turns = (dataclasses.replace(t, image=pictures[t.image_key]) if t.image_key else t for t in self.turns)
        return dataclasses.replace(self, turns=tuple(turns))
