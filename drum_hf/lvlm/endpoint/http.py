"""One POST to a chat endpoint: bounded, retried where that helps, counted, and never beyond the spending cap.

The client is httpx's, on an event loop in the background: there a request has one limit of time whatever the endpoint
does, and can be broken off at any moment.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import http.cookiejar
import json
import logging
import math
import os
import random
import ssl
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Coroutine
from datetime import UTC
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit, urlunsplit

import httpx

from ...errors import ContextOverflowError, EndpointError
from ...utils.redaction import address_secrets, redact
from ...utils.text import shown
from .spending import Meter, Spending

__all__ = ["ChatClient", "PassingError", "Stop", "StoppedError", "wait_before"]

logger = logging.getLogger(__name__)

#: Seconds: the first back-off is up to the one, no back-off of ours is longer than the other.
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
#: Seconds: an endpoint that asks for a longer pause than this is left alone, with an error.
_LONGEST_RETRY_AFTER = 600.0
#: Seconds to wait for a connection, at most.
_CONNECT = 15.0
#: Characters of an endpoint's own message that are shown.
_SHOWN = 500
#: Bytes of an answer, decompressed, and of an error's: log-probabilities of a prompt take about 100 bytes a token.
_ANSWER_BYTES, _ERROR_BYTES = 32 << 20, 1 << 20

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
    "maximum number of tokens",
    "prompt is too long",
    "tokens + `max_new_tokens` must be",
)


class StoppedError(Exception):
    """Another request failed for good, or the call was broken off, so this one was not answered."""


class PassingError(Exception):
    """A fault that a repetition may cure."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Stop(threading.Event):
    """What the requests of one call share: set, no other is sent; broken off, those under way end at once."""

    def __init__(self) -> None:
        super().__init__()
        self._under_way: set[concurrent.futures.Future[Any]] = set()
        self._broken_off = False
        self._guard = threading.Lock()

    def break_off(self) -> None:
        """Set it, and cancel the requests under way."""
        self.set()
        with self._guard:
            self._broken_off = True
            under_way = list(self._under_way)
        for future in under_way:
            future.cancel()

    def wait_for(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of what runs on the background loop.

        Raises:
            StoppedError: it was broken off.
        """
        future = asyncio.run_coroutine_threadsafe(work, _background_loop())
        with self._guard:
            self._under_way.add(future)
            late = self._broken_off
        if late:
            future.cancel()
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise StoppedError from None
        except BaseException:
            future.cancel()  # such as Ctrl-C in this very thread
            raise
        finally:
            with self._guard:
                self._under_way.discard(future)


_loop: tuple[int, asyncio.AbstractEventLoop] | None = None
_loop_lock = threading.Lock()


def _background_loop() -> asyncio.AbstractEventLoop:
    """The event loop that runs in a daemon thread of this process; a forked child gets another."""
    global _loop
    with _loop_lock:
        if _loop is None or _loop[0] != os.getpid():
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="drum-hf-http", daemon=True).start()
            _loop = (os.getpid(), loop)
        return _loop[1]


class _Plain(logging.Filter):
    """httpx logs each address in full; a key in its query must not be in the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(redact(str(a)) if isinstance(a, httpx.URL) else a for a in record.args)
        return True


class _Bearer(httpx.Auth):
    """The key as a header."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


class _Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes


class ChatClient:
    """Sends chat completions to one endpoint; safe for several threads.

    Args:
        base_url: what `/chat/completions` is appended to, such as "http://localhost:8000/v1".
        api_key: sent as a bearer token; "" or None for none. In no message and no repr.
        timeout: seconds for one request, from the connection to the last byte of the answer.
        max_retries: repetitions of one request.
        max_requests, max_tokens: spending cap, or None; see `Spending`.
        meter: counts and caps instead, where several clients spend together.
        secrets: what else must not be in any message.

    Attributes:
        base_url: without the path of the chat endpoint, user name, password or query.
        sleep: pauses for some seconds, or until the event is set. Tests put their own here.
        now: seconds since 1970.
        uniform: a random number between two.

    Raises:
        ValueError: the address is not an http(s) address, or the key holds what no header may.
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
        secrets: set[str] | None = None,
    ) -> None:
        try:
            parts = urlsplit(base_url)
            valid = parts.scheme in ("http", "https") and bool(httpx.URL(base_url).host)
        except (ValueError, httpx.InvalidURL):
            valid = False
        if not valid:
            raise ValueError(
                'expected base_url to be an address such as "http://localhost:8000/v1", got '
                f"{shown(redact(base_url))[:_SHOWN]!r}"
            )
        if parts.username or parts.password:
            raise ValueError("expected no user name or password in base_url; pass api_key= instead")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.base_url = urlunsplit((parts.scheme, parts.netloc.lower(), path, "", ""))
        self._url = urlunsplit((parts.scheme, parts.netloc, path + "/chat/completions", parts.query, ""))
        self._key = (api_key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise ValueError("expected an API key of printable ASCII characters without blanks; copy it again")
        self._secrets = {self._key, *address_secrets(base_url), *(secrets or ())} - {""}
        self.timeout = timeout
        self.max_retries = max_retries
        self.sleep: Callable[[float, threading.Event], Any] = lambda seconds, stop: stop.wait(seconds)
        self.now = time.time
        self.uniform = random.SystemRandom().uniform  # not the seeded one: clients must not move in step
        self.meter = meter or Meter(self.base_url, max_requests=max_requests, max_tokens=max_tokens)
        self._http: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None

    @property
    def spent(self) -> Spending:
        return self.meter.spent

    def complete(self, body: dict[str, Any], stop: Stop) -> dict[str, Any]:
        """The endpoint's answer to one chat completion, as parsed JSON.

        Raises:
            EndpointError: the endpoint refused, or gave no usable answer after every repetition.
            ContextOverflowError: the endpoint says that the conversation is too long.
            BudgetExceededError: the cap is reached; nothing was sent.
            StoppedError: `stop` was set before the request was sent, or broke it off.
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

    def attempt(self, body: dict[str, Any], stop: Stop, *, repetition: bool = False) -> dict[str, Any]:
        """As `complete`, sent once.

        Raises:
            PassingError: a fault that a repetition may cure.
        """
        if stop.is_set():
            raise StoppedError
        self.meter.reserve(repetition=repetition)
        return self._send(json.dumps(body).encode(), stop)

    # ---- one attempt ----

    def _send(self, data: bytes, stop: Stop) -> dict[str, Any]:
        try:
            answer = stop.wait_for(self._exchange(data))
        except (TimeoutError, httpx.TimeoutException) as error:
            raise PassingError(f"{self.base_url} did not answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            if _is_insecure(error):
                raise EndpointError(f"{self.base_url}: no secure connection: {self._said(str(error))}") from error
            reason = self._said(str(error) or type(error).__name__)
            raise PassingError(f"{self.base_url}: the connection failed: {reason}") from error
        if answer.status != 200:
            self._refused(answer, _parsed(answer.body))
        content = _parsed(answer.body)
        if content is None:
            text = self._said(answer.body.decode(errors="replace"))
            raise PassingError(f"{self.base_url} answered with something that is not JSON: {text!r}")
        if isinstance(content, dict) and content.get("error") and not content.get("choices"):
            self._refused(answer, content)  # some gateways report errors under status 200
        self.meter.count(content.get("usage") if isinstance(content, dict) else None)
        if not isinstance(content, dict):
            raise EndpointError(f"expected a JSON object from {self.base_url}, got a {type(content).__name__}")
        return content

    async def _exchange(self, data: bytes) -> _Answer:
        # What is compressed is decompressed here, since httpx would do it without a bound.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "gzip"}
        async with (
            asyncio.timeout(self.timeout),
            self._client().stream("POST", self._url, content=data, headers=headers) as response,
        ):
            fine = response.status_code == 200
            body = await self._body(response, _ANSWER_BYTES if fine else _ERROR_BYTES, cut=not fine)
            return _Answer(response.status_code, response.headers, body)

    async def _body(self, response: httpx.Response, most: int, *, cut: bool) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", ""):
            raise EndpointError(f"expected {self.base_url} to answer in gzip or plain, got {self._said(encoding)!r}")
        inflate = zlib.decompressobj(31) if encoding == "gzip" else None
        body, received = bytearray(), 0
        async for part in response.aiter_raw():
            received += len(part)
            try:
                body += inflate.decompress(part, most + 1 - len(body)) if inflate else part
            except zlib.error as error:
                raise PassingError(f"{self.base_url} answered with broken compression") from error
            if max(received, len(body)) > most:
                if cut:
                    return bytes(body[:most])
                raise EndpointError(
                    f"expected an answer of at most {most >> 20} MiB from {self.base_url}, got more; is it a chat "
                    "endpoint?"
                )
        return bytes(body)

    def _client(self) -> httpx.AsyncClient:
        """The kept client; called on the background loop, to which its connections belong."""
        loop = asyncio.get_running_loop()
        if self._http is None or self._http[0] is not loop:
            log = logging.getLogger("httpx")
            if not any(isinstance(known, _Plain) for known in log.filters):
                log.addFilter(_Plain())
            client = httpx.AsyncClient(
                auth=_Bearer(self._key),
                cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
                follow_redirects=False,  # one that is followed takes the key elsewhere
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, _CONNECT)),
            )
            self._http = (loop, client)
            weakref.finalize(self, _close, loop, client).atexit = False
        return self._http[1]

    def _refused(self, answer: _Answer, content: Any) -> NoReturn:
        """Raise what an answer that is no completion stands for."""
        message, codes = _fault(answer.body.decode(errors="replace") if content is None else content)
        status = answer.status
        if status == 200:
            status = next((int(c) for c in codes if len(c) == 3 and c.isdecimal() and 400 <= int(c) < 600), status)
        text = f"{self.base_url} answered {status}: {self._said(message)}"
        passing = status in _PASSING or status >= 500
        if passing and not _LASTING & set(codes):
            after = _retry_after(answer.headers.get("Retry-After"), self.now())
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
            elsewhere = self._said(str(answer.headers.get("Location")))
            remedies[status] = f"redirects are not followed; is base_url {elsewhere!r}?"
        remedy = remedies.get(status, "fields can be added, or left out by None, with extra_body=")
        if "image(s)" in message:
            remedy = "use fewer shots, or serve it with room for more images (vLLM: --limit-mm-per-prompt)"
        raise EndpointError(f"{text}; {remedy}", status=status)

    def _said(self, text: str) -> str:
        """What an endpoint says, shortened, without secrets, which some repeat, nor what a terminal acts on."""
        return shown(redact(text[: 100 * _SHOWN], self._secrets, "[API key]")[:_SHOWN])


def _is_insecure(error: BaseException | None) -> bool:
    """Whether a connection failed for a certificate: a repetition doesn't help."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _close(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    if _loop is not None and _loop[1] is loop and _loop[0] == os.getpid():
        asyncio.run_coroutine_threadsafe(client.aclose(), loop)


def _parsed(body: bytes) -> Any:
    """The JSON of an answer; None where it is none, or nested too deeply to be read."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _brief(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return f"a {type(value).__name__} of too many levels"


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


def _fault(content: Any) -> tuple[str, list[str]]:
    """An endpoint's own message, and the codes it gives beside it."""
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        error = {"message": error}
    message = error.get("message") or error.get("detail") or (error if any(error.values()) else "")
    codes = [str(error[name]) for name in ("code", "type", "param") if isinstance(error.get(name), (str, int))]
    text = message if isinstance(message, str) else _brief(message)
    return text.strip() or "no message", codes


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
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
