"""What a request wants scored, and one score from the log-probabilities of its answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..types import ICLRequest

__all__ = ["REASONING", "combine_answers", "log_softmax", "strip_reasoning", "wanted_answers"]

#: What most models write around their reasoning.
REASONING = ("<think>", "</think>")


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.logaddexp.reduce(values)


def strip_reasoning(text: str, markers: tuple[str, str] | None = REASONING) -> str:
    """An answer without the reasoning before it, stripped. The template may have written the opening marker.

    Args:
        markers: what opens and closes reasoning; None: nothing does.

    Raises:
        ValueError: the reasoning doesn't end.

    >>> strip_reasoning("<think>It looks red.</think> red"), strip_reasoning("It looks red.</think> red")
    ('red', 'red')
    """
    if markers is None:
        return text.strip()
    opening, closing = markers
    answer = text.rpartition(closing)[2].strip()
    if answer.startswith(opening):
        raise ValueError(
            f"expected an answer, but the reasoning that {opening} opens was cut off; raise max_new_tokens (and a "
            "server's context), or switch reasoning off, such as by chat_template_kwargs={'enable_thinking': False}"
        )
    return answer


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


def _stripped(text: str, kind: str, query: str | None) -> str:
    if not text.strip():
        raise ValueError(f"expected a {kind} with text, query {query!r} has {text!r}")
    return text.strip()
