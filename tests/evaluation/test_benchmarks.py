"""Episodes are fair, trivial answers are worth what they should be, and public formats read and score as published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import load_lvlm

from drum_hf.data import TripletTable
from drum_hf.errors import (
    ColumnError,
    ImageError,
    LeakError,
    RowError,
    SavedFileError,
    ScoringUnsupportedError,
    TooFewDemonstrationsError,
)
from drum_hf.evaluation.benchmarks.benchmarks import (
    Benchmark,
    BenchmarkItem,
    EpisodeBenchmark,
    concept_binding,
    count_induction,
    letter_match,
    operator_induction,
    read_smmile,
    read_vl_icl,
    vl_icl_match,
    yes_no_match,
)
from drum_hf.scores.store import ScoreStore
from drum_hf.tuning.episodes import choice_prompt
from drum_hf.types import ICLRequest, Query


def picture(number: int, size: int = 4) -> Image.Image:
    """A picture that its number can be read from."""
    return Image.new("RGB", (size, size), (number % 256, number // 256, 77))


def number_of(image: Image.Image | None) -> int:
    assert image is not None
    red, green, _ = image.getpixel((0, 0))  # type: ignore[misc]
    return red + 256 * green


def table(classes: int = 5, each: int = 8) -> TripletTable:
    """Picture n is of class n modulo `classes`."""
    return TripletTable.from_dataset(
        [
            {"id": f"r{n}", "image": picture(n), "prompt": "", "response": bird, "label": bird}
            for n, bird in ((n, f"bird {n % classes}") for n in range(classes * each))
        ]
    )


TABLE = table()


class Answering:
    """An LVLM that gives the answer of a function, by generation and by likelihood (0.9 of it)."""

    fingerprint = "answering"

    def __init__(self, answer: Callable[[ICLRequest], str]) -> None:
        self.answer = answer
        self.scored: list[ICLRequest] = []
        self.generated = 0

    def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
        self.scored += requests
        return np.log([0.9 if r.responses[0] == self.answer(r) else 0.1 / (len(r.choices) - 1) for r in requests])

    def generate(self, requests: Sequence[ICLRequest], *, max_new_tokens: int = 32) -> list[str]:
        self.generated += len(requests)
        return [self.answer(r) for r in requests]


def first(request: ICLRequest) -> str:
    return request.demonstrations[0].response


def last(request: ICLRequest) -> str:
    return request.demonstrations[-1].response


def knowing(request: ICLRequest) -> str:
    """The answer of a demonstration of the query's class, which `table()` lets tell by the picture's number."""
    label = number_of(request.query.image) % 5
    return next(d.response for d in request.demonstrations if number_of(d.image) % 5 == label)


# --- episodes ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    ways=st.integers(2, 5),
    shots=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 10**6),
    letters=st.booleans(),
)
def test_every_episode_is_sound(ways: int, shots: list[int], seed: int, letters: bool) -> None:
    options = "letters" if letters else "names"
    benchmark = EpisodeBenchmark(TABLE, ways=ways, shots=shots, queries=3, seed=seed, options=options)  # type: ignore[arg-type]
    assert len(benchmark.items) == 3 * len(shots) * (ways if letters else 1)
    orders: dict[tuple[str, Any], list[str]] = {}
    for item in benchmark.items:
        request = item.request
        assert request.responses == (item.gold,) and request.choices == item.options and len(item.options) == ways
        assert item.shown == tuple(d.response for d in request.demonstrations)
        pictures = [*(d.image for d in request.demonstrations), request.query.image]
        assert len({number_of(p) for p in pictures}) == len(pictures) == ways * int(item.shots) + 1
        if letters:
            named = dict(line.split(". ") for line in request.query.prompt.splitlines()[1:-1])
            orders.setdefault((item.id, item.shots), []).append(named[item.options[0]])
        else:
            named = {name: name for name in item.options}
            assert "bird" not in request.query.prompt
        assert len(set(named.values())) == ways
        assert named[item.gold] == f"bird {number_of(request.query.image) % 5}"
        for demonstration in request.demonstrations:
            assert demonstration.prompt == request.query.prompt
            assert named[demonstration.response] == f"bird {number_of(demonstration.image) % 5}"
        assert set(Counter(item.shown).values()) <= {item.shots}
    # Every class stands once under the first letter, so an answer that is always "A" is worth exactly chance.
    assert all(len(set(firsts)) == ways for firsts in orders.values())
    again = EpisodeBenchmark(TABLE, ways=ways, shots=shots, queries=3, seed=seed, options=options)  # type: ignore[arg-type]
    assert [i.request for i in again.items] == [i.request for i in benchmark.items]


def test_fewer_shots_show_the_first_of_more_shots_to_the_same_query() -> None:
    both = EpisodeBenchmark(TABLE, shots=(1, 4), queries=20, seed=3, options="names").items
    alone = EpisodeBenchmark(TABLE, shots=1, queries=20, seed=3, options="names").items
    for few, many, one in zip(both[:20], both[20:], alone, strict=True):
        assert few.request == one.request
        assert few.request.query.id == many.request.query.id
        assert {d.id for d in few.request.demonstrations} < {d.id for d in many.request.demonstrations}


def test_demonstration_order_query_class_and_option_order_are_independent() -> None:
    items = EpisodeBenchmark(TABLE, queries=800, seed=1).items[::2]  # of the two option orders, the first
    low = [number_of(item.request.query.image) % 5 < 2 for item in items]
    cells = Counter((item.shown[0] == item.gold, item.gold, of) for item, of in zip(items, low, strict=True))
    share = {cell: (2 / 5 if cell[2] else 3 / 5) / 4 for cell in cells}
    assert len(cells) == 8
    for cell, count in cells.items():
        assert abs(count - 800 * share[cell]) < 4.5 * np.sqrt(800 * share[cell])


@pytest.mark.parametrize("options", ["letters", "names"])
@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (2, 4), (4, 1)])
def test_copying_the_first_answer_is_chance_here_and_perfect_in_the_released_order(
    options: Any, ways: int, shots: int
) -> None:
    lvlm = Answering(first)
    fair = EpisodeBenchmark(TABLE, ways=ways, shots=shots, queries=300, options=options).evaluate(lvlm)
    part = fair.by_shots[shots]
    assert part.chance == 1 / ways
    assert abs(fair.accuracy[shots] - 1 / ways) < 4 * np.sqrt((1 / ways) * (1 - 1 / ways) / 300)
    assert part.accuracy["likelihood"] == part.accuracy["generation"] == part.baselines["copy-first"].mean()
    released = EpisodeBenchmark(TABLE, ways=ways, shots=shots, queries=30, options=options, order="released")
    part = released.evaluate(lvlm).by_shots[shots]
    assert part.accuracy == {"likelihood": 1.0, "generation": 1.0}
    assert part.baselines["copy-first"].mean() == part.trivial == 1.0 and part.baselines["copy-last"].mean() == 0.0


@pytest.mark.parametrize(
    ("answer", "baseline"), [(first, "copy-first"), (last, "copy-last"), (lambda request: "A", "constant")]
)
def test_a_baseline_is_what_an_lvlm_that_answers_so_reaches(answer: Any, baseline: str) -> None:
    result = EpisodeBenchmark(TABLE, ways=3, shots=(1, 2), queries=40).evaluate(Answering(answer))
    for part in result.by_shots.values():
        assert part.values["likelihood"] == pytest.approx(part.baselines[baseline])
        assert part.values["generation"] == pytest.approx(part.baselines[baseline])


def test_closed_forms() -> None:
    benchmark = EpisodeBenchmark(TABLE, ways=3, shots=(2, 0), queries=20)
    knows = benchmark.evaluate(Answering(lambda r: knowing(r) if r.demonstrations else "A"))
    assert knows.accuracy[2] == 1.0 and knows.accuracy[0] == pytest.approx(1 / 3)
    part = knows.by_shots[2]
    # Each class is shown as often as any other, and stands as often under A.
    assert part.baselines["majority"] == pytest.approx(np.full(20, 1 / 3))
    assert part.baselines["constant"] == pytest.approx(np.full(20, 1 / 3))
    assert set(knows.by_shots[0].baselines) == {"constant"}
    assert part.interval("likelihood") == (1.0, 1.0)


def test_the_likeliest_option_is_found_from_all_but_one_of_the_scores_and_ties_are_shared() -> None:
    class Weighing(Answering):
        def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
            self.scored += requests
            return np.array([weights(r)[r.choices.index(r.responses[0])] for r in requests])

    def weights(request: ICLRequest) -> np.ndarray:
        rng = np.random.default_rng(list(request.query.key.encode()))
        return np.log(rng.dirichlet(np.ones(len(request.choices))))

    benchmark = EpisodeBenchmark(TABLE, ways=4, queries=25, shots=0)
    lvlm = Weighing(first)
    part = benchmark.evaluate(lvlm, scoring="likelihood").by_shots[0]
    likeliest = tuple(item.options[int(weights(item.request).argmax())] for item in benchmark.items)
    assert part.predictions["likelihood"] == likeliest
    assert len(lvlm.scored) == 3 * len({i.request.query.key for i in benchmark.items}) and lvlm.generated == 0
    right = [answer == item.gold for answer, item in zip(likeliest, benchmark.items, strict=True)]
    assert part.accuracy["likelihood"] == pytest.approx(np.mean(right))

    class Undecided(Answering):
        def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
            return np.log([1 / len(r.choices) for r in requests])

    assert benchmark.evaluate(Undecided(first), scoring="likelihood").accuracy[0] == pytest.approx(0.25)


def test_the_store_pays_once_and_endpoints_without_scores_can_be_asked_for_answers() -> None:
    benchmark, store = EpisodeBenchmark(TABLE, queries=5), ScoreStore()
    lvlm = Answering(knowing)
    result = benchmark.evaluate(lvlm, store)
    calls = len(lvlm.scored), lvlm.generated
    assert calls == (10, 10)
    assert benchmark.evaluate(lvlm, store).to_dict() == result.to_dict()
    assert (len(lvlm.scored), lvlm.generated) == calls

    class Endpoint(Answering):
        def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
            raise ScoringUnsupportedError("no log-probabilities")

    with pytest.raises(ScoringUnsupportedError):
        benchmark.evaluate(Endpoint(knowing))
    assert benchmark.evaluate(Endpoint(knowing), scoring="generation").scorings == ("generation",)
    with pytest.raises(ValueError, match="expected scoring"):
        benchmark.evaluate(lvlm, scoring="guess")  # type: ignore[arg-type]


def test_the_result_is_json_and_a_table() -> None:
    result = EpisodeBenchmark(TABLE, shots=(0, 1), queries=40, name="birds").evaluate(Answering(lambda r: "A"))
    told = json.loads(json.dumps(result.to_dict()))
    assert told["benchmark"] == "birds" and told["settings"]["table"] == TABLE.fingerprint
    zero, one = told["by_shots"]
    assert zero["baselines"] == {"copy-first": None, "copy-last": None, "majority": None, "constant": 0.5}
    assert one["likelihood"] == {"accuracy": 0.5, "ci": [0.5, 0.5]} and one["episodes"] == 40
    assert one["trivial"] == max([*one["baselines"].values(), one["chance"]])
    lines = result.table().splitlines()
    assert lines[2].startswith("| shots | likelihood [95%] | generation [95%] | copy-first | copy-last | majority |")
    assert lines[4] == "| 0 | 50.0 [50.0, 50.0] | 50.0 [50.0, 50.0] | – | – | – | 50.0 | 50.0 |"
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_any_labelled_images_will_do() -> None:
    pairs = [(picture(n), f"bird {n % 2}") for n in range(6)]
    rows = [{"image": image, "label": label, "more": 1} for image, label in pairs]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["bird 0", "bird 1"]))
    dataset = datasets.Dataset.from_list(
        [{"image": image, "label": int(label[-1])} for image, label in pairs], features=features
    )
    numbered = [(image, int(label[-1])) for image, label in pairs]
    made = [EpisodeBenchmark(data, queries=4, seed=5, shots=2) for data in (pairs, iter(rows), dataset)]
    requests = [[item.request for item in benchmark.items] for benchmark in made]
    assert requests[0] == requests[1] == requests[2]
    prompt = EpisodeBenchmark(numbered, queries=1).items[0].request.query.prompt
    assert prompt in [choice_prompt("What is in the picture?", names) for names in (("0", "1"), ("1", "0"))]


def test_ambiguous_pictures_and_the_querys_group_are_left_out() -> None:
    rows = [{"image": picture(n), "prompt": "", "response": "x", "label": f"bird {n % 2}"} for n in range(8)]
    both = TripletTable.from_dataset([*rows, {**rows[0], "prompt": "and?", "label": "bird 1"}])
    benchmark = EpisodeBenchmark(both, queries=60, shots=2)
    assert benchmark.left_out == 1
    seen = {number_of(d.image) for item in benchmark.items for d in item.request.demonstrations}
    assert seen == set(range(1, 8))
    grouped = TripletTable.from_dataset([{**row, "group": "one" if n < 4 else "two"} for n, row in enumerate(rows)])
    for item in EpisodeBenchmark(grouped, queries=20).items:
        group = number_of(item.request.query.image) < 4
        assert all((number_of(d.image) < 4) != group for d in item.request.demonstrations)
    with pytest.raises(TooFewDemonstrationsError, match="outside its group"):
        EpisodeBenchmark(grouped, shots=3)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: EpisodeBenchmark(TABLE, ways=6), TooFewDemonstrationsError, "needs 6 classes with 2 different"),
        (lambda: EpisodeBenchmark(TABLE, shots=8), TooFewDemonstrationsError, "got 0 such classes"),
        (lambda: EpisodeBenchmark(TABLE, words=["dax"]), TooFewDemonstrationsError, "at least 2 words"),
        (lambda: EpisodeBenchmark(TABLE, ways=1), ValueError, "2 to 26 ways, got 1"),
        (lambda: EpisodeBenchmark(TABLE, shots=-1), ValueError, "numbers of shots from 0"),
        (lambda: EpisodeBenchmark(TABLE, shots=()), ValueError, "numbers of shots from 0"),
        (lambda: EpisodeBenchmark(TABLE, queries=0), ValueError, "at least one query"),
        (lambda: EpisodeBenchmark(TABLE, options="numbers"), ValueError, "'numbers'"),  # type: ignore[arg-type]
        (lambda: EpisodeBenchmark([{"image": picture(1)}]), ColumnError, "without labels"),
        (lambda: EpisodeBenchmark([(picture(1), "a", "b")]), ColumnError, "row 0: expected a pair"),  # type: ignore[list-item]
        (lambda: EpisodeBenchmark(datasets.Dataset.from_dict({"fur": ["red"]})), ColumnError, "'image' and 'label'"),
        (lambda: Benchmark("none", [], scorer=letter_match), ValueError, "has no item"),
    ],
)
def test_what_cannot_be_made_is_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_letters_are_read_as_letters_only() -> None:
    right = ["B", "b", " B\n", "(B)", "B.", "B) the bus", "**B**", '"B"', "B: bus"]
    wrong = ["", "A", "bus", "A or B", "B and A", "Bus.", "BB"]
    assert [letter_match(text, "B") for text in right] == [1.0] * len(right)
    assert [letter_match(text, "B") for text in wrong] == [0.0] * len(wrong)


def test_a_local_lvlm_scores_as_its_labels_say(tmp_path: Path) -> None:
    lvlm = load_lvlm("idefics3", tmp_path)
    benchmark = EpisodeBenchmark(table(3, 3), ways=3, shots=1, queries=2)
    part = benchmark.evaluate(lvlm).by_shots[1]
    expected = tuple(item.options[int(lvlm.label_scores(item.request).argmax())] for item in benchmark.items)
    assert part.predictions["likelihood"] == expected
    answers = lvlm.generate([item.request for item in benchmark.items], max_new_tokens=8)
    assert part.predictions["generation"] == tuple(answers)


# --- synthetic kinds -----------------------------------------------------------------------------------------------


def test_concepts_are_bound_by_the_demonstrations_alone() -> None:
    benchmark = concept_binding(TABLE, shots=(1, 2), queries=50)
    assert benchmark.evaluate(Answering(knowing)).accuracy == {1: 1.0, 2: 1.0}
    names = {name for item in benchmark.items for name in item.options}
    assert len(names) > 80 and not any("bird" in name for name in names)
    means = {(number_of(i.request.query.image) % 5, i.gold) for i in benchmark.items}
    assert len(means) > 40  # a name means nothing beyond its episode
    own = concept_binding(TABLE, shots=1, queries=20, words=["dax", "fep", "wug"])
    assert {name for item in own.items for name in item.options} == {"dax", "fep", "wug"}


def digits(each: int = 12) -> list[tuple[Image.Image, int]]:
    return [(picture(n), n % 10) for n in range(10 * each)]


def shown_digits(image: Image.Image | None) -> tuple[int, int]:
    """Numbers of the left and the right picture of a pair, each 4 pixels wide."""
    assert image is not None and image.size == (9, 4)
    return number_of(image), number_of(image.crop((5, 0, 9, 4)))


def results(pair: tuple[int, int]) -> dict[str, int]:
    a, b = pair[0] % 10, pair[1] % 10
    return {"+": a + b, "-": a - b, "x": a * b}


def test_operator_induction() -> None:
    benchmark = operator_induction(digits(), shots=(0, 1, 8), queries=30, seed=2)
    for number, item in enumerate(benchmark.items):
        request = item.request
        symbol = "+-x"[number % 3]
        pairs = [shown_digits(turn.image) for turn in (*request.demonstrations, request.query)]
        assert len({n for pair in pairs for n in pair}) == 2 * (int(item.shots) + 1)
        answers = [results(pair) for pair in pairs]
        assert all(len(set(found.values())) == 3 and found["-"] >= 0 for found in answers)
        assert [found[symbol] for found in answers] == [int(answer) for answer in (*item.shown, item.gold)]
        assert set(item.options) == {str(value) for value in answers[-1].values()}

    def inducing(request: ICLRequest) -> str:
        found = results(shown_digits(request.demonstrations[0].image))
        symbol = next(s for s, value in found.items() if str(value) == first(request))
        return f"It is {results(shown_digits(request.query.image))[symbol]}."

    result = benchmark.evaluate(Answering(lambda r: inducing(r) if r.demonstrations else "?"), scoring="generation")
    assert result.accuracy == {0: 0.0, 1: 1.0, 8: 1.0}
    assert result.by_shots[8].trivial < 0.5 and result.by_shots[8].chance == pytest.approx(1 / 3)


def test_count_induction() -> None:
    rng = np.random.default_rng(0)
    scenes = []
    for n in range(60):
        things = [
            {"shape": str(rng.choice(["ring", "star"])), "colour": str(rng.choice(["red", "blue", "green"]))}
            for _ in range(rng.integers(1, 6))
        ]
        scenes.append((picture(n), things))
    benchmark = count_induction(scenes, shots=(1, 4), queries=200)
    for item in benchmark.items:
        request = item.request
        seen = [number_of(turn.image) for turn in (*request.demonstrations, request.query)]
        assert len(set(seen)) == len(seen) == int(item.shots) + 1
        for n, turn, answer in zip(
            seen, (*request.demonstrations, request.query), (*item.shown, item.gold), strict=True
        ):
            attribute, value = turn.prompt.split(": ")
            assert int(answer) == sum(thing[attribute] == value for thing in scenes[n][1])
    golds = Counter(item.gold for item in benchmark.items[:200])
    assert set(golds) == set(benchmark.items[0].options)
    assert max(golds.values()) < 200 / len(golds) * 1.6


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: operator_induction([(picture(1), "ten")]), ColumnError, "row 0: expected a label from 0 to 9"),
        (lambda: operator_induction(digits(1)), TooFewDemonstrationsError, "8 shots need 18 digit images"),
        (
            lambda: operator_induction([(picture(n), (0, 0, 0, 0, 1, 2)[n % 6]) for n in range(12)], shots=5),
            TooFewDemonstrationsError,
            "for 6 pairs on which",
        ),
        (lambda: count_induction([(picture(1), [])]), ColumnError, "1 scenes without any"),
        (lambda: count_induction([(picture(1), [{"a": "b"}])], shots=1), TooFewDemonstrationsError, "2 different"),
    ],
)
def test_synthetic_kinds_that_cannot_be_made_are_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


# --- VL-ICL --------------------------------------------------------------------------------------------------------


def save(root: Path, name: str, number: int) -> str:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)
    return name


def write_task(root: Path, task: str, query: Any, support: Any) -> Path:
    folder = root / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "query.json").write_text(json.dumps(query))
    (folder / "support.json").write_text(json.dumps(support))
    return folder


def simple_task(root: Path, task: str) -> Path:
    """textocr or clevr: picture n's answer is n."""
    rows = [
        {"id": n, "image": [save(root, f"{task}/{n}.png", n)], "question": f"q{n}", "answer": answer}
        for n, answer in enumerate(range(13) if task == "clevr" else [f"T{n}" for n in range(13)])
    ]

    return write_task(root, task, rows[:3], rows[3:])


