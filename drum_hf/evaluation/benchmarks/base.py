"""What every in-context benchmark is: items to ask, a scorer, and the trivial answers that a result stands beside."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ...scores.cached import CachedLVLM
from ...scores.store import ScoreStore
from ...types import LVLM, ICLRequest
from ..answers import exact_match, letter_match
from ..likelihood import Scoring, likeliest, option_probabilities
from ..statistics import bootstrap_interval

__all__ = [
    "BASELINES",
    "Benchmark",
    "BenchmarkItem",
    "BenchmarkResult",
    "Scorer",
    "Shots",
    "ShotsResult",
    "letter_match",
    "name_match",
    "numbers_of_shots",
]

Shots = int | Literal["all"]
#: (answer given, gold answer) -> 1.0 or 0.0
Scorer = Callable[[str, str], float]

#: The answers that need no look at the query: baselines of every benchmark.
BASELINES = ("copy-first", "copy-last", "majority", "constant")


def name_match(prediction: str, gold: str) -> float:
    """1.0 if the answer's first line is the gold name, case, white space and trailing punctuation aside."""
    return exact_match(prediction.strip().partition("\n")[0], [gold])


def numbers_of_shots(shots: int | Sequence[int], queries: int) -> tuple[int, ...]:
    """The numbers of shots asked for, each once.

    Raises:
        ValueError: there is none, one is negative, or there is no query.
    """
    wanted = tuple(dict.fromkeys([shots] if isinstance(shots, int) else shots))
    if not wanted or min(wanted) < 0:
        raise ValueError(f"expected numbers of shots from 0, got {shots!r}")
    if queries < 1:
        raise ValueError(f"expected at least one query, got {queries}")
    return wanted


@dataclasses.dataclass(frozen=True)
class BenchmarkItem:
    """One question to the LVLM; its request, and with it the images, is made when asked for.

    Attributes:
        id: of the episode; an episode asked with its options in several orders is several items.
        shots: as the benchmark counts them, or "all" where each item has its own number.
        gold: the right answer, as the LVLM should write it.
        options: what may be answered, in the order shown; () for an open question.
        shown: the demonstrations' answers, first to last, as they would answer this question.
        build: makes the request.
    """

    id: str
    shots: Shots
    gold: str
    options: tuple[str, ...]
    shown: tuple[str, ...]
    build: Callable[[], ICLRequest] = dataclasses.field(repr=False, compare=False)

    @property
    def request(self) -> ICLRequest:
        """Demonstrations and query, the gold answer to be scored, the options as its choices."""
        return dataclasses.replace(self.build(), responses=(self.gold,), choices=self.options)


class _Requests(Sequence[ICLRequest]):
    """Requests of items, made one by one as they are read."""

    def __init__(self, items: Sequence[BenchmarkItem], make: Callable[[BenchmarkItem], ICLRequest]) -> None:
        self._items, self._make = items, make

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Requests(self._items[index], self._make)
        return self._make(self._items[index])


