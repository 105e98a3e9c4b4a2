"""`OpenAILVLM`: a model behind any chat endpoint that speaks OpenAI's protocol.

The protocol is one POST of JSON, so it is spoken through `requests` rather than through the `openai` package: the
fields that scoring needs are vLLM's own, and repetitions must be ours, because each counts against the spending cap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal, TypeVar

import numpy as np

from ...errors import EndpointError, ScoringUnsupportedError
from ...types import ICLRequest
from ...utils.optional import bar_options
from ..answers import combine_answers, wanted_answers
from ..prompts import ImagePosition
from .chat_api import ChatMessages, answer_text
from .fleet import ChatFleet, Greeting
from .http import ChatClient, StoppedError
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
from .spending import Spending

__all__ = ["EndpointCapabilities", "OpenAILVLM", "Spending"]

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

#: The most that OpenAI returns, and vLLM by default.
_TOP_LOGPROBS = 20

#: Conversations that show how an endpoint answers to fields for scoring, and what its template writes before an
#: answer; they end differently, so that what is common to them is the template's.
_PROBES = (("What is two plus three?", "five"), ("Name the capital of Norway", "Oslo"))

#: Statuses by which a probe learns nothing about fields: key, model or address are wrong.
_NOT_ABOUT_FIELDS = {401, 402, 403, 404, 429}

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
        timeout: seconds to wait for a connection, and for the endpoint's next byte.
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
        extra_body: fields added to each request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`; a
            None takes one of ours out, such as `{"temperature": None}` where a model refuses it.
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
        timeout: float = 60.0,
        max_retries: int = 6,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        image_format: Literal["png", "jpeg"] = "png",
        image_detail: str | None = None,
        system: str | None = None,
        image_position: ImagePosition = "first",
        seed: int | None = None,
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
        self._vouched = name is not None or revision is not None
        key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        how: dict[str, Any] = {"timeout": timeout, "max_retries": max_retries}
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
        self._limit = "max_tokens"  # what every server knows, but OpenAI's newest models
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
        """The named parts that the fingerprint is made of."""
        return {
            "class": type(self).__name__,
            "name": self.name,
            "revision": self.revision,
            "endpoint": None if self._vouched else self.base_url,
            "system": self._chat.system,
            "image_position": self._chat.image_position,
            "image_format": self._chat.image_format,
            "image_detail": self._chat.image_detail,
            "seed": None if self.seed is None else str(self.seed),
            "extra_body": json.dumps(self.extra_body, sort_keys=True) if self.extra_body else None,
        }

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

        def answer(request: ICLRequest, stop: threading.Event) -> str:
            found = self._complete(self._messages(request), stop, **{self._limit: max_new_tokens})
            try:
                return answer_text(found)
            except ValueError as error:
                raise EndpointError(
                    f"{self.base_url}, asked for {max_new_tokens} tokens on query {request.query.id!r}: {error}"
                ) from error

        return self._run(requests, answer, "generating", progress)

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
        jobs = [(i, answer) for i, answers in enumerate(wanted) for answer in answers]

        def score(job: tuple[int, str], stop: threading.Event) -> np.ndarray:
            return self._answer_logprobs(requests[job[0]], job[1], stop)

        def combined(parts: dict[int, np.ndarray]) -> dict[int, float]:
            of_request: list[list[np.ndarray]] = [[] for _ in requests]
            for j, (i, _) in enumerate(jobs):
                of_request[i] += [parts[j]] if j in parts else []
            return {
                i: combine_answers(requests[i], mine)
                for i, mine in enumerate(of_request)
                if len(mine) == len(wanted[i])
            }

        try:
            scores = combined(dict(enumerate(self._run(jobs, score, "scoring", progress))))
        except BaseException as error:
            error.partial = combined(getattr(error, "partial", {}))  # type: ignore[attr-defined]
            raise
        return np.array([scores[i] for i in range(len(requests))])

    def _score_labels(self, requests: Sequence[ICLRequest], wanted: list[list[str]], progress: bool) -> np.ndarray:
        def score(i: int, stop: threading.Event) -> float:
            fields = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS, self._limit: 1}
            answer = self._complete(self._messages(requests[i]), stop, **fields)
            try:
                values = label_logprobs(answer, wanted[i])
            except ScoringUnsupportedError as error:
                raise ScoringUnsupportedError(f"query {requests[i].query.id!r}: {error}") from error
            return combine_answers(requests[i], [value.reshape(1) for value in values])  # of one token each

        return np.array(self._run(range(len(requests)), score, "scoring", progress))

    def _answer_logprobs(self, request: ICLRequest, answer: str, stop: threading.Event) -> np.ndarray:
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
        self, messages: list[dict[str, Any]], stop: threading.Event, *, answered: bool = True
    ) -> list[PromptToken] | None:
        """Tokens of a conversation up to the end of its last message, or to where the model begins to answer."""
        return prompt_tokens(self._complete(messages, stop, **self._prefill_fields(answered=answered)))

    def _prefill_fields(self, *, answered: bool) -> dict[str, Any]:
        return {
            "prompt_logprobs": 0,
            "add_generation_prompt": not answered,
            "continue_final_message": answered,
            self._limit: 1,
        }

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
            whole = self._prefill([*messages, {"role": "assistant", "content": answer}], threading.Event())
            if whole is None:
                return _Probed("it ignores the field")
            prompt = self._prefill(messages, threading.Event(), answered=False)
            found = None if prompt is None else answer_start(prompt, whole, answer)
            if found is None:
                return _Probed("the tokens that it returns don't end with those of a given answer")
            before.append(whole[: found[0]])
            glued.append(found[1])
        lead = common_tail(before[0], before[1]) if glued[0] == glued[1] else []
        return _Probed(None, tuple(lead), glued[0])

    def _probe_labels(self) -> _Probed:
        messages = [{"role": "user", "content": _PROBES[0][0]}]
        fields = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS, self._limit: 1}
        found = first_alternatives(self._complete(messages, threading.Event(), **fields))
        return _Probed(None if found else "it ignores the field")

    # ---- requests ----

    def _messages(self, request: ICLRequest) -> list[dict[str, Any]]:
        return self._chat.messages(request)

    def _complete(self, messages: list[dict[str, Any]], stop: threading.Event, **fields: Any) -> dict[str, Any]:
        return self._sent(lambda body: self._client.complete(body, stop), messages, fields)

    def _sent(
        self, send: Callable[[dict[str, Any]], dict[str, Any]], messages: list[dict[str, Any]], fields: dict[str, Any]
    ) -> dict[str, Any]:
        body = {"model": self.model, "temperature": 0, "seed": self.seed, **self.extra_body}
        body = {field: value for field, value in body.items() if value is not None}
        try:
            return send({**body, **fields, "messages": messages})
        except EndpointError as error:
            other = "max_completion_tokens"
            if error.status != 400 or "max_tokens" not in fields or other not in str(error):
                raise
            self._limit = other
            fields[other] = fields.pop("max_tokens")
            return send({**body, **fields, "messages": messages})

    def _greet(self, send: Callable[[dict[str, Any]], dict[str, Any]]) -> Greeting:
        """How one endpoint of several answers to a fixed conversation; up to two requests."""
        asked, answer = _PROBES[0]
        messages = [{"role": "user", "content": asked}]
        answered = [*messages, {"role": "assistant", "content": answer}]
        tokens: list[PromptToken] = []
        try:
            found = self._sent(send, answered, self._prefill_fields(answered=True))
            with contextlib.suppress(ScoringUnsupportedError):
                tokens = prompt_tokens(found) or []
        except EndpointError as error:
            if error.status is None or error.status in _NOT_ABOUT_FIELDS:
                raise
            found = self._sent(send, messages, {self._limit: 1})
        usage = found.get("usage")
        length = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return Greeting(found.get("model"), length, tuple(tokens))

    # ---- many at once ----

    def _run(
        self,
        jobs: Sequence[_Job],
        work: Callable[[_Job, threading.Event], _Result],
        title: str,
        progress: bool,
    ) -> list[_Result]:
        """Results in order. When one fails, no other is begun, those under way end, and the exception has them all."""
        from tqdm.auto import tqdm

        if not jobs:
            return []
        stop = threading.Event()

        def guarded(job: _Job) -> _Result:
            try:
                return work(job, stop)
            except BaseException:
                stop.set()  # here rather than below, so that this thread itself begins no other
                raise

        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=len(jobs), desc=title, unit="request", **bar_options(progress)))
            pool = stack.enter_context(ThreadPoolExecutor(min(self._slots, len(jobs)), "drum-hf-endpoint"))
            futures = {pool.submit(guarded, job): i for i, job in enumerate(jobs)}
            done: dict[int, _Result] = {}
            try:
                for future in as_completed(futures):
                    if isinstance(future.exception(), StoppedError):
                        continue  # the failure that stopped it comes, too
                    done[futures[future]] = future.result()
                    bar.update(1)
            except BaseException as error:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                for future, i in futures.items():
                    if not future.cancelled() and future.exception() is None:
                        done[i] = future.result()
                error.partial = done  # type: ignore[attr-defined]
                raise
        return [done[i] for i in range(len(jobs))]