def operator_task(root: Path, task: str) -> Path:
    def images(n: int) -> list[str]:
        parts = ("a", "b") if "interleaved" in task else ("a",)
        return [save(root, f"{task}/{n}{part}.png", n + 100 * (part == "b")) for part in parts]

    query = [
        {"id": n, "image": images(n), "question": "What?", "operator": symbol, "answer": 11 * n}
        for n, symbol in enumerate("+-x")
    ]
    support = [
        {"id": n, "image": images(n), "question": "What?", "answer": [10 * n, 10 * n + 1, 10 * n + 2]}
        for n in range(3, 12)
    ]
    return write_task(root, task, query, support)


def open_mi_task(root: Path) -> Path:
    query = []
    for n in range(4):
        classes = [f"dax{n}", f"fep{n}", f"wug{n}"]
        support = {
            name: {
                "images": [save(root, f"open_mi/support/{n}_{k}_{i}.png", 100 * n + 10 * k + i) for i in range(5)],
                "caption": f"This is a {name}",
            }
            for k, name in enumerate(classes)
        }
        query.append(
            {
                "id": n,
                "image": [save(root, f"open_mi/query/{n}.png", 900 + n)],
                "question": "This is a",
                "answer": classes[1],
                "classes": classes,
                "support": support,
            }
        )
    return write_task(root, "open_mi", query, [])


