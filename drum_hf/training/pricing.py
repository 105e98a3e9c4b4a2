"""A price before the bill: how many pairs are new to the LVLM, and what scoring them will take."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import TripletTable
from ..scores.feedback import Feedback
from ..scores.processes import ALONE, Processes, shard
from ..scores.store import ScoreStore
from ..types import LVLM
from .mining import FIRST_RANDOM_SHARE, CandidateTable, mine_candidates

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever

__all__ = [
    "CALIBRATION",
    "Rates",
    "ScorePlan",
    "TrainingPlan",
    "measure_drafts",
    "plan_scores",
    "plan_training",
    "price",
]

#: Pairs that a process scores to find out what they take; our choice.
CALIBRATION = 32

Pair = tuple[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What an LVLM takes in one process, from a calibration.

    Attributes:
        pair: seconds for a pair whose images it has seen before, its share of the demonstration's prefix included.
        image: seconds for an image that it sees for the first time; 0 for an LVLM that doesn't keep them.
        tokens: prompt tokens of a pair; NaN where the LVLM doesn't count them.
        requests: sent to an endpoint for a pair; 0 for an LVLM that runs here.
    """

    pair: float
    image: float
    tokens: float = math.nan
    requests: float = 0.0


@dataclasses.dataclass
class ScorePlan:
    """Pairs to score, and what they will cost.

    Attributes:
        feedback: scores them.
        pairs: (query id, (demonstration id,)) each.
        new, known: different pairs that the LVLM must score, and those already paid for.
        images: different pictures that the new pairs show.
        tokens: prompt tokens of the new pairs, from a sample (an endpoint's: all tokens that it counts); 0 where
            nothing was measured.
        seconds: expected time of the new pairs, in all processes together. NaN where it was not measured, and for an
            endpoint, whose time is not ours to tell.
        requests: to an endpoint; 0 for an LVLM that runs here.
        paid: pairs that were scored to find this out. They are in the store, and count as new here.
        drafts: queries whose draft the LVLM must write first, and `draft_seconds`, what that takes. Without them the
            pairs were proposed by image and prompt alone, so that some will be others.
        rates: of each process; None where it was not measured.
        processes: that share the work.
    """

    feedback: Feedback
    pairs: list[Pair]
    new: int
    known: int
    images: int
    tokens: int = 0
    seconds: float = 0.0
    requests: int = 0
    paid: int = 0
    drafts: int = 0
    draft_seconds: float = 0.0
    rates: list[Rates | None] | None = None
    processes: Processes = ALONE

    def describe(self) -> str:
        """One line for a terminal."""
        parts = [f"{self.new:,} new pairs, {self.known:,} already in the store", f"{self.images:,} distinct images"]
        if self.tokens:
            parts.insert(1, f"about {self.tokens:,} {'' if self.requests else 'prompt '}tokens")
        parts += _cost(self.seconds, self.requests, self.processes.count)
        if self.drafts:
            parts.append(
                f"{self.drafts:,} drafts to be written first{_also(self.draft_seconds)}, until when some of the "
                "pairs are guesses"
            )
        if self.paid:
            parts.append(f"{self.paid:,} of the pairs were scored to find this out, and are paid for and kept")
        return "; ".join(parts)

    def run(self) -> np.ndarray:
        """Score them; every finished batch is kept."""
        return self.feedback.score(self.pairs, processes=self.processes)


@dataclasses.dataclass
class TrainingPlan:
    """What the LVLM will have to do for a whole training.

    Attributes:
        first: the first round.
        later: at most so many new pairs in each later round, which proposes what the trained retriever likes.
        set_level: how many of the last rounds set-level score, two demonstrations at a time.
        images: different pictures of all that a later round may show.
        seconds, tokens, requests: of all rounds, as `ScorePlan` has them; of rounds after the first, at most.
    """

    first: ScorePlan
    later: list[int]
    images: int
    seconds: float
    tokens: int
    requests: int
    set_level: int = 0

    def describe(self) -> str:
        """A few lines for a terminal."""
        lines = [f"round 1: {self.first.describe()}"]
        alone = len(self.later) - self.set_level
        for done, pairs in enumerate(self.later):
            lines.append(
                f"round {done + 2}: at most {pairs:,} {'new pairs' if done < alone else 'pairs at set level'}"
            )
        total = [f"at most {self.first.new + sum(self.later):,} new pairs"]
        if self.tokens:
            total.append(f"about {self.tokens:,} {'' if self.requests else 'prompt '}tokens")
        total += _cost(self.seconds, self.requests, self.first.processes.count)
        lines.append(f"in all: {'; '.join(total)}; training the encoder comes on top")
        return "\n".join(lines)


