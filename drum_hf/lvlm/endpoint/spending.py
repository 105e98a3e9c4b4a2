"""What was asked of endpoints, and the cap on it."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, NoReturn, TypeGuard

from ...errors import BudgetExceededError, EndpointError

__all__ = ["Meter", "Spending", "is_count"]

#: Tokens in one conversation, at most: a thousand times the longest context of today.
_MOST_TOKENS = 10**9


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


class Meter:
    """Counts what is spent, and keeps it below a cap; safe for several threads, and shared by a fleet's endpoints.

    Args:
        where: whose spending it is, for messages.
        max_requests, max_tokens: the cap, or None; see `Spending`.
    """

    def __init__(self, where: str, *, max_requests: int | None, max_tokens: int | None) -> None:
        self._where = where
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self._lock = threading.Lock()
        self._spent = Spending()
        self._metered = True

    @property
    def spent(self) -> Spending:
        with self._lock:
            return self._spent

    def reserve(self, *, repetition: bool) -> None:
        """Count a request that is about to be sent.

        Raises:
            BudgetExceededError: the cap is reached; the request must not be sent.
            EndpointError: the cap is one of tokens, and the endpoint doesn't report them.
        """
        with self._lock:
            spent = self._spent
            if self.max_requests is not None and spent.requests >= self.max_requests:
                self._refuse("max_requests", self.max_requests)
            if self.max_tokens is not None:
                if not self._metered:
                    raise EndpointError(
                        f"expected {self._where} to report the tokens of each answer in `usage`, which it doesn't "
                        "always: max_tokens can't be kept; cap the spending with max_requests"
                    )
                if spent.tokens >= self.max_tokens:
                    self._refuse("max_tokens", self.max_tokens)
            self._spent = dataclasses.replace(
                spent, requests=spent.requests + 1, retries=spent.retries + int(repetition)
            )

    def _refuse(self, cap: str, limit: int) -> NoReturn:
        raise BudgetExceededError(
            f"expected to spend at most {cap}={limit:,} at {self._where}, and that is spent: {self._spent}. What "
            f"was answered is kept where a score store is in use: raise {cap} and run the same again to go on"
        )

    def count(self, usage: Any) -> None:
        """Add what an answer's `usage` says; what is no count of tokens adds nothing, and fails a cap of tokens."""
        counts = usage if isinstance(usage, dict) else {}
        asked, answered = counts.get("prompt_tokens"), counts.get("completion_tokens")
        with self._lock:
            self._metered &= is_count(asked) and is_count(0 if answered is None else answered)
            self._spent = dataclasses.replace(
                self._spent,
                prompt_tokens=self._spent.prompt_tokens + (asked if is_count(asked) else 0),
                completion_tokens=self._spent.completion_tokens + (answered if is_count(answered) else 0),
            )


def is_count(value: Any) -> TypeGuard[int]:
    """Whether an endpoint may be believed that this is a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