def matching_task(root: Path) -> Path:
    def turn(n: int, answer: str) -> dict[str, Any]:
        images = [save(root, f"matching_mi/{n}_{k}.png", 2 * n + k) for k in range(2)]
        return {"image": images, "question": "Same?", "answer": answer}

    query = [{"id": n, **turn(n, ("yes", "no")[n % 2])} for n in range(4)]
    support = [{"id": n, "same": turn(2 * n + 10, "yes"), "diff": turn(2 * n + 11, "no")} for n in range(8)]
    return write_task(root, "matching_mi", query, support)


@pytest.mark.parametrize("task", ["textocr", "clevr"])
def test_vl_icl_tasks_of_one_picture(tmp_path: Path, task: str) -> None:
    benchmark = read_vl_icl(simple_task(tmp_path, task), seed=3)
    assert Counter(item.shots for item in benchmark.items) == {0: 3, 1: 3, 2: 3, 4: 3, 8: 3}
    for item in benchmark.items:
        request = item.request
        turns = (*request.demonstrations, request.query)
        assert len(request.demonstrations) == item.shots and item.options == () and item.id == request.query.id
        for turn, answer in zip(turns, (*item.shown, item.gold), strict=True):
            assert turn.prompt == f"q{number_of(turn.image)}"
            assert answer.lstrip("T") == str(number_of(turn.image))
        assert all(number_of(d.image) >= 3 for d in request.demonstrations)
    by_id = {(item.id, item.shots): item.shown for item in benchmark.items}
    assert all(by_id[n, 8][:2] == by_id[n, 2] for n in "012")
    other = read_vl_icl(tmp_path / task, seed=4, shots=8, queries=1, instruction="Look.")
    assert len(other.items) == 1 and other.items[0].shown != by_id["0", 8]
    assert other.items[0].request.demonstrations[0].prompt.startswith("Look.\nq")
    assert "Look" not in other.items[0].request.query.prompt
    result = benchmark.evaluate(Answering(lambda r: f" {item_answer(r, task)}\nand more"))
    assert set(result.accuracy.values()) == {1.0} and result.by_shots[0].chance is None
    with pytest.raises(ValueError, match="open questions"):
        benchmark.evaluate(Answering(first), scoring="likelihood")


