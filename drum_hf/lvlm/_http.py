"""One POST to a chat endpoint: retried where that helps, counted, and never beyond the spending cap."""

from __future__ import annotations

import dataclasses
import email.utils
import json
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

import requests

from ..errors import BudgetExceededError, ContextOverflowError, EndpointError

__all__ = ["ChatClient", "Spending", "StoppedError"]

logger = logging.getLogger(__name__)

#: Seconds: the first back-off is up to the one, no back-off of ours is longer than the other.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
#: Seconds: an endpoint that asks for a longer pause than this is left alone, with an error.
_LONGEST_RETRY_AFTER = 600.0
#: Characters of an endpoint's own message that are shown.
_SHOWN = 500

#: Statuses below 500 that a repetition may cure: timeout, conflict, too early, too many requests.
_PASSING = {408, 409, 425, 429}
#: What endpoints answer 429 with though waiting won't help.
_LASTING = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}

#: How the usual servers say that a conversation is too long, in their `code`, `type` or message.
_TOO_LONG = (
    "context_length_exceeded",
    "exceed_context_size",
    "context length",
    "context window",
    "context size",
    "maximum model length",
    "max_model_len",
    "tokens + `max_new_tokens` must be",
)


class StoppedError(Exception):
    """Another request failed for good, so this one was not sent."""


class _PassingError(Exception):
    """A fault that a repetition may cure."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Spending:
    """What was asked of an endpoint so far.

    Attributes:
        requests: HTTP requests sent, repetitions and probes included.
        retries: those of them that were repetitions.
        prompt_tokens, completion_tokens: as the endpoint reports them in `usage`.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests ({self.retries:,} of them repetitions), "
            f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens"
        )


