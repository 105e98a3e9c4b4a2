"""In-context benchmarks: episodes from any labelled image table, VL-ICL's and SMMILE's tasks, and synthetic kinds.

Each gives items (a request, its gold answer, its options) and evaluates any LVLM on them, always beside the answers
that need no look at the query.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...data import TripletTable
from ...errors import ColumnError, TooFewDemonstrationsError
from ...tuning.episodes import choice_prompt
from ...types import Demonstration, ICLRequest, Query, content_key, trusted
from .base import (
    BASELINES,
    Benchmark,
    BenchmarkItem,
    BenchmarkResult,
    ShotsResult,
    letter_match,
    name_match,
    numbers_of_shots,
)
from .smmile import read_smmile
from .synthetic import count_induction, made_up_words, operator_induction
from .vl_icl import VL_ICL_TASKS, read_vl_icl, side_by_side, vl_icl_match, yes_no_match

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

__all__ = [
    "BASELINES",
    "Benchmark",
    "BenchmarkItem",
    "BenchmarkResult",
    "EpisodeBenchmark",
    "ShotsResult",
    "VL_ICL_TASKS",
    "concept_binding",
    "count_induction",
    "join_benchmarks",
    "letter_match",
    "made_up_words",
    "name_match",
    "numbers_of_shots",
    "operator_induction",
    "read_smmile",
    "read_vl_icl",
    "side_by_side",
    "vl_icl_match",
    "yes_no_match",
]

#: Keeps the draws of these episodes apart from any others of the same seed.
_STREAM = 60_021
#: What two episodes of one index and seed draw apart from one another.
_CONTENT, _DEMONSTRATIONS, _OPTIONS = range(3)


def _labelled(data: Any) -> TripletTable:
    """A table with labels from any of the forms that an image classification data set comes in."""
    import datasets

    if not isinstance(data, (TripletTable, datasets.Dataset)):
        rows = list(data)
        if rows and not isinstance(rows[0], Mapping):
            pairs = [tuple(row) for row in rows]
            odd = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
            if odd is not None:
                raise ColumnError(f"row {odd}: expected a pair (image, label), got {len(pairs[odd])} values")
            rows = [{"image": image, "label": str(label)} for image, label in pairs]
        # A label that is a number is its own name.
        rows = [{**row, "label": None if row.get("label") is None else str(row["label"])} for row in rows]
        labels = [row["label"] for row in rows]
        data = [
            {"id": str(i), "prompt": "", "response": label or "?", "label": label, "image": row.get("image")}
            for i, (row, label) in enumerate(zip(rows, labels, strict=True))
        ]
    elif isinstance(data, datasets.Dataset) and not {"prompt", "response"} <= set(data.column_names):
        missing = [name for name in ("image", "label") if name not in data.column_names]
        if missing:
            raise ColumnError(
                f"expected columns 'image' and 'label', got {', '.join(map(repr, data.column_names))}; rename them "
                "with data.rename_column"
            )
        data = data.select_columns(["image", "label"])
        data = data.add_column("id", [str(i) for i in range(len(data))]).add_column("prompt", [""] * len(data))
        data = TripletTable.from_dataset(data, columns={"response": "label"})
    table = TripletTable.from_dataset(data)
    if not table.label_set:
        raise ColumnError(
            "expected a table whose column 'label' names classes, got one without labels; name the column with "
            "columns={'label': '<column>'}"
        )
    return table


@dataclasses.dataclass(frozen=True)
class _Episode:
    """What is asked, before it is known how many demonstrations are shown."""

    number: int
    classes: tuple[str, ...]  # the query's class first
    names: dict[str, str]  # class -> what it is called here
    query: int
    demonstrations: dict[str, list[int]]  # class -> rows, as many as the most shots
    options: tuple[str, ...]  # classes in the order from which the option orders are turned


class EpisodeBenchmark(Benchmark):
    """N-way K-shot episodes: N classes, K demonstrations of each, and a query of one of them.

    The query's class, the demonstrations' order and the options' order are drawn independently: copying an
    answer is worth 1 / ways. (Published code for the 2-way 1-shot benchmarks on CUB, Flowers-102, Stanford Dogs,
    Food-101 and Stanford Cars puts the query's class first; `order="released"` does that, for comparison.)

    No image appears twice in an episode, no row demonstrates a query of its group, and an image with several labels
    is left out. With the same seed, an episode at fewer shots shows the first of what it shows at more shots.

    Args:
        table: a TripletTable with labels; a Dataset or list of dicts with columns image and label; or (image, label)
            pairs.
        ways: classes an episode.
        shots: demonstrations of each class, or several such numbers, each from 0.
        queries: episodes, each with one query.
        seed: other seeds draw other episodes.
        options: "letters": every turn lists the classes with letters, and a letter is the answer; each episode is
            asked in `ways` option orders, every class once under every letter, and scores their mean. "names": the
            class's name is the answer, and no turn lists them.
        order: "shuffled", or "released".
        question: what every turn asks.
        words: names that stand for the classes, drawn anew for every episode; None for the labels themselves.
        prompt: makes a turn's text from the question and the names in order, with "letters".
        answer_format: how answers are worded, from {answer} (the name or letter) and {label} (what is seen).
            "{label}: {answer}" has the LVLM say what it sees first, which a small one needs; then every class of the
            episode with every answer is an option, so that nothing is given away (our choice).
        name: in results.

    Attributes:
        left_out: images that bear several labels.

    Raises:
        ColumnError: the table has no labels.
        TooFewDemonstrationsError: fewer than `ways` classes have `shots` + 1 images, or there are too few words.
        ValueError: ways below 2 or above 26, negative shots, no query, or an unknown setting.

    Example:
        >>> from PIL import Image
        >>> pairs = [(Image.new("RGB", (4, 4), (n, 0, 9 * n)), "wren" if n % 2 else "tit") for n in range(6)]
        >>> benchmark = EpisodeBenchmark(pairs, shots=2, queries=3)
        >>> item = benchmark.items[0]
        >>> sorted(item.shown), item.options, len(item.request.demonstrations)
        (['A', 'A', 'B', 'B'], ('A', 'B'), 4)
        >>> len(benchmark.items)  # an item for each order of the options
        6
    """

    def __init__(
        self,
        table: TripletTable | datasets.Dataset | Iterable[Mapping[str, Any]] | Iterable[tuple[Image, str]],
        *,
        ways: int = 2,
        shots: int | Sequence[int] = 1,
        queries: int = 200,
        seed: int = 0,
        options: Literal["letters", "names"] = "letters",
        order: Literal["shuffled", "released"] = "shuffled",
        question: str = "What is in the picture?",
        words: Sequence[str] | None = None,
        prompt: Callable[[str, Sequence[str]], str] = choice_prompt,
        answer_format: str = "{answer}",
        name: str = "episodes",
    ) -> None:
        wanted = numbers_of_shots(shots, queries)
        if not 2 <= ways <= len(string.ascii_uppercase):
            raise ValueError(f"expected 2 to 26 ways, got {ways}")
        if options not in ("letters", "names") or order not in ("shuffled", "released"):
            raise ValueError(
                'expected options "letters" or "names", and order "shuffled" or "released", got '
                f"{options!r}, {order!r}"
            )
        self.table = _labelled(table)
        self.ways, self.order, self.question, self.prompt = ways, order, question, prompt
        self._letters = options == "letters"
        self._format = _answer_format(answer_format)
        self._seed = seed
        self._words = None if words is None else list(dict.fromkeys(words))
        if self._words is not None and len(self._words) < ways:
            raise TooFewDemonstrationsError(
                f"expected at least {ways} words, one for each class of an episode, got {len(self._words)}"
            )
        self._rows, self.left_out = self._classes(max(wanted))
        episodes = [self._draw(number, max(wanted)) for number in range(queries)]
        orders = ways if self._letters else 1
        super().__init__(
            name,
            [self._item(e, shown, turn) for shown in wanted for e in episodes for turn in range(orders)],
            scorer=letter_match if self._letters and answer_format == "{answer}" else name_match,
            max_new_tokens=(8 if self._letters else 16) if answer_format == "{answer}" else 32,
            settings={
                "ways": ways,
                "shots": list(wanted),
                "queries": queries,
                "seed": seed,
                "options": options,
                "order": order,
                "question": question,
                "answer_format": answer_format,
                "made_up_names": words is not None,
                "table": self.table.fingerprint,
            },
        )

    def _classes(self, most: int) -> tuple[dict[str, list[int]], int]:
        """Class -> its rows, a row for each image, where there are enough of them; and how many images were left."""
        labels_of: dict[str, set[str]] = {}
        first: dict[str, int] = {}
        for row, (label, key) in enumerate(zip(self.table.labels, self.table.image_keys, strict=True)):
            if label is not None and key:
                labels_of.setdefault(key, set()).add(label)
                first.setdefault(key, row)
        rows: dict[str, list[int]] = {}
        for key, row in first.items():
            if len(labels_of[key]) == 1:
                rows.setdefault(next(iter(labels_of[key])), []).append(row)
        enough = {label: members for label, members in rows.items() if len(members) > most}
        if len(enough) < self.ways:
            sizes = sorted((len(members) for members in rows.values()), reverse=True)
            raise TooFewDemonstrationsError(
                f"a {self.ways}-way {most}-shot episode needs {self.ways} classes with {most + 1} different images "
                f"each, got {len(enough)} such classes (images of the largest: {sizes[: self.ways]}); ask for fewer "
                "ways or shots, or give more images"
            )
        return enough, sum(len(labels) > 1 for labels in labels_of.values())

    def _rng(self, number: int, what: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([_STREAM, self._seed, number, what, *more])

    def _draw(self, number: int, most: int) -> _Episode:
        rng = self._rng(number, _CONTENT)
        names = list(self._rows)
        classes = tuple(names[i] for i in rng.choice(len(names), self.ways, replace=False))
        query = self._rows[classes[0]][rng.integers(len(self._rows[classes[0]]))]
        group = self.table.groups[query]
        demonstrations = {}
        for label in classes:
            others = [r for r in self._rows[label] if r != query and (group is None or self.table.groups[r] != group)]
            if len(others) < most:
                raise TooFewDemonstrationsError(
                    f"query {self.table.ids[query]!r} needs {most} demonstrations of class {label!r} from outside its "
                    f"group {group!r}, which leaves {len(others)}; ask for fewer shots, or give more images"
                )
            demonstrations[label] = [others[i] for i in rng.permutation(len(others))[:most]]
        called = dict(zip(classes, classes, strict=True))
        if self._words is not None:
            drawn = rng.choice(len(self._words), self.ways, replace=False)
            called = dict(zip(classes, (self._words[i] for i in drawn), strict=True))
        turned = self._rng(number, _OPTIONS).permutation(self.ways)
        return _Episode(number, classes, called, query, demonstrations, tuple(classes[i] for i in turned))

    def _item(self, episode: _Episode, shots: int, turn: int) -> BenchmarkItem:
        order = episode.options[turn:] + episode.options[:turn]
        names = [episode.names[label] for label in order]
        answers = dict(zip(order, string.ascii_uppercase if self._letters else names, strict=False))
        text = self.prompt(self.question, names) if self._letters else self.question
        # In the released order the query's class stands first, in every round of demonstrations.
        shown = [(label, episode.demonstrations[label][k]) for k in range(shots) for label in episode.classes]
        if self.order == "shuffled":
            places = self._rng(episode.number, _DEMONSTRATIONS, shots).permutation(len(shown))
            shown = [shown[i] for i in places]
        said = {label: self._format(label, answer) for label, answer in answers.items()}
        return BenchmarkItem(
            id=f"{episode.number}",
            shots=shots,
            gold=said[episode.classes[0]],
            options=tuple(dict.fromkeys(self._format(seen, answers[label]) for seen in order for label in order)),
            shown=tuple(said[label] for label, _ in shown),
            build=functools.partial(self._request, text, episode.query, [(row, said[label]) for label, row in shown]),
        )

    def _request(self, text: str, query: int, shown: Sequence[tuple[int, str]]) -> ICLRequest:
        table = self.table

        def image(row: int) -> Image | None:
            return table[table.ids[row]].image

        demonstrations = tuple(
            trusted(
                Demonstration,
                id=table.ids[row],
                image=image(row),
                prompt=text,
                response=answer,
                key=content_key(table.image_keys[row], text, answer),
            )
            for row, answer in shown
        )
        key = content_key(table.image_keys[query], text)
        asked = trusted(Query, image=image(query), prompt=text, id=table.ids[query], key=key)
        return ICLRequest(asked, demonstrations)


def _answer_format(text: str) -> Callable[[str, str], str]:
    """(label, answer) -> the answer as it is worded.

    Raises:
        ValueError: the format has another field, or none for the answer.
    """
    fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    if "answer" not in fields or fields - {"answer", "label"}:
        raise ValueError(f"expected answer_format with {{answer}}, and {{label}} where it is wanted, got {text!r}")
    return lambda label, answer: text.format(label=label, answer=answer)


def concept_binding(
    table: TripletTable | datasets.Dataset | Iterable[Mapping[str, Any]] | Iterable[tuple[Image, str]],
    *,
    ways: int = 2,
    shots: int | Sequence[int] = (1, 2, 4, 8),
    queries: int = 200,
    seed: int = 0,
    words: Sequence[str] | None = None,
    question: str = "What is this?",
    answer_format: str = "{answer}",
    name: str = "concept_binding",
) -> EpisodeBenchmark:
    """Fast concept binding (Tsimpoukelli et al., 2021; VL-ICL's open_mi): classes under made-up names.

    The names are drawn anew for every episode, so that only its demonstrations say what they mean.

    Args:
        table, ways, shots, queries, seed, question, answer_format, name: as in `EpisodeBenchmark`.
        words: the names to draw from, such as words that the LVLM's tokenizer knows; None for `made_up_words(512)`.

    Raises:
        As `EpisodeBenchmark`.
    """
    return EpisodeBenchmark(
        table,
        ways=ways,
        shots=shots,
        queries=queries,
        seed=seed,
        options="names",
        question=question,
        words=made_up_words(512) if words is None else words,
        answer_format=answer_format,
        name=name,
    )


def join_benchmarks(name: str, benchmarks: Sequence[Benchmark]) -> Benchmark:
    """Several benchmarks as one, whose accuracy is the mean over all of their episodes.

    Args:
        name: in results.
        benchmarks: of different names, whose answers one rule judges.

    Raises:
        ValueError: there is none, two have one name, or their rules differ.
    """
    names = [part.name for part in benchmarks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected benchmarks of different names, got {names}")
    first = benchmarks[0]
    if any(part.scorer is not first.scorer for part in benchmarks):
        raise ValueError(f"expected benchmarks whose answers are judged alike, got {', '.join(names)}")
    items = [dataclasses.replace(i, id=f"{part.name}/{i.id}") for part in benchmarks for i in part.items]
    order = {shots: place for place, shots in enumerate(dict.fromkeys(item.shots for item in items))}
    return Benchmark(
        name,
        sorted(items, key=lambda item: order[item.shots]),
        scorer=first.scorer,
        max_new_tokens=max(part.max_new_tokens for part in benchmarks),
        settings={"parts": {part.name: part.settings for part in benchmarks}},
        skipped=[row for part in benchmarks for row in part.skipped],
    )