def item_answer(request: ICLRequest, task: str) -> str:
    return ("" if task == "clevr" else "t") + str(number_of(request.query.image))


@pytest.mark.parametrize("task", ["operator_induction", "operator_induction_interleaved"])
def test_vl_icl_operator_tasks(tmp_path: Path, task: str) -> None:
    benchmark = read_vl_icl(operator_task(tmp_path, task), shots=(1, 8))
    for item in benchmark.items:
        request, place = item.request, int(item.id)
        for demonstration in request.demonstrations:
            assert demonstration.response == str(10 * number_of(demonstration.image) + place)
            if "interleaved" in task:
                assert demonstration.image is not None and demonstration.image.size == (9, 4)
                assert number_of(demonstration.image.crop((5, 0, 9, 4))) == number_of(demonstration.image) + 100
        assert item.gold == str(11 * place)
    # "1 + 10 = 11" is read as 1: the first number counts.
    answers = ["It is 0.", "1 + 10 = 11", "= 22"]
    result = benchmark.evaluate(Answering(lambda r: answers[int(r.query.id or 0)]))
    assert result.accuracy == {1: pytest.approx(2 / 3), 8: pytest.approx(2 / 3)}


def test_vl_icl_open_mi(tmp_path: Path) -> None:
    benchmark = read_vl_icl(open_mi_task(tmp_path))
    assert list(dict.fromkeys(item.shots for item in benchmark.items)) == [0, 1, 2, 4, 5]
    orders = set()
    for item in benchmark.items:
        request, n = item.request, int(item.id)
        classes = [f"dax{n}", f"fep{n}", f"wug{n}"]
        assert item.gold == f"fep{n}" and set(item.options) > {item.gold} and len(item.options) == 2
        counts = Counter(item.shown)
        assert set(counts) <= set(item.options) and set(counts.values()) <= {item.shots}
        for demonstration in request.demonstrations:
            found = number_of(demonstration.image)
            assert found // 100 == n and classes[found % 100 // 10] == demonstration.response
            assert demonstration.prompt == "This is a"
        orders.add(item.shown[:1] == (item.gold,) if item.shots else None)
    assert orders == {None, True, False}  # the query's class stands first here and there
    result = benchmark.evaluate(Answering(lambda r: f"fep{r.query.id}"))
    assert set(result.accuracy.values()) == {1.0} and result.by_shots[1].chance == 0.5
    with pytest.raises(TooFewDemonstrationsError, match=r"support of class '.*': expected 8 images"):
        read_vl_icl(tmp_path / "open_mi", shots=8)