class _Bearer(requests.auth.AuthBase):
    """The key as a header; being an `auth`, it also keeps requests from sending what a .netrc says instead."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class ChatClient:
    """Sends chat completions to one endpoint; safe for several threads.

    Args:
        base_url: what `/chat/completions` is appended to, such as "http://localhost:8000/v1".
        api_key: sent as a bearer token; "" or None for none. In no message and no repr.
        timeout: seconds to wait for a connection, and for the endpoint's next byte.
        max_retries: repetitions of one request.
        max_requests, max_tokens: spending cap, or None; see `Spending`.

    Attributes:
        base_url: without the path of the chat endpoint, user name or password.
        sleep: pauses for some seconds, or until the event is set. Tests put their own here.
        now: seconds since 1970.
        uniform: a random number between two.

    Raises:
        ValueError: the address is no http(s) address, or the key holds what no header may.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        timeout: float,
        max_retries: int,
        max_requests: int | None,
        max_tokens: int | None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f'expected base_url to be an address such as "http://localhost:8000/v1", got {base_url!r}'
            )
        if parts.username or parts.password:
            raise ValueError("expected no user name or password in base_url; pass api_key= instead")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.base_url = urlunsplit((parts.scheme, parts.netloc.lower(), path, "", ""))
        self._url = urlunsplit((parts.scheme, parts.netloc, path + "/chat/completions", parts.query, ""))
        self._key = (api_key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise ValueError("expected an API key of printable ASCII characters without blanks; copy it again")
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.sleep: Callable[[float, threading.Event], Any] = lambda seconds, stop: stop.wait(seconds)
        self.now = time.time
        self.uniform = random.SystemRandom().uniform  # not the seeded one: clients must not move in step
        self._lock = threading.Lock()
        self._spent = Spending()
        self._metered = True
        # A session is for one thread at a time, and its connections are worth keeping from one call to the next.
        self._sessions: queue.SimpleQueue[requests.Session] = queue.SimpleQueue()

    @property
    def spent(self) -> Spending:
        with self._lock:
            return self._spent

    def complete(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """The endpoint's answer to one chat completion, as parsed JSON.

        Raises:
            EndpointError: the endpoint refused, or gave no usable answer after every repetition.
            ContextOverflowError: the endpoint says that the conversation is too long.
            BudgetExceededError: the cap is reached; nothing was sent.
            StoppedError: `stop` was set before the request was sent.
        """
        data = json.dumps(body).encode()
        attempt = 0
        while True:
            self._reserve(stop, repetition=attempt > 0)
            try:
                return self._send(data)
            except _PassingError as fault:
                if attempt == self.max_retries:
                    raise EndpointError(
                        f"{fault}; gave up after {attempt + 1} attempts. Is the endpoint up, and base_url right? "
                        "Raise max_retries or timeout, or lower max_concurrency; what was answered before is kept",
                        status=fault.status,
                    ) from fault
                seconds = self._wait(attempt, fault.retry_after)
                logger.info("%s; repeated in %.1f s (%d of %d)", fault, seconds, attempt + 1, self.max_retries)
            self.sleep(seconds, stop)
            attempt += 1

    def _wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds until the next attempt: what the endpoint asks for, or an exponential back-off with full jitter."""
        if retry_after is None:
            return self.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
        if retry_after > _LONGEST_RETRY_AFTER:
            raise EndpointError(
                f"{self.base_url} asks for a pause of {retry_after:.0f} s, longer than the "
                f"{_LONGEST_RETRY_AFTER:.0f} s that are waited for; run again later, what was answered before is kept",
                status=429,
            )
        return retry_after + self.uniform(0, _FIRST_WAIT)  # whoever was told the same shall not come back at once

    # ---- the cap ----

    def _reserve(self, stop: threading.Event, *, repetition: bool) -> None:
        with self._lock:
            spent = self._spent
            if stop.is_set():
                raise StoppedError
            if self.max_requests is not None and spent.requests >= self.max_requests:
                self._refuse("max_requests", self.max_requests)
            if self.max_tokens is not None:
                if not self._metered:
                    raise EndpointError(
                        f"expected {self.base_url} to report the tokens of each answer in `usage`, which it doesn't: "
                        "max_tokens can't be kept; cap the spending with max_requests"
                    )
                if spent.tokens >= self.max_tokens:
                    self._refuse("max_tokens", self.max_tokens)
            self._spent = dataclasses.replace(
                spent, requests=spent.requests + 1, retries=spent.retries + int(repetition)
            )

    def _refuse(self, cap: str, limit: int) -> NoReturn:
        raise BudgetExceededError(
            f"expected to spend at most {cap}={limit:,} at {self.base_url}, and that is spent: {self._spent}. What "
            f"was answered is kept where a score store is in use: raise {cap} and run the same again to go on"
        )

    def _count(self, usage: Any) -> None:
        counts = usage if isinstance(usage, dict) else {}
        asked, answered = (counts.get(f"{part}_tokens") for part in ("prompt", "completion"))
        with self._lock:
            self._metered &= isinstance(asked, int)
            self._spent = dataclasses.replace(
                self._spent,
                prompt_tokens=self._spent.prompt_tokens + (asked if isinstance(asked, int) else 0),
                completion_tokens=self._spent.completion_tokens + (answered if isinstance(answered, int) else 0),
            )

    # ---- one attempt ----

    def _send(self, data: bytes) -> dict[str, Any]:
        try:
            session = self._sessions.get_nowait()
        except queue.Empty:
            session = requests.Session()
        try:
            response = session.post(
                self._url,
                data=data,
                headers={"Content-Type": "application/json"},
                auth=_Bearer(self._key),
                timeout=self.timeout,
                allow_redirects=False,  # one that is followed becomes a GET, or takes the key elsewhere
            )
        except requests.exceptions.SSLError as error:
            raise EndpointError(self._said(f"{self.base_url}: no secure connection: {error}")) from error
        except requests.exceptions.Timeout as error:
            raise _PassingError(f"{self.base_url} did not answer within {self.timeout:g} s") from error
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise _PassingError(self._said(f"{self.base_url}: the connection failed: {error}")) from error
        except requests.exceptions.RequestException as error:
            raise EndpointError(self._said(f"{self.base_url} can't be asked: {error}")) from error
        finally:
            self._sessions.put(session)
        if response.status_code != 200:
            self._refused(response)
        try:
            answer = response.json()
        except ValueError as error:
            raise _PassingError(
                self._said(f"{self.base_url} answered with something that is not JSON: {response.text[:_SHOWN]!r}")
            ) from error
        if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
            self._refused(response)  # some gateways report errors under status 200
        self._count(answer.get("usage") if isinstance(answer, dict) else None)
        if not isinstance(answer, dict):
            raise EndpointError(f"expected a JSON object from {self.base_url}, got a {type(answer).__name__}")
        return answer

    def _refused(self, response: requests.Response) -> NoReturn:
        """Raise what an answer that is no completion stands for."""
        message, codes = _fault(response)
        status = response.status_code
        if status == 200:
            status = next((int(c) for c in codes if c.isdecimal() and 400 <= int(c) < 600), status)
        text = self._said(f"{self.base_url} answered {status}: {message}")
        passing = status in _PASSING or status >= 500
        if passing and not _LASTING & set(codes):
            after = _retry_after(response.headers.get("Retry-After"), self.now())
            raise _PassingError(text, status=status, retry_after=after)
        if status in (400, 413, 422) and any(sign in part.lower() for sign in _TOO_LONG for part in (message, *codes)):
            raise ContextOverflowError(f"{text}; use fewer shots or smaller images")
        remedies = {
            401: "check the API key: pass api_key=, or set OPENAI_API_KEY",
            403: "check that the API key may use this model",
            404: 'check the model\'s name, and base_url, which usually ends in "/v1"',
            413: 'send smaller images, or image_format="jpeg"',
            429: "the account's quota is used up: check its plan and billing",
        }
        if 300 <= status < 400:
            remedies[status] = f"redirects are not followed; is base_url {response.headers.get('Location')!r}?"
        remedy = remedies.get(status, "fields can be added, or left out by None, with extra_body=")
        raise EndpointError(f"{text}; {remedy}", status=status)

    def _said(self, text: str) -> str:
        """A message without the key, which some endpoints repeat in theirs."""
        return text.replace(self._key, "[API key]") if self._key else text


def _fault(response: requests.Response) -> tuple[str, list[str]]:
    """An endpoint's own message, and the codes it gives beside it."""
    try:
        content = response.json()
    except ValueError:
        content = response.text
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        error = {"message": error}
    message = error.get("message") or error.get("detail") or error
    codes = [str(error[name]) for name in ("code", "type") if error.get(name) is not None]
    text = message if isinstance(message, str) else json.dumps(message)
    return (text.strip()[:_SHOWN] or response.reason or "no message"), codes


def _retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as such or as an HTTP date; None where it can't be read.

    >>> _retry_after("1.5", 0.0), _retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 20.0), _retry_after("soon", 0.0)
    (1.5, 40.0, None)
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else None
