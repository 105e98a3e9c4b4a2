"""Demonstrations to chat messages, and chat messages to text with the response's place known."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ChatTemplateError, RowError
from ..types import Demonstration, ICLRequest, Query
from .answers import one_begins_another

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Answer", "ChatFormat", "Row", "build_messages"]

logger = logging.getLogger(__name__)

ImagePosition = Literal["first", "last"]

#: Names under which chat templates switch reasoning on and off.
_THINKING = ("enable_thinking", "thinking")

#: The day that templates which write the date are given, so that scores don't change overnight. Our choice: what
#: Llama's templates fall back to.
_TODAY = datetime.datetime(2024, 7, 26)

#: How a template asks for the date, in a format that it names.
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

#: Roles whose turns of text alone are given as a string, from the usual way (none) on.
_STRING_ROLES: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"system", "assistant"}),
    frozenset({"system", "assistant", "user"}),
)

# Private-use characters: no chat template trims or escapes them, and no response holds them.
_SLOT = "\ue000response\ue001"


def _user_turn(turn: Demonstration | Query, image_position: ImagePosition, pixels: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": turn.prompt}] if turn.prompt else []
    if turn.image is not None:
        image: dict[str, Any] = {"type": "image", "image": turn.image} if pixels else {"type": "image"}
        content.insert(0 if image_position == "first" else len(content), image)
    if not content:
        kind = "demonstration" if isinstance(turn, Demonstration) else "query"
        raise ValueError(
            f"expected an image or a prompt in every turn, but the {kind} {turn.id!r} has neither; give it one of them"
        )
    return {"role": "user", "content": content}


def _text_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _messages(
    request: ICLRequest, image_position: ImagePosition, system: str | None, pixels: bool
) -> list[dict[str, Any]]:
    messages = [_text_turn("system", system)] if system else []
    for demonstration in request.demonstrations:
        messages.append(_user_turn(demonstration, image_position, pixels))
        messages.append(_text_turn("assistant", demonstration.response))
    messages.append(_user_turn(request.query, image_position, pixels))
    return messages


def build_messages(
    request: ICLRequest, *, image_position: ImagePosition = "first", system: str | None = None
) -> list[dict[str, Any]]:
    """A request as Hugging Face chat messages, ready for `processor.apply_chat_template`.

    Every demonstration is a user turn and an assistant turn, first to last; the query is the last user turn. What the
    request wants scored is not in the messages, and neither is the query's draft, which only the retriever uses.

    Args:
        image_position: whether a turn's image stands before ("first") or after ("last") its text. Our choice of
            "first" is what most chat templates were trained on.
        system: text of a system turn before everything, or None for no such turn.

    Raises:
        ValueError: a turn has neither an image nor a prompt, or `image_position` is unknown.

    >>> demonstration = Demonstration("d", None, "capital of Italy?", "Rome")
    >>> for message in build_messages(ICLRequest(Query(None, "capital of Norway?"), (demonstration,))):
    ...     print(message["role"], message["content"])
    user [{'type': 'text', 'text': 'capital of Italy?'}]
    assistant [{'type': 'text', 'text': 'Rome'}]
    user [{'type': 'text', 'text': 'capital of Norway?'}]
    """
    if image_position not in ("first", "last"):
        raise ValueError(f'expected image_position "first" or "last", got {image_position!r}')
    return _messages(request, image_position, system, pixels=True)


def _images(request: ICLRequest) -> list[Image]:
    """The images of a request in the order its messages show them."""
    images = [demonstration.image for demonstration in request.demonstrations]
    return [image for image in (*images, request.query.image) if image is not None]


def _variables(template: str) -> set[str]:
    """Names that a chat template reads and doesn't set."""
    from jinja2 import Environment, ext, meta

    class Marked(ext.Extension):
        """The tag by which templates mark what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(extensions=[Marked, "jinja2.ext.loopcontrols"])
    return meta.find_undeclared_variables(environment.parse(template))


@dataclasses.dataclass
class Row:
    """One sequence to run: a rendered conversation, less the last `cut` of its tokens.

    `ids` are the tokens of the text as rendered, an image being one placeholder; only the processor knows how many
    tokens an image really takes. So everything is counted from the end, where both agree.
    """

    request: ICLRequest
    text: str
    ids: list[int]
    images: list[Image]
    cut: int = 0
    tail: int = 0  # tokens at the end, from the response's first one on


@dataclasses.dataclass
class Answer:
    """A response's tokens, the last of them predicted `back` positions before the end of its row."""

    row: int
    ids: list[int]
    back: int