def test_vl_icl_matching_mi(tmp_path: Path) -> None:
    benchmark = read_vl_icl(matching_task(tmp_path), shots=(0, 2))
    for item in benchmark.items:
        assert item.shown == ("yes", "no") * int(item.shots) and item.options == ("yes", "no")
        assert all(d.image is not None and d.image.size == (9, 4) for d in item.request.demonstrations)
    part = benchmark.evaluate(Answering(lambda r: "Yes, it is.\nNo")).by_shots[2]
    assert part.accuracy["generation"] == 0.5
    assert {name: values.mean() for name, values in part.baselines.items()} == dict.fromkeys(part.baselines, 0.5)
    assert part.baselines["copy-first"].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_vl_icl_never_shows_the_querys_own_picture(tmp_path: Path) -> None:
    folder = simple_task(tmp_path, "clevr")
    for n in (3, 4):
        picture(0).save(folder / f"{n}.png")  # another file of the same pixels
    items = read_vl_icl(folder, shots=8).items
    assert sorted(map(int, items[0].shown)) == list(range(5, 13))
    assert {"3", "4"} & set(items[1].shown)


def test_vl_icl_rules() -> None:
    plain, number = vl_icl_match("textocr"), vl_icl_match("operator_induction_interleaved")
    assert plain("  Stop \n", "stop") == plain("stop. Then", "STOP") == plain("STOP\nstop.", "stop") == 1.0
    assert plain("a.b\nc", "a.b") == 1.0  # a newline cuts before a full stop does
    assert plain(".com", ".com") == 1.0 and plain("stop it", "stop") == 0.0
    assert number("9 + 3 = 12", "12") == 0.0 and number("twelve", "12") == 0.0 and number("Answer: 12", "12") == 1.0
    assert number("-3", "-3") == 0.0 and vl_icl_match("clevr")("-3", "-3") == 1.0
    assert yes_no_match("YES", "yes") == yes_no_match("perhaps", "no") == yes_no_match("no.\nyes", "no") == 1.0


