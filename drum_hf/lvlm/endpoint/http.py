"""One POST to a chat endpoint: retried where that helps, counted, and never beyond the spending cap."""

from __future__ import annotations

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

from ...errors import ContextOverflowError, EndpointError
from .spending import Meter, Spending

__all__ = ["ChatClient", "PassingError", "StoppedError", "wait_before"]

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


class PassingError(Exception):
    """A fault that a repetition may cure."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


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
        meter: counts and caps instead, where several clients spend together.

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
        max_requests: int | None = None,
        max_tokens: int | None = None,
        meter: Meter | None = None,
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
        self.sleep: Callable[[float, threading.Event], Any] = lambda seconds, stop: stop.wait(seconds)
        self.now = time.time
        self.uniform = random.SystemRandom().uniform  # not the seeded one: clients must not move in step
        self.meter = meter or Meter(self.base_url, max_requests=max_requests, max_tokens=max_tokens)
        # A session is for one thread at a time, and its connections are worth keeping from one call to the next.
        self._sessions: queue.SimpleQueue[requests.Session] = queue.SimpleQueue()

    @property
    def spent(self) -> Spending:
        return self.meter.spent

    def complete(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """The endpoint's answer to one chat completion, as parsed JSON.

        Raises:
            EndpointError: the endpoint refused, or gave no usable answer after every repetition.
            ContextOverflowError: the endpoint says that the conversation is too long.
            BudgetExceededError: the cap is reached; nothing was sent.
            StoppedError: `stop` was set before the request was sent.
        """
        attempt = 0
        while True:
            try:
                return self.attempt(body, stop, repetition=attempt > 0)
            except PassingError as fault:
                if attempt == self.max_retries:
                    raise EndpointError(
                        f"{fault}; gave up after {attempt + 1} attempts. Is the endpoint up, and base_url right? "
                        "Raise max_retries or timeout, or lower max_concurrency; what was answered before is kept",
                        status=fault.status,
                    ) from fault
                seconds = wait_before(attempt, fault, self.base_url, self.uniform)
                logger.info("%s; repeated in %.1f s (%d of %d)", fault, seconds, attempt + 1, self.max_retries)
            self.sleep(seconds, stop)
            attempt += 1

    def attempt(self, body: dict[str, Any], stop: threading.Event, *, repetition: bool = False) -> dict[str, Any]:
        """As `complete`, sent once.

        Raises:
            PassingError: a fault that a repetition may cure.
        """
        if stop.is_set():
            raise StoppedError
        self.meter.reserve(repetition=repetition)
        return self._send(json.dumps(body).encode())

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
            raise PassingError(f"{self.base_url} did not answer within {self.timeout:g} s") from error
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise PassingError(self._said(f"{self.base_url}: the connection failed: {error}")) from error
        except requests.exceptions.RequestException as error:
            raise EndpointError(self._said(f"{self.base_url} can't be asked: {error}")) from error
        finally:
            self._sessions.put(session)
        if response.status_code != 200:
            self._refused(response)
        try:
            answer = response.json()
        except ValueError as error:
            raise PassingError(
                self._said(f"{self.base_url} answered with something that is not JSON: {response.text[:_SHOWN]!r}")
            ) from error
        if isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
            self._refused(response)  # some gateways report errors under status 200
        self.meter.count(answer.get("usage") if isinstance(answer, dict) else None)
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
            raise PassingError(text, status=status, retry_after=after)
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


def wait_before(attempt: int, fault: PassingError, base_url: str, uniform: Callable[[float, float], float]) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or an exponential back-off with full jitter.

    Raises:
        EndpointError: it asks for a longer pause than is waited for.
    """
    if fault.retry_after is None:
        return uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
    if fault.retry_after > _LONGEST_RETRY_AFTER:
        raise EndpointError(
            f"{base_url} asks for a pause of {fault.retry_after:.0f} s, longer than the "
            f"{_LONGEST_RETRY_AFTER:.0f} s that are waited for; run again later, what was answered before is kept",
            status=429,
        )
    return fault.retry_after + uniform(0, _FIRST_WAIT)  # whoever was told the same shall not come back at once


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