@dataclasses.dataclass(frozen=True)
class ShotsResult:
    """A benchmark's result at one number of shots. Every array has one value an episode, the mean over its option
    orders, in [0, 1], higher is better.

    Attributes:
        shots: see `BenchmarkItem`.
        ids: of the episodes.
        values: by scoring, float64 of shape (episodes,).
        baselines: by name of the trivial answer, float64 of shape (episodes,); without demonstrations there is nothing
            to copy, and only "constant" is there.
        chance: of an answer drawn from the options; None where a question is open.
        predictions: by scoring, the answer to each item.
    """

    shots: Shots
    ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    baselines: dict[str, np.ndarray]
    chance: float | None
    predictions: dict[str, tuple[str, ...]] = dataclasses.field(repr=False)

    @property
    def accuracy(self) -> dict[str, float]:
        """Mean over the episodes, by scoring."""
        return {scoring: float(values.mean()) for scoring, values in self.values.items()}

    @property
    def trivial(self) -> float:
        """The best that a trivial answer reaches: a baseline, or chance."""
        means = [float(values.mean()) for values in self.baselines.values()]
        return max(means + ([] if self.chance is None else [self.chance]))

    def interval(self, scoring: str, *, seed: int = 0) -> tuple[float, float]:
        """95% bootstrap interval of the accuracy, episodes resampled."""
        return bootstrap_interval(self.values[scoring], seed=seed)

    def to_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """JSON-ready; fractions."""
        row: dict[str, Any] = {"shots": self.shots, "episodes": len(self.ids)}
        for scoring, accuracy in self.accuracy.items():
            row[scoring] = {"accuracy": accuracy, "ci": list(self.interval(scoring, seed=seed))}
        means = {name: float(self.baselines[name].mean()) if name in self.baselines else None for name in BASELINES}
        return row | {"baselines": means, "chance": self.chance, "trivial": self.trivial}


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """What an LVLM reached on a benchmark, by shots, beside the trivial answers on the very same episodes.

    Attributes:
        name: of the benchmark.
        by_shots: in the order of the benchmark's items.
        settings: how the episodes were made.
        fingerprint: of the LVLM.
    """

    name: str
    by_shots: dict[Shots, ShotsResult]
    settings: dict[str, Any]
    fingerprint: str

    @property
    def scorings(self) -> tuple[str, ...]:
        """How answers were scored; the first is the one that `accuracy` means."""
        return tuple(next(iter(self.by_shots.values())).values)

    @property
    def accuracy(self) -> dict[Shots, float]:
        """Accuracy at each number of shots, by the first scoring."""
        return {shots: part.accuracy[self.scorings[0]] for shots, part in self.by_shots.items()}

    def to_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """JSON-ready; fractions, with 95% bootstrap intervals over episodes."""
        return {
            "benchmark": self.name,
            "settings": dict(self.settings),
            "lvlm": self.fingerprint,
            "by_shots": [part.to_dict(seed=seed) for part in self.by_shots.values()],
        }

    def table(self, *, seed: int = 0) -> str:
        """A Markdown table, in percent, a row for each number of shots."""
        heads = ["shots", *(f"{scoring} [95%]" for scoring in self.scorings), *BASELINES, "chance"]
        lines = [f"{self.name}, accuracy in %", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for part in self.by_shots.values():
            row = part.to_dict(seed=seed)
            cells = [str(part.shots)]
            for scoring in self.scorings:
                low, high = row[scoring]["ci"]
                cells.append(f"{100 * row[scoring]['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
            trivial = [*row["baselines"].values(), row["chance"]]
            cells += ["–" if value is None else f"{100 * value:.1f}" for value in trivial]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


class Benchmark:
    """Items to ask an LVLM, and how its answers are scored.

    Attributes:
        name: in results.
        items: in order; see `BenchmarkItem`.
        scorer: of a generated answer.
        max_new_tokens: of a generated answer.
        settings: how the items were made, for the result.
        skipped: (where, reason) of what was left out when the data was read.
    """

    def __init__(
        self,
        name: str,
        items: Iterable[BenchmarkItem],
        *,
        scorer: Scorer,
        max_new_tokens: int = 16,
        settings: Mapping[str, Any] | None = None,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.items = list(items)
        self.scorer = scorer
        self.max_new_tokens = max_new_tokens
        self.settings = dict(settings or {})
        self.skipped = list(skipped)
        if not self.items:
            raise ValueError(f"benchmark {name!r} has no item; expected at least one question")

    def __repr__(self) -> str:
        shots = ", ".join(str(shots) for shots in dict.fromkeys(item.shots for item in self.items))
        return f"{type(self).__name__}({self.name!r}, {len(self.items)} items, shots {shots})"

    def __len__(self) -> int:
        return len(self.items)

    def evaluate(
        self,
        lvlm: LVLM,
        store: ScoreStore | None = None,
        *,
        scoring: Scoring | Sequence[Scoring] | None = None,
        progress: bool | None = None,
    ) -> BenchmarkResult:
        """Ask everything, and set the result beside the trivial answers.

        By "likelihood", the answer is the option with the highest log-likelihood (summed over its tokens; a tie of n
        counts 1/n); by "generation", it is what the LVLM writes, greedily, and the benchmark's scorer judges it.

        Args:
            lvlm: any LVLM.
            store: keeps what the LVLM was asked, so that nothing is paid for twice.
            scoring: one, or several; by default both where every question has options, else "generation". Ask for
                "generation" alone of an endpoint that returns no log-probabilities.
            progress: show a bar; None: where more than a few batches are new.

        Raises:
            ValueError: "likelihood" of a benchmark with open questions, or an unknown scoring.
            ScoringUnsupportedError: "likelihood" of an LVLM that gives none.
        """
        closed = all(item.options for item in self.items)
        if scoring is None:
            chosen: tuple[str, ...] = ("likelihood", "generation") if closed else ("generation",)
        else:
            chosen = (scoring,) if isinstance(scoring, str) else tuple(scoring)
        if not chosen or set(chosen) - {"likelihood", "generation"}:
            raise ValueError(f'expected scoring "likelihood", "generation" or both, got {scoring!r}')
        if "likelihood" in chosen and not closed:
            raise ValueError(
                f"benchmark {self.name!r} asks open questions, which have no options to compare by likelihood; "
                'pass scoring="generation"'
            )
        asked = lvlm if isinstance(lvlm, CachedLVLM) else CachedLVLM(lvlm, store or ScoreStore())
        predictions: dict[str, list[str]] = {}
        values: dict[str, np.ndarray] = {}
        for way in chosen:
            if way == "likelihood":
                predictions[way], values[way] = self._by_likelihood(asked, progress)
            else:
                requests = _Requests(self.items, lambda item: item.build())
                answers = asked.generate(requests, max_new_tokens=self.max_new_tokens, progress=progress)
                pairs = zip(answers, self.items, strict=True)
                predictions[way] = answers
                values[way] = np.array([self.scorer(answer, item.gold) for answer, item in pairs], dtype=np.float64)

        by_shots: dict[Shots, list[int]] = {}
        for i, item in enumerate(self.items):
            by_shots.setdefault(item.shots, []).append(i)
        results = {s: self._result(s, rows, values, predictions) for s, rows in by_shots.items()}
        return BenchmarkResult(self.name, results, dict(self.settings), asked.fingerprint)

    def _by_likelihood(self, lvlm: CachedLVLM, progress: bool | None) -> tuple[list[str], np.ndarray]:
        """The likeliest option of each item, and what it is worth."""
        requests = _Requests(self.items, lambda item: item.request)
        predictions, values = [], []
        for item, probabilities in zip(
            self.items, option_probabilities(lvlm, requests, progress=progress), strict=True
        ):
            best = [item.options[k] for k in likeliest(probabilities)]
            predictions.append(best[0])
            values.append((item.gold in best) / len(best))
        return predictions, np.array(values, dtype=np.float64)

    def baselines(self, items: Sequence[BenchmarkItem]) -> dict[str, np.ndarray]:
        """What the trivial answers reach on these items, float64 of shape (len(items),) each.

        "copy-first" and "copy-last" answer as the first and the last demonstration; "majority" as most of them do,
        ties shared out evenly; "constant" is the one answer that does best on all of these items. The copying ones are
        left out where an item has no demonstration.
        """

        def worth(answers: Iterable[str], gold: str) -> float:
            return float(np.mean([self.scorer(answer, gold) for answer in answers]))

        found: dict[str, list[float]] = {}
        if all(item.shown for item in items):
            found["copy-first"] = [worth(item.shown[:1], item.gold) for item in items]
            found["copy-last"] = [worth(item.shown[-1:], item.gold) for item in items]
            found["majority"] = [worth(_most_frequent(item.shown), item.gold) for item in items]
        constants = dict.fromkeys(item.gold for item in items)
        counts = Counter(item.gold for item in items)
        best = max(constants, key=lambda answer: sum(n * self.scorer(answer, gold) for gold, n in counts.items()))
        found["constant"] = [self.scorer(best, item.gold) for item in items]
        return {name: np.array(values, dtype=np.float64) for name, values in found.items()}

    def _result(
        self,
        shots: Shots,
        rows: list[int],
        values: Mapping[str, np.ndarray],
        predictions: Mapping[str, Sequence[str]],
    ) -> ShotsResult:
        items = [self.items[i] for i in rows]
        episodes: dict[str, list[int]] = {}
        for position, item in enumerate(items):
            episodes.setdefault(item.id, []).append(position)

        def of_episodes(of_items: np.ndarray) -> np.ndarray:
            return np.array([of_items[positions].mean() for positions in episodes.values()])

        options = [len(item.options) for item in items]
        return ShotsResult(
            shots=shots,
            ids=tuple(episodes),
            values={way: of_episodes(of_items[rows]) for way, of_items in values.items()},
            baselines={name: of_episodes(of_items) for name, of_items in self.baselines(items).items()},
            chance=float(np.mean([1 / n for n in options])) if all(options) else None,
            predictions={way: tuple(answers[i] for i in rows) for way, answers in predictions.items()},
        )


def _most_frequent(answers: Sequence[str]) -> list[str]:
    counts = Counter(answers)
    most = max(counts.values())
    return [answer for answer, count in counts.items() if count == most]
