"""Several chat endpoints that serve one model, as one: requests go where there is room, and not where they failed."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import EndpointError
from .http import ChatClient, PassingError, Stop, StoppedError, wait_before
from .scores import PromptToken
from .spending import Meter, Spending

__all__ = ["ChatFleet", "Greeting"]

logger = logging.getLogger(__name__)

#: Statuses that are about an endpoint rather than about a request: key, plan, model or address are wrong there.
_ITS_OWN = {None, 401, 402, 403, 404, 429}
#: Log-probabilities of one prompt that differ by more come from other weights. Servers of the same weights differ in
#: the last bits of bfloat16, and by their kernels, by hundredths (our choice).
_SAME = 0.2
#: Seconds that a thread waits at most before it looks again whether it was stopped.
_GLANCE = 0.5


@dataclasses.dataclass(frozen=True)
class Greeting:
    """How an endpoint answered to a conversation that each of a fleet is sent before anything else.

    Attributes:
        model: what it calls itself; None where it doesn't say.
        length: tokens of the conversation under its template; None where it doesn't count them.
        tokens: these tokens; empty where it doesn't return them.
    """

    model: str | None
    length: int | None
    tokens: tuple[PromptToken, ...] = ()

    def differs(self, other: Greeting) -> str | None:
        """What tells two endpoints apart; None where nothing does."""
        if self.model != other.model:
            return f"one calls its model {self.model!r}, the other {other.model!r}"
        if self.length != other.length or bool(self.tokens) != bool(other.tokens):
            counts = [f"{g.length} tokens{'' if g.tokens else ' without log-probabilities'}" for g in (self, other)]
            return f"the same conversation is {counts[0]} for one and {counts[1]} for the other"
        if [token.id for token in self.tokens] != [token.id for token in other.tokens]:
            return "the same conversation has other tokens: their templates or tokenizers differ"
        gaps = [abs(a.logprob - b.logprob) for a, b in zip(self.tokens, other.tokens, strict=True)]
        worst = max(gaps, default=0.0)
        if not worst <= _SAME:
            return (
                f"their log-probabilities of the same conversation differ by {worst:.2f}: the weights are not the same"
            )
        return None


@dataclasses.dataclass
class _Member:
    client: ChatClient
    busy: int = 0
    faults: int = 0  # since its last answer
    out_until: float = 0.0
    greeting: Greeting | None = None
    lost: EndpointError | None = None  # why it is out for good


class ChatFleet:
    """Sends chat completions to whichever endpoint has the most room; safe for several threads, as `ChatClient`.

    An endpoint that fails is taken out, for as long as a single one would be waited for (up to 30 s, doubling), and
    then tried with one request at a time until it answers; meanwhile the request goes to the others. One that refuses
    the key, the model or the address is out for good. A request that has failed `max_retries + 1` times for each
    endpoint is given up.

    Args:
        base_urls, api_key, timeout, max_retries, secrets: as of `ChatClient`, of each endpoint.
        slots: requests under way at once, at each endpoint.
        max_requests, max_tokens: spending cap over the fleet.
        greet: asks an endpoint, through the function that it is given, how it answers to a fixed conversation.

    Attributes:
        now: seconds on a clock that only goes forward.
        uniform: a random number between two.

    Raises:
        ValueError: an address is none, or comes twice.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        api_key: str | None,
        *,
        slots: int,
        timeout: float,
        max_retries: int,
        max_requests: int | None,
        max_tokens: int | None,
        secrets: set[str],
        greet: Callable[[Callable[[dict[str, Any]], dict[str, Any]]], Greeting],
    ) -> None:
        self.meter = Meter(f"{len(base_urls)} endpoints", max_requests=max_requests, max_tokens=max_tokens)
        how: dict[str, Any] = {"timeout": timeout, "max_retries": max_retries, "meter": self.meter, "secrets": secrets}
        self._members = [_Member(ChatClient(url, api_key, **how)) for url in base_urls]
        self.base_urls = [member.client.base_url for member in self._members]
        if len(set(self.base_urls)) < len(self.base_urls):
            raise ValueError(f"expected each endpoint once, got {', '.join(self.base_urls)}")
        self._slots, self._greet = slots, greet
        self._attempts = (max_retries + 1) * len(self._members)
        self._reference: tuple[str, Greeting] | None = None
        self._turn = threading.Condition()
        self.now = time.monotonic
        self.uniform = random.SystemRandom().uniform

    @property
    def base_url(self) -> str:
        """The addresses, for messages."""
        return ", ".join(self.base_urls)

    @property
    def spent(self) -> Spending:
        return self.meter.spent

    @property
    def lost(self) -> dict[str, EndpointError]:
        """Addresses that are out for good, and why."""
        with self._turn:
            return {member.client.base_url: member.lost for member in self._members if member.lost is not None}

    def complete(self, body: dict[str, Any], stop: Stop) -> dict[str, Any]:
        """An endpoint's answer to one chat completion, as parsed JSON.

        Raises:
            EndpointError: a request was refused, every endpoint is out for good, or none gave a usable answer after
                every repetition; or two of them don't serve the same model.
            ContextOverflowError, BudgetExceededError, StoppedError: as in `ChatClient.complete`.
        """
        failures = 0
        while True:
            member = self._enter(stop)
            client = member.client
            try:
                if member.greeting is None:
                    self._admit(member, stop)
                answer = client.attempt(body, stop, repetition=failures > 0)
            except PassingError as fault:
                failures += 1
                self._rest(member, fault)
                if failures == self._attempts:
                    raise EndpointError(
                        f"{fault}; gave up after {failures} attempts at {len(self._members)} endpoints. Are they up, "
                        "and the addresses right? Raise max_retries or timeout, or lower max_concurrency; what was "
                        "answered before is kept",
                        status=fault.status,
                    ) from fault
            except EndpointError as error:
                if error.status not in _ITS_OWN:
                    raise
                self._lose(member, error)
                failures += 1
            else:
                member.faults = 0
                return answer
            finally:
                with self._turn:
                    member.busy -= 1
                    self._turn.notify_all()

    def _enter(self, stop: Stop) -> _Member:
        """The endpoint with the largest share of its slots free, one of them taken; waits until there is one."""
        with self._turn:
            while True:
                if stop.is_set():
                    raise StoppedError
                alive = [member for member in self._members if member.lost is None]
                if not alive:
                    first = self._members[0].lost
                    assert first is not None
                    others = "; ".join(str(member.lost) for member in self._members[1:])
                    raise EndpointError(f"every endpoint is out: {first}; {others}", status=first.status) from first
                now = self.now()
                # One that failed, or was never asked, has to prove itself with a single request.
                room = [m for m in alive if m.out_until <= now and m.busy < (self._slots if self._proven(m) else 1)]
                if room:
                    chosen = min(room, key=lambda member: member.busy)
                    chosen.busy += 1
                    return chosen
                back = min((m.out_until - now for m in alive if m.out_until > now), default=_GLANCE)
                self._turn.wait(min(max(back, 0.0), _GLANCE))

    @staticmethod
    def _proven(member: _Member) -> bool:
        return member.faults == 0 and member.greeting is not None

    def _admit(self, member: _Member, stop: Stop) -> None:
        """Greet an endpoint, and compare it with the first that was greeted."""
        greeting = self._greet(lambda body: member.client.attempt(body, stop))
        with self._turn:
            if self._reference is None:
                self._reference = (member.client.base_url, greeting)
            where, reference = self._reference
            fault = greeting.differs(reference)
            if fault is None:
                member.greeting = greeting
        if fault is not None:
            raise EndpointError(
                f"expected endpoints that serve the same model under the same template, but {member.client.base_url} "
                f"and {where} don't: {fault}. Scores of different models must not be mixed: ask them one by one",
                status=409,
            )

    def _rest(self, member: _Member, fault: PassingError) -> None:
        try:
            seconds = wait_before(member.faults, fault, member.client.base_url, self.uniform)
        except EndpointError as error:
            self._lose(member, error)
            return
        with self._turn:
            member.faults += 1
            member.out_until = max(member.out_until, self.now() + seconds)
        logger.info("%s; left alone for %.1f s", fault, seconds)

    def _lose(self, member: _Member, error: EndpointError) -> None:
        with self._turn:
            first, member.lost = member.lost is None, member.lost or error
        if first:
            logger.warning("%s; nothing more is sent there", error)
