"""`OpenAILVLM`: a model behind any chat endpoint that speaks OpenAI's protocol.

The protocol is one POST of JSON, so it is spoken through `httpx` rather than through the `openai` package: the fields
that scoring needs are vLLM's own, and repetitions must be ours, because each counts against the spending cap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from ...errors import ContextOverflowError, EndpointError, ScoringUnsupportedError
from ...types import ICLRequest
from ...utils.optional import bar_options
from ...utils.redaction import body_secrets, redacted
from ..answers import REASONING_MARKERS, combine_answers, one_begins_another, wanted_answers
from ..prompts import ImagePosition
from .chat_api import ChatMessages, PromptLengths, answer_text
from .fleet import ChatFleet, Greeting
from .http import ChatClient, Stop, StoppedError
from .scores import (
    PromptToken,
    answer_start,
    answer_start_after,
    common_tail,
    first_alternatives,
    label_logprobs,
    logprobs_of,
    prompt_tokens,
)
from .spending import Spending, is_count

__all__ = ["EndpointCapabilities", "OpenAILVLM", "Spending"]

logger = logging.getLogger(__name__)

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

#: The most that OpenAI returns, and vLLM by default; where that is refused, fewer.
_TOP_LOGPROBS = (20, 5, 2)

#: Conversations that show how an endpoint answers to fields for scoring, and what its template writes before an
#: answer; they end differently, so that what is common to them is the template's.
_PROBES = (("What is two plus three?", "five"), ("Name the capital of Norway", "Oslo"))

#: Statuses by which a probe learns nothing about fields: key, model or address are wrong.
_NOT_ABOUT_FIELDS = {401, 402, 403, 404, 429}

_MORE_ROOM = "raise its context (Ollama: OLLAMA_CONTEXT_LENGTH), or use fewer shots or smaller images"
_INSTEAD = (
    "Score with TransformersLVLM, with a vLLM endpoint (which returns prompt_logprobs), or, for labels of one token "
    "each given as choices, with an endpoint that returns top_logprobs"
)


@dataclasses.dataclass(frozen=True)
class EndpointCapabilities:
    """What an endpoint can be asked for.

    Attributes:
        generate: answers; every chat endpoint's.
        prompt_logprobs: scores of any response.
        top_logprobs: scores over choices, if these are labels of one token each.
    """

    generate: bool
    prompt_logprobs: bool
    top_logprobs: bool


@dataclasses.dataclass(frozen=True)
class _Probed:
    """Why something can't be had, or None where it can; and what stands before answers (`answer_start_after`)."""

    reason: str | None = None
    lead: tuple[str, ...] = ()
    glued: str = ""


@dataclasses.dataclass(frozen=True)
class _Accepted:
    """What an endpoint takes of the fields that are sent by default; learned from its refusals."""

    limit: str = "max_tokens"  # what every server knows, but OpenAI's newest models
    temperature: bool = True
    top_logprobs: int = _TOP_LOGPROBS[0]

    def after(self, refusal: EndpointError, body: dict[str, Any], given: dict[str, Any]) -> _Accepted | None:
        """What to try next, where the refusal is about such a field and the user didn't give it; else None."""
        if refusal.status not in (400, 422):
            return None
        said = str(refusal).lower()
        if self.limit == "max_tokens" in body and "max_tokens" not in given and "max_completion_tokens" in said:
            return dataclasses.replace(self, limit="max_completion_tokens")
        if self.temperature and "temperature" in body and "temperature" not in given and "temperature" in said:
            return dataclasses.replace(self, temperature=False)
        fewer = [count for count in _TOP_LOGPROBS if count < self.top_logprobs]
        if fewer and "top_logprobs" in body and "top_logprobs" not in given and "logprobs" in said:
            return dataclasses.replace(self, top_logprobs=fewer[0])
        return None


