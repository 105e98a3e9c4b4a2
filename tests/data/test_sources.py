"""Public data sets by name, each on a small parquet copy with the columns and types of the real one."""

from __future__ import annotations

import dataclasses
import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from drum_hf.cli import main
from drum_hf.data import SOURCES, check_leaks, check_table, find_source, load_triplets
from drum_hf.errors import ColumnError, DuplicateIdError, EmptySupportError, ImageError, RowError, SavedFileError
from drum_hf.evaluation.metrics import METRICS
from drum_hf.types import image_key

TEXT, WHOLE, TEXTS = Value("string"), Value("int64"), List(Value("string"))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8))


def vqa(i: int) -> dict:
    """Two questions an image; five annotators, of whom one said nothing."""
    return {
        "image": picture(i // 2),
        "question": f"What is {i}?",
        "answers": ["no", "yes", "yes", "", f"is {i}"],
    }


# Per side: repository, split, its files' name, Features as the Hub has them, and a row. Written by hand after the
# data sets' own cards, not after the registry.
ANSWERS = List({"answer": TEXT, "answer_confidence": TEXT, "answer_id": WHOLE})
LAYOUTS = {
    ("vqav2", "query"): (
        "lmms-lab/VQAv2",
        "validation-00000-of-00002",
        Features(
            question_type=TEXT,
            multiple_choice_answer=TEXT,
            answers=ANSWERS,
            image_id=WHOLE,
            answer_type=TEXT,
            question_id=WHOLE,
            question=TEXT,
            image=datasets.Image(),
        ),
        lambda i: {
            **vqa(i),
            "question_type": "what is",
            "multiple_choice_answer": "no",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": n + 1}
                for n, text in enumerate(vqa(i)["answers"])
            ],
            "image_id": 40 + i // 2,
            "answer_type": "other",
            "question_id": 40000 + i,
        },
    ),
    ("okvqa", "query"): (
        "lmms-lab/OK-VQA",
        "val2014-00000-of-00002",
        Features(
            question_id=TEXT,
            image=datasets.Image(),
            question=TEXT,
            answers=TEXTS,
            question_type=TEXT,
            answer_type=TEXT,
        ),
        lambda i: {**vqa(i), "question_id": f"{i}5", "question_type": "one", "answer_type": "other"},
    ),
    ("vizwiz", "query"): (
        "lmms-lab/VizWiz-VQA",
        "val-00000-of-00005",
        Features(question_id=TEXT, image=datasets.Image(), question=TEXT, answers=TEXTS, category=TEXT),
        lambda i: {**vqa(i), "question_id": f"VizWiz_val_{i}.jpg", "category": "other"},
    ),
    ("flowers102", "support"): (
        "dpdl-benchmark/oxford_flowers102",
        "train-00000-of-00001",
        Features(image=datasets.Image(), label=ClassLabel(names=["pink primrose", "globe thistle"])),
        lambda i: {"image": picture(i), "label": i % 2},
    ),
    ("food101", "support"): (
        "ethz/food101",
        "train-00000-of-00008",
        Features(image=datasets.Image(), label=ClassLabel(names=["apple_pie", "baby_back_ribs"])),
        lambda i: {"image": picture(i), "label": i % 2},
    ),
    ("cub200", "support"): (
        "bentrevett/caltech-ucsd-birds-200-2011",
        "train-00000-of-00002",
        Features(
            image=datasets.Image(),
            label=ClassLabel(names=["001.Black_footed_Albatross", "002.Laysan_Albatross"]),
            bbox=List(Value("float32")),
        ),
        lambda i: {"image": picture(i), "label": i % 2, "bbox": [1.0, 2.0, 3.0, 4.0]},
    ),
    ("coco", "query"): (
        "lmms-lab/COCO-Caption",
        "val-00000-of-00013",
        Features(question_id=TEXT, image=datasets.Image(), question=TEXT, answer=TEXTS, id=WHOLE, file_name=TEXT),
        lambda i: {
            "question_id": f"COCO_val2014_{i}.jpg",
            "image": picture(i),
            "question": "Please describe it.",
            "answer": [f"A {i}.", f"One {i}."],
            "id": i,
            "file_name": f"COCO_val2014_{i}.jpg",
        },
    ),
    ("coco", "support"): (
        "jxie/coco_captions",
        "train-00000-of-00190",
        Features(image=datasets.Image(), filename=TEXT, cocoid=WHOLE, caption=TEXT),
        # four images, two captions each, the last image of val2014
        lambda i: {
            "image": picture(i // 2),
            "filename": f"COCO_{'val' if i // 2 == 3 else 'train'}2014_{i // 2}.jpg",
            "cocoid": i // 2,
            "caption": f"Caption {i}.",
        },
    ),
    ("flickr30k", "support"): (
        "nlphuji/flickr30k",
        "TEST/test/0000",
        Features(image=datasets.Image(), caption=TEXTS, sentids=TEXTS, split=TEXT, img_id=TEXT, filename=TEXT),
        lambda i: {
            "image": picture(i),
            "caption": [f"A {i}.", f"One {i}."],
            "sentids": ["0", "1"],
            "split": ("train", "test", "val")[i % 3],
            "img_id": str(i),
            "filename": f"{i}.jpg",
        },
    ),
    ("nocaps", "query"): (
        "lmms-lab/NoCaps",
        "validation-00000-of-00003",
        Features(
            image=datasets.Image(),
            image_coco_url=TEXT,
            image_id=Value("int32"),
            annotations_ids=List(Value("int32")),
            annotations_captions=TEXTS,
        ),
        lambda i: {
            "image": picture(i),
            "image_coco_url": "",
            "image_id": i,
            "annotations_ids": [1, 2],
            "annotations_captions": [f"A {i}.", f"One {i}."],
        },
    ),
    ("seedbench", "query"): (
        "lmms-lab/SEED-Bench-2",
        "test-00000-of-00077",
        Features(
            answer=TEXT,
            choice_a=TEXT,
            choice_b=TEXT,
            choice_c=TEXT,
            choice_d=TEXT,
            data_id=TEXTS,
            question=TEXT,
            question_id=TEXT,
            question_type_id=Value("int16"),
            image=List(datasets.Image()),
        ),
        # the last two of every eight are of a type with several images, which is not used
        lambda i: {
            "answer": "ABCD"[i % 4],
            **{f"choice_{letter}": f"{letter}{i}" for letter in "abcd"},
            "data_id": [str(i)],
            "question": f"What is {i}?",
            "question_id": f"q{i}",
            "question_type_id": i % 8 + 1 if i % 8 < 6 else 20,
            "image": [picture(i // 2)] if i % 8 < 6 else [picture(0), picture(1)],
        },
    ),
}
TRAIN = Features(
    image=datasets.Image(),
    question_type=TEXT,
    answers=TEXTS,
    question_id=WHOLE,
    id_image=WHOLE,
    question=TEXT,
    id=WHOLE,
)
LAYOUTS[("okvqa", "support")] = (
    "Multimodal-Fatima/OK-VQA_train",
    "train-00000-of-00004-0123456789abcdef",
    TRAIN,
    lambda i: {**vqa(i), "question_type": "one", "question_id": 700 + i, "id_image": 70 + i // 2, "id": i},
)
LAYOUTS[("vqav2", "support")] = (
    "Multimodal-Fatima/VQAv2_train",
    "train-00000-of-00143-0123456789abcdef",
    Features({**TRAIN, "multiple_choice_answer": TEXT}),
    lambda i: {**LAYOUTS[("okvqa", "support")][3](i), "multiple_choice_answer": "no"},
)
LAYOUTS[("vizwiz", "support")] = (
    "Multimodal-Fatima/VizWiz_train",
    "train-00000-of-00021-0123456789abcdef",
    Features(id=WHOLE, filename=TEXT, image=datasets.Image(), question=TEXT, answers=TEXTS),
    lambda i: {**vqa(i), "filename": f"VizWiz_train_{i}.jpg", "id": i},
)
TEXTVQA = (
    Features(
        image_id=TEXT,
        question_id=Value("int32"),
        question=TEXT,
        image=datasets.Image(),
        answers=TEXTS,
        ocr_tokens=TEXTS,
    ),
    lambda i: {**vqa(i), "image_id": f"f{i // 2}", "question_id": 30 + i, "ocr_tokens": ["STOP"]},
)
LAYOUTS[("textvqa", "support")] = ("lmms-lab/textvqa", "train-00000-of-00020", *TEXTVQA)
LAYOUTS[("textvqa", "query")] = ("lmms-lab/textvqa", "validation-00000-of-00003", *TEXTVQA)
LAYOUTS[("nocaps", "support")] = LAYOUTS[("coco", "support")]
LAYOUTS[("flickr30k", "query")] = LAYOUTS[("flickr30k", "support")]
LAYOUTS[("seedbench", "support")] = LAYOUTS[("seedbench", "query")]
for name, split in (("flowers102", "test"), ("food101", "validation"), ("cub200", "test")):
    repo, _, features, row = LAYOUTS[(name, "support")]
    LAYOUTS[(name, "query")] = (repo, f"{split}-00000-of-00001", features, row)

SIDES = sorted(LAYOUTS)


def rows_of(key, count=8):
    _, _, features, row = LAYOUTS[key]
    return datasets.Dataset.from_list([row(i) for i in range(count)], features=features)


def write_copy(root, key, data=None):
    """A copy in the repository's own layout."""
    repo, file, *_ = LAYOUTS[key]
    path = root / repo / (f"{file}.parquet" if "/" in file else f"data/{file}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    (data or rows_of(key)).to_parquet(path)
    return path


@pytest.fixture
def load(tmp_path):
    def load(key, data=None, **options):
        write_copy(tmp_path / "copy", key, data)
        options = {"split": key[1], "cache_dir": tmp_path / "cache"} | options
        return load_triplets(key[0], data_dir=tmp_path / "copy", **options)

    return load


# The registry


def test_every_data_set_named_is_there_with_both_sides():
    assert set(SOURCES) == {name for name, _ in SIDES} and len(SIDES) == 2 * len(SOURCES) == 22
    for name, source in SOURCES.items():
        assert source.name == name and source.metric in METRICS and source.licence and source.prompt
        assert source.task in ("vqa", "classification", "captioning")
        for part in (source.support, source.query):
            assert part.needed <= set(part.columns)
            assert part.download["repo"].count("/") == 1 and "{" not in part.download["files"]


@pytest.mark.parametrize("key", SIDES, ids="-".join)
def test_the_parts_are_those_of_the_layouts_here(key):
    repo, file, features, _ = LAYOUTS[key]
    part = find_source(key[0]).part(key[1])
    assert part.repo == repo and set(part.columns) <= set(features)
    stored = f"{file}.parquet" if "/" in file else f"data/{file}.parquet"
    beginning, end = part.download["files"].split("*")
    assert stored.startswith(beginning) and stored.endswith(end)


def test_names_are_found_however_they_are_spelt():
    assert find_source("OK-VQA") is find_source("ok_vqa") is SOURCES["okvqa"]
    with pytest.raises(ValueError, match=r"expected one of vqav2, .*got 'gqa'"):
        load_triplets("gqa")


# Every entry


@pytest.mark.parametrize("key", SIDES, ids="-".join)
def test_streamed_or_not_it_is_the_same_table(key, load):
    table = load(key)
    streamed = load(key, streaming=True)
    assert streamed.fingerprint == table.fingerprint and streamed.references == table.references
    assert all(table.image_keys) and all(table.groups) and all(response.strip() for response in table.responses)
    some = load(key, limit=1, streaming=True)
    assert len(some) == 1 and some.ids == table.ids[:1]
    first = table[table.ids[0]]
    assert image_key(first.image) == table.image_keys[0]


VQA = [key for key in SIDES if SOURCES[key[0]].task == "vqa"]


@pytest.mark.parametrize("key", VQA, ids="-".join)
def test_questions_their_answers_and_their_images(key, load):
    table = load(key)
    assert table.prompts == [f"What is {i}?" for i in range(8)]
    assert table.references == [("no", "yes", "yes", f"is {i}") for i in range(8)]
    assert table.responses == ["no" if key[0] == "vqav2" else "yes"] * 8  # the data set's own, or the most frequent
    first = {group: i for i, group in reversed(list(enumerate(table.groups)))}
    assert [first[group] for group in table.groups] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert table.image_keys == [image_key(picture(i // 2)) for i in range(8)]


@pytest.mark.parametrize(
    ("name", "prompt", "words"),
    [
        ("flowers102", "What kind of flower is this?", ["pink primrose", "globe thistle"]),
        ("food101", "What dish is this?", ["apple pie", "baby back ribs"]),
        ("cub200", "What kind of bird is this?", ["Black footed Albatross", "Laysan Albatross"]),
    ],
)
def test_classes_by_their_names_in_words(name, prompt, words, load):
    support, query = load((name, "support")), load((name, "query"))
    assert support.labels == support.responses == words * 4 and support.label_set == tuple(words)
    assert support.prompts == [prompt] * 8 and not set(support.ids) & set(query.ids)
    assert load((name, "query"), prompt="Which?").prompts == ["Which?"] * 8


def test_captions_of_one_image_become_one_row_and_no_image_of_val2014_demonstrates(load):
    table = load(("coco", "support"))
    assert table.ids == ["0", "1", "2"] and table.responses == ["Caption 0.", "Caption 2.", "Caption 4."]
    assert table.references[1] == ("Caption 2.", "Caption 3.")
    assert load(("nocaps", "support")).ids == ["0", "1", "2", "3"]
    shuffled = rows_of(("coco", "support")).select([4, 0, 2, 1, 5, 3])
    table = load(("coco", "support"), shuffled, limit=2)
    assert table.ids == ["2", "0"] and table.references == [("Caption 4.", "Caption 5."), ("Caption 0.", "Caption 1.")]


@pytest.mark.parametrize("name", ["coco", "nocaps"])
def test_all_captions_of_a_query(name, load):
    table = load((name, "query"))
    assert table.responses[3] == "A 3." and table.references[3] == ("A 3.", "One 3.")
    assert table.prompts == ["Describe the image in one sentence."] * 8
    # ids of the two sides are told apart, even where both count from 0
    other = load((name, "support"), rows_of((name, "support")).map(lambda row: {"image": picture(99)}))
    assert not set(table.ids) & set(other.ids)


def test_flickr_has_one_file_and_a_column_of_splits(load):
    key = ("flickr30k", "support")
    assert load(key).ids == ["0", "3", "6"]
    assert load(("flickr30k", "query")).ids == ["1", "4", "7"]
    assert load(key, split="val").ids == ["2", "5"]
    with pytest.raises(EmptySupportError, match="'split' is 'dev'"):
        load(key, split="dev")


def test_seed_bench_is_cut_by_picture_and_asks_by_letter(load):
    data = rows_of(("seedbench", "query"), 64)
    sides = [load(("seedbench", "query"), data, split=split) for split in ("support", "query", "test")]
    support, query, whole = sides
    assert len(whole) == 48 and sorted(support.ids + query.ids) == sorted(whole.ids) and len(query) > 2
    assert check_leaks(support, query) == []
    assert whole.prompts[1] == "What is 1?\nA. a1\nB. b1\nC. c1\nD. d1"
    assert whole.responses[1] == whole.labels[1] == "B" and set(whole.label_set) == set("ABCD")
    assert whole.groups[0] == whole.groups[1] != whole.groups[2]
    again = load(("seedbench", "query"), data.select(range(63, -1, -1)))
    assert sorted(again.ids) == sorted(query.ids)  # whatever the order of the rows


def test_reading_writes_no_copy_of_the_images(load, capfd):
    for key in SIDES:
        load(key)
    assert "Casting" not in capfd.readouterr().err


def test_two_images_where_one_is_expected(load):
    key = ("seedbench", "query")
    data = rows_of(key).map(lambda row: {"question_type_id": 1})
    with pytest.raises(RowError, match=r"\(id 'q6'\), column 'image': expected one image, got none or several"):
        load(key, data, split="test")
    table = load(key, data, split="test", on_bad_rows="skip")
    assert len(table) == 6 and [row for row, _ in table.skipped] == [6, 7]


def test_rows_left_out_keep_their_number_in_the_split(load):
    data = rows_of(("flickr30k", "support")).map(lambda row: {"caption": [] if row["img_id"] == "3" else ["A."]})
    table = load(("flickr30k", "support"), data, on_bad_rows="skip")
    assert table.ids == ["0", "6"] and [row for row, _ in table.skipped] == [3]


def test_another_split_of_the_repository(load, tmp_path):
    write_copy(tmp_path / "copy", ("textvqa", "query"))
    path = tmp_path / "copy/lmms-lab/textvqa/data"
    (path / "validation-00000-of-00003.parquet").rename(path / "test-00000-of-00001.parquet")
    assert len(load(("textvqa", "support"), split="test")) == 8
    with pytest.raises(ValueError, match=r"expected split= one of 'test', 'train', got 'validation'"):
        load_triplets("textvqa", split="query", data_dir=tmp_path / "copy")


# Other copies


def test_saved_datasets_single_files_and_class_folders(tmp_path):
    key = ("cub200", "support")
    data = rows_of(key)
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    data.to_parquet(tmp_path / "any.parquet")
    tables = [load_triplets("cub200", data_dir=tmp_path / at) for at in ("both", "one", "any.parquet")]
    for i in range(8):
        folder = tmp_path / "images/train" / ("001.Black_footed_Albatross", "002.Laysan_Albatross")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    for streaming in (False, True):
        tables.append(load_triplets("cub200", data_dir=tmp_path / "images", streaming=streaming))
        tables.append(load_triplets("cub200", data_dir=tmp_path / "images/train", streaming=streaming))
    assert {tuple(sorted(table.keys)) for table in tables} == {tuple(sorted(tables[0].keys))}
    assert len(load_triplets("cub200", split="test", data_dir=tmp_path / "both")) == 1


def test_a_copy_without_the_hubs_types_is_refused_by_name(tmp_path):
    """A ClassLabel is only a number where the file doesn't say what its numbers mean."""
    path = tmp_path / "train-00000-of-00001.parquet"
    rows_of(("food101", "support")).to_parquet(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(ColumnError, match=r"'label': expected a ClassLabel, or class names, got int64"):
        load_triplets("food101", data_dir=tmp_path)
    path = tmp_path / "val2014-00000-of-00001.parquet"
    rows_of(("okvqa", "query")).to_parquet(path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert len(load_triplets("okvqa", split="query", data_dir=tmp_path)) == 8  # images as {bytes, path} will do


# What is wrong is named


@pytest.mark.parametrize("key", SIDES, ids="-".join)
def test_every_column_that_is_read_is_missed_by_its_name(key, load):
    part = find_source(key[0]).part(key[1])
    data = rows_of(key)
    for column in part.needed:
        with pytest.raises(ColumnError, match=rf"'{column}': expected .*, there is none"):
            load(key, data.rename_column(column, "renamed"))
    with pytest.raises(ColumnError, match=rf"'{part.answers}': expected .*, got float64") as caught:
        load(key, data.remove_columns(part.answers).add_column(part.answers, [0.5] * len(data)))
    assert key[0] in str(caught.value) and "revision=" in str(caught.value)


def test_all_faults_at_once_and_what_is_new(load):
    data = rows_of(("okvqa", "query")).rename_columns({"answers": "replies", "question": "asked"})
    with pytest.raises(ColumnError) as caught:
        load(("okvqa", "query"), data)
    for words in (
        "2 of its columns",
        "'question'",
        "'answers': expected lists of texts",
        "new here: 'asked', 'replies'",
    ):
        assert words in str(caught.value)


def test_columns_that_are_not_read_are_only_told(load, caplog):
    data = rows_of(("okvqa", "query")).remove_columns("answer_type").add_column("hint", ["x"] * 8)
    with caplog.at_level(logging.WARNING):
        assert len(load(("okvqa", "query"), data)) == 8
    assert "'answer_type': expected text, there is none" in caplog.text and "new here: 'hint'" in caplog.text
    caplog.clear()
    assert len(load(("nocaps", "query"))) == 8 and not caplog.text


def test_rows_that_cant_be_used(load):
    key = ("okvqa", "query")
    rows = [LAYOUTS[key][3](i) for i in range(4)]
    features = LAYOUTS[key][2]
    for change, error, words in [
        ({"answers": []}, RowError, r"row 2 \(id '25'\), column 'response'"),
        ({"answers": None}, RowError, r"\(id '25'\), column 'response'"),
        ({"image": None}, RowError, r"\(id '25'\), column 'image': expected one image"),
        ({"question_id": "05"}, DuplicateIdError, r"'05' in rows 0 and 2"),
        ({"image": {"bytes": b"no picture", "path": None}}, ImageError, r"\(id '25'\), column 'image'"),
    ]:
        data = datasets.Dataset.from_list([*rows[:2], rows[2] | change, rows[3]], features=features)
        for streaming in (False, True):
            with pytest.raises(error, match=words):
                load(key, data, streaming=streaming)
            if error is not DuplicateIdError:
                table = load(key, data, streaming=streaming, on_bad_rows="skip")
                assert table.ids == ["05", "15", "35"] and [row for row, _ in table.skipped] == [2]


def test_a_path_in_a_strangers_file_leads_nowhere_else(load, tmp_path):
    key = ("okvqa", "query")
    picture(0).save(tmp_path / "private.png")
    row = LAYOUTS[key][3](0) | {"image": {"bytes": None, "path": str(tmp_path / "private.png")}}
    path = write_copy(tmp_path / "copy", key)
    kind = datasets.Image(decode=False)
    data = datasets.Dataset.from_list([row], features=Features({**LAYOUTS[key][2], "image": kind}))
    pq.write_table(data.data.table, path)  # to_parquet would put the picture's bytes there
    for streaming in (False, True):
        with pytest.raises(RowError, match="leaves it"):
            load_triplets("okvqa", split="query", data_dir=tmp_path / "copy", streaming=streaming)


def test_arguments_and_places_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="limit of at least 1"):
        load_triplets("okvqa", limit=0)
    with pytest.raises(ValueError, match="on_bad_rows"):
        load_triplets("okvqa", on_bad_rows="ignore")
    with pytest.raises(ValueError, match="revision and token are the Hub's"):
        load_triplets("okvqa", data_dir=tmp_path, revision="main")
    with pytest.raises(SavedFileError, match=r"expected a copy of lmms-lab/OK-VQA with files like data/val2014-\*"):
        load_triplets("okvqa", split="query", data_dir=tmp_path)
    (tmp_path / "val2014-00000-of-00001.parquet").write_bytes(b"PAR1 cut short")
    for streaming in (False, True):
        with pytest.raises(SavedFileError, match="download them again"):
            load_triplets("okvqa", split="query", data_dir=tmp_path, streaming=streaming, cache_dir=tmp_path / "c")


# The Hub's door


def test_what_is_asked_of_the_hub(monkeypatch):
    asked = []

    def answer(path, **options):
        asked.append({"path": path} | options)
        data = rows_of(("flickr30k", "support"))
        return data.to_iterable_dataset() if options["streaming"] else data

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert load_triplets("flickr30k", streaming=True, token="secret", cache_dir="there").ids == ["0", "3", "6"]
    assert asked == [
        {
            "path": "nlphuji/flickr30k",
            "split": "test",
            "data_files": {"test": "TEST/test/*.parquet"},
            "revision": "refs/convert/parquet",
            "cache_dir": "there",
            "streaming": True,
            "token": "secret",
        }
    ]
    load_triplets("flickr30k", revision="abc")
    assert asked[1]["revision"] == "abc" and asked[1]["streaming"] is False
    mine = dataclasses.replace(
        SOURCES["flickr30k"], support=dataclasses.replace(SOURCES["flickr30k"].support, repo="me/flickr")
    )
    load_triplets(mine)
    assert asked[2]["path"] == "me/flickr"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", [("okvqa", "query"), ("flickr30k", "support")], ids="-".join)
def test_only_the_splits_files_of_a_repository_are_read(key, streaming, tmp_path):
    """As on the Hub: a card that declares other splits and sizes, and their files beside (here, broken ones)."""
    path = write_copy(tmp_path, key)
    repo = tmp_path / LAYOUTS[key][0]
    other = repo / "data" / "other-00000-of-00001.parquet"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(b"PAR1 not to be read")
    splits = "".join(f"  - name: {name}\n    num_examples: 99\n" for name in ("val2014", "test", "other"))
    (repo / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    source = find_source(key[0])
    mine = dataclasses.replace(
        source, **{key[1]: dataclasses.replace(source.part(key[1]), repo=str(repo), revision=None)}
    )
    table = load_triplets(mine, split=key[1], streaming=streaming, cache_dir=tmp_path / "cache")
    assert len(table) == (8 if key[0] == "okvqa" else 3)
    other.unlink()
    path.rename(other)
    with pytest.raises(SavedFileError, match="found neither"):
        load_triplets(mine, split=key[1], streaming=streaming, cache_dir=tmp_path / "cache")


def test_no_hub_is_a_named_error():
    with pytest.raises(SavedFileError, match=r"Multimodal-Fatima/OK-VQA_train: .*found neither"):
        load_triplets("okvqa")


# drum-hf data


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    lines = [
        {"file_name": "0.png", "question": "Why?", "answer": "so", "tag": "x"},
        {"file_name": "0.png", "question": "How?", "answer": "thus", "tag": "x"},
        {"file_name": "1.png", "question": "Why?", "answer": "", "tag": "x"},
        {"file_name": "2.png", "question": "Why?", "answer": "so", "tag": "x"},
        {"file_name": "9.png", "question": "Why?", "answer": "so", "tag": "x"},
        {"file_name": "../up.png", "question": "Why?", "answer": "so", "tag": "x"},
        {"question": "", "answer": "so", "tag": "x"},
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    return tmp_path


def test_check_tells_every_bad_row(folder, capsys):
    assert main(["-q", "data", "check", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "jsonl file" and found["rows"] == 2 and found["images"] == 1 and not found["ok"]
    assert found["columns"] == {"image": "file_name", "prompt": "question", "response": "answer"}
    assert found["unused"] == ["tag"] and found["examples"][0]["response"] == "so"
    assert [bad["row"] for bad in found["bad_rows"]] == [2, 3, 4, 5, 6]
    for bad, words in zip(
        found["bad_rows"], ("'answer'", "can't be read", "no such file", "leaves it", "both are empty"), strict=True
    ):
        assert words in bad["problem"]
    assert len(found["problems"]) == 1 and "line 8: expected JSON" in found["problems"][0]
    assert found["groups"] == 1 and found["examples"][0]["image"] == "6 x 4"
    assert [note.partition(":")[0] for note in found["notes"]] == ["all rows show one picture"]
    assert main(["-q", "data", "check", str(folder), "--json", "--group", "none"]) == 1
    assert "1 images are in several rows that no group joins" in json.loads(capsys.readouterr().out)["notes"][0]

    assert main(["-q", "data", "check", str(folder), "--show", "1"]) == 1
    out = capsys.readouterr().out
    for words in ("image (from file_name)", "2 rows to use", "row 2: column 'answer'", "and 4 more", "not used: tag"):
        assert words in out
    assert "row 3:" not in out


def test_check_of_a_good_table(tmp_path, capsys):
    (tmp_path / "t.csv").write_text('frage,answer\nWhy?,so\n"How, then?",thus\n')
    command = ["-q", "data", "check", str(tmp_path / "t.csv")]
    assert main(command) == 1 and "expected a column 'prompt'" in capsys.readouterr().out
    assert main([*command, "--columns", "prompt=frage"]) == 0
    out = capsys.readouterr().out
    assert "all well" in out and "prompt (from frage)" in out and "2 of them without an image" in out
    with pytest.raises(SystemExit):
        main([*command, "--columns", "prompt"])
    (tmp_path / "t.csv").write_text("prompt,response\nWhy?,so,so\nHow?,thus\nWho\n")
    report = check_table(tmp_path / "t.csv")
    assert report.rows == 1 and [problem[-100:].count("expected 2 cells") for problem in report.problems] == [1, 1]


def test_check_notes_what_a_run_would_stumble_over():
    def notes(rows, **options):
        return " / ".join(check_table(rows, **options).notes)

    def classes(*labels):
        return [{"image": picture(n), "label": label} for n, label in enumerate(labels)]

    said = notes(classes("no", "no", "no", "no finding", "nothing", "yes"))
    assert (
        "2 labels are the beginning of another, which scoring must tell apart: 'no' of 'no finding', 'no' of" in said
    )
    assert "3 labels have fewer than 3 rows, so that hardly any other row can demonstrate them" in said
    assert "no row asks anything" in said and "no row has an image" not in said
    assert "'1' of '10'" in notes(classes("1", "10")) and "every label is a number" in notes(classes("1", "10"))
    assert "1 labels differ in case or in how they are encoded alone: 'Cat' and 'cat'" in notes(classes("Cat", "cat"))
    assert "column 'label': 1 cells are read without the blanks" in notes(classes("cat ", "cat", "dog"))
    assert "no row has an image" in notes([{"prompt": "p", "response": "r"}])
    grouped = [{"prompt": f"p{n}", "response": f"r{n}", "group": "g"} for n in range(3)]
    assert "all rows are of the group 'g'" in notes(grouped)
    long = [{"id": "long", "image": Image.new("RGB", (402, 2)), "label": "a"}, *classes("b")]
    assert "1 images are more than 200 times as long as wide" not in notes(long[1:])
    assert "1 images are more than 200 times as long as wide" in notes([long[0], long[1] | {"id": "b"}])


def test_check_asks_the_lvlms_processor(tmp_path, capsys, monkeypatch):
    class Refusing:
        def image_processor(self, images, **options):
            sizes.append(images[0].size)
            if images[0].width > 100 * images[0].height:
                raise ValueError("absolute aspect ratio must be smaller than 100")

        def apply_chat_template(self, turns, tokenize):
            return "".join(f"<{turn['role']}>{turn['content'][-1]['text']}" for turn in turns)

    sizes = []
    monkeypatch.setattr("drum_hf.cli.data.load_images_of", lambda name, args: Refusing())
    rows = [{"file_name": f"{n}.png", "question": "why?\x1b[31m", "answer": "so"} for n in range(3)]
    for n, size in enumerate([(8, 8), (8, 8), (300, 2)]):
        Image.new("RGB", size, (n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["-q", "data", "check", str(tmp_path), "--lvlm", "any"]) == 1
    out = capsys.readouterr().out
    assert "row 2: column 'file_name': the LVLM's processor refuses this image of 300 x 2 pixels (ValueErr" in out
    assert "[image 8 x 8] 'why?" in out and "<user>why?" in out and "<assistant>so" in out and "\x1b" not in out
    assert sizes == [(8, 8), (300, 2)]  # each size once


def test_check_where_nothing_can_be_used(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,response\nWhy?,\nHow?,\n")
    report = check_table(tmp_path / "t.csv")
    assert report.problems == ["no row can be used"] and [row for row, _ in report.bad_rows] == [0, 1]
    assert "SavedFileError" in check_table(tmp_path / "nowhere.csv").problems[0]
    (tmp_path / "t.csv").write_text("id,prompt,response\na,Why?,so\na,How?,so\n")
    assert "'a' in rows 0 and 1" in check_table(tmp_path / "t.csv").problems[0]
    pq.write_table(pa.table({"prompt": ["Why?"], "response": [1.5]}), tmp_path / "t.parquet")
    assert "column 'response': expected text" in check_table(tmp_path / "t.parquet").problems[0]


def test_check_of_a_copy_of_a_public_data_set(tmp_path, capsys):
    write_copy(tmp_path, ("okvqa", "query"))
    command = ["-q", "data", "check", str(tmp_path), "--source", "okvqa", "--split", "query", "--json"]
    assert main([*command, "--limit", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "OK-VQA, val2014" and found["rows"] == 3 and found["references"] == 3
    write_copy(tmp_path, ("okvqa", "query"), rows_of(("okvqa", "query")).rename_column("answers", "answer"))
    assert main(command) == 1
    assert "'answers': expected lists of texts" in json.loads(capsys.readouterr().out)["problems"][0]
    with pytest.raises(ValueError, match="names its columns"):
        check_table(tmp_path, source="okvqa", columns={"prompt": "question"})


def test_list_tells_what_would_be_downloaded(capsys):
    assert main(["data", "list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in known] == list(SOURCES)
    assert known[1]["query"]["bytes"] == 831_514_064 and known[1]["query"]["columns"]["answers"] == "texts"
    assert main(["data", "list", "OK-VQA"]) == 0
    out = capsys.readouterr().out
    assert "lmms-lab/OK-VQA, data/val2014-*.parquet (5046 rows, 0.8 GB)" in out and "vizwiz" not in out
    assert main(["data", "list", "gqa"]) == 2