def _cost(seconds: float, requests: int, processes: int) -> list[str]:
    if requests:
        return [f"about {requests:,} requests to the endpoint"]
    where = f"on these {processes} processes" if processes > 1 else "on this machine"
    return [] if math.isnan(seconds) or not seconds else [f"{_duration(seconds)} {where}"]


def _also(seconds: float) -> str:
    return "" if math.isnan(seconds) else f" ({_duration(seconds)})"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"about {hours} h {minutes} min"
    if minutes:
        return f"about {minutes} min {rest} s"
    return f"about {rest} s" if rest else "under a second"


def price(
    feedback: Feedback,
    pairs: Sequence[Pair],
    *,
    processes: Processes = ALONE,
    calibrate: int = CALIBRATION,
    worth: int = 0,
    rates: Sequence[Rates | None] | None = None,
    seed: int = 0,
) -> ScorePlan:
    """What scoring these pairs will take.

    The rates come from up to `calibrate` of the new pairs in each process, as they will be scored: whole demonstration
    groups, after a warm-up on one of them, preceded by the zero-shot scores of their queries. A zero-shot score costs
    the query's image and what a pair costs whose images were seen, so that the two timings give both. All of these
    scores are kept.

    Args:
        pairs: (query id, demonstration ids) each.
        processes: that will share the work; all of them make this call.
        calibrate: 0 counts, and measures nothing.
        worth: fewer new pairs than this are counted only.
        rates: of an earlier price, instead of a calibration.
        seed: of the sample.
    """
    pairs = list(pairs)
    new = feedback.unscored(pairs, processes=processes)
    shares = [[new[i] for i in s] for s in shard([pairs[p][1] for p in new], processes.count)]
    known = len(set(pairs)) - len(new)
    scored: list[list[Pair]] = [[] for _ in shares]
    if rates is None and calibrate > 0 and new and len(new) >= worth:
        groups = _groups(pairs, shares[processes.rank], seed)
        measured = processes.gather(lambda: _calibrate(feedback, groups, calibrate))
        rates, scored = [found for found, _ in measured], [sample for _, sample in measured]
    plan = ScorePlan(feedback, pairs, len(new), known, len(_images(feedback, [pairs[i] for i in new])))
    plan.processes, plan.rates = processes, None if rates is None else list(rates)
    plan.paid = sum(map(len, scored))
    if rates is not None:
        left = [
            (len(share) - len(done), len(_images(feedback, [pairs[i] for i in share]) - _images(feedback, done)))
            for share, done in zip(shares, scored, strict=True)
        ]
        plan.seconds, plan.tokens, plan.requests = _bill(left, len(new), rates)
    elif new:
        plan.seconds = math.nan
    return plan


def _bill(shares: Sequence[tuple[int, int]], new: int, rates: Sequence[Rates | None]) -> tuple[float, int, int]:
    """Seconds and requests of shares of (pairs, images) that are still to be scored; tokens of `new` pairs."""
    measured = [rate for rate in rates if rate is not None]
    if not measured:
        return 0.0, 0, 0
    # A process that had nothing to calibrate on is taken for an average one.
    usual = Rates(*(float(np.mean([getattr(r, f.name) for r in measured])) for f in dataclasses.fields(Rates)))
    by_share = [
        (rate or usual).pair * pairs + (rate or usual).image * images
        for (pairs, images), rate in zip(shares, rates, strict=True)
    ]
    tokens = 0 if math.isnan(usual.tokens) else round(usual.tokens * new)
    requests = round(usual.requests * sum(pairs for pairs, _ in shares))
    return (math.nan if usual.requests else max(by_share)), tokens, requests


def _images(feedback: Feedback, pairs: Iterable[Pair]) -> set[str]:
    """Keys of the pictures that these pairs show."""
    support, queries = feedback.support, feedback.queries
    keys: set[str] = set()
    for query_id, shown in pairs:
        keys.add(queries.image_keys[queries.row(query_id)])
        keys.update(support.image_keys[support.row(d)] for d in shown)
    return keys - {""}


