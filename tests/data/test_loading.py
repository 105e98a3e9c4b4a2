"""Reading the user's own tables: every format, both folder layouts, the Hub's door, and what is refused."""

from __future__ import annotations

import csv
import json
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from drum_hf.data import TripletTable, load_table
from drum_hf.errors import ColumnError, DuplicateIdError, EmptySupportError, ImageError, RowError, SavedFileError
from drum_hf.types import image_key


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8))


ROWS = [
    {
        "id": "007",
        "image": "images/0.png",
        "prompt": 'Say "a, b"\nor not?',
        "response": "a",
        "references": ["a", "b"],
        "group": "1",
    },
    {"id": "é", "image": "images/1.png", "prompt": "", "response": "12", "references": ["12"], "group": "2"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for seed in range(2):
        picture(seed).save(tmp_path / "images" / f"{seed}.png")
    return tmp_path


def write(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


# Formats


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet", "metadata.csv"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_every_format_gives_the_same_table(folder, name, by_folder, monkeypatch):
    file = write(folder / name, ROWS)
    monkeypatch.chdir(folder.parent)
    table = load_table(folder if by_folder else file)
    expected = TripletTable.from_dataset([row | {"image": folder / row["image"]} for row in ROWS])
    assert table.ids == ["007", "é"] and table.responses == ["a", "12"]
    assert table.fingerprint == expected.fingerprint
    assert table.references == expected.references and table.groups == ["1", "2"]
    assert [image_key(d.image) for d in table] == [image_key(picture(0)), image_key(picture(1))]


def test_parquet_with_images_inside(folder):
    inside = datasets.Dataset.from_list(
        [{"question": "q", "answer": "a", "image": {"bytes": (folder / "images/0.png").read_bytes(), "path": None}}],
        features=datasets.Features(
            question=datasets.Value("string"), answer=datasets.Value("string"), image=datasets.Image()
        ),
    )
    inside.to_parquet(folder / "in.parquet")
    assert load_table(folder / "in.parquet").image_keys == [image_key(picture(0))]


def test_empty_csv_cells(tmp_path):
    (tmp_path / "t.csv").write_text("image,prompt,response,references,group,label\n,q,a,,,\n\n,p,b,,g,\n")
    table = load_table(tmp_path / "t.csv")
    assert table.image_keys == ["", ""] and table.references == [(), ()] and table.groups == [None, "g"]
    assert table.label_set == ()


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    rows = [{"id": "a", "prompt": "one\u2028two\x0bthree", "response": "r"}]
    for name in ("t.csv", "t.jsonl"):
        assert load_table(write(tmp_path / name, rows)).prompts == ["one\u2028two\x0bthree"]


def test_saved_tables_come_back(folder, tmp_path):
    table = load_table(write(folder / "t.json", ROWS))
    (tmp_path / "elsewhere").mkdir()
    file = table.save(tmp_path / "elsewhere")
    for path in (file, file.parent):
        assert load_table(path).fingerprint == table.fingerprint
    rewritten = pq.read_table(file)
    rewritten = rewritten.set_column(3, "response", pa.array(["x", "y"]))
    pq.write_table(rewritten, file)
    with pytest.raises(SavedFileError, match="altered"):
        load_table(file)


def test_what_datasets_saved(folder):
    rows = [{"prompt": "p", "response": "r", "image": str(folder / "images/0.png")}]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(folder / "one")
    assert load_table(folder / "one").image_keys == [image_key(picture(0))]
    splits = datasets.DatasetDict(train=dataset, test=dataset.add_column("id", ["t"]))
    splits.save_to_disk(folder / "two")
    assert load_table(folder / "two", split="test").ids == ["t"]
    for split in (None, "dev", "../one"):
        with pytest.raises(ValueError, match="split= one of 'train', 'test'"):
            load_table(folder / "two", split=split)
    datasets.DatasetDict(only=dataset).save_to_disk(folder / "three")
    assert len(load_table(folder / "three")) == 1
    (folder / "one" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(SavedFileError, match="save_to_disk"):
        load_table(folder / "one")


# Folders


def test_a_folder_of_classes(tmp_path):
    for label, seeds in {"dog": [0, 1], "cat": [0]}.items():
        (tmp_path / label).mkdir()
        for seed in seeds:
            picture(seed).save(tmp_path / label / f"{seed}.PNG")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / ".hidden.png").write_text("no image")
    table = load_table(tmp_path)
    assert table.ids == ["cat/0.PNG", "dog/0.PNG", "dog/1.PNG"]
    assert table.labels == table.responses == ["cat", "dog", "dog"] and set(table.prompts) == {""}
    assert table.image_keys[0] == table.image_keys[1] == image_key(picture(0))


def test_splits_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "p", "response": "train"}])
    write(tmp_path / "test.csv", [{"prompt": "p", "response": "test"}])
    (tmp_path / "dev").mkdir()
    write(tmp_path / "dev" / "metadata.json", [{"prompt": "p", "response": "dev"}])
    for split in ("train", "test", "dev"):
        assert load_table(tmp_path, split=split).responses == [split]
    with pytest.raises(ValueError, match="'dev', 'test', 'train', got 'valid'"):
        load_table(tmp_path, split="valid")
    with pytest.raises(SavedFileError, match=r"one table file, found test\.csv, train\.jsonl"):
        load_table(tmp_path)
    with pytest.raises(ValueError, match="split="):
        load_table(tmp_path / "test.csv", split="test")
    write(tmp_path / "metadata.csv", [{"prompt": "p", "response": "meta"}])
    assert load_table(tmp_path).responses == ["meta"]


