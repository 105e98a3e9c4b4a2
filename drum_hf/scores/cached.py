"""An LVLM that looks its answers up in a `ScoreStore`, and asks another LVLM only for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np

from ..errors import NonFiniteScoreError
from ..types import LVLM, ICLRequest
from ..utils.optional import bar_options
from .store import RequestParts, ScoreStore, request_key

__all__ = ["CachedLVLM"]

_Value = TypeVar("_Value", float, str)

#: Batches of new work from which a progress bar is worth its lines.
_QUIET_BATCHES = 3


class CachedLVLM:
    """An LVLM that looks every answer up, asks another LVLM for the rest, and writes each batch at once.

    Args:
        lvlm: the LVLM that answers what is not known.
        store: where answers are kept.
        batch_size: requests sent, and written, at a time: what a kill can lose at most.

    An LVLM that fails half-way through a batch may leave what it has on the exception, as `partial`: a dict from
    positions in the batch to answers. That is written, too, before the exception goes on.

    Attributes:
        calls: requests sent to the LVLM so far.
        hits: requests answered without it so far: from the store, or as a repetition within one call.

    Raises:
        ValueError: batch_size is below 1.
    """

    def __init__(self, lvlm: LVLM, store: ScoreStore, *, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        self.lvlm = lvlm
        self.store = store
        self.batch_size = batch_size
        self.calls = 0
        self.hits = 0

    @property
    def fingerprint(self) -> str:
        """The LVLM's own."""
        return self.lvlm.fingerprint

    @property
    def _identity(self) -> dict[str, str | bool | None] | None:
        return getattr(self.lvlm, "identity", None)  # not every LVLM names its parts

    def __repr__(self) -> str:
        return f"CachedLVLM({self.lvlm!r}, {self.store!r})"

    def plan(self, keys: Sequence[bytes], *, kind: Literal["score", "generate"] = "score") -> tuple[int, int]:
        """What a call would cost, without making it: (unique keys to be sent, unique keys already known)."""
        unique = list(dict.fromkeys(keys))
        look_up = self.store.get_scores if kind == "score" else self.store.get_texts
        new = look_up(unique).count(None)
        return new, len(unique) - new

    def score(self, requests: Iterable[ICLRequest], *, progress: bool | None = None) -> np.ndarray:
        """Log-likelihoods as of `LVLM.score`, paid for once.

        Args:
            requests: a sequence, read again where an answer is new (it may load its images lazily); or an iterator.
            progress: show a bar; None: where more than a few batches are new.

        Returns:
            float64 array of shape (len(requests),), in order.

        Raises:
            NonFiniteScoreError: the LVLM returned NaN or infinity; the rest of its batch was written.
            SavedFileError: the store can't be read or written.
        """
        several = requests if isinstance(requests, Sequence) else list(requests)
        fingerprint = self.fingerprint
        keys = [request_key(request, fingerprint) for request in several]
        shared = [tuple(demonstration.key for demonstration in request.demonstrations) for request in several]
        return self.score_lazily(
            keys, lambda positions: [several[i] for i in positions], shared=shared, progress=progress
        )

    def score_lazily(
        self,
        keys: Sequence[bytes],
        build: Callable[[Sequence[int]], list[ICLRequest]],
        *,
        shared: Sequence[Hashable] | None = None,
        progress: bool | None = None,
    ) -> np.ndarray:
        """As `score`, with requests built batch by batch, and only those whose score is new.

        Args:
            keys: `request_key` of each request under this LVLM's fingerprint.
            build: makes the requests at some positions of `keys`, in that order.
            shared: what each request's conversation begins with, such as its demonstrations' ids. Requests that begin
                alike are sent together, so that an LVLM which computes a common beginning once can do so.

        Returns:
            float64 array of shape (len(keys),), in order.

        Raises:
            ValueError: `build` made other requests than the keys say.
            NonFiniteScoreError, SavedFileError: as in `score`.
        """
        fingerprint = self.fingerprint

        def ask(positions: list[int]) -> list[float]:
            batch = _built(build, positions, [keys[i] for i in positions], fingerprint)

            def keep(answers: dict[int, float]) -> None:
                self.store.put_scores(
                    [keys[positions[i]] for i in answers],
                    list(answers.values()),
                    fingerprint=fingerprint,
                    parts=[RequestParts.of(batch[i]) for i in answers],
                    identity=self._identity,
                )

            with self._keeping_partial(keep):
                scores = np.asarray(self.lvlm.score(batch), dtype=np.float64).reshape(-1)
            self._count(len(scores), batch)
            finite = np.isfinite(scores)
            keep({i: float(scores[i]) for i in np.flatnonzero(finite).tolist()})
            if not finite.all():
                first = int(np.argmin(finite))
                bad = batch[first]
                raise NonFiniteScoreError(
                    f"expected finite scores, got {scores[first]} for query {bad.query.id!r} with demonstrations "
                    f"{[demonstration.id for demonstration in bad.demonstrations]!r}; look at their images and "
                    "responses, or run the LVLM in bfloat16 or float32 (float16 overflows)"
                )
            return scores.tolist()

        answers = self._answers(keys, self.store.get_scores(keys), ask, "score", progress, shared)
        return np.asarray(answers, dtype=np.float64)

    def generate(
        self, requests: Iterable[ICLRequest], *, max_new_tokens: int = 32, progress: bool | None = None
    ) -> list[str]:
        """Greedy answers as of `LVLM.generate`, paid for once; arguments as in `score`.

        Raises:
            SavedFileError: the store can't be read or written.
        """
        several = requests if isinstance(requests, Sequence) else list(requests)
        fingerprint = self.fingerprint
        keys = [request_key(r, fingerprint, kind="generate", max_new_tokens=max_new_tokens) for r in several]

        def ask(positions: list[int]) -> list[str]:
            batch = [several[i] for i in positions]

            def keep(answers: dict[int, str]) -> None:
                self.store.put_texts(
                    [keys[positions[i]] for i in answers],
                    list(answers.values()),
                    fingerprint=fingerprint,
                    parts=[RequestParts.of(batch[i], max_new_tokens) for i in answers],
                    identity=self._identity,
                )

            with self._keeping_partial(keep):
                texts = list(self.lvlm.generate(batch, max_new_tokens=max_new_tokens))
            self._count(len(texts), batch)
            keep(dict(enumerate(texts)))
            return texts

        return self._answers(keys, self.store.get_texts(keys), ask, "generate", progress)

    def _answers(
        self,
        keys: Sequence[bytes],
        known: Sequence[_Value | None],
        ask: Callable[[list[int]], list[_Value]],
        verb: str,
        progress: bool | None,
        shared: Sequence[Hashable] | None = None,
    ) -> list[_Value]:
        from tqdm.auto import tqdm

        answers = {key: answer for key, answer in zip(keys, known, strict=True) if answer is not None}
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in answers}
        new = sorted(first.values())
        self.hits += len(keys) - len(new)
        shown = bool(new) and (len(new) > _QUIET_BATCHES * self.batch_size if progress is None else progress)
        with tqdm(total=len(new), desc=f"LVLM {verb}", unit="request", **bar_options(shown)) as bar:
            bar.set_postfix({"from cache": f"{1 - len(new) / max(1, len(keys)):.0%}"}, refresh=False)
            for positions in self._batches(new, shared):
                answers.update(zip((keys[i] for i in positions), ask(positions), strict=True))
                bar.update(len(positions))
        return [answers[key] for key in keys]

    def _batches(self, new: list[int], shared: Sequence[Hashable] | None) -> Iterator[list[int]]:
        """Positions to be sent together; what shares its beginning is in one batch wherever one holds it."""
        groups: dict[Hashable, list[int]] = {}
        for position in new:
            groups.setdefault(position if shared is None else shared[position], []).append(position)
        batch: list[int] = []
        for group in groups.values():
            if batch and len(batch) + len(group) > self.batch_size:
                yield batch
                batch = []
            while len(group) > self.batch_size:
                yield group[: self.batch_size]
                group = group[self.batch_size :]
            batch += group
        if batch:
            yield batch

    @contextlib.contextmanager
    def _keeping_partial(self, keep: Callable[[dict[int, _Value]], None]) -> Iterator[None]:
        """Writes what an LVLM answered before it failed: its exception's `partial`, answers by position in a batch."""
        try:
            yield
        except BaseException as error:
            partial: dict[int, _Value] = getattr(error, "partial", {})
            self.calls += len(partial)
            keep(partial)
            raise

    def _count(self, answers: int, batch: Sequence[ICLRequest]) -> None:
        self.calls += len(batch)
        if answers != len(batch):
            raise ValueError(
                f"expected {len(batch)} answers for {len(batch)} requests, but {type(self.lvlm).__name__} returned "
                f"{answers}; an LVLM answers each request, in order"
            )


def _built(
    build: Callable[[Sequence[int]], list[ICLRequest]], positions: list[int], keys: list[bytes], fingerprint: str
) -> list[ICLRequest]:
    """Requests from the caller, checked: one under another's key would poison the store for good."""
    batch = list(build(positions))
    if [request_key(request, fingerprint) for request in batch] != keys:
        raise ValueError(
            f"build made {len(batch)} requests for {len(positions)} positions, and not those that the keys stand for; "
            "make the keys with request_key(request, lvlm.fingerprint) from the same contents, in order"
        )
    return batch
