"""Log-probabilities of given answers, read from what endpoints return; where they can't be read exactly, an error.

Two sources are exact. vLLM's `prompt_logprobs` gives every token of the prompt with its log-probability, so an answer
that stands at the prompt's end is read off; it begins where the tokens of the same conversation without it end. And
`top_logprobs` gives the likeliest first tokens of the answer, which is enough for labels of one token each.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import NonFiniteScoreError, ScoringUnsupportedError
from ...utils.text import shown

__all__ = [
    "PromptToken",
    "answer_start",
    "answer_start_after",
    "common_tail",
    "first_alternatives",
    "label_logprobs",
    "logprobs_of",
    "prompt_tokens",
]

#: What vLLM writes for minus infinity, which JSON can't hold.
_MINUS_INFINITY = -9999.0
#: How far above 0 rounding takes the logarithm of a probability of 1, at most.
_ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class PromptToken:
    """A token of a prompt.

    Attributes:
        id: in the endpoint's vocabulary; "" for a prompt's first token, which has no log-probability.
        logprob: natural logarithm of its probability, given those before.
        text: what it decodes to by itself; a piece of a character decodes to U+FFFD, or to nothing.
    """

    id: str
    logprob: float
    text: str


def prompt_tokens(answer: dict[str, Any]) -> list[PromptToken] | None:
    """The prompt's tokens from an answer to `"prompt_logprobs": 0`; None where the endpoint ignored the field.

    Raises:
        ScoringUnsupportedError: they are there, but not one for each position.
    """
    entries = answer.get("prompt_logprobs")
    if not entries:
        return None
    tokens = []
    for position, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if position == 0 and entry is None:
            tokens.append(PromptToken("", 0.0, ""))
            continue
        try:
            ((name, token),) = entry.items()
            text = token.get("decoded_token") or ""
            tokens.append(PromptToken(name, _logprob(token["logprob"]), text + ""))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ScoringUnsupportedError(
                "expected prompt_logprobs to hold the prompt's own token at each position, with its logprob, as "
                f"vLLM returns them for prompt_logprobs=0; position {position} is {shown(reprlib.repr(entry))}"
            ) from error
    return tokens


def _logprob(value: Any) -> float:
    """A log-probability: at most 0 but for rounding; or NaN, which `logprobs_of` names.

    Raises:
        ValueError, TypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {type(value).__name__}")
    if value > _ROUNDING:
        raise ValueError(f"expected at most 0, got {value}")
    return min(float(value), 0.0) if value == value else float("nan")


def logprobs_of(tokens: Sequence[PromptToken], query: str | None, answer: str) -> np.ndarray:
    """Log-probabilities of an answer's tokens.

    Raises:
        NonFiniteScoreError: the model gives one of them no probability, or NaN.
    """
    values = np.array([token.logprob for token in tokens])
    if not (np.isfinite(values) & (values > _MINUS_INFINITY)).all():
        raise NonFiniteScoreError(
            f"expected finite log-probabilities, the endpoint gave {values.tolist()} for the response {answer!r} of "
            f"query {query!r}; serve the model in bfloat16 or float32 (float16 overflows), and check its weights"
        )
    return values