def test_a_folder_without_any_table(tmp_path):
    with pytest.raises(EmptySupportError, match="a folder of images for each class"):
        load_table(tmp_path)


# Columns


def test_usual_names_are_accepted_and_logged(folder, caplog):
    rows = [
        {"file_name": "images/0.png", "question": "q", "answers": ["b", "a", "a", "b", "c"]},
        {"file_name": "images/1.png", "question": "q", "answers": ["c", "a", "a"]},
    ]
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="drum_hf"):
            table = load_table(write(folder / name, rows))
        assert table.responses == ["b", "a"]  # the earliest of equals; the most frequent
        assert table.references[1] == ("c", "a", "a")
        for usual, ours in (("file_name", "image"), ("question", "prompt"), ("answers", "references")):
            assert f"'{usual}' is read as '{ours}'" in caplog.text


def test_our_names_and_the_users_go_before_usual_ones(tmp_path):
    rows = [{"question": "no", "prompt": "yes", "answer": "no", "gold": "yes", "answers": "not a list"}]
    table = load_table(write(tmp_path / "t.json", rows), columns={"response": "gold"})
    assert table.prompts == table.responses == ["yes"] and table.references == [()]


def test_whole_numbers_as_ids(tmp_path):
    rows = [{"qid": 7, "group": 3, "question": "q", "answer": "a"}]
    for name in ("t.jsonl", "t.parquet"):
        table = load_table(write(tmp_path / name, rows), columns={"id": "qid"})
        assert table.ids == ["7"] and table.groups == ["3"]


@pytest.mark.parametrize("name", ["t.json", "t.parquet"])
def test_no_response_at_all(tmp_path, name):
    with pytest.raises(ColumnError, match=r"column 'response', got columns 'question'; name it with columns="):
        load_table(write(tmp_path / name, [{"question": "q"}]))


def test_a_row_without_references_has_no_response(tmp_path):
    rows = [{"question": "q", "answers": ["a"]}, {"question": "p", "answers": []}]
    file = write(tmp_path / "t.json", rows)
    with pytest.raises(RowError, match=r"row 1, column 'answers'.*at least one answer"):
        load_table(file)
    assert load_table(file, on_bad_rows="skip").skipped[0][0] == 1


# Where images may lie


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize("escape", ["../images/0.png", "images/../../images/0.png", "absolute"])
def test_image_paths_may_not_leave_the_folder(folder, name, escape):
    (folder / "tables").mkdir()
    path = str(folder / "images" / "0.png") if escape == "absolute" else escape
    file = write(folder / "tables" / name, [{"id": "a", "image": path, "prompt": "p", "response": "r"}])
    with pytest.raises(RowError, match=r"row 0 \(id 'a'\).*leaves it; pass image_root="):
        load_table(file)
    if escape == "absolute":
        assert load_table(file, image_root=folder).image_keys == [image_key(picture(0))]


def test_a_path_hidden_in_an_image_struct_may_not_leave_either(folder):
    (folder / "tables").mkdir()
    rows = [{"image": {"bytes": None, "path": str(folder / "images/0.png")}, "prompt": "p", "response": "r"}]
    for name in ("t.parquet", "t.json"):
        with pytest.raises(RowError, match="leaves it"):
            load_table(write(folder / "tables" / name, rows))


