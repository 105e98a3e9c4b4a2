"""In-context benchmarks of the playground: new pictures, and values that no tuning episode has shown.

- `names`: concept binding; a made-up word stands for each of two held-out values of one attribute, and "value word" is
  the answer;
- `letters`: the same with the words listed, and "value letter" is the answer;
- `operators`: VL-ICL's operator induction over handwritten digits that no model has seen;
- `counts`: VL-ICL's count induction over groups of objects with held-out shapes and colours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...evaluation.benchmarks.benchmarks import (
    Benchmark,
    EpisodeBenchmark,
    concept_binding,
    count_induction,
    join_benchmarks,
    numbers_of_shots,
    operator_induction,
)
from ...scores.store import ScoreStore
from ...types import LVLM
from ..language import CLASSIFY_PROMPTS, QUESTIONS, RESULT_PROMPT, private_words
from ..scenes import ATTRIBUTES, CELLS, DIGITS, FRAMES, digit_images, render_digit, render_group, render_scene
from .conversations import HELD_OUT, Album, Chat
from .pretraining import TRAINING_DIGITS, PicturePool, render_pool
from .tower import random_digit, render_groups, render_pairs

__all__ = ["SHOTS", "compare_lvlms", "format_comparison", "make_benchmarks", "ordinary_questions"]

logger = logging.getLogger(__name__)

SHOTS = (1, 2, 4, 8)
#: The tiny LVLM says what it sees before it says what that is called.
SEEN_FIRST = "{label} {answer}"
#: Handwritten digits that no training has shown.
NEW_DIGITS = np.setdiff1d(np.arange(1797), np.arange(1797)[TRAINING_DIGITS])


def make_benchmarks(seed: int, *, queries: int = 120, shots: int | Sequence[int] = SHOTS) -> list[Benchmark]:
    """The four benchmarks, drawn from a seed.

    Args:
        seed: other seeds give other pictures, words and episodes.
        queries: episodes a benchmark.
        shots: demonstrations (of each of the two classes, in the first two).
    """
    rng = np.random.default_rng([seed, 31])
    shots = numbers_of_shots(shots, queries)
    words = private_words()
    asked = QUESTIONS | {"digit": CLASSIFY_PROMPTS}
    names, letters = [], []
    each = -(-queries // len(HELD_OUT))
    for name, values in HELD_OUT.items():
        table = [(_picture(name, value, rng), value) for value in values for _ in range(max(shots) + each)]
        how: dict[str, Any] = {
            "ways": 2,
            "shots": shots,
            "queries": each,
            "seed": seed,
            "words": words,
            "question": asked[name][0],
            "answer_format": SEEN_FIRST,
            "name": name,
        }
        names.append(concept_binding(table, **how))
        letters.append(EpisodeBenchmark(table, **how))
    digits = [
        (random_digit(int(row), rng), DIGITS[digit_images()[1][row]])
        for row in rng.choice(NEW_DIGITS, 300, replace=False)
    ]
    groups = [_group(rng) for _ in range(300)]
    return [
        join_benchmarks("names", names),
        join_benchmarks("letters", letters),
        operator_induction(digits, shots=shots, queries=queries, seed=seed, question=RESULT_PROMPT, name="operators"),
        count_induction(groups, shots=shots, queries=queries, seed=seed, name="counts"),
    ]


def _picture(name: str, value: str, rng: np.random.Generator) -> Image.Image:
    """A new picture that shows a value."""
    frame = str(rng.choice(sorted(FRAMES)))
    if name == "digit":
        rows = NEW_DIGITS[digit_images()[1][NEW_DIGITS] == int(value)]
        colour, background = (str(rng.choice(ATTRIBUTES[n])) for n in ("colour", "background"))
        return render_digit(int(rng.choice(rows)), colour, background, frame, rng)
    values = {n: str(rng.choice(options)) for n, options in ATTRIBUTES.items()} | {name: value}
    return render_scene(values, frame, rng)


def _group(rng: np.random.Generator) -> tuple[Image.Image, list[dict[str, str]]]:
    """A group of objects with held-out shapes and colours."""
    places = rng.choice(len(CELLS), int(rng.integers(1, 5)), replace=False)
    things: list[dict[str, str] | None] = [None] * len(CELLS)
    for place in places:
        things[place] = {name: str(rng.choice(HELD_OUT[name])) for name in ("shape", "colour")}
    picture = render_group(things, str(rng.choice(ATTRIBUTES["background"])), rng)
    return picture, [thing for thing in things if thing]


def ordinary_questions(seed: int, count: int = 600) -> Benchmark:
    """Ordinary questions about new pictures in plain words, without demonstrations, each answered in plain words."""
    album = Album([*_new_pools(seed, count)])
    return Chat(album, turns=(1, 1), seed=seed).benchmark(count)


def _new_pools(seed: int, count: int) -> list[PicturePool]:
    made = [seed, 32]
    return [
        render_pool(made, count, count // 2, digits_from=NEW_DIGITS),
        render_pairs(made, count // 3, digits_from=NEW_DIGITS),
        render_groups(made, count // 3),
    ]


def compare_lvlms(
    lvlms: Mapping[str, LVLM],
    *,
    seed: int,
    queries: int = 120,
    questions: int = 600,
    store: ScoreStore | None = None,
) -> dict[str, Any]:
    """What LVLMs make of the benchmarks, by likelihood and by generation, and of ordinary questions without shots.

    Args:
        lvlms: name -> LVLM.
        seed: of the benchmarks and of the questions.
        queries, questions: episodes a benchmark, ordinary questions.
        store: keeps what was asked.

    Returns:
        JSON-ready; fractions. For each name `<name>_few_shot` (likelihood, the mean over benchmarks and shots),
        `<name>_few_shot_generated` and `<name>_zero_shot` (ordinary questions, generated); `trivial_baseline`, the
        best answer that looks at no query, in the same mean; and `by_benchmark`.
    """
    benchmarks, asked = make_benchmarks(seed, queries=queries), ordinary_questions(seed, questions)
    found: dict[str, Any] = {}
    table: dict[str, Any] = {benchmark.name: {} for benchmark in benchmarks}
    for name, lvlm in lvlms.items():
        results = [benchmark.evaluate(lvlm, store, progress=False) for benchmark in benchmarks]
        for scoring, what in (("likelihood", "few_shot"), ("generation", "few_shot_generated")):
            cells = [part.accuracy[scoring] for result in results for part in result.by_shots.values()]
            found[f"{name}_{what}"] = float(np.mean(cells))
        found[f"{name}_zero_shot"] = asked.evaluate(lvlm, store, progress=False).accuracy[0]
        trivial = [part.trivial for result in results for part in result.by_shots.values()]
        found["trivial_baseline"] = float(np.mean(trivial))
        for result in results:
            for shots, part in result.by_shots.items():
                row = table[result.name].setdefault(str(shots), {"trivial": part.trivial})
                row[name] = part.accuracy["likelihood"]
                row[f"{name}_generated"] = part.accuracy["generation"]
        logger.info("%s: few-shot %.3f, zero-shot %.3f", name, found[f"{name}_few_shot"], found[f"{name}_zero_shot"])
    return found | {"by_benchmark": table, "seed": seed, "queries": queries, "questions": questions}


def format_comparison(found: Mapping[str, Any], names: Sequence[str] = ("base", "tuned")) -> str:
    """A Markdown table of `compare_lvlms`, in percent: few-shot by benchmark and shots, and ordinary questions."""
    heads = ["benchmark", "shots", "trivial", *names, *(f"{name}, generated" for name in names)]
    rows = [
        [benchmark, shots, row["trivial"], *(row[n] for n in names), *(row[f"{n}_generated"] for n in names)]
        for benchmark, by_shots in found["by_benchmark"].items()
        for shots, row in by_shots.items()
    ]
    means = [found[f"{n}_few_shot"] for n in names] + [found[f"{n}_few_shot_generated"] for n in names]
    rows.append(["**mean**", "", found["trivial_baseline"], *means])
    zero = [found[f"{n}_zero_shot"] for n in names]
    rows.append(["ordinary questions", "0", None, *[None] * len(names), *zero])

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else "–" if value is None else f"{100 * value:.1f}"

    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])