class OpenAILVLM:
    """An `LVLM` over any OpenAI-compatible chat endpoint: OpenAI itself, vLLM, `transformers serve`, and others.

    `generate` works with every endpoint. `score` works where the endpoint returns log-probabilities that make the
    score exact (see there), else it raises; no score is ever guessed. What the endpoint can do is tried out by a
    few tiny requests when it is first needed.

    Requests go out from `max_concurrency` threads, so it works in notebooks too. A request that fails for good stops
    the call, and the exception carries what was answered as `partial`, a dict from positions in the call's requests
    to answers; `CachedLVLM` keeps it, so that a second run sends only what is missing.

    Args:
        model: the model's name at the endpoint.
        base_url: the address that `/chat/completions` follows, such as "http://localhost:8000/v1"; or several, of
            servers of the same model (see below).
        api_key: sent as a bearer token; default: the environment variable OPENAI_API_KEY, or none. Never shown.
        max_concurrency: requests under way at once; at each of several endpoints.
        timeout: seconds for one request, from the connection to the last byte of the answer.
        max_retries: repetitions of a request after 408, 409, 425, 429, 5xx, a timeout or a lost connection. Between
            them: what `Retry-After` says, or else a random time up to 1, 2, 4, … 30 s. Other refusals raise at once.
        max_requests: spending cap in requests over this object's life, repetitions and probes included; never
            exceeded.
        max_tokens: spending cap in prompt and completion tokens as the endpoint reports them, checked before each
            request: what is under way then (at most `max_concurrency` requests) is still paid for.
        image_format: how images are sent: "png" without loss, or "jpeg" (quality 95), which is smaller.
        image_detail: OpenAI's "low", "high" or "auto"; None says nothing.
        system: text of a system turn, or None.
        image_position: a turn's image before ("first") or after ("last") its text.
        seed: sent with each request, if given. Answers are greedy (temperature 0) in any case.
        chat_template_kwargs: arguments of the model's chat template, such as `{"enable_thinking": False}`, for servers
            that take them (vLLM, SGLang, llama.cpp).
        reasoning_markers: pairs of what begins and ends reasoning in an answer, which is left out of it; () for none.
            None: nothing does. Reasoning that a server gives beside the text is left out in any case.
        extra_body: fields added to each request; they win over ours, and a None takes one of ours out. Only the length
            of a request that scores stays 1.
        name: what the model is called, where the endpoint's name for it is not the usual one.
        revision: what identifies the weights, such as a commit of the Hub repository.

    Several endpoints are one LVLM: a request goes to the one with the most room. One that fails is left alone for a
    while, and its requests go to the others; one that refuses the key or the model is left alone for good. Before an
    endpoint is used, it answers to a fixed conversation, and `EndpointError` is raised where its model's name, its
    template's tokens or (with `prompt_logprobs`) their log-probabilities are not the others'. Spending caps hold for
    all of them together.

    With `name` or `revision` you vouch for which model answers: the fingerprint then leaves the endpoint's address
    out, so that scores are shared between all servers of that model. Without either, another address is another LVLM.

    Raises:
        ValueError: an argument is out of range; several endpoints, but neither `name` nor `revision`.

    >>> lvlm = OpenAILVLM("Qwen/Qwen2.5-VL-7B-Instruct", base_url="http://localhost:8000/v1", api_key="secret")
    >>> lvlm
    OpenAILVLM('Qwen/Qwen2.5-VL-7B-Instruct', base_url='http://localhost:8000/v1')
    >>> str(lvlm.spent)
    '0 requests (0 of them repetitions), 0 prompt tokens, 0 completion tokens'
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | Sequence[str],
        api_key: str | None = None,
        max_concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 6,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        image_detail: str | None = None,
        system: str | None = None,
        image_position: ImagePosition = "first",
        seed: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        reasoning_markers: Sequence[tuple[str, str]] = REASONING_MARKERS,
        extra_body: dict[str, Any] | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        if max_concurrency < 1 or max_retries < 0 or not timeout > 0:
            raise ValueError(
                "expected max_concurrency of at least 1, max_retries of at least 0 and a positive timeout, got "
                f"{max_concurrency=}, {max_retries=} and {timeout=}"
            )
        if any(cap is not None and cap < 0 for cap in (max_requests, max_tokens)):
            raise ValueError(f"expected spending caps of at least 0, or None, got {max_requests=} and {max_tokens=}")
        self.model = model
        self.name = name or model
        self.revision = revision
        self.max_concurrency = max_concurrency
        self._chat = ChatMessages(
            image_format=image_format, image_detail=image_detail, image_position=image_position, system=system
        )
        self.seed = seed
        self.extra_body = dict(extra_body or {})
        if chat_template_kwargs:
            self.extra_body = {"chat_template_kwargs": dict(chat_template_kwargs), **self.extra_body}
        if any(len(pair) != 2 or not all(pair) for pair in reasoning_markers):
            raise ValueError(
                f"expected reasoning_markers as pairs of texts, such as {REASONING_MARKERS[:1]}, or (), got "
                f"{reasoning_markers!r}"
            )
        self.reasoning_markers = tuple((begin, end) for begin, end in reasoning_markers)
        self._vouched = name is not None or revision is not None
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        how: dict[str, Any] = {"timeout": timeout, "max_retries": max_retries}
        how["secrets"] = body_secrets(self.extra_body)
        how |= {"max_requests": max_requests, "max_tokens": max_tokens}
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ValueError("expected at least one address as base_url, got none")
        if len(urls) > 1 and not self._vouched:
            raise ValueError(
                f"expected revision= (or name=) with {len(urls)} endpoints: their scores are kept as one model's, and "
                "which one it is can't be their addresses"
            )
        self._client: ChatClient | ChatFleet
        if len(urls) == 1:
            self._client = ChatClient(urls[0], key, **how)
        else:
            self._client = ChatFleet(urls, key, slots=max_concurrency, greet=self._greet, **how)
        self._slots = max_concurrency * len(urls)
        self._accepted = _Accepted()
        self._lengths = PromptLengths()
        self._lock = threading.RLock()
        self._probed: dict[str, _Probed] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, base_url={self.base_url!r})"

    @property
    def base_url(self) -> str:
        """The endpoint's address, without the path of its chat API; several joined by commas."""
        return self._client.base_url

    @property
    def spent(self) -> Spending:
        """Requests, repetitions and tokens so far."""
        return self._client.spent

    @property
    def identity(self) -> dict[str, str | bool | None]:
        """The named parts that the fingerprint is made of; secrets in `extra_body` are left out."""
        parts: dict[str, str | bool | None] = {
            "class": type(self).__name__,
            "name": self.name,
            "revision": self.revision,
            "endpoint": None if self._vouched else self.base_url,
            "system": self._chat.system,
            "image_position": self._chat.image_position,
            "image_format": self._chat.image_format,
            "image_detail": self._chat.image_detail,
            "seed": None if self.seed is None else str(self.seed),
            "extra_body": json.dumps(redacted(self.extra_body), sort_keys=True) if self.extra_body else None,
        }
        if self.reasoning_markers != REASONING_MARKERS:
            parts["reasoning_markers"] = json.dumps(self.reasoning_markers)
        return parts

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the `identity`: what is known here of all that an answer depends on.

        An endpoint shows neither weights nor template: where its operator changes them behind the same name, say so
        with another `revision`.
        """
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def capabilities(self) -> EndpointCapabilities:
        """What the endpoint can do. The first time, this sends up to five tiny requests.

        Raises:
            EndpointError: it can't be asked, for instance because the key is wrong.
        """
        return EndpointCapabilities(
            generate=True,
            prompt_logprobs=self._probe("prompt_logprobs").reason is None,
            top_logprobs=self._probe("top_logprobs").reason is None,
        )

    # ---- what the protocol asks for ----

    def generate(
        self, requests: Sequence[ICLRequest], *, max_new_tokens: int = 32, progress: bool = False
    ) -> list[str]:
        """Greedy answers in the order of the requests, stripped.

        Raises:
            EndpointError: the endpoint refused, or gave no usable answer after every repetition.
            ContextOverflowError: a conversation doesn't fit the context.
            BudgetExceededError: the spending cap is reached.
        """
        if max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")

        def answer(request: ICLRequest, stop: Stop) -> str:
            found = self._complete(self._messages(request), stop, max_new_tokens)
            self._check_prompt(request, found)
            try:
                text = answer_text(found, self.reasoning_markers)
            except ValueError as error:
                raise EndpointError(
                    f"{self.base_url}, asked for {max_new_tokens} tokens on query {request.query.id!r}: {error}"
                ) from error
            self._check_end(request, found, max_new_tokens)
            return text

        return self._run(requests, answer, "generating", progress)

    def _check_prompt(self, request: ICLRequest, found: dict[str, Any]) -> None:
        """
        Raises:
            ContextOverflowError: the endpoint cut the conversation.
        """
        prompt = _counted(found, "prompt_tokens")
        least = self._lengths.lost(request, prompt) if prompt else None
        if least is not None:
            raise ContextOverflowError(
                f"expected {self.base_url} to read all of query {request.query.id!r} and its demonstrations, but it "
                f"counts {prompt} tokens where there are at least {least}: it cut them; {_MORE_ROOM}"
            )

    def _check_end(self, request: ICLRequest, found: dict[str, Any], asked: int) -> None:
        """
        Raises:
            ContextOverflowError: the answer was cut before the tokens that it may have.
        """
        answered, ending = _counted(found, "completion_tokens"), found["choices"][0].get("finish_reason")
        limits = {"max_tokens", "max_completion_tokens"} & self.extra_body.keys()
        if ending == "length" and answered and answered < asked and not limits:
            raise ContextOverflowError(
                f"expected up to {asked} tokens of {self.base_url} on query {request.query.id!r}, but it ended after "
                f"{answered}: its context is full; {_MORE_ROOM}"
            )

    def score(self, requests: Sequence[ICLRequest], *, progress: bool = False) -> np.ndarray:
        """Log-likelihood of each request's gold response, as defined by `LVLM.score`; only where it is exact.

        With `prompt_logprobs` (vLLM), the endpoint runs the conversation with the response at its end, and the
        response's tokens are read off: one request for each response or choice. Otherwise, with `top_logprobs`,
        requests with `choices` that are labels of one token each are scored by the first token that the endpoint
        would answer with: one request each.

        Returns:
            float64, shape (len(requests),), at most 0, higher is better, in the order of the requests.

        Raises:
            ScoringUnsupportedError: the endpoint returns no log-probabilities that make these scores exact.
            NonFiniteScoreError: the model gives a response no probability, or NaN.
            ValueError: a response is missing, empty or not among its choices, or a weight is not positive.
            EndpointError, ContextOverflowError, BudgetExceededError: as in `generate`.
        """
        wanted = [wanted_answers(request) for request in requests]
        if not requests:
            return np.empty(0)
        if self._probe("prompt_logprobs").reason is None:
            return self._score_prompts(requests, wanted, progress)
        if all(request.choices for request in requests) and self._probe("top_logprobs").reason is None:
            return self._score_labels(requests, wanted, progress)
        reasons = [f"prompt_logprobs: {self._probe('prompt_logprobs').reason}"]
        if all(request.choices for request in requests):
            reasons.append(f"top_logprobs: {self._probe('top_logprobs').reason}")
        raise ScoringUnsupportedError(
            f"expected {self.base_url} to return log-probabilities of given responses, which it doesn't: "
            f"{'; '.join(reasons)}. {_INSTEAD}"
        )

    # ---- scores ----

    def _score_prompts(self, requests: Sequence[ICLRequest], wanted: list[list[str]], progress: bool) -> np.ndarray:
        begun = next((request for request in requests if one_begins_another(request.choices)), None)
        if begun is not None:
            logger.warning(
                "a choice of query %r begins another; the endpoint's scores leave the end of the turn out, so that "
                "the longer choice is never likelier. Rename the choices, or score with TransformersLVLM",
                begun.query.id,
            )
        # Requests that differ in their responses alone share what is asked.
        keys = [[(_conversation(request), answer) for answer in wanted[i]] for i, request in enumerate(requests)]
        first: dict[tuple[Hashable, str], int] = {}
        for i, mine in enumerate(keys):
            for key in mine:
                first.setdefault(key, i)
        jobs = list(first.items())

        def score(job: tuple[tuple[Hashable, str], int], stop: Stop) -> np.ndarray:
            (_, answer), i = job
            return self._answer_logprobs(requests[i], answer, stop)

        def combined(parts: dict[int, np.ndarray]) -> dict[int, float]:
            values = {jobs[j][0]: part for j, part in parts.items()}
            return {
                i: combine_answers(requests[i], [values[key] for key in mine])
                for i, mine in enumerate(keys)
                if all(key in values for key in mine)
            }

        return self._combined(jobs, score, combined, len(requests), progress)

    def _score_labels(self, requests: Sequence[ICLRequest], wanted: list[list[str]], progress: bool) -> np.ndarray:
        keys = [(_conversation(request), tuple(wanted[i])) for i, request in enumerate(requests)]
        first: dict[Hashable, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        jobs = list(first.items())

        def score(job: tuple[Hashable, int], stop: Stop) -> np.ndarray:
            i = job[1]
            fields = {"logprobs": True, "top_logprobs": self._accepted.top_logprobs}
            answer = self._complete(self._messages(requests[i]), stop, 1, **fields)
            try:
                return label_logprobs(answer, wanted[i])
            except ScoringUnsupportedError as error:
                raise ScoringUnsupportedError(f"query {requests[i].query.id!r}: {error}") from error

        def combined(parts: dict[int, np.ndarray]) -> dict[int, float]:
            values = {jobs[j][0]: part for j, part in parts.items()}
            return {  # each label is one token
                i: combine_answers(requests[i], [value.reshape(1) for value in values[key]])
                for i, key in enumerate(keys)
                if key in values
            }

        return self._combined(jobs, score, combined, len(requests), progress)

    def _combined(
        self,
        jobs: Sequence[_Job],
        work: Callable[[_Job, Stop], _Result],
        combine: Callable[[dict[int, _Result]], dict[int, float]],
        count: int,
        progress: bool,
    ) -> np.ndarray:
        """Scores of requests that are made of jobs; those that are complete are kept where a job fails."""
        try:
            scores = combine(dict(enumerate(self._run(jobs, work, "scoring", progress))))
        except BaseException as error:
            error.partial = combine(getattr(error, "partial", {}))  # type: ignore[attr-defined]
            raise
        return np.array([scores[i] for i in range(count)])

    def _answer_logprobs(self, request: ICLRequest, answer: str, stop: Stop) -> np.ndarray:
        messages = self._messages(request)
        whole = self._prefill([*messages, {"role": "assistant", "content": answer}], stop)
        probed = self._probe("prompt_logprobs")
        start = answer_start_after(probed.lead, probed.glued, whole or [], answer)
        if whole and start is None:  # its tokens merge with those before: only a comparison shows where it begins
            found = answer_start(self._prefill(messages, stop, answered=False) or [], whole, answer)
            start = found and found[0]
        if not whole or not start:
            end = [token.text for token in (whole or [])[-12:]]
            raise ScoringUnsupportedError(
                f"expected the prompt_logprobs of {self.base_url} to end with the tokens of the response {answer!r} "
                f"of query {request.query.id!r}, but where they begin can't be told from its last tokens {end}. "
                f"{_INSTEAD}"
            )
        return logprobs_of(whole[start:], request.query.id, answer)

    def _prefill(
        self, messages: list[dict[str, Any]], stop: Stop, *, answered: bool = True
    ) -> list[PromptToken] | None:
        """Tokens of a conversation up to the end of its last message, or to where the model begins to answer."""
        return prompt_tokens(self._complete(messages, stop, 1, **self._prefill_fields(answered=answered)))

    @staticmethod
    def _prefill_fields(*, answered: bool) -> dict[str, Any]:
        return {"prompt_logprobs": 0, "add_generation_prompt": not answered, "continue_final_message": answered}

    def _probe(self, field: str) -> _Probed:
        with self._lock:
            if field not in self._probed:
                probe = self._probe_prompts if field == "prompt_logprobs" else self._probe_labels
                try:
                    self._probed[field] = probe()
                except ScoringUnsupportedError as error:
                    self._probed[field] = _Probed(str(error))
                except EndpointError as error:
                    if error.status is None or error.status >= 500 or error.status in _NOT_ABOUT_FIELDS:
                        raise
                    self._probed[field] = _Probed(str(error))
            return self._probed[field]

    def _probe_prompts(self) -> _Probed:
        before: list[list[PromptToken]] = []
        glued: list[str] = []
        for asked, answer in _PROBES:
            messages = [{"role": "user", "content": asked}]
            whole = self._prefill([*messages, {"role": "assistant", "content": answer}], Stop())
            if whole is None:
                return _Probed("it ignores the field")
            prompt = self._prefill(messages, Stop(), answered=False)
            found = None if prompt is None else answer_start(prompt, whole, answer)
            if found is None:
                return _Probed("the tokens that it returns don't end with those of a given answer")
            before.append(whole[: found[0]])
            glued.append(found[1])
        lead = common_tail(before[0], before[1]) if glued[0] == glued[1] else []
        return _Probed(None, tuple(lead), glued[0])

    def _probe_labels(self) -> _Probed:
        messages = [{"role": "user", "content": _PROBES[0][0]}]
        fields = {"logprobs": True, "top_logprobs": self._accepted.top_logprobs}
        found = first_alternatives(self._complete(messages, Stop(), 1, **fields))
        return _Probed(None if found else "it ignores the field")

    # ---- requests ----

    def _messages(self, request: ICLRequest) -> list[dict[str, Any]]:
        return self._chat.messages(request)

    def _complete(self, messages: list[dict[str, Any]], stop: Stop, length: int, **fields: Any) -> dict[str, Any]:
        return self._sent(lambda body: self._client.complete(body, stop), messages, length, fields)

    def _sent(
        self,
        send: Callable[[dict[str, Any]], dict[str, Any]],
        messages: list[dict[str, Any]],
        length: int,
        fields: dict[str, Any],
    ) -> dict[str, Any]:
        """The answer to a conversation. A field of ours that the endpoint refuses is replaced or left out."""
        accepted = known = self._accepted
        while True:
            body = self._body(accepted, messages, length, fields)
            try:
                answer = send(body)
            except EndpointError as error:
                others = accepted.after(error, body, self.extra_body)
                if others is None:
                    raise
                accepted = others
            else:
                if accepted != known:  # only now is it known that the fields were the reason
                    self._learn(accepted)
                return answer

    def _body(
        self, accepted: _Accepted, messages: list[dict[str, Any]], length: int, fields: dict[str, Any]
    ) -> dict[str, Any]:
        body = {"model": self.model, "temperature": 0 if accepted.temperature else None, "seed": self.seed, **fields}
        if "top_logprobs" in fields:
            body["top_logprobs"] = accepted.top_logprobs
        limits = {"max_tokens", "max_completion_tokens"} & self.extra_body.keys() or {accepted.limit}
        body |= dict.fromkeys(limits, length)
        body |= self.extra_body
        body = {field: value for field, value in body.items() if value is not None}
        if fields:  # a score is read from the prompt or the first token: further ones would only be paid for
            body |= dict.fromkeys(limits & body.keys(), length)
        if not body.get("logprobs"):
            body.pop("top_logprobs", None)  # refused without the other
        return {**body, "messages": messages}

    def _learn(self, accepted: _Accepted) -> None:
        with self._lock:
            before, self._accepted = self._accepted, accepted
        if before.temperature and not accepted.temperature:
            logger.warning(
                "%s refuses temperature=0 for %s: its answers are drawn at a temperature of its own, and may differ "
                "from run to run",
                self.base_url,
                self.model,
            )

    def _greet(self, send: Callable[[dict[str, Any]], dict[str, Any]]) -> Greeting:
        """How one endpoint of several answers to a fixed conversation; up to two requests."""
        asked, answer = _PROBES[0]
        messages = [{"role": "user", "content": asked}]
        answered = [*messages, {"role": "assistant", "content": answer}]
        tokens: list[PromptToken] = []
        try:
            found = self._sent(send, answered, 1, self._prefill_fields(answered=True))
            with contextlib.suppress(ScoringUnsupportedError):
                tokens = prompt_tokens(found) or []
        except EndpointError as error:
            if error.status is None or error.status in _NOT_ABOUT_FIELDS:
                raise
            found = self._sent(send, messages, 1, {})
        called = found.get("model")
        model = called[:200] if isinstance(called, str) else None
        return Greeting(model, _counted(found, "prompt_tokens"), tuple(tokens))

    # ---- many at once ----

    def _run(
        self,
        jobs: Sequence[_Job],
        work: Callable[[_Job, Stop], _Result],
        title: str,
        progress: bool,
    ) -> list[_Result]:
        """Results in order. When one fails, no other is begun, those under way end, and the exception has them all.

        Ctrl-C breaks off those under way, too. The threads are daemons: none keeps the process from ending.
        """
        from tqdm.auto import tqdm

        if not jobs:
            return []
        stop, pending = Stop(), iter(range(len(jobs)))
        found: queue.SimpleQueue[tuple[int, _Result | None, BaseException | None] | None] = queue.SimpleQueue()

        def run() -> None:
            for i in pending:
                try:
                    found.put((i, work(jobs[i], stop), None))
                except BaseException as error:
                    stop.set()  # here rather than below, so that this thread itself begins no other
                    found.put((i, None, error))
                    break
            found.put(None)

        done: dict[int, Any] = {}
        failure: BaseException | None = None
        running = min(self._slots, len(jobs))
        for _ in range(running):
            threading.Thread(target=run, name="drum-hf-endpoint", daemon=True).start()
        with tqdm(total=len(jobs), desc=title, unit="request", **bar_options(progress)) as bar:
            while running:
                try:
                    item = found.get()
                except BaseException as error:  # Ctrl-C in this thread
                    failure = failure or error
                    stop.break_off()
                    continue
                if item is None:
                    running -= 1
                    continue
                i, result, fault = item
                if fault is None:
                    done[i] = result
                    bar.update(1)
                elif not isinstance(fault, StoppedError):  # the failure that stopped it comes, too
                    failure = failure or fault
        if failure is not None:
            failure.partial = done  # type: ignore[attr-defined]
            raise failure
        return [done[i] for i in range(len(jobs))]


def _conversation(request: ICLRequest) -> Hashable:
    """What requests share that differ in their responses alone."""
    return request.query.key, tuple(demonstration.key for demonstration in request.demonstrations)


def _counted(answer: dict[str, Any], what: str) -> int | None:
    """A number of tokens in an answer's `usage`; None where it doesn't say, or says something else."""
    usage = answer.get("usage")
    value = usage.get(what) if isinstance(usage, dict) else None
    return value if is_count(value) else None