def test_absolute_paths_inside_the_folder_and_another_root(folder, tmp_path):
    rows = [{"image": str(folder / "images/0.png"), "prompt": "p", "response": "r"}]
    assert load_table(write(folder / "t.csv", rows)).image_keys == [image_key(picture(0))]
    rows = [{"image": "0.png", "prompt": "p", "response": "r"}]
    file = write(folder / "u.csv", rows)
    assert load_table(file, image_root=folder / "images").image_keys == [image_key(picture(0))]
    with pytest.raises(ImageError, match=r"row 0.*no such file: .*0\.png"):
        load_table(file)
    (folder / "sibling").mkdir()
    rows = [{"image": "../images2/0.png", "prompt": "p", "response": "r"}]  # a name that only begins alike
    with pytest.raises(RowError, match="leaves it"):
        load_table(write(folder / "v.csv", rows), image_root=folder / "images")


# Refused files


@pytest.mark.parametrize(
    ("name", "text", "error", "match"),
    [
        ("t.csv", "", EmptySupportError, "an empty file"),
        ("t.csv", "prompt,response\n", EmptySupportError, "at least one row"),
        ("t.jsonl", "\n\n", EmptySupportError, "at least one row"),
        ("t.json", "[]", EmptySupportError, "at least one row"),
        ("t.parquet", "", EmptySupportError, "an empty file"),
        ("t.parquet", "PAR1 no", SavedFileError, "expected a parquet file"),
        ("t.xlsx", "x", SavedFileError, r"expected a table \(\.csv, .*got \.xlsx"),
        ("table", "x", SavedFileError, "got no extension"),
        ("t.json", "{", SavedFileError, "expected JSON"),
        ("t.json", '{"prompt": ["p"]}', SavedFileError, "a list of objects, got dict"),
        ("t.json", "[" * 100_000, SavedFileError, "expected JSON"),
        ("t.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": ', SavedFileError, "line 2: expected JSON"),
        ("t.jsonl", "3\n", ColumnError, "expected a column 'prompt'"),
        ("t.csv", "prompt,response\na,b,c\n", SavedFileError, "line 2: expected 2 cells, got 3"),
        ("t.csv", "prompt,response\na\n", SavedFileError, "line 2: expected 2 cells, got 1"),
        ("t.csv", 'prompt,response\n"a,b\n', SavedFileError, "line 2"),
        ("t.csv", "prompt,prompt\na,b\n", ColumnError, "each column once"),
        ("t.csv", "prompt,response,references\na,b,not json\n", RowError, "row 0, column 'references'"),
        ("t.csv", "id,prompt,response\n,a,b\n", RowError, "row 0 .*column 'id'"),
        ("t.csv", "id,prompt,response\nx,a,b\nx,c,d\n", DuplicateIdError, "'x' in rows 0 and 1"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, error, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=match):
        load_table(tmp_path / name)


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes("prompt,response\né,è\n".encode("latin-1"))
    with pytest.raises(SavedFileError, match="UTF-8"):
        load_table(tmp_path / "t.csv")


@pytest.mark.parametrize("path", ["nowhere.csv", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_not_there_never_goes_to_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedFileError, match="found none"):
        load_table(path)


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    rows = datasets.Dataset.from_list([{"question": "q", "answer": "a", "id": 5}])
    splits = datasets.DatasetDict(train=rows, test=rows)

    def load_dataset(path, *, split=None, **options):
        asked.append((path, split, options))
        if path == "me/missing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/missing' doesn't exist")
        if path == "me/one":
            return datasets.DatasetDict(train=rows)
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_data_sets(hub):
    assert load_table("me/data", split="test", revision="abc", token="t").ids == ["5"]
    assert hub == [("me/data", "test", {"revision": "abc", "token": "t"})]
    assert load_table("me/one").prompts == ["q"]
    with pytest.raises(ValueError, match="split= one of 'train', 'test', none was given"):
        load_table("me/data")
    with pytest.raises(SavedFileError, match="a data set of the Hub, found neither"):
        load_table("me/missing")


def test_hub_options_make_no_sense_for_a_file(hub, tmp_path):
    write(tmp_path / "t.csv", [{"prompt": "p", "response": "r"}])
    with pytest.raises(ValueError, match="revision: expected only with a Hub id"):
        load_table("t.csv", revision="abc")
    assert hub == []