def _groups(pairs: Sequence[Pair], rows: Sequence[int], seed: int) -> list[list[Pair]]:
    """Pairs by their demonstrations, in random order."""
    groups: dict[tuple[str, ...], list[Pair]] = {}
    for row in rows:
        groups.setdefault(pairs[row][1], []).append(pairs[row])
    several = list(groups.values())
    return [several[i] for i in np.random.default_rng(seed).permutation(len(several))]


def _calibrate(feedback: Feedback, groups: list[list[Pair]], limit: int) -> tuple[Rates | None, list[Pair]]:
    """Rates from up to `limit` pairs of these groups, and the pairs that were scored for it."""
    if not groups:
        return None, []
    warm_up, limit = groups[0][: max(1, limit // 4)], limit - max(1, limit // 4)
    sample: list[Pair] = []
    for group in groups[1:]:
        sample += group[: limit - len(sample)]
        if len(sample) == limit:
            break
    if not sample:  # a single group, or no limit to speak of
        warm_up, sample = warm_up[:-1], warm_up[-1:]
    spent = _spent(feedback.lvlm.lvlm)
    if spent is not None:
        # An endpoint: what counts is what it counts, and nothing is sent that the plan would not send.
        feedback.score(sample, progress=False)
        after = _spent(feedback.lvlm.lvlm) or spent
        requests, tokens = (round(b - a) / len(sample) for a, b in zip(spent, after, strict=True))
        return Rates(math.nan, math.nan, tokens or math.nan, requests), sample
    feedback.score(warm_up, progress=False)
    bare = [(query_id, ()) for query_id in dict.fromkeys(q for q, _ in sample)]
    bare = [bare[i] for i in feedback.unscored(bare)]
    first = _timed(feedback, bare)
    second = _timed(feedback, sample)
    pair, image = _solve(first, len(bare), second, len(sample), len({shown for _, shown in sample}))
    count = getattr(feedback.lvlm.lvlm, "count_tokens", None)
    tokens = math.nan if count is None else float(np.mean(count([feedback.request(*p) for p in sample])))
    return Rates(pair, image, tokens), warm_up + sample


def _timed(feedback: Feedback, pairs: Sequence[Pair]) -> float:
    began = time.perf_counter()
    feedback.score(pairs, progress=False)
    return time.perf_counter() - began


def _solve(bare_seconds: float, bare: int, seconds: float, pairs: int, groups: int) -> tuple[float, float]:
    """Seconds a pair and an image, from `bare` zero-shot scores and then `pairs` pairs in `groups` groups.

    bare_seconds = bare * (image + pair) and seconds = groups * image + pairs * pair. Where nothing tells them apart
    (a demonstration for each query, or no zero-shot score that was new), all is laid on the pairs.
    """
    whole = seconds / pairs
    if not bare or groups >= pairs:
        return whole, 0.0
    image = min(max(0.0, (bare_seconds / bare - whole) / (1 - groups / pairs)), seconds / groups)
    return max(0.0, seconds - groups * image) / pairs, image


def _spent(lvlm: LVLM) -> tuple[float, float] | None:
    """(requests, tokens) that an endpoint has counted so far; None for an LVLM that runs here."""
    spent: Any = getattr(lvlm, "spent", None)
    if spent is None:
        return None
    counts = spent if isinstance(spent, Mapping) else {f: getattr(spent, f, 0) for f in _COUNTED}
    requests, *tokens = (float(counts.get(name, 0) or 0) for name in _COUNTED)
    return requests, sum(tokens)


_COUNTED = ("requests", "prompt_tokens", "completion_tokens")


def measure_drafts(
    feedback: Feedback, query_ids: Sequence[str], *, processes: Processes = ALONE, sample: int = 8
) -> tuple[int, float]:
    """How many queries have no draft yet, and the seconds that writing them will take, from a few that are kept.

    Returns:
        (drafts, seconds); the seconds NaN for an endpoint, of which nothing is asked.
    """
    new = feedback.undrafted(query_ids, processes=processes)
    share = [query_ids[new[i]] for i in shard([()] * len(new), processes.count)[processes.rank]]
    if not new or _spent(feedback.lvlm.lvlm) is not None:
        return len(new), math.nan if new else 0.0

    def work() -> float:
        if not share:
            return 0.0
        feedback.drafts(share[:1])
        began = time.perf_counter()
        feedback.drafts(share[1 : 1 + sample])
        return (time.perf_counter() - began) / max(1, len(share[1 : 1 + sample])) * len(share[1 + sample :])

    return len(new), max(processes.gather(work))


def plan_scores(
    retriever: DemoRetriever,
    lvlm: LVLM,
    *,
    queries: TripletTable | None,
    store: ScoreStore,
    candidates: int,
    choices: Sequence[str] = (),
    random_share: float = FIRST_RANDOM_SHARE,
    seed: int = 0,
    calibrate: int = CALIBRATION,
    write_drafts: bool = True,
    processes: Processes = ALONE,
) -> ScorePlan:
    """Propose `candidates` demonstrations for every query, as a first mining round would, and price them.

    Args:
        queries: None: the support set's own rows.
        store: keeps the scores, those of the calibration included.
        choices: the closed label set that scores are normalised over.
        random_share, seed: as in `DrumTrainingArguments`.
        calibrate: see `price`.
        write_drafts: have the LVLM draft answers first, where the retriever compares responses. False: use the drafts
            that are in the store, and price the others.
        processes: that share the work; all of them make this call.
    """
    asked = retriever.support if queries is None else queries
    feedback = Feedback(lvlm, retriever.support, asked, store=store, choices=choices)
    drafts: dict[str, str] = {}
    missing, seconds = 0, 0.0
    if retriever.uses_drafts:
        if not write_drafts:
            missing, seconds = measure_drafts(feedback, asked.ids, processes=processes)
        unwritten = set(feedback.undrafted(asked.ids, processes=processes)) if missing else set()
        written = [query_id for i, query_id in enumerate(asked.ids) if i not in unwritten]
        drafts = dict(zip(written, feedback.drafts(written, processes=processes), strict=True))
    mined = processes.from_main(
        lambda: mine_candidates(
            retriever,
            CandidateTable(asked.ids),
            lambda query_id: asked.query(query_id, draft=drafts.get(query_id)),
            count=candidates,
            random_share=random_share,
            rng=np.random.default_rng([seed, 77, 0]),
        )
    )
    pairs: list[Pair] = [(query_id, (candidate,)) for query_id, found in mined.items() for candidate, _ in found]
    plan = price(feedback, pairs, processes=processes, calibrate=calibrate, seed=seed)
    plan.drafts, plan.draft_seconds = missing, seconds
    return plan


def plan_training(first: ScorePlan, *, rounds: int, candidates: int, set_level_rounds: int = 0) -> TrainingPlan:
    """What the rounds of a training will cost, from the plan of its first one.

    Rounds after the first are priced as if none of their pairs were known and every image came anew, though not to a
    set-level round, whose candidates have all been seen. There a pair is taken for one and a half, since it shows two
    demonstrations and a query where others show one and a query.
    """
    support, queries = first.feedback.support, first.feedback.queries
    set_level = min(set_level_rounds, rounds - 1)
    # each query has so many demonstrations at most: all but itself, where it is one
    most = [len(support) - (query_id in support) for query_id in queries.ids]
    alone = [
        sum(min(candidates, max(0, m - done * candidates)) for m in most) for done in range(1, rounds - set_level)
    ]
    pools = [min(m, candidates * (rounds - set_level)) - 1 for m in most]  # but for the companion
    beside = [sum(min(candidates, max(0, pool - done * candidates)) for pool in pools) for done in range(set_level)]
    images = len(({*support.image_keys} | {*queries.image_keys}) - {""})
    seconds, tokens, requests = first.seconds, first.tokens, first.requests
    seconds += first.draft_seconds
    if not any(first.rates or ()):
        seconds = math.nan if sum(alone + beside) else seconds
    else:
        assert first.rates is not None
        share = first.processes.count
        for pairs, anew, weight in [(n, images, 1.0) for n in alone] + [(n, 0, 1.5) for n in beside]:
            work = (-(-round(weight * pairs) // share), anew if pairs else 0)
            more = _bill([work] * share, round(weight * pairs), first.rates)
            seconds, tokens = seconds + more[0], tokens + more[1]
            requests += _bill([(-(-pairs // share), 0)] * share, pairs, first.rates)[2]
    return TrainingPlan(first, alone + beside, images, seconds, tokens, requests, set_level)
