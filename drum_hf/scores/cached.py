"""The one path to an LVLM's scores and answers: look up, ask for the rest in batches, write each batch at once."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import ChatTemplateError, DrumError, EndpointError, NonFiniteScoreError, RowError
from ..types import LVLM, ICLRequest
from ..utils.optional import bar_options
from ..utils.text import shown, well_formed
from .processes import ALONE, Processes, shard
from .store import RequestKind, RequestParts, ScoreStore, request_key

__all__ = ["CachedLVLM", "Refused"]

logger = logging.getLogger(__name__)

#: Batches of new work from which a progress bar is worth its lines.
_QUIET_BATCHES = 3
#: HTTP statuses by which an endpoint refuses one request rather than all of them.
_REFUSALS = (400, 413, 415, 422)

#: Skipped requests that are logged one by one.
_TOLD = 10

Build = Callable[[Sequence[int]], list[ICLRequest]]


class Refused(NamedTuple):
    """A request that the LVLM gave no usable answer to, and why."""

    query_id: str | None
    demonstration_ids: tuple[str, ...]
    reason: str


class CachedLVLM:
    """An LVLM that looks every answer up, asks another LVLM for the rest, and writes each batch at once.

    Args:
        lvlm: the LVLM that answers what is not known.
        store: where answers are kept.
        batch_size: requests sent, and written, at a time: what a kill can lose at most.
        on_error: what to do about a request that the LVLM refuses (too long, an image that its processor doesn't
            take, a score that is not finite). "raise": keep the other answers of its batch, then raise an error that
            names the row. "skip": log it, go on, and answer NaN or ""; `refused` lists it. Refusals are not stored.

    An LVLM that fails partway through a batch may leave what it has on the exception, as `partial`: a dict from
    positions in the batch to answers. That is written, too, before the exception goes on.

    Methods that take `processes` share their work among the processes of a launch, which must then all make the call,
    with the same arguments: what one of them (or one machine's store) knows counts for all, the rest is dealt out by
    what requests share, each process writes what it has answered to its store, and all of them return the same. Left
    out, a process works alone, whatever it was launched with.

    Attributes:
        calls: requests that the LVLM has answered so far.
        hits: requests answered without it so far: from the store, or as a repetition within one call.
        refused: requests skipped so far, of this process.

    Raises:
        ValueError: batch_size is below 1, or on_error is neither.
    """

    def __init__(
        self, lvlm: LVLM, store: ScoreStore, *, batch_size: int = 64, on_error: Literal["raise", "skip"] = "raise"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, got {batch_size}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"expected on_error 'raise' or 'skip', got {on_error!r}")
        self.lvlm = lvlm
        self.store = store
        self.batch_size = batch_size
        self.on_error = on_error
        self.calls = 0
        self.hits = 0
        self.refused: list[Refused] = []
        self._mended = False

    @property
    def fingerprint(self) -> str:
        """The LVLM's own."""
        return self.lvlm.fingerprint

    def __repr__(self) -> str:
        return f"CachedLVLM({self.lvlm!r}, {self.store!r})"

    def score(
        self, requests: Iterable[ICLRequest], *, processes: Processes = ALONE, progress: bool | None = None
    ) -> np.ndarray:
        """Log-likelihoods as of `LVLM.score`, paid for once.

        Args:
            requests: a sequence, read again where an answer is new (it may load its images lazily); or an iterator.
            processes: share the work among these.
            progress: show a bar, in the main process only; None: where more than a few batches are new.

        Returns:
            float64 array of shape (len(requests),), in order.

        Raises:
            NonFiniteScoreError: the LVLM returned NaN or infinity; the rest of its batch was written.
            RowError: the LVLM refused a request by a plain ValueError; the rest of its batch was written.
            SavedFileError: the store can't be read or written.
        """
        several = requests if isinstance(requests, Sequence) else list(requests)
        fingerprint = self.fingerprint
        keys = [request_key(request, fingerprint) for request in several]
        shared = [tuple(demonstration.key for demonstration in request.demonstrations) for request in several]
        return self.score_lazily(keys, _chosen(several), shared=shared, processes=processes, progress=progress)

    def score_lazily(
        self,
        keys: Sequence[bytes],
        build: Build,
        *,
        shared: Sequence[Hashable] | None = None,
        processes: Processes = ALONE,
        progress: bool | None = None,
    ) -> np.ndarray:
        """As `score`, with requests built batch by batch, and only those whose score is new.

        Args:
            keys: `request_key` of each request under this LVLM's fingerprint.
            build: makes the requests at some positions of `keys`, in that order.
            shared: what each request's conversation begins with, such as its demonstrations' ids; () for nothing.
                Requests that begin alike are sent together, so that an LVLM which computes a common beginning once
                can do so.

        Returns:
            float64 array of shape (len(keys),), in order.

        Raises:
            ValueError: `build` made other requests than the keys say.
            NonFiniteScoreError, RowError, SavedFileError: as in `score`.
        """
        return np.asarray(self._answers("score", keys, build, None, shared, processes, progress), dtype=np.float64)

    def generate(
        self,
        requests: Iterable[ICLRequest],
        *,
        max_new_tokens: int = 32,
        processes: Processes = ALONE,
        progress: bool | None = None,
    ) -> list[str]:
        """Greedy answers as of `LVLM.generate`, paid for once; arguments and errors as in `score`.

        An answer is kept, and returned, `well_formed`: half a surrogate pair and NUL become U+FFFD.
        """
        several = requests if isinstance(requests, Sequence) else list(requests)
        fingerprint = self.fingerprint
        keys = [request_key(r, fingerprint, kind="generate", max_new_tokens=max_new_tokens) for r in several]
        return self.generate_lazily(
            keys, _chosen(several), max_new_tokens=max_new_tokens, processes=processes, progress=progress
        )

    def generate_lazily(
        self,
        keys: Sequence[bytes],
        build: Build,
        *,
        max_new_tokens: int = 32,
        processes: Processes = ALONE,
        progress: bool | None = None,
    ) -> list[str]:
        """As `generate`, with requests built batch by batch; arguments as in `score_lazily`."""
        return self._answers("generate", keys, build, max_new_tokens, None, processes, progress)

    def plan(self, keys: Sequence[bytes], *, kind: RequestKind = "score") -> tuple[int, int]:
        """What a call would cost, without making it: (unique keys to be sent, unique keys already known)."""
        new = len(self.unknown(keys, kind=kind))
        return new, len(set(keys)) - new

    def unknown(
        self, keys: Sequence[bytes], *, kind: RequestKind = "score", processes: Processes = ALONE
    ) -> list[int]:
        """Positions of the keys that a call would send to the LVLM, each different one once."""
        return _new(keys, self._known(keys, kind, processes))

    def _known(self, keys: Sequence[bytes], kind: RequestKind, processes: Processes) -> dict[bytes, Any]:
        """What any machine's store holds; the same in every process, so that they deal out the same work."""
        look_up = self.store.get_scores if kind == "score" else self.store.get_texts
        # the processes of a machine have one file, of which one report is enough
        reports = processes.is_local_main or self.store.path == ":memory:"
        answers: dict[bytes, Any] = {}
        for values in processes.gather(lambda: look_up(keys) if reports else []):
            for key, value in zip(keys, values, strict=False):
                if value is not None:
                    answers.setdefault(key, value)
        return answers

    def _answers(
        self,
        kind: RequestKind,
        keys: Sequence[bytes],
        build: Build,
        max_new_tokens: int | None,
        shared: Sequence[Hashable] | None,
        processes: Processes,
        progress: bool | None,
    ) -> list[Any]:
        answers = self._known(keys, kind, processes)
        known = len(answers)
        groups: Sequence[Hashable] = [()] * len(keys) if shared is None else shared
        # In the order in which all of them would be sent: so a run that was killed goes on with the very batches that
        # it would have sent, and batches of another make-up round otherwise.
        began: dict[Hashable, int] = {}
        for position, group in enumerate(groups):
            began.setdefault(group, position)
        new = sorted(_new(keys, answers), key=lambda i: (i if groups[i] == () else began[groups[i]], i))
        self.hits += len(keys) - len(new)
        shares = [[new[i] for i in share] for share in shard([groups[i] for i in new], processes.count)]
        own = shares[processes.rank]
        seen = len(own) > _QUIET_BATCHES * self.batch_size if progress is None else progress

        def work() -> list[Any]:
            if not own:
                return []
            self.store.check_writable(self.fingerprint)
            found: dict[int, Any] = {}
            with _bar(kind, own, len(new), known, visible=processes.is_main and seen) as bar:
                for positions in self._batches(own, groups):
                    processes.check()
                    batch = self._built(build, positions, [keys[i] for i in positions], max_new_tokens)
                    found.update(zip(positions, self._batch(kind, batch, max_new_tokens), strict=True))
                    bar.update(len(positions))
            return [found[i] for i in own]

        for share, values in zip(shares, processes.gather(work), strict=True):
            answers.update(zip((keys[i] for i in share), values, strict=True))
        return [answers[key] for key in keys]

    def _batches(self, new: list[int], shared: Sequence[Hashable]) -> Iterator[list[int]]:
        """Positions to be sent together; what shares its beginning is in one batch wherever one holds it."""
        groups: dict[Hashable, list[int]] = {}
        for position in new:
            alone = shared[position] == ()
            groups.setdefault((alone, position if alone else shared[position]), []).append(position)
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

    def _built(
        self, build: Build, positions: list[int], keys: list[bytes], max_new_tokens: int | None
    ) -> list[ICLRequest]:
        """Requests from the caller, checked: one under another's key would poison the store for good."""
        batch = list(build(positions))
        fingerprint = self.fingerprint
        if [RequestParts.of(request, max_new_tokens).key(fingerprint) for request in batch] != keys:
            raise ValueError(
                f"build made {len(batch)} requests for {len(positions)} positions, and not those that the keys stand "
                "for; make the keys with request_key(request, lvlm.fingerprint) from the same contents, in order"
            )
        return batch

    def _batch(self, kind: RequestKind, batch: list[ICLRequest], max_new_tokens: int | None) -> list[Any]:
        """The answers to a batch, each of them written."""
        faults: dict[int, Exception] = {}
        answers = self._asked(kind, batch, list(range(len(batch))), max_new_tokens, faults)
        for i in sorted(faults):
            query, demonstrations = batch[i].query.id, tuple(d.id for d in batch[i].demonstrations)
            if self.on_error == "raise":
                raise _named(faults[i], query, demonstrations)
            answers[i] = math.nan if kind == "score" else ""
            self.refused.append(Refused(query, demonstrations, str(faults[i])))
            if len(self.refused) <= _TOLD:
                logger.warning(
                    "skipped query %s with demonstrations %s: %s%s",
                    *(shown(repr(each)) for each in (query, list(demonstrations))),
                    shown(faults[i]),
                    "; further ones are only listed in `refused`" if len(self.refused) == _TOLD else "",
                )
        return [answers[i] for i in range(len(batch))]

    def _asked(
        self,
        kind: RequestKind,
        batch: list[ICLRequest],
        rows: list[int],
        max_new_tokens: int | None,
        faults: dict[int, Exception],
    ) -> dict[int, Any]:
        """Answers to some rows of a batch, written; a row that is refused goes to `faults`.

        Where the LVLM refuses a call for one row's sake, its halves are asked one by one, down to that row. Where
        errors are raised, the first such row is enough: no other is searched for.
        """
        requests = [batch[i] for i in rows]
        values: list[Any]
        try:
            if kind == "score":
                values = np.asarray(self.lvlm.score(requests), dtype=np.float64).reshape(-1).tolist()
            else:
                values = list(self.lvlm.generate(requests, max_new_tokens=max_new_tokens or 0))
        except BaseException as error:
            partial = {rows[i]: value for i, value in getattr(error, "partial", {}).items()}
            self.calls += len(partial)
            answers = self._kept(kind, batch, partial, max_new_tokens, faults)
            left = [i for i in rows if i not in partial]
            if not left or not isinstance(error, Exception) or not self._is_of_a_row(error):
                raise
            if len(left) == 1:
                faults[left[0]] = error
            elif self.on_error == "skip" or not faults:
                middle = len(left) // 2
                for half in (left[:middle], left[middle:]):
                    answers |= self._asked(kind, batch, half, max_new_tokens, faults)
            return answers
        self.calls += len(rows)
        if len(values) != len(rows):
            raise ValueError(
                f"expected {len(rows)} answers for {len(rows)} requests, but {type(self.lvlm).__name__} returned "
                f"{len(values)}; an LVLM answers each request, in order"
            )
        return self._kept(kind, batch, dict(zip(rows, values, strict=True)), max_new_tokens, faults)

    def _is_of_a_row(self, error: Exception) -> bool:
        if isinstance(error, EndpointError):
            return self.on_error == "skip" and error.status in _REFUSALS
        # A template is the model's, and the same for every row.
        return isinstance(error, ValueError) and not isinstance(error, ChatTemplateError)

    def _kept(
        self,
        kind: RequestKind,
        batch: list[ICLRequest],
        answers: dict[int, Any],
        max_new_tokens: int | None,
        faults: dict[int, Exception],
    ) -> dict[int, Any]:
        """The answers that can be kept, as they are kept: written before anything can interrupt."""
        usable: dict[int, Any] = {}
        for i, value in answers.items():
            if kind == "score" and math.isfinite(value):
                usable[i] = float(value)
            elif kind == "score":
                faults[i] = NonFiniteScoreError(
                    f"expected finite scores, got {value}; look at its images and responses, or run the LVLM in "
                    "bfloat16 or float32 (float16 overflows)"
                )
            elif isinstance(value, str):
                usable[i] = well_formed(value)
                if usable[i] != value and not self._mended:
                    self._mended = True
                    logger.warning(
                        "an answer to query %s holds half a surrogate pair or NUL, which become U+FFFD, or is cut "
                        "after a million characters; this is said once",
                        shown(repr(batch[i].query.id)),
                    )
            else:
                faults[i] = RowError(f"expected a text as an answer, got {value!r:.80} of {type(value).__name__}")
        fingerprint = self.fingerprint
        parts = [RequestParts.of(batch[i], max_new_tokens) for i in usable]
        put: Callable[..., None] = self.store.put_scores if kind == "score" else self.store.put_texts
        with _uninterrupted():
            put(
                [part.key(fingerprint) for part in parts],
                list(usable.values()),
                fingerprint=fingerprint,
                parts=parts,
                identity=getattr(self.lvlm, "identity", None),  # not every LVLM names its parts
            )
        return usable


def _chosen(requests: Sequence[ICLRequest]) -> Build:
    return lambda positions: [requests[i] for i in positions]


def _new(keys: Sequence[bytes], known: dict[bytes, Any]) -> list[int]:
    first: dict[bytes, int] = {}
    for position, key in enumerate(keys):
        if key not in known:
            first.setdefault(key, position)
    return list(first.values())


def _named(error: Exception, query: str | None, demonstrations: tuple[str, ...]) -> Exception:
    """The error with its row; one that the library has no name for as a `RowError`."""
    said = shown(" ".join(str(error).split()), most=2000)
    message = f"query {shown(repr(query))} with demonstrations {shown(repr(list(demonstrations)))}: {said}"
    if isinstance(error, DrumError):
        error.args = (message, *error.args[1:])
        return error
    named = RowError(
        f"{message}; fix or remove this row, or skip such rows with CachedLVLM(…, on_error='skip'). The other answers "
        "of its batch are kept"
    )
    named.__cause__ = error
    return named


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until what was paid for is written."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    pressed: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if pressed and callable(before):
            before(*pressed[0])


def _bar(kind: RequestKind, own: list[int], new: int, known: int, *, visible: bool) -> Any:
    from tqdm.auto import tqdm

    several = f" ({len(own):,} of {new:,} in this process)" if len(own) < new else ""
    bar = tqdm(
        total=len(own),
        desc=f"LVLM {kind}{several}",
        unit="pair" if kind == "score" else "request",
        **bar_options(visible),
    )
    bar.set_postfix({"new": new, "known": known}, refresh=False)
    return bar