BROKEN: list[tuple[str, Callable[[list[dict[str, Any]], list[dict[str, Any]]], Any], type[Exception], str]] = [
    ("textocr", lambda q, s: q[1].pop("question"), RowError, "query.json, row 1: expected a column 'question'"),
    ("textocr", lambda q, s: s[2].update(answer=" "), RowError, "support.json, row 2: column 'answer'"),
    ("textocr", lambda q, s: s[2].update(image=[]), RowError, "support.json, row 2: column 'image'"),
    ("textocr", lambda q, s: s[0].update(image="a/no.png"), ImageError, "support.json, row 0: .*'a/no.png'"),
    ("textocr", lambda q, s: s[0].update(image="../out.png"), ImageError, "support.json, row 0: .*below"),
    ("textocr", lambda q, s: s[0].update(image=[3]), RowError, "support.json, row 0: .*got 3"),
    ("textocr", lambda q, s: s.__setitem__(4, "row"), RowError, "support.json, row 4: expected an object"),  # type: ignore[call-overload]
    ("textocr", lambda q, s: [row.update(q[0]) for row in s], TooFewDemonstrationsError, "query.json, row 0, got 0"),
    ("open_mi", lambda q, s: q[2]["support"]["fep2"]["images"].insert(0, q[2]["image"][0]), LeakError, "row 2: its"),
    ("textocr", lambda q, s: s.__delitem__(slice(5, None)), TooFewDemonstrationsError, "got 5; ask for fewer"),
    ("textocr", lambda q, s: q.clear(), SavedFileError, "query.json, got list with nothing"),
    ("operator_induction", lambda q, s: q[0].update(operator="/"), RowError, "row 0: column 'operator'"),
    ("operator_induction", lambda q, s: s[0].update(answer=[1, 2]), RowError, "row 0: column 'answer': .*each of"),
    ("operator_induction", lambda q, s: q[0].update(answer=[1, 2, 3]), RowError, "query.json, row 0: column 'answer'"),
    ("matching_mi", lambda q, s: s[1].pop("diff"), RowError, "support.json, row 1: expected a column 'diff'"),
    ("matching_mi", lambda q, s: q[2].update(answer="maybe"), RowError, "query.json, row 2: column 'answer'"),
    ("open_mi", lambda q, s: q[1].update(classes=["fep1"]), RowError, "query.json, row 1: column 'classes'"),
    ("open_mi", lambda q, s: q[1]["support"].pop("fep1"), RowError, "row 1, support of class 'fep1'"),
]


