"""What a request wants scored, one score from the log-probabilities of its answers' tokens, and answers as read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ..types import ICLRequest

__all__ = ["REASONING_MARKERS", "combine_answers", "log_softmax", "one_begins_another", "without_reasoning"]
__all__ += ["wanted_answers"]

#: What models write around their reasoning: Qwen, DeepSeek, GLM; Kimi; Gemma 4; Seed; Magistral.
REASONING_MARKERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.logaddexp.reduce(values)


def wanted_answers(request: ICLRequest) -> list[str]:
    """The texts whose likelihood a request's score is made of: its choices, or else its responses; stripped.

    Raises:
        ValueError: a response is missing, empty or not among its choices, a weight is not positive, or two choices
            are the same.
    """
    query = request.query.id
    responses = [_stripped(text, "response", query) for text in request.responses]
    choices = [_stripped(text, "choice", query) for text in request.choices]
    if not responses:
        raise ValueError(f"expected at least one response to score, query {query!r} has none")
    if any(not weight > 0 for weight in request.weights):
        raise ValueError(f"expected positive weights, query {query!r} has {request.weights}")
    if len(set(choices)) < len(choices):
        raise ValueError(f"expected distinct choices, query {query!r} has {choices}")
    strangers = [response for response in responses if choices and response not in choices]
    if strangers:
        raise ValueError(
            f"expected responses among the choices {choices}, query {query!r} has {strangers}; add them to the "
            "choices or leave the choices out"
        )
    return choices or responses


def combine_answers(request: ICLRequest, parts: Sequence[np.ndarray]) -> float:
    """A request's score, as `LVLM.score` defines it.

    Args:
        parts: log-probabilities of the tokens of each of `wanted_answers(request)`.
    """
    if request.choices:
        sums = log_softmax(np.array([part.sum() for part in parts]))
        of_choice = dict(zip((choice.strip() for choice in request.choices), sums, strict=True))
        values = np.array([of_choice[response.strip()] for response in request.responses])
    else:
        values = np.array([part.mean() for part in parts])
    weights = np.array(request.weights or [1.0] * len(values))
    return float(np.logaddexp.reduce(values + np.log(weights / weights.sum())))


def one_begins_another(choices: Sequence[str]) -> bool:
    """Whether a choice is the beginning of another, so that the longer one could never be likelier.

    >>> one_begins_another(["1", "2", "10"]), one_begins_another(["yes", "no"])
    (True, False)
    """
    texts = sorted(choice.strip() for choice in choices)
    return any(after.startswith(text) for text, after in itertools.pairwise(texts))


def without_reasoning(
    text: str, markers: Sequence[tuple[str, str]] = REASONING_MARKERS, *, begun: bool | None = False
) -> str | None:
    """An answer without the reasoning that it begins with, or None where the reasoning doesn't end.

    Args:
        markers: what begins and ends reasoning.
        begun: whether the prompt has begun it already; None where that is not known.

    >>> without_reasoning("<think>red or blue?</think> red"), without_reasoning("<think>red or")
    ('red', None)
    >>> without_reasoning("It looks red.</think> red", begun=None)
    'red'
    """
    text = text.strip()
    for begin, end in markers:
        if text.startswith(begin) or (begun is not False and end in text):
            _, found, answer = text.partition(end)
            return without_reasoning(answer, markers) if found else None
    return None if begun else text


def _stripped(text: str, kind: str, query: str | None) -> str:
    if not text.strip():
        raise ValueError(f"expected a {kind} with text, query {query!r} has {text!r}")
    return text.strip()