def _plain(text: str) -> str:
    """Without whitespace, which tokens decoded one by one lose or keep as they please."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _spells(tokens: Sequence[PromptToken], text: str) -> bool:
    """Whether tokens read as a text; pieces of characters may stand for any but ASCII ones."""
    read = _plain("".join(token.text for token in tokens))
    pieces = [re.escape(piece) for piece in re.split("\ufffd+", read)]
    return bool(tokens) and re.fullmatch(r"[^\x00-\x7f]+".join(pieces), _plain(text)) is not None


def answer_start(prompt: Sequence[PromptToken], whole: Sequence[PromptToken], answer: str) -> tuple[int, str] | None:
    """Where an answer's tokens begin in a conversation that ends with it; None where that can't be told.

    Usually right after the tokens of the same conversation without the answer. Where these merge with the answer's, or
    the template writes other things before an answer that is given than before one that is to come, it is the first
    token that holds a character of the answer, or of the whitespace before it that the model has to write.

    Args:
        prompt: tokens up to where the model would begin to answer.
        whole: tokens of the conversation with the answer, up to the answer's last character.

    Returns:
        position of the first token, and what that token holds before the answer and its whitespace, usually "".
    """
    same = 0
    while same < min(len(prompt), len(whole)) and prompt[same].id == whole[same].id:
        same += 1
    if same == len(prompt):
        return (same, "") if _spells(whole[same:], answer) else None
    texts = [token.text for token in whole[same:]]
    # The characters from here on are the model's to write, as far as they are whitespace or the answer.
    shown = "".join(token.text for token in prompt[same:])
    agree = itertools.takewhile(lambda pair: pair[0] == pair[1], zip("".join(texts), shown, strict=False))
    given = sum(1 for _ in agree)
    starts = [0, *itertools.accumulate(map(len, texts))]
    first, read, wanted = len(texts), "", _plain(answer)
    while first and not read.endswith(wanted):
        first -= 1
        read = _plain(texts[first]) + read
    if not read.endswith(wanted):
        return None
    while first and texts[first - 1][max(0, given - starts[first - 1]) :].isspace():
        first -= 1
    return same + first, texts[first][: max(0, given - starts[first])]


def answer_start_after(lead: Sequence[str], glued: str, whole: Sequence[PromptToken], answer: str) -> int | None:
    """Where an answer's tokens begin, if they come right after the tokens `lead`; else None.

    Args:
        glued: what the first of them holds before the answer and its whitespace.
    """
    for start in range(len(whole) - 1, len(lead) if lead else len(whole), -1):
        before = whole[start - len(lead) : start]
        if [token.id for token in before] == list(lead) and _spells(whole[start:], glued + answer):
            first = whole[start].text
            return start if first.startswith(glued) and first != glued else None
    return None


def common_tail(one: Sequence[PromptToken], other: Sequence[PromptToken], limit: int = 64) -> list[str]:
    """Ids of the tokens, up to `limit`, that two sequences end with alike."""
    tail: list[str] = []
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a.id != b.id or not a.id or len(tail) == limit:
            break
        tail.insert(0, a.id)
    return tail


def label_logprobs(answer: dict[str, Any], labels: Sequence[str]) -> np.ndarray:
    """Log-probability of each label, given the likeliest first tokens of an answer.

    A label counts only as one whole token: of a longer one, the first token's probability is shared with everything
    else that begins so. Where tokens with and without a blank before them are there, those are read that hold all
    labels, or if both do, the likelier ones.

    Returns:
        float64, shape (len(labels),); not normalised over the labels.

    Raises:
        ScoringUnsupportedError: a label is not among the tokens.
        NonFiniteScoreError: a log-probability is NaN or infinite.
    """
    variants: dict[str, dict[str, float]] = {}
    alternatives = first_alternatives(answer) or []
    for text, logprob in alternatives:
        label = text.strip()
        blank = text[: len(text) - len(text.lstrip())]
        if label in labels and blank + label == text:
            variants.setdefault(blank, {}).setdefault(label, logprob)
    whole = [found for found in variants.values() if len(found) == len(set(labels))]
    if not whole:
        seen = set().union(*variants.values()) if variants else set()
        raise ScoringUnsupportedError(
            f"expected every label among the {len(alternatives)} first tokens that the endpoint returns, but of "
            f"{list(labels)} it gave {sorted(seen)}: top_logprobs score only labels that are one token each and few "
            "enough. Use labels such as A, B, C and name them in the prompt, or score with TransformersLVLM or a "
            "vLLM endpoint"
        )
    best = max(whole, key=lambda found: np.logaddexp.reduce(list(found.values())))
    values = np.array([best[label] for label in labels])
    if not (np.isfinite(values) & (values > _MINUS_INFINITY)).all():
        raise NonFiniteScoreError(f"expected finite log-probabilities of the labels {list(labels)}, got {values}")
    return values


def first_alternatives(answer: dict[str, Any]) -> list[tuple[str, float]] | None:
    """The likeliest first tokens and their log-probabilities from an answer to `"logprobs": true`.

    None where the endpoint ignored the field, or answered with something else.
    """
    try:
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(entry["token"] + "", _logprob(entry["logprob"])) for entry in entries] or None
    except (IndexError, KeyError, TypeError, ValueError):
        return None
