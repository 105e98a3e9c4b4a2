"""Conversations for ICL tuning: laws of the draw, readers of public formats, mixes, the curriculum, and leaks."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from drum_hf.data import TripletTable
from drum_hf.errors import (
    ColumnError,
    EmptySupportError,
    ImageError,
    LeakError,
    RowError,
    SavedFileError,
    TooFewDemonstrationsError,
)
from drum_hf.tuning.episodes import (
    DEFAULT_CURRICULUM,
    SEED_HELD_OUT,
    SEED_TRAINED,
    SEED_TYPES,
    SEED_UNSEEN,
    ConceptRow,
    ConceptTable,
    Conversation,
    Curriculum,
    Episodes,
    EpisodeSettings,
    Mix,
    MixReport,
    MixSource,
    Stage,
    Turn,
    check_disjoint,
    read_labels,
    read_llava,
    read_messages,
    read_seed_bench,
    read_vl_checklist,
    split_concepts,
    to_dataset,
)
from drum_hf.types import image_key

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def plain_table(rows: list[ConceptRow]) -> ConceptTable:
    """A table for draws without pictures."""
    return ConceptTable(rows, None)  # type: ignore[arg-type]


def labelled(count: int = 40, colours: int = 4, shapes: int = 5) -> ConceptTable:
    return plain_table(
        [
            ConceptRow(
                str(n),
                f"image{n}",
                {"colour": f"colour{n % colours}", "shape": f"shape{n // colours % shapes}"},
                caption=f"thing {n}" if n % 3 else "",
            )
            for n in range(count)
        ]
    )


def pictured(count: int = 12) -> ConceptTable:
    rows = [
        {"image": picture(n), "concepts": {"kind": f"kind{n % 3}"}, "caption": f"a picture of number {n}"}
        for n in range(count)
    ]
    return ConceptTable.from_dataset(rows)


# The laws of the draw


@st.composite
def tables(draw: st.DrawFn) -> tuple[ConceptTable, bool]:
    """A table, and whether two of its rows share a picture."""
    count = draw(st.integers(4, 24))
    shared = draw(st.booleans())
    concepts = draw(st.integers(1, 3))
    rows = []
    for n in range(count):
        known = {f"concept{c}": f"value{c}.{draw(st.integers(0, 5))}" for c in range(concepts) if draw(st.booleans())}
        key = f"image{draw(st.integers(0, count)) if shared else n}"
        rows.append(ConceptRow(str(n), key, known, caption=draw(st.sampled_from(["", f"caption {n}"]))))
    rows = [row for row in rows if row.concepts]
    assume(rows)
    return plain_table(rows), shared


@st.composite
def pairs(draw: st.DrawFn, low: int, high: int) -> tuple[int, int]:
    first = draw(st.integers(low, high))
    return first, draw(st.integers(first, high))


@st.composite
def drawn_as(draw: st.DrawFn) -> EpisodeSettings:
    shares = st.sampled_from([0.0, 0.3, 1.0])
    ways = draw(st.none() | pairs(1, 4))
    copied = draw(st.none() | shares)
    return EpisodeSettings(
        shots=draw(pairs(0, 5)),
        forms=tuple(draw(st.sets(st.sampled_from(["open", "choice", "caption"]), min_size=1))),
        ways=ways,
        copied=1.0 if ways and ways[1] == 1 and copied is not None else copied,
        distractors=draw(shares),
        options=draw(pairs(2, 5)),
        renamed=draw(shares),
        unnamed=draw(shares),
    )


@settings(max_examples=150, deadline=None)
@given(tables(), drawn_as(), st.integers(0, 2**31), st.integers(0, 10**9))
def test_every_conversation_keeps_the_laws(made, how, seed, index):
    table, shared = made
    try:
        episodes = Episodes(table, how, seed=seed)
    except (ColumnError, TooFewDemonstrationsError):
        assume(False)
    try:
        talk = episodes.draw(index, images=False)
    except TooFewDemonstrationsError:
        assert shared, "with pictures of their own, what passed the check can be filled"
        return
    assert talk == Episodes(table, how, seed=seed).draw(index, images=False)  # by seed and number alone

    turns = talk.turns
    assert how.shots[0] <= talk.shots <= how.shots[1] and talk.form in how.forms and talk.kind == "episode"
    assert len({turn.image_key for turn in turns}) == len(turns)
    own = [turn for turn in turns if turn.concept == talk.concept]
    assert turns[-1] in own and turns[0] in own  # distractors stand in between
    assert talk.value == turns[-1].value
    if not how.distractors:
        assert own == list(turns)
    for turn in turns:
        rows = [row for row in table.rows if row.image_key == turn.image_key]
        assert any(row.concepts.get(turn.concept) == turn.value for row in rows)

    values = [turn.value for turn in own]
    if how.ways:
        assert len(set(values)) <= how.ways[1]
        if how.copied is None:
            assert len(set(values)) >= min(how.ways[0], len(own), len(table.concepts[talk.concept]))
    if how.copied in (0.0, 1.0) and len(own) > 1:
        assert (values[-1] in values[:-1]) == bool(how.copied)

    meanings: dict[str, set[tuple[str, str]]] = {}
    for turn in turns:
        if talk.form == "caption":
            assert turn.answer in {row.caption for row in table.rows if row.image_key == turn.image_key}
            assert not turn.options
            continue
        answer = turn.answer
        if talk.form == "choice":
            fewest = min(how.options[0], len(table.concepts[turn.concept]))
            assert len(set(turn.options)) == len(turn.options) and fewest <= len(turn.options) <= how.options[1]
            answer = turn.options[LETTERS.index(turn.answer)]
            for letter, option in zip(LETTERS, turn.options, strict=False):
                assert f"\n{letter}. {option}\n" in turn.prompt
        else:
            assert not turn.options
        if how.renamed == 0:
            assert answer == turn.value
        meanings.setdefault(answer, set()).add((turn.concept, turn.value))
    assert all(len(meant) == 1 for meant in meanings.values())  # a made-up word means one thing
    if talk.form != "caption" and how.unnamed == 1 and len(own) == len(turns):
        assert not any(talk.concept in turn.prompt.split("\n")[0] for turn in turns)


@given(st.integers(0, 2**31), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_tight_tables_are_filled_to_the_last_picture(seed, values):
    # 3 pictures of one value, 1 of each other one: a 2-way episode of 4 turns has to take all 3.
    rows = [ConceptRow(str(n), f"i{n}", {"c": f"v{max(0, n - 2)}"}) for n in range(values + 2)]
    how = EpisodeSettings(shots=3, forms="open", ways=2)
    talk = Episodes(plain_table(rows), how, seed=seed).draw(0, images=False)
    assert Counter(turn.value for turn in talk.turns)["v0"] == 3


def test_option_letters_and_last_values_are_spread_evenly():
    episodes = Episodes(labelled(), EpisodeSettings(shots=(1, 3), forms="choice", options=(3, 3)), seed=3)
    talks = [episodes.draw(i, images=False) for i in range(600)]
    letters = Counter(turn.answer for talk in talks for turn in talk.turns)
    assert set(letters) == {"A", "B", "C"} and max(letters.values()) < 1.2 * min(letters.values())
    last = Counter(talk.value for talk in talks if talk.concept == "colour")
    assert len(last) == 4 and max(last.values()) < 1.6 * min(last.values())
    assert {talk.shots for talk in talks} == {1, 2, 3}


def test_a_stream_gives_no_conversation_twice_and_ends_by_name():
    rows = [ConceptRow(str(n), f"i{n}", {"c": f"v{n % 2}"}) for n in range(4)]
    episodes = Episodes(plain_table(rows), EpisodeSettings(shots=0, forms="open"), source="four")
    assert len({talk.key for talk in episodes.stream(4, images=False)}) == 4
    with pytest.raises(TooFewDemonstrationsError, match="5 different conversations, but source 'four' has no more"):
        list(episodes.stream(5, images=False))


def test_concepts_that_cannot_be_filled_are_left_out_aloud(caplog):
    rows = [*labelled().rows, *(ConceptRow(f"s{n}", f"s{n}", {"size": f"size{n}"}) for n in range(3))]
    episodes = Episodes(plain_table(rows), EpisodeSettings(shots=3, forms="open"))
    assert "1 of 3 concepts can't fill 4 turns" in caplog.text and "size" in caplog.text
    assert {episodes.draw(i, images=False).concept for i in range(40)} == {"colour", "shape"}


def test_difficulty_leaves_the_hard_concepts_out():
    table = labelled(colours=2, shapes=9)

    def drawn(hardest: float, **options) -> set[str]:
        episodes = Episodes(table, EpisodeSettings(shots=1, forms="open", difficulty=hardest), **options)
        return {episodes.draw(i, images=False).concept for i in range(40)}

    assert drawn(0.0) == {"colour"} and drawn(1.0) == {"colour", "shape"}
    assert drawn(0.5, difficulty={"colour": 0.9, "shape": 0.1}) == {"shape"}


def test_the_rows_own_texts_are_used_where_they_are_about_the_concept():
    rows = [
        ConceptRow(str(n), f"i{n}", {"animal": name}, "Which animal?", name, (name, "a stone"), f"the {name}")
        for n, name in enumerate(["cat", "dog", "owl"])
    ]
    rows += [ConceptRow("x", "ix", {"animal": "eel", "place": "sea"}, "Where?", "sea", ("sea", "air"))]
    rows += [ConceptRow("y", "iy", {"place": "air", "animal": "bat"})]
    episodes = Episodes(plain_table(rows), EpisodeSettings(shots=4, forms="choice"), concepts=["animal"])
    by_key = {turn.image_key: turn for turn in episodes.draw(0, images=False).turns}
    assert by_key["i0"].prompt.startswith("Which animal?") and set(by_key["i0"].options) == {"cat", "a stone"}
    assert by_key["ix"].prompt.startswith("What is the animal here?") and "sea" not in by_key["ix"].options
    episodes = Episodes(plain_table(rows), EpisodeSettings(shots=1, forms="open"), concepts=["place"])
    turns = {turn.image_key: (turn.prompt, turn.answer) for turn in episodes.draw(0, images=False).turns}
    assert turns == {"ix": ("Where?", "sea"), "iy": ("What is the place here?", "air")}


# Conversations


def test_messages_alternate_and_carry_the_images_in_order():
    talk = Episodes(pictured(), EpisodeSettings(shots=3, forms="open"), seed=1)[0]
    messages = talk.messages()
    assert [message["role"] for message in messages] == ["user", "assistant"] * 4
    assert [[part["type"] for part in m["content"]] for m in messages] == [["image", "text"], ["text"]] * 4
    assert [image_key(m["content"][0]["image"]) for m in messages[::2]] == [turn.image_key for turn in talk.turns]
    assert [m["content"][0]["text"] for m in messages[1::2]] == [turn.answer for turn in talk.turns]
    assert [part["type"] for part in talk.messages(image_position="last")[0]["content"]] == ["text", "image"]
    assert talk.images == [m["content"][0]["image"] for m in messages[::2]]
    assert talk.without_images().key == talk.key


def test_a_conversation_without_its_pictures_is_never_shown_as_text():
    talk = Episodes(pictured()).draw(0, images=False)
    for read in (lambda: talk.images, talk.messages):
        with pytest.raises(RowError, match="with its pictures"):
            read()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Turn(None, "", "yes"), "image or a prompt"),
        (lambda: Turn(None, "why?", " "), "answer in every turn"),
        (lambda: Turn(picture(0), "<image> why?", "so"), "images and slots differ in number"),
        (lambda: Conversation((), "c", "v", "open"), "at least one turn"),
        (lambda: Conversation((Turn(picture(0), "a", "b"), Turn(picture(0), "c", "d")), "c", "v", "open"), "once"),
        (lambda: Conversation((Turn(None, "a", "b", concept="x"),), "c", "v", "open"), "last turn about 'c'"),
    ],
)
def test_broken_conversations_are_refused(make, message):
    with pytest.raises(RowError, match=message):
        make()


# Tables


def test_tables_from_datasets_lists_and_triplets_are_alike(tmp_path):
    names = ["cat", "dog"]
    rows = [{"image": picture(n), "animal": names[n % 2], "n": n} for n in range(6)]
    features = datasets.Features(
        image=datasets.Image(), animal=datasets.ClassLabel(names=names), n=datasets.Value("int64")
    )
    data = datasets.Dataset.from_list([row | {"animal": n % 2} for n, row in enumerate(rows)], features=features)
    triplets = TripletTable.from_dataset(
        [{"image": row["image"], "prompt": "", "response": row["animal"], "label": row["animal"]} for row in rows]
    )
    for n, row in enumerate(rows):
        folder = tmp_path / row["animal"]
        folder.mkdir(exist_ok=True)
        row["image"].save(folder / f"{n}.png")
    found = [
        read_labels(rows, "animal"),
        read_labels(data, "animal"),
        read_labels(data.select([5, 4, 3, 2, 1, 0]), "animal"),
        read_labels(triplets, concept="animal"),
        read_labels(tmp_path, concept="animal"),
    ]
    for table in found:
        assert table.concepts["animal"] == {"cat": 3, "dog": 3} and len(table) == 6
        assert table.contents() == found[0].contents()
        row = table.rows[0]
        assert image_key(table.image(row)) == row.image_key
    numbers = ConceptTable.from_dataset(data, concepts={"animal": "animal", "number": "n"})
    assert len(numbers.concepts["number"]) == 6
    assert ConceptTable.from_dataset(numbers) is numbers


def test_a_struct_column_of_concepts_leaves_out_what_is_not_known():
    rows = [{"image": picture(n), "concepts": {"a": "x" if n else None, "b": "yz"[n % 2]}} for n in range(4)]
    table = ConceptTable.from_dataset(datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()))
    assert table.concepts == {"b": {"y": 2, "z": 2}, "a": {"x": 3}}


def test_copies_are_kept_once():
    rows = [{"image": picture(n % 2), "concepts": {"a": "xy"[n % 2]}} for n in range(6)]
    table = ConceptTable.from_dataset(rows)
    assert len(table) == 2 and table.duplicates == 4


GOOD = {"concepts": {"a": "x"}}


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"image": None, **GOOD}, RowError, "row 1, column 'image': expected an image, got none"),
        ({"image": b"no image", **GOOD}, ImageError, "row 1"),
        ({"concepts": ["x"]}, RowError, "row 1, column 'concepts': expected {name: value}"),
        ({"concepts": {"a": 0.5}}, RowError, "row 1, column 'concepts', concept 'a': expected a text"),
        (GOOD | {"question": 3}, RowError, "row 1, column 'question': expected text"),
        (GOOD | {"options": ["x", "x"], "answer": "x"}, RowError, "2 to 26 different texts"),
        (GOOD | {"options": ["x", "y"], "answer": "z"}, RowError, "expected the answer 'z' among them"),
        (GOOD | {"options": "xy", "answer": "x"}, RowError, "expected a list of texts"),
    ],
)
def test_bad_rows_are_named_or_skipped(row, error, message):
    rows = [{"image": picture(0), **GOOD}, {"image": picture(1), **row}, {"image": picture(2), **GOOD}]
    with pytest.raises(error, match=message):
        ConceptTable.from_dataset(rows)
    table = ConceptTable.from_dataset(rows, on_bad_rows="skip")
    assert len(table) == 2 and [number for number, _ in table.skipped] == [1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConceptTable.from_dataset([{"image": picture(0)}]), ColumnError, "expected a column 'concepts'"),
        (lambda: ConceptTable.from_dataset([{"concepts": {}}]), ColumnError, "expected a column 'image'"),
        (lambda: read_labels([{"image": picture(0), "label": "x"}], "breed"), ColumnError, "a column 'breed'"),
        (
            lambda: ConceptTable.from_dataset([{"image": picture(0), **GOOD}], columns={"picture": "image"}),
            ColumnError,
            "columns= names 'picture'",
        ),
        (lambda: ConceptTable.from_dataset([]), EmptySupportError, "without rows"),
        (lambda: ConceptTable.from_dataset([{"image": picture(0), "concepts": {}}]), EmptySupportError, "about a"),
        (lambda: Episodes(labelled(), concepts=["size"]), ColumnError, "concepts= names 'size'"),
        (lambda: Episodes(labelled(), questions={"size": "?"}), ColumnError, "questions= names 'size'"),
        (lambda: Episodes(labelled(colours=1)), ColumnError, "two values of concept 'colour', got only 'colour0'"),
        (lambda: Episodes(labelled(8)), TooFewDemonstrationsError, "9 turns .* has 8 different pictures"),
        (
            lambda: Episodes(
                plain_table([r._replace(caption="") for r in labelled().rows]), EpisodeSettings(forms="caption")
            ),
            TooFewDemonstrationsError,
            "0 with a caption",
        ),
        (
            lambda: Episodes(labelled(4, colours=4), EpisodeSettings(shots=1, copied=1.0), concepts=["colour"]),
            TooFewDemonstrationsError,
            "at most 1 of one",
        ),
        (lambda: Episodes(labelled(), EpisodeSettings(ways=(6, 9))), TooFewDemonstrationsError, "of 4 values"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "fault",
    [
        {"shots": (3, 1)},
        {"shots": (-1, 1)},
        {"ways": 0},
        {"options": (1, 2)},
        {"options": (2, 27)},
        {"copied": 1.5},
        {"distractors": -0.1},
        {"forms": ("essay",)},
        {"forms": ()},
        {"difficulty": None},
        {"ways": (1, 1), "copied": 0.5},
    ],
)
def test_settings_out_of_range_are_refused(fault):
    with pytest.raises(ValueError, match=next(reversed(fault))):
        EpisodeSettings(**fault)


# Train and test apart


@settings(max_examples=80, deadline=None)
@given(tables(), st.sampled_from(["image", "value", "concept"]), st.floats(0.05, 0.95), st.integers(0, 99))
def test_splits_share_nothing(made, by, share, seed):
    table, _ = made
    try:
        train, test = split_concepts(table, share, by=by, seed=seed)
    except (ColumnError, EmptySupportError):
        assume(False)
    assert check_disjoint(train, test) == []
    whole = table.contents()
    for side in (train, test):
        assert side.contents().images <= whole.images and side.contents().values <= whole.values
    if by != "image":
        assert check_disjoint(train, test, by=("image", "value")) == []
    if by == "concept":
        assert not set(train.concepts) & set(test.concepts)
    again = split_concepts(table, share, by=by, seed=seed)
    assert [side.rows for side in again] == [train.rows, test.rows]


def test_named_values_and_concepts_are_held_out():
    train, test = split_concepts(labelled(), {"colour": ["colour1"]})
    assert set(test.concepts) == {"colour"} and set(test.concepts["colour"]) == {"colour1"}
    assert "colour1" not in train.concepts["colour"]
    _, test = split_concepts(labelled(), ["shape"], by="concept")
    assert set(test.concepts) == {"shape"}
    for named in ({"colour": ["pink"]}, {"size": ["big"]}, {}):
        with pytest.raises(ColumnError):
            split_concepts(labelled(), named)
    for share in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_concepts(labelled(), share)
    with pytest.raises(ValueError, match="as a list of concepts"):
        split_concepts(labelled(), ["colour"])


def test_overlap_is_an_error_wherever_it_hides(caplog):
    table = pictured()
    train = Episodes(table, EpisodeSettings(shots=1), seed=1)
    chat = read_llava([talk_row("<image>\nWhat?", "This.", images=[picture(3)])])
    key = image_key(picture(3))
    for one in (table, train, Mix([MixSource("t", train)]), [train[i] for i in range(40)]):
        with pytest.raises(LeakError, match="share 1 images"):
            check_disjoint(one, chat)
        assert check_disjoint(one, chat, on_leak="ignore") == [("image", key)]
    assert check_disjoint(chat, [dataclasses.replace(train[0], turns=train[0].turns)], by=["value"]) == []
    found = check_disjoint(train, [train[0]], by=("value",), on_leak="warn")
    assert found == sorted({("value", f"kind = {turn.value}") for turn in train[0].turns})
    assert "too good to be true" in caplog.text
    triplets = TripletTable.from_dataset([{"image": picture(3), "prompt": "?", "response": "x"}])
    assert check_disjoint(table, triplets, on_leak="ignore") == [("image", key)]
    for by in ("image", (), ("concept",)):
        with pytest.raises(ValueError, match="expected by"):
            check_disjoint(train, chat, by=by)


# Public formats


def seed_row(n: int, type_id: int, **other) -> dict:
    choices = {f"choice_{letter}": f"thing {n}{letter}" for letter in "abcd"}
    base = {"question_id": str(n), "question": f"Question {n}?", "answer": LETTERS[n % 4]}
    return base | choices | {"question_type_id": type_id, "data_id": f"{n}.png"} | other


@pytest.fixture
def seed_file(tmp_path):
    for n in range(16):
        picture(n).save(tmp_path / f"{n}.png")
    rows = [seed_row(n, n % 8 + 1) for n in range(16)] + [seed_row(16, 10, data_id="missing.mp4")]
    path = tmp_path / "SEED-Bench.json"
    path.write_text(json.dumps({"question_type": {"Scene Understanding": 1}, "questions": rows}))
    return path


def test_seed_bench_follows_the_papers_split_of_types(seed_file):
    assert (SEED_TRAINED, SEED_HELD_OUT, SEED_UNSEEN) == ((1, 2, 3, 4), (5,), (6, 7, 8))
    train, held = read_seed_bench(seed_file), read_seed_bench(seed_file, types=SEED_HELD_OUT)
    assert list(train.concepts) == [SEED_TYPES[n] for n in SEED_TRAINED] and len(train) == 8
    assert list(held.concepts) == ["instance counting"]
    assert check_disjoint(train, held, by=("image", "value")) == []
    row = train.rows[1]
    assert (row.question, row.answer, row.image_key) == ("Question 1?", "thing 1b", image_key(picture(1)))
    talk = Episodes(train, EpisodeSettings(shots=1, forms="choice"), seed=2)[0]
    for turn in talk.turns:
        assert turn.prompt.startswith("Question") and len(turn.options) == 4
        assert turn.options[LETTERS.index(turn.answer)] == turn.value


def test_seed_bench_from_the_hubs_mirror():
    rows = [seed_row(n, 1) | {"image": [picture(n)]} for n in range(3)]
    for row in rows:
        del row["data_id"]
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = {name: text for name in rows[0]} | {"question_type_id": number}  # noqa: C420
    features["image"] = datasets.List(datasets.Image())
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    assert read_seed_bench(data).contents() == read_seed_bench(rows).contents()
    assert len(read_seed_bench(data)) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"answer": "E"}, "row 1, column 'answer': expected a letter from A to D, got 'E'"),
        ({"answer": "D", "choice_d": None}, "from A to C, got 'D'"),
        ({"answer": None}, "got None"),
        ({"answer": "AB"}, "got 'AB'"),
        ({"image": [picture(0), picture(1)]}, "row 1, column 'image': expected one image a question, got 2"),
        ({"image": None}, "row 1, column 'image': expected an image, got none"),
    ],
)
def test_seed_bench_rows_out_of_range_are_named(fault, message):
    rows = [seed_row(n, 1, image=picture(n)) for n in range(3)]
    rows[1] |= fault
    with pytest.raises(RowError, match=message):
        read_seed_bench(rows)
    table = read_seed_bench(rows, on_bad_rows="skip")
    assert len(table) == 2 and [number for number, _ in table.skipped] == [1]


def test_seed_bench_refuses_what_it_is_not(tmp_path):
    with pytest.raises(ColumnError, match="choice_b"):
        read_seed_bench([{"question": "?", "choice_a": "x", "answer": "A", "question_type_id": 1}])
    with pytest.raises(ValueError, match="types among"):
        read_seed_bench([seed_row(0, 1)], types=(9,))
    with pytest.raises(SavedFileError, match="found none"):
        read_seed_bench(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("[1, ")
    with pytest.raises(SavedFileError, match="expected JSON"):
        read_seed_bench(tmp_path / "broken.json")


def test_vl_checklist_folders_name_the_concepts(tmp_path):
    for n in range(4):
        picture(n).save(tmp_path / f"{n}.png")
    colours = [[f"{n}.png", {"POS": [f"a {c} car"], "NEG": ["a grey car"]}] for n, c in enumerate(["red", "blue"])]
    actions = [["2.png", {"POS": ["man rides horse", "a cat sits"], "NEG": ["man feeds horse", "a cat runs"]}]]
    for name, rows in (("attribute/color", colours), ("relation/action", actions)):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows))
    table = read_vl_checklist(tmp_path)
    assert table.concepts == {"attribute/color": {"red": 1, "blue": 1}, "relation/action": {"rides": 1, "sits": 1}}
    assert table.rows[0].options == ("a red car", "a grey car") and table.rows[0].caption == "a red car"
    choice = Episodes(table, EpisodeSettings(shots=1, forms="choice"), concepts=["attribute/color"])[0].turns[0]
    assert choice.prompt.startswith("Which description fits the image?\nA. a ")
    assert choice.options[LETTERS.index(choice.answer)] == f"a {choice.value} car"
    talk = Episodes(table, EpisodeSettings(shots=1, forms="open"), concepts=["attribute/color"])[0]
    assert sorted(turn.answer for turn in talk.turns) == ["blue", "red"]
    single = read_vl_checklist(tmp_path / "attribute" / "color.json", image_root=tmp_path)
    assert list(single.concepts) == ["color"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0.png"], "row 1, expected \\[image"),
        ([picture(1), {"POS": ["a"]}], "'NEG': expected a list of texts"),
        ([picture(1), {"POS": [], "NEG": ["b"]}], "'POS': expected a list of texts"),
        ([picture(1), {"POS": ["a"], "NEG": [" "]}], "'NEG': expected texts, none of them empty"),
        ([picture(1), {"POS": ["a"], "NEG": ["a"]}], "different texts"),
    ],
)
def test_vl_checklist_rows_of_another_shape_are_named(row, message):
    rows = [[picture(0), {"POS": ["a x"], "NEG": ["a y"]}], row]
    with pytest.raises(RowError, match=message):
        read_vl_checklist(rows, concept="letters")
    assert len(read_vl_checklist(rows, concept="letters", on_bad_rows="skip")) == 1
    with pytest.raises(ValueError, match="concept="):
        read_vl_checklist(rows)


def talk_row(*texts: str, images=None) -> dict:
    roles = ("human", "gpt") * len(texts)
    said = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    return {"conversations": said} | ({} if images is None else {"image": images})


def test_llava_rows_with_none_one_and_several_images(tmp_path):
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    rows = [
        talk_row("Hello?", "Yes."),
        talk_row("<image>\nWhat?", "A thing.", "Sure?", "Yes.", images="0.png"),
        talk_row("<image>\nWhat?", "One.", "And this?\n<image>", "Two.", images=["1.png", "2.png"]),
        talk_row("Hello?", "Yes."),
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    talks = read_llava(path, source="chat")
    assert len(talks) == 3  # the copy is kept once
    assert [len(talk.images) for talk in talks] == [0, 1, 2]
    assert [turn.prompt for turn in talks[2].turns] == ["What?", "And this?"]
    assert [image_key(image) for image in talks[2].images] == [image_key(picture(n)) for n in (1, 2)]
    assert {(talk.kind, talk.source, talk.form) for talk in talks} == {("replay", "chat", "open")}
    assert [len(talk.turns) for talk in talks[1:]] == [2, 2]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (talk_row("<image> What?", "This."), RowError, "row 1, .*got 1 slots for 0 images"),
        (talk_row("What?", "This.", images=[picture(0)]), RowError, "got 0 slots for 1 images"),
        (talk_row("<image><image> What?", "This.", images=[picture(0), picture(1)]), RowError, "one image a human"),
        (talk_row("What?", "This <image>.", images=[picture(0)]), RowError, "none in an answer"),
        (talk_row("What?"), RowError, "alternating and in full pairs"),
        (talk_row("What?", ""), RowError, "answer in every turn"),
        (talk_row("<image>What?", "This.", images="absent.png"), ImageError, "no such file"),
        (talk_row("<image>What?", "This.", images="../absent.png"), RowError, "leaves it"),
        ({"conversations": [{"from": "system", "value": "Be kind."}]}, RowError, "human or gpt"),
        ([], RowError, "dict of columns"),
    ],
)
def test_llava_rows_that_cannot_be_used_are_named_or_skipped(row, error, message, tmp_path):
    rows = [talk_row("Hello?", "Yes."), row]
    with pytest.raises(error, match=message):
        read_llava(rows, image_root=tmp_path)
    talks = read_llava(rows, image_root=tmp_path, on_bad_rows="skip")
    assert len(talks) == 1 and talks.skipped[0][0] == 1


def test_conversations_survive_a_table_of_messages(tmp_path):
    episodes = Episodes(pictured(), EpisodeSettings(shots=(0, 3), distractors=0.5), seed=4, source="pictures")
    talks = [*episodes.stream(6), Conversation((Turn(None, "Hello?", "Yes."),), "", "", "open", kind="replay")]
    to_dataset(talks).to_parquet(tmp_path / "talks.parquet")
    data = datasets.Dataset.from_parquet(str(tmp_path / "talks.parquet"), cache_dir=str(tmp_path / "cache"))
    again = read_messages(data)
    assert [talk.without_images() for talk in again] == [talk.without_images() for talk in talks]
    assert [list(map(image_key, talk.images)) for talk in again] == [
        [turn.image_key for turn in talk.turns if turn.image_key] for talk in talks
    ]
    assert len(episodes.to_dataset(3)) == 3
    with pytest.raises(EmptySupportError):
        to_dataset([])


def test_messages_with_their_images_inline_or_beside():
    part = {"type": "text", "text": "What?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    inline = {"messages": [{"role": "user", "content": [{"type": "image", "image": picture(0)}, part]}, answer]}
    beside = {"messages": [{"role": "user", "content": "<image>What?"}, answer], "images": [picture(0)]}
    one, other = read_messages([inline])[0], read_messages([beside])[0]
    assert one.key == other.key
    with pytest.raises(RowError, match="1 slots for 2 images"):
        read_messages([beside | {"images": [picture(0), picture(1)]}])
    with pytest.raises(RowError, match="roles user and assistant, got 'system'"):
        read_messages([{"messages": [{"role": "system", "content": "Be kind."}]}])
    with pytest.raises(RowError, match="one for each of 1 exchanges, got 2"):
        read_messages([beside | {"turns": [{}, {}]}])


# Mixes


def chat(count: int = 3) -> list[Conversation]:
    return [Conversation((Turn(None, f"{n}?", "Yes."),), "", "", "open", kind="replay") for n in range(count)]


def small_mix(seed: int = 0, curriculum: Curriculum | None = None) -> Mix:
    episodes = Episodes(labelled(200, 5, 8), EpisodeSettings(shots=(0, 4)), seed=seed)
    other = Episodes(labelled(60), EpisodeSettings(shots=2, forms="open"), seed=seed)
    sources = [MixSource("a", episodes, weight=3), MixSource("b", other), MixSource("chat", chat())]
    return Mix(sources, curriculum, seed=seed)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 150))
def test_a_mix_keeps_its_shares_and_repeats_no_episode(seed, count):
    mix = small_mix(seed)
    talks = list(mix.stream(count, images=False))
    keys = [talk.key for talk in talks if talk.kind == "episode"]
    assert len(talks) == count and len(set(keys)) == len(keys)
    assert talks == list(small_mix(seed).stream(count, images=False))
    firsts = [mix.draw(place, place / count, images=False) for place in range(count)]
    assert [talk.source for talk in firsts] == [talk.source for talk in talks]
    for name, share in mix.shares().items():
        assert abs(sum(talk.source == name for talk in talks) - share * count) <= 4  # evenly spread, not by luck
    report = mix.report(count)
    assert report == MixReport.of(talks) and report.conversations == count
    assert all(sum(counts.values()) == count for counts in report.counts.values())
    assert json.loads(json.dumps(report.to_dict()))["turns"] == sum(len(talk.turns) for talk in talks)


def test_a_curriculum_decides_what_is_drawn_when():
    plan = Curriculum.from_dict(
        {
            "stages": [
                {"share": 1, "replay": 0.5, "shots": [1, 1], "ways": [1, 1], "forms": ["open"], "difficulty": 0},
                {"share": 3, "replay": 0.0, "shots": [3, 4], "distractors": 1.0, "forms": ["choice"]},
            ]
        }
    )
    mix = small_mix(1, plan)
    talks = list(mix.stream(400, images=False))
    early, late = talks[:100], talks[100:]
    assert abs(sum(talk.kind == "replay" for talk in early) - 50) <= 2
    assert {talk.kind for talk in late} == {"episode"}
    copied = [talk for talk in early if talk.kind == "episode"]
    assert {(talk.shots, talk.form) for talk in copied} == {(1, "open")}
    assert all(talk.turns[0].answer == talk.turns[1].answer for talk in copied)
    assert {talk.shots for talk in late} == {3, 4} and {talk.form for talk in late} == {"choice"}
    assert all(turn.concept != talk.concept for talk in late for turn in talk.turns[1:-1])
    assert mix.shares(0.1) == pytest.approx({"a": 0.375, "b": 0.125, "chat": 0.5})
    assert mix.shares(0.9) == pytest.approx({"a": 0.75, "b": 0.25, "chat": 0})
    assert mix.report(400).distractors == sum(len(talk.turns) - 2 for talk in late)


def test_the_report_reads_as_a_table():
    lines = str(small_mix().report(100)).splitlines()
    assert lines[0].startswith("100 conversations, ")
    kinds = small_mix().report(100).counts["kind"]
    assert any(line.split() == ["kind", "episode", f"{kinds['episode']}", f"{kinds['episode']}.0%"] for line in lines)
    assert any(line.split() == ["replay", f"{kinds['replay']}", f"{kinds['replay']}.0%"] for line in lines)
    assert any("concept" in line and "(none)" in line for line in lines)


def test_a_mix_gives_pictures_unless_told_not_to():
    chats = read_llava([talk_row("<image>What?", "This.", images=[picture(99)])])
    mix = Mix([MixSource("pictures", Episodes(pictured(), EpisodeSettings(shots=1))), MixSource("chat", chats)])
    for index in range(6):
        talk = mix.draw(index)
        assert talk.images and talk.without_images() == mix.draw(index, images=False)
    assert len(mix.to_dataset(5)) == 5
    there = pickle.loads(pickle.dumps(mix))  # as a worker process gets it
    assert [there.draw(index).key for index in range(6)] == [mix.draw(index).key for index in range(6)]
    assert mix.contents().images == pictured().contents().images | {image_key(picture(99))}


@pytest.mark.parametrize("text", ["yaml", "json"])
def test_a_curriculum_is_data(text):
    import yaml

    written = DEFAULT_CURRICULUM.to_dict()
    read = yaml.safe_load(yaml.safe_dump(written)) if text == "yaml" else json.loads(json.dumps(written))
    assert Curriculum.from_dict(read) == DEFAULT_CURRICULUM
    assert small_mix(0, DEFAULT_CURRICULUM).report(40).conversations == 40


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mix([]), EmptySupportError, "at least one source"),
        (lambda: MixSource("a", []), EmptySupportError, "source 'a', got none"),
        (lambda: MixSource("a", chat(), weight=0), ValueError, "weight above 0"),
        (lambda: MixSource("a", 3), TypeError, "got int"),
        (lambda: MixSource("a", chat(), kind="rerun"), ValueError, "kind one of"),
        (lambda: Mix([MixSource("a", chat()), MixSource("a", chat())]), ValueError, "'a' twice"),
        (lambda: Mix([MixSource("a", chat())], DEFAULT_CURRICULUM), ValueError, "stage 0: .* kind 'episode'"),
        (
            lambda: Mix([MixSource("a", Episodes(labelled()))], DEFAULT_CURRICULUM),
            ValueError,
            "stage 0: .* kind 'replay' for replay=0.3",
        ),
        (
            lambda: small_mix(0, Curriculum((Stage(), Stage(shots=70)))),
            TooFewDemonstrationsError,
            "stage 1, source 'b': .* 71 turns",
        ),
        (lambda: Curriculum(()), ValueError, "at least one stage"),
        (lambda: Curriculum.from_dict({"stages": [], "seed": 1}), ValueError, "'seed'"),
        (lambda: Curriculum.from_dict([{"share": 1}, {"shot": 3}]), ValueError, "stage 1: .*got 'shot'"),
        (lambda: Curriculum.from_dict([{"share": 0}]), ValueError, "stage 0: expected share above 0"),
        (lambda: Curriculum.from_dict([{"replay": 2}]), ValueError, "stage 0: expected replay between"),
        (lambda: DEFAULT_CURRICULUM.at(1.2), ValueError, "progress from 0 to 1"),
    ],
)
def test_mixes_that_cannot_be_drawn_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_finite_source_that_is_used_up_is_named():
    talks = [dataclasses.replace(talk, kind="episode") for talk in chat(3)]
    mix = Mix([MixSource("three", talks)])
    assert len(list(mix.stream(3))) == 3
    with pytest.raises(TooFewDemonstrationsError, match="source 'three' has no more after 3"):
        list(mix.stream(4))