@pytest.mark.parametrize(("task", "break_", "error", "words"), BROKEN)
def test_vl_icl_faults_name_file_and_row(
    tmp_path: Path, task: str, break_: Any, error: type[Exception], words: str
) -> None:
    root = tmp_path / "data"
    makers = {"textocr": simple_task, "operator_induction": operator_task}
    makers |= {"matching_mi": lambda r, _: matching_task(r), "open_mi": lambda r, _: open_mi_task(r)}
    folder = makers[task](root, task)
    picture(1).save(tmp_path / "out.png")
    query, support = (json.loads((folder / f"{name}.json").read_text()) for name in ("query", "support"))
    break_(query, support)
    write_task(root, task, query, support)
    with pytest.raises(error, match=words):
        read_vl_icl(folder)


def test_vl_icl_folders_and_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown VL-ICL task 'birds'; expected one of open_mi"):
        read_vl_icl(tmp_path / "birds")
    with pytest.raises(SavedFileError, match=r"with query\.json, there is none"):
        read_vl_icl(tmp_path / "clevr")
    folder = simple_task(tmp_path, "clevr")
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"query\.json, row 1, '.*1\.png': column 'image': .* can't be read"):
        read_vl_icl(folder)
    (folder / "support.json").write_text("{")
    with pytest.raises(SavedFileError, match=r"support\.json, reading it as JSON failed"):
        read_vl_icl(folder)
    with pytest.raises(ValueError, match="unknown VL-ICL task 'mine'"):
        read_vl_icl(simple_task(tmp_path / "x", "clevr").rename(tmp_path / "x" / "mine"))


# --- SMMILE --------------------------------------------------------------------------------------------------------


def smmile_rows() -> list[dict[str, Any]]:
    """Two problems; rows out of order, as nothing promises that they are in order."""
    rows = []
    for problem, answers in (("p1", ["Black.", "Red", "Black."]), ("p2", ["yes", "no", "no", "Left, yes"])):
        for order, answer in enumerate(answers, start=1):
            rows.append(
                {
                    "problem_id": problem,
                    "order": order,
                    "image": picture(order + 10 * (problem == "p2")),
                    "question": f"{problem} {order}?",
                    "answer": answer,
                    "speciality": "x",
                }
            )
    return rows[::-1]


def smmile_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(
        problem_id=text, order=number, image=datasets.Image(), question=text, answer=text, speciality=text
    )
    return datasets.Dataset.from_list(rows, features=features)