class ChatFormat:
    """A processor's chat template and tokenizer, checked once; turns requests into rows of tokens.

    The template must keep every text and every image: a few conversations are tried out on construction. Turns of
    text alone are given as strings where the template prints lists of parts as they are. An answer is scored where
    the template's generation prompt ends: where a rendered turn begins otherwise, the prompt takes its place.

    Args:
        processor: a Hugging Face processor with a chat template and a fast tokenizer.
        image_position: see `build_messages`.
        system: see `build_messages`.
        score_end_of_turn: whether the token that ends the turn counts as the response's last. None: where one choice
            of a request begins another, and nowhere else.
        chat_template_kwargs: variables of the template. A switch for reasoning (`enable_thinking`, `thinking`) that
            is not among them is off.

    Attributes:
        template_kwargs: the variables that the template gets, defaults included.
        opening: what the template writes between the last question and where the model begins to answer.
        date: the day that the template writes (ISO 8601), or None where it writes none.
        end_of_turn: what the template writes after the last response.
        stop: text of the special token that ends a response and is missing from `end_of_turn`; else "".
        image_token: text that stands for one image in a rendered conversation; None where the processor doesn't say.
        add_special_tokens: whether the tokenizer adds its own; not where the template writes the BOS token itself.
        special_ids: ids of tokens that no ordinary text gives.
        expansions: gives the texts that stand for images, to be put in before a conversation is tokenized; None
            where tokens can be put in afterwards.

    Raises:
        ChatTemplateError: there is no template or no fast tokenizer, or the template fails, loses a text or an
            image, or knows nothing of a variable.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_position: ImagePosition = "first",
        system: str | None = None,
        score_end_of_turn: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if image_position not in ("first", "last"):
            raise ValueError(f'expected image_position "first" or "last", got {image_position!r}')
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_position = image_position
        self.system = system
        self.score_end_of_turn = score_end_of_turn
        name = type(processor).__name__
        template = getattr(processor, "chat_template", None)
        if template is None:
            raise ChatTemplateError(
                f"expected a processor with a chat template, but {name} has none: use the instruction-tuned version "
                "of the model, or set processor.chat_template to a Jinja template"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ChatTemplateError(
                "expected a fast tokenizer, which knows where a response's tokens stand, but that of "
                f"{name} is a {type(self.tokenizer).__name__}: convert it, or use a repository with a tokenizer.json"
            )
        self._set_variables(template["default"] if isinstance(template, dict) else template, chat_template_kwargs)
        self.expansions: Callable[[list[Image]], list[str]] | None = None
        self.special_ids = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        self._special_texts = sorted(token.content for token in self.tokenizer.added_tokens_decoder.values())
        failures = []
        for self._string_roles in _STRING_ROLES:
            try:
                self._check()
                break
            except ChatTemplateError as error:
                failures.append(error)
        else:
            raise failures[0]

    def _set_variables(self, template: str, given: Mapping[str, Any] | None) -> None:
        """Find out which variables the template reads, and settle those that scores depend on."""
        from jinja2 import TemplateError

        try:
            known = _variables(template)
        except TemplateError as error:
            raise self._fail(f"fails: {error}") from error
        self.template_kwargs = dict(given or {})
        unknown = sorted(self.template_kwargs.keys() - known)
        if unknown:
            raise ChatTemplateError(
                f"expected chat_template_kwargs that the chat template of {type(self.processor).__name__} reads, got "
                f"{', '.join(unknown)}; its variables are {', '.join(sorted(known))}"
            )
        for name in _THINKING:
            if name in known and name not in self.template_kwargs:
                self.template_kwargs[name] = False
                logger.info("%s=False: the model answers without reasoning (chat_template_kwargs sets it)", name)
        self.date = None
        self._template: str | None = None  # in the processor's place
        if "strftime_now" in known and "date_string" not in self.template_kwargs:
            self.date = _TODAY.date().isoformat()
            self._template = _DATE.sub(lambda found: repr(_TODAY.strftime(found[2])), template)
            logger.info("the chat template writes the date: it is taken to be %s, so that scores stay", self.date)

    def _fail(self, what: str) -> ChatTemplateError:
        return ChatTemplateError(
            "expected a chat template that keeps every text and image of a conversation, but that of "
            f"{type(self.processor).__name__} {what}; set processor.chat_template to one that renders content lists "
            'of {"type": "image"} and {"type": "text"} parts for the roles user and assistant'
            + (" and system" if getattr(self, "system", None) else "")
        )

    def _check(self) -> None:
        texts = ["probe question one", "probe answer one", "probe question two"]

        def conversation(with_images: bool) -> list[dict[str, Any]]:
            messages = [_text_turn("system", self.system)] if self.system else []
            messages += [_text_turn(role, t) for role, t in zip(("user", "assistant", "user"), texts, strict=True)]
            for message in messages:
                if with_images and message["role"] == "user":
                    message["content"].insert(0 if self.image_position == "first" else 1, {"type": "image"})
            return messages

        answer = _text_turn("assistant", _SLOT)
        plain, shown = self.render([conversation(False), conversation(True)], generate=True)
        whole, full = self.render([[*conversation(False), answer], [*conversation(True), answer]], generate=False)
        for text in [*texts, *([self.system.strip()] if self.system else [])]:
            if text not in shown:
                raise self._fail(f"lost the text {text!r}")
        if full.count(_SLOT) != 1:
            raise self._fail(f"renders the last response {full.count(_SLOT)} times instead of once")
        if "'type': 'text'" in full or '"type": "text"' in full:
            raise self._fail("prints the list of a message's parts as it is")
        before, _, self.end_of_turn = full.partition(_SLOT)
        self.opening = plain.rpartition(texts[-1])[2]
        bos = self.tokenizer.bos_token
        self.add_special_tokens = not (bos is not None and shown.startswith(bos))
        self._find_start([(whole.partition(_SLOT)[0], plain), (before, shown)])
        self._find_stop(conversation(False))

        names = [getattr(self.processor, name, None) for name in ("image_token", "boi_token")]
        counts = {name: shown.count(name) for name in names if isinstance(name, str) and name}
        found = [name for name, count in counts.items() if count == 2 and name not in plain]
        if counts and not found:
            raise self._fail(f"loses an image: for two images its placeholders appear {counts} times")
        if not counts and shown == plain:
            raise self._fail("loses the images: a conversation reads the same with and without them")
        self.image_token = found[0] if found else None

    def _find_start(self, pairs: list[tuple[str, str]]) -> None:
        """Where a response begins, from (rendered up to the response, generation prompt) of several conversations.

        Attributes:
            glue: characters before the response that are the model's to produce: whitespace that the template
                writes between the generation prompt and the response. A token that holds only that belongs to the
                response. A block, such as one of empty reasoning, is given.
            from_prompt: the prompt doesn't begin the rendered turn, and is scored in its place.
        """
        rests = {before.removeprefix(prompt) if before.startswith(prompt) else None for before, prompt in pairs}
        (rest,) = rests if len(rests) == 1 else (None,)
        self.from_prompt = rest is None
        self.glue = len(rest) if rest is not None and not rest.strip() else 0
        if self.from_prompt:
            logger.info("the generation prompt doesn't begin the rendered turn: responses are scored after the prompt")

    def _find_stop(self, messages: list[dict[str, Any]]) -> None:
        """The special token that ends a response, where the template writes none after the last one."""
        self.stop = ""
        if self.special_in(self.end_of_turn):
            return
        more = [*messages, _text_turn("assistant", _SLOT), _text_turn("user", "probe question three")]
        (text,) = self.render([more], generate=True)
        after = text.partition(_SLOT)[2].lstrip()
        # What begins the next turn ends this one (GLM), else the tokenizer's end of a text (LLaVA 1.5).
        follows = [t for t in self._special_texts if after.startswith(t) and t != self.tokenizer.bos_token]
        self.stop = max(follows, key=len, default=self.tokenizer.eos_token or "")

    def special_in(self, text: str) -> list[int]:
        """Ids of the special tokens in a text."""
        return [i for i in self.tokenizer(text, add_special_tokens=False)["input_ids"] if i in self.special_ids]

    def counts_end(self, request: ICLRequest) -> bool:
        """Whether the token that ends the turn counts as the last one of this request's answers."""
        if self.score_end_of_turn is not None:
            return self.score_end_of_turn
        return one_begins_another(request.choices)

    @property
    def settings(self) -> dict[str, Any]:
        """What rendered conversations and scores depend on, beside template and tokenizer; JSON-ready."""
        return {
            "image_position": self.image_position,
            "system": self.system,
            "score_end_of_turn": self.score_end_of_turn,
            "chat_template_kwargs": self.template_kwargs,
            "date": self.date,
        }

    def render(self, conversations: Sequence[list[dict[str, Any]]], *, generate: bool) -> list[str]:
        """Conversations as the template writes them.

        Args:
            conversations: messages whose content is a list of parts.
            generate: whether they end where the model begins to answer.

        Raises:
            ChatTemplateError: the template fails.
        """
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(
                [[self._as_string(message) for message in messages] for messages in conversations],
                add_generation_prompt=generate,
                tokenize=False,
                chat_template=self._template,
                **self.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise self._fail(f"fails: {error}") from error

    def _as_string(self, message: dict[str, Any]) -> dict[str, Any]:
        parts = message["content"]
        if message["role"] not in self._string_roles or any(part["type"] != "text" for part in parts):
            return message
        return {**message, "content": "".join(part["text"] for part in parts)}

    def prompts(self, requests: Sequence[ICLRequest]) -> list[str]:
        """Each conversation as text, up to where the model begins to answer."""
        return self.render([_messages(r, self.image_position, self.system, False) for r in requests], generate=True)

    def frames(self, requests: Sequence[ICLRequest]) -> list[tuple[str, str]]:
        """What stands before and after the response of each conversation: `before + response + after` is its text."""
        if self.from_prompt:
            return [(prompt, self.end_of_turn) for prompt in self.prompts(requests)]
        conversations = [
            [*_messages(r, self.image_position, self.system, False), _text_turn("assistant", _SLOT)] for r in requests
        ]
        frames = []
        for text in self.render(conversations, generate=False):
            before, _, after = text.rpartition(_SLOT)
            frames.append((before, after))
        return frames

    def tokenize(self, texts: list[str]) -> Any:
        """A BatchEncoding of rendered conversations, an image being one placeholder."""
        return self.tokenizer(texts, add_special_tokens=self.add_special_tokens, return_attention_mask=False)

    def _checked_images(self, request: ICLRequest, text: str) -> list[Image]:
        images = _images(request)
        token = self.image_token
        if token is not None and text.count(token) != len(images):
            raise RowError(
                f"expected the image placeholder {token!r} once for each of {len(images)} images, but the "
                f"conversation of query {request.query.id!r} holds it {text.count(token)} times; remove it from "
                "prompts and responses"
            )
        return images

    def prompt_rows(self, requests: Sequence[ICLRequest]) -> list[Row]:
        """A row for each conversation, up to where the model begins to answer.

        Raises:
            RowError: a text holds the placeholder that stands for an image.
        """
        if not requests:
            return []
        texts = self.prompts(requests)
        images = [self._checked_images(request, text) for request, text in zip(requests, texts, strict=True)]
        tokenized = self.tokenize([self._expanded(text, own) for text, own in zip(texts, images, strict=True)])
        return [
            Row(request, text, ids, own)
            for request, text, ids, own in zip(requests, texts, tokenized["input_ids"], images, strict=True)
        ]

    def _expanded(self, text: str, images: list[Image]) -> str:
        """A conversation as it is tokenized."""
        if self.expansions is None or not images or self.image_token is None:
            return text
        parts = text.split(self.image_token)
        return parts[0] + "".join(a + b for a, b in zip(self.expansions(images), parts[1:], strict=True))

    def answer_rows(
        self, requests: Sequence[ICLRequest], wanted: list[list[str]]
    ) -> tuple[list[Row], list[list[Answer]]]:
        """Rows to run, and where in them the tokens of every wanted answer of every request stand.

        A conversation and its answer are tokenized together. Answers that share their first tokens share a row:
        only the longest run, and none runs its last token, which predicts nothing.

        Raises:
            RowError: a text holds the placeholder that stands for an image.
            ChatTemplateError: an answer has no token of its own.
        """
        texts: list[str] = []  # as a processor takes them
        full: list[str] = []  # as they are tokenized
        spans: list[tuple[int, int]] = []
        pictures: list[list[Image]] = []
        ends = [self.counts_end(request) for request in requests]
        for request, end, (before, after), answers in zip(requests, ends, self.frames(requests), wanted, strict=True):
            after = (self.stop if end else "") + after
            pictures.append(self._checked_images(request, before + answers[0] + after))
            expanded = self._expanded(before, pictures[-1])
            for answer in answers:
                texts.append(before + answer + after)
                full.append(expanded + answer + after)
                spans.append((len(expanded) - self.glue, len(expanded) + len(answer)))
        tokenized = self._tokenized(full, spans, [len(answers) for answers in wanted], ends)
        rows: list[Row] = []
        placed: list[list[Answer]] = []
        at = 0
        for request, images, answers in zip(requests, pictures, wanted, strict=True):
            found = []
            for k in range(at, at + len(answers)):
                ids, first, stop = tokenized[k]
                if not first:
                    raise ChatTemplateError(
                        f"expected tokens before the response {answers[k - at]!r}, but the tokenizer made none; check "
                        "the chat template"
                    )
                found.append((tuple(ids[: stop - 1]), ids[first:stop], k, len(ids) - stop + 1))
            at += len(answers)
            mine: list[Answer | None] = [None] * len(answers)
            longest: tuple[int, ...] = ()
            # Sorted in reverse, everything that a prefix begins stands right before it.
            for j in sorted(range(len(found)), key=lambda j: found[j][0], reverse=True):
                prefix, ids, k, cut = found[j]
                if longest[: len(prefix)] != prefix:
                    rows.append(Row(request, texts[k], list(prefix), images, cut, len(ids) - 1))
                    longest = prefix
                mine[j] = Answer(len(rows) - 1, ids, len(longest) - len(prefix))
            placed.append([answer for answer in mine if answer is not None])
        return rows, placed

    def _tokenized(
        self, texts: list[str], spans: list[tuple[int, int]], counts: list[int], ends_count: list[bool]
    ) -> list[tuple[list[int], int, int]]:
        """Ids of each text, and first and one past the last of the tokens in its span.

        Texts that follow one another in runs of `counts` differ in their answers only, and their end of turn counts
        where `ends_count` says so. What stands behind the last
        special token is tokenized apart then, once for all texts that end alike: nothing merges across such a token.
        """
        ends: dict[int, int] = {}  # number of a text -> where its own end begins
        run_of: list[int] = []  # number of a text -> number of the first of its run
        closing: list[bool] = []
        for count, closes in zip(counts, ends_count, strict=True):
            first = len(run_of)
            run_of += [first] * count
            closing += [closes] * count
            if count > 1 and (start := self._after_special(texts[first], spans[first][0])):
                ends.update(dict.fromkeys(range(first, first + count), start))
        tails = list(dict.fromkeys(texts[k][start:] for k, start in ends.items()))
        tail = (
            dict(zip(tails, self.tokenizer(tails, add_special_tokens=False).encodings, strict=True)) if tails else {}
        )
        encoded: dict[int, Any] = {}

        def encode(numbers: list[int]) -> None:
            if numbers:
                encoded.update(zip(numbers, self.tokenize([texts[k] for k in numbers]).encodings, strict=True))

        encode([k for k in range(len(texts)) if k not in ends or run_of[k] == k])
        heads: dict[int, list[int]] = {}
        for k in set(run_of) & set(ends):
            ids, own = encoded[k].ids, tail[texts[k][ends[k] :]].ids
            if ids[len(ids) - len(own) :] == own:
                heads[k] = ids[: len(ids) - len(own)]
        # For some tokenizers it matters what stands before.
        encode([k for k in range(len(texts)) if k not in encoded and run_of[k] not in heads])
        result = []
        for k, text in enumerate(texts):
            head = heads.get(run_of[k]) if k in ends else None
            if head is None:
                ids = encoded[k].ids
                result.append((ids, *self._locate(ids, encoded[k].offsets, spans[k], text, closing[k])))
                continue
            own, start = tail[text[ends[k] :]], ends[k]
            span = (spans[k][0] - start, spans[k][1] - start)
            first, stop = self._locate(own.ids, own.offsets, span, text[start:], closing[k])
            result.append((head + own.ids, len(head) + first, len(head) + stop))
        return result

    def _after_special(self, text: str, stop: int) -> int:
        """Where the last special token before `stop` ends; 0 where there is none."""
        return max((place + len(t) for t in self._special_texts if (place := text.rfind(t, 0, stop)) >= 0), default=0)

    def _locate(
        self, ids: list[int], offsets: list[tuple[int, int]], span: tuple[int, int], text: str, closes: bool
    ) -> tuple[int, int]:
        """First and one past the last of the tokens that overlap the characters of `span`, and the end of its turn."""
        start, end = span
        stop = len(ids)
        while stop and (offsets[stop - 1][0] >= end or offsets[stop - 1] == (0, 0)):
            stop -= 1
        first = stop
        while first and offsets[first - 1][1] > start:
            first -= 1
        if first == stop:
            raise ChatTemplateError(
                f"expected tokens in the response {text[start:end]!r}, but the tokenizer made none; "
                "check the tokenizer's normalizer and the chat template"
            )
        if closes:
            while stop < len(ids) and ids[stop] not in self.special_ids:
                stop += 1
            if stop == len(ids):
                raise ChatTemplateError(
                    "expected a special token that ends the assistant's turn, and neither the chat template nor the "
                    "tokenizer has one; pass score_end_of_turn=False"
                )
            stop += 1
        return first, stop
