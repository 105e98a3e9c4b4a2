"""What the LVLM is asked about demonstrations: scores of pairs, and drafts of queries, by id and through the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..data import TripletTable
from ..types import LVLM, ICLRequest, Query, trusted
from ..utils.optional import bar_options
from .cached import CachedLVLM
from .sharding import ALONE, Processes, shard
from .store import RequestParts, ScoreStore, request_key

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Feedback"]

_Value = TypeVar("_Value", float, str)

#: Batches of new work from which a progress bar is worth its lines.
_QUIET_BATCHES = 3


class Feedback:
    """An LVLM's feedback on which demonstrations help which queries.

    Args:
        lvlm: any LVLM; wrapped in a `CachedLVLM` unless it is one.
        support: the table that demonstrations come from.
        queries: the table that queries and their gold responses come from; often the support set itself.
        store: where scores and drafts are kept; in memory if left out.
        choices: the closed label set that scores are normalised over (classification, multiple choice).
        max_new_tokens: length of a draft.

    A query's gold answers are its `references`, each weighted by how often it stands there (VQA's ten annotators), or
    else its `response`.

    Methods that take `processes` share their work among the processes of a launch, which must then all make the call,
    with the same arguments: what one of them (or one machine's store) knows counts for all, the rest is dealt out by
    demonstrations, each process writes what it has answered to its store, and all of them return the same. Left out,
    a process works alone, whatever it was launched with.
    """

    def __init__(
        self,
        lvlm: LVLM,
        support: TripletTable,
        queries: TripletTable,
        *,
        store: ScoreStore | None = None,
        choices: Sequence[str] = (),
        max_new_tokens: int = 32,
    ) -> None:
        self.lvlm = lvlm if isinstance(lvlm, CachedLVLM) else CachedLVLM(lvlm, store or ScoreStore())
        self.support, self.queries = support, queries
        self.choices = tuple(choices)
        self.max_new_tokens = max_new_tokens

    def _gold(self, row: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        references = self.queries.references[row]
        if self.choices or not references:
            return (self.queries.responses[row],), ()
        counted = Counter(references)
        return tuple(counted), (tuple(float(n) for n in counted.values()) if len(counted) > 1 else ())

    def _key(self, query_id: str, demonstration_ids: Sequence[str]) -> bytes:
        """Store key of a scored pair, from content hashes alone: no image is decoded."""
        row = self.queries.row(query_id)
        shown = tuple(self.support.keys[self.support.row(d)] for d in demonstration_ids)
        responses, weights = self._gold(row)
        parts = RequestParts(self.queries.query_keys[row], shown, responses, weights, self.choices)
        return parts.key(self.lvlm.fingerprint)

    def _draft_key(self, query_id: str) -> bytes:
        asked = ICLRequest(trusted(Query, image=None, key=self.queries.query_keys[self.queries.row(query_id)]))
        return request_key(asked, self.lvlm.fingerprint, kind="generate", max_new_tokens=self.max_new_tokens)

    def request(self, query_id: str, demonstration_ids: Sequence[str] = ()) -> ICLRequest:
        """The request that scores `query_id`'s gold response after these demonstrations, pictures and all."""
        responses, weights = self._gold(self.queries.row(query_id))
        shown = tuple(self.support[d] for d in demonstration_ids)
        return ICLRequest(self.queries.query(query_id), shown, responses, weights, self.choices)

    def score(
        self,
        pairs: Sequence[tuple[str, Sequence[str]]],
        *,
        processes: Processes = ALONE,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Score of each (query id, demonstration ids in the order shown); float64, higher is better.

        Only what the store does not hold is computed; every finished batch is in the store.

        Args:
            processes: share the work among these.
            progress: show a bar, in the main process only; None: where more than a few batches are new.

        Raises:
            MissingIdError: an id is in neither table.
            NonFiniteScoreError: the LVLM returned NaN or infinity.
        """
        keys = [self._key(q, ds) for q, ds in pairs]
        shared = [tuple(demonstrations) for _, demonstrations in pairs]

        def ask(own: list[int], bar: _Bar) -> list[float]:
            def build(rows: Sequence[int]) -> list[ICLRequest]:
                processes.check()
                bar.begin(len(rows))
                return [self.request(*pairs[own[r]]) for r in rows]

            return self.lvlm.score_lazily(
                [keys[i] for i in own], build, shared=[shared[i] for i in own], progress=False
            ).tolist()

        answers = self._share(keys, self.lvlm.store.get_scores, shared, ask, processes, "LVLM score", "pair", progress)
        return np.asarray(answers, dtype=np.float64)

    def zero_shot(self, query_ids: Sequence[str], *, processes: Processes = ALONE) -> np.ndarray:
        """Scores without any demonstration; a demonstration's utility is its score minus this."""
        return self.score([(q, ()) for q in query_ids], processes=processes)

    def drafts(
        self, query_ids: Sequence[str], *, processes: Processes = ALONE, progress: bool | None = None
    ) -> list[str]:
        """The LVLM's own zero-shot answers: generated once, kept in the store, never the gold response.

        Args:
            processes, progress: as in `score`.
        """

        def ask(own: list[int], bar: _Bar) -> list[str]:
            texts: list[str] = []
            for start in range(0, len(own), self.lvlm.batch_size):
                processes.check()
                batch = own[start : start + self.lvlm.batch_size]
                bar.begin(len(batch))
                requests = [ICLRequest(self.queries.query(query_ids[i])) for i in batch]
                texts += self.lvlm.generate(requests, max_new_tokens=self.max_new_tokens, progress=False)
            return texts

        keys = [self._draft_key(q) for q in query_ids]
        alone: list[Hashable] = [()] * len(keys)
        return self._share(keys, self.lvlm.store.get_texts, alone, ask, processes, "LVLM draft", "query", progress)

    def unscored(self, pairs: Sequence[tuple[str, Sequence[str]]], *, processes: Processes = ALONE) -> list[int]:
        """Positions of the pairs that `score` would send to the LVLM, each different one once."""
        keys = [self._key(q, ds) for q, ds in pairs]
        return _new(keys, self._known(keys, self.lvlm.store.get_scores, processes))

    def undrafted(self, query_ids: Sequence[str], *, processes: Processes = ALONE) -> list[int]:
        """Positions of the queries that `drafts` would send to the LVLM, each different one once."""
        keys = [self._draft_key(q) for q in query_ids]
        return _new(keys, self._known(keys, self.lvlm.store.get_texts, processes))

    def plan(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> tuple[int, int]:
        """How many of these pairs are (new, already paid for)."""
        return self.lvlm.plan([self._key(q, ds) for q, ds in pairs])

    def _known(
        self,
        keys: Sequence[bytes],
        look_up: Callable[[Sequence[bytes]], list[_Value | None]],
        processes: Processes,
    ) -> dict[bytes, _Value]:
        """What any machine's store holds; the same in every process, so that they deal out the same work."""
        answers: dict[bytes, _Value] = {}
        # the processes of a machine have one file, of which one report is enough
        reports = processes.is_local_main or self.lvlm.store.path == ":memory:"
        for values in processes.gather(lambda: look_up(keys) if reports else []):
            for key, value in zip(keys, values, strict=False):
                if value is not None:
                    answers.setdefault(key, value)
        return answers

    def _share(
        self,
        keys: Sequence[bytes],
        look_up: Callable[[Sequence[bytes]], list[_Value | None]],
        shared: Sequence[Hashable],
        ask: Callable[[list[int], _Bar], list[_Value]],
        processes: Processes,
        title: str,
        unit: str,
        progress: bool | None,
    ) -> list[_Value]:
        answers = self._known(keys, look_up, processes)
        new = _new(keys, answers)
        # In the order in which all of them would be sent: so a run that was killed goes on with the very batches that
        # it would have sent, and batches of another make-up round otherwise.
        began: dict[Hashable, int] = {}
        for position, group in enumerate(shared):
            began.setdefault(group, position)
        new.sort(key=lambda i: (i if shared[i] == () else began[shared[i]], i))
        self.lvlm.hits += len(keys) - len(new)
        shares = [[new[i] for i in share] for share in shard([shared[i] for i in new], processes.count)]
        own = shares[processes.rank]
        if progress is None:
            progress = len(own) > _QUIET_BATCHES * self.lvlm.batch_size
        known = len(answers)

        def work() -> list[_Value]:
            if not own:
                return []
            with _Bar(title, unit, own, len(new), known, shown=processes.is_main and bool(progress)) as bar:
                return ask(own, bar)

        for share, values in zip(shares, processes.gather(work), strict=True):
            answers.update(zip((keys[i] for i in share), values, strict=True))
        return [answers[key] for key in keys]


def _new(keys: Sequence[bytes], known: dict[bytes, _Value]) -> list[int]:
    first: dict[bytes, int] = {}
    for position, key in enumerate(keys):
        if key not in known:
            first.setdefault(key, position)
    return list(first.values())


class _Bar:
    """Progress through this process's share, told of each batch when it begins."""

    def __init__(self, title: str, unit: str, own: list[int], new: int, known: int, *, shown: bool) -> None:
        from tqdm.auto import tqdm

        several = f" ({len(own):,} of {new:,} in this process)" if len(own) < new else ""
        self._bar: tqdm = tqdm(total=len(own), desc=f"{title}{several}", unit=unit, **bar_options(shown))
        self._bar.set_postfix({"new": new, "known": known}, refresh=False)
        self._begun = 0

    def begin(self, size: int) -> None:
        """The batch before this one, of `size` requests, is done."""
        self._bar.update(self._begun)
        self._begun = size

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self._bar.update(self._begun)
        self._bar.close()