def test_smmile_open_questions(tmp_path: Path) -> None:
    dataset = smmile_dataset(smmile_rows())
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-0.parquet")
    read = [read_smmile(data) for data in (smmile_rows(), dataset, tmp_path, tmp_path / "data" / "train-0.parquet")]
    told = [[(i.id, i.shots, i.gold, i.shown, i.request) for i in benchmark.items] for benchmark in read]
    assert told[0] == told[1] == told[2] == told[3]
    items = {(item.id, item.shots): item for item in read[0].items}
    assert set(items) == {("p1", 0), ("p1", "all"), ("p2", 0), ("p2", "all")}
    item = items["p2", "all"]
    assert item.gold == "Left, yes" and item.shown == ("yes", "no", "no") and item.options == ()
    assert [(d.prompt, number_of(d.image)) for d in item.request.demonstrations] == [
        ("p2 1?", 11), ("p2 2?", 12), ("p2 3?", 13)
    ]  # fmt: skip
    assert (item.request.query.prompt, number_of(item.request.query.image)) == ("p2 4?", 14)
    assert not items["p1", 0].request.demonstrations
    result = read[0].evaluate(Answering(lambda r: "black" if r.query.id == "p1" else "LEFT  yes!"))
    assert result.accuracy == {0: 1.0, "all": 1.0}
    means = result.to_dict()["by_shots"][1]["baselines"]
    assert means == {"copy-first": 0.5, "copy-last": 0.0, "majority": 0.25, "constant": 0.5}
    assert [i.shown for i in read_smmile(dataset, shots=2).items if i.id == "p2"] == [("no", "no")]


def test_smmile_multiple_choice() -> None:
    benchmark = read_smmile(smmile_rows(), format="choice")
    for item in benchmark.items:
        request = item.request
        lines = request.query.prompt.splitlines()
        named = dict(line.split(". ", 1) for line in lines[1:-1])
        assert tuple(named) == item.options
        assert named[item.gold] == {"p1": "Black.", "p2": "Left, yes"}[item.id]
        assert [d.response for d in request.demonstrations] == [named[letter] for letter in item.shown]
        assert all(d.prompt.startswith(item.id) and "\n" not in d.prompt for d in request.demonstrations)
    assert Counter((item.id, item.shots) for item in benchmark.items) == {
        ("p1", 0): 2, ("p1", "all"): 2, ("p2", 0): 3, ("p2", "all"): 3
    }  # fmt: skip
    part = benchmark.evaluate(Answering(lambda r: "A")).by_shots["all"]
    assert part.values["likelihood"] == pytest.approx([1 / 2 if id == "p1" else 1 / 3 for id in part.ids])
    assert part.chance == pytest.approx((2 * 1 / 2 + 3 * 1 / 3) / 5)
    assert dict(zip(part.ids, part.baselines["copy-first"], strict=True)) == {"p1": 1.0, "p2": 0.0}


@pytest.mark.parametrize(
    ("row", "change", "error", "words"),
    [
        (0, {"image": None}, ImageError, r"row 0 \(problem 'p2'\): column 'image'"),
        (1, {"answer": " "}, RowError, r"row 1 .*column 'answer'"),
        (1, {"order": "2"}, RowError, r"row 1 \(problem 'p2'\): column 'order': expected a whole number"),
        (1, {"order": 4}, RowError, "problem 'p2': column 'order': expected each place once"),
        (1, {"problem_id": "p3"}, RowError, "problem 'p3': expected examples and a query"),
        (0, {"image": "no.png"}, ImageError, r"row 0 .*no\.png"),
    ],
)
def test_smmile_problems_that_cannot_be_used_are_named_or_skipped(
    row: int, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    rows = smmile_rows()
    rows[row] |= change
    with pytest.raises(error, match=words):
        read_smmile(rows)
    benchmark = read_smmile(rows, on_bad_rows="skip")
    assert [problem for problem, _ in benchmark.skipped] == [rows[row]["problem_id"]]
    assert "p1" in {item.id for item in benchmark.items}


def test_smmile_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SavedFileError, match="found none"):
        read_smmile(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(SavedFileError, match="reading failed"):
        read_smmile(tmp_path)
    with pytest.raises(ColumnError, match="'problem_id'"):
        read_smmile([{"question": "?"}])
    with pytest.raises(ColumnError, match="'order'"):
        read_smmile(smmile_dataset(smmile_rows()).remove_columns("order"))
    with pytest.raises(ValueError, match='"all"'):
        read_smmile(smmile_rows(), shots="some")  # type: ignore[arg-type]


def test_items_are_made_of_requests_when_read() -> None:
    made = []

    def build() -> ICLRequest:
        made.append(1)
        return ICLRequest(Query(None, "2 + 2 is"))

    benchmark = Benchmark("sums", [BenchmarkItem("0", 0, "4", (), (), build)], scorer=lambda a, b: float(a == b))
    assert not made
    assert benchmark.evaluate(Answering(lambda r: "4")).accuracy == {0: 1.0}
    assert made
