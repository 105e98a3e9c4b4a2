"""Reading the user's own tables: every format, both folder layouts, the Hub's door, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import shutil
import zipfile

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
        ("t.json", '{"rows": 3}', SavedFileError, "a list of objects, got an object with 'rows'"),
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


@pytest.mark.parametrize(
    "path",
    ["nowhere.csv", "./nowhere", "/nowhere/at/all", "a/b/c", "x" * 90_000, "a\0b", "\ud800", "\x1b[31m"],
    ids=lambda path: ascii(path)[:20],
)
def test_a_path_that_is_not_there_never_goes_to_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedFileError, match="found none") as raised:
        load_table(path)
    assert len(str(raised.value)) < 400 and str(raised.value).isprintable()


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


@pytest.mark.parametrize("kind", ["text", "struct", "list"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_hub_data_set_reads_no_file_of_this_machine(kind, streamed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fetched = tmp_path / "hub" / "datasets--me--data" / "snapshots" / "abc" / "0.png"
    other = tmp_path / "hub" / "datasets--me--other" / "0.png"
    link = fetched.with_name("link.png")
    for file in (tmp_path / "secret.png", fetched, other):
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(file)
    link.symlink_to(tmp_path / "secret.png")

    def rows(path):
        path = str(path)
        image = {"text": path, "struct": {"bytes": None, "path": path}, "list": [{"bytes": None, "path": path}]}[kind]
        made = datasets.Dataset.from_list([{"image": image, "prompt": "p", "response": "r"}])
        if kind == "struct":
            made = made.cast_column("image", datasets.Image())
        return made.to_iterable_dataset() if streamed else made

    for path in (tmp_path / "secret.png", "secret.png", other, link, fetched / "../../../../../secret.png"):
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, path=path, **k: rows(path))
        with pytest.raises(ImageError, match="files of this machine are not read for it"):
            load_table("me/data", split="train")
        with pytest.raises(EmptySupportError):
            load_table("me/data", split="train", on_bad_rows="skip")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows(fetched))
    assert load_table("me/data", split="train").image_keys == [image_key(picture(0))]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows("secret.png"))
    assert len(load_table("me/data", split="train", image_root=tmp_path)) == 1  # where the user says so


def test_what_load_dataset_gave_reads_no_file_of_this_machine(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    rows = {"image": [str(tmp_path / "secret.png")], "prompt": ["p"], "response": ["r"]}
    cached = tmp_path / "me___data" / "default" / "data-train.arrow"  # as datasets names the cache of me/data
    cached.parent.mkdir(parents=True)
    with pa.OSFile(str(cached), "wb") as sink, pa.ipc.new_stream(sink, pa.table(rows).schema) as writer:
        writer.write_table(pa.table(rows))
    fetched = datasets.Dataset.from_file(str(cached))
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    streamed = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "t.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    for data in (fetched, streamed):
        with pytest.raises(ImageError, match="files of this machine are not read for it"):
            load_table(data)
        assert len(load_table(data, image_root=tmp_path)) == 1
    assert len(load_table(datasets.Dataset.from_dict(rows))) == 1  # the user's own


def test_a_table_file_that_is_a_link_out_of_its_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.csv").write_text("prompt,response\np,r\n")
    (tmp_path / "data" / "metadata.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(SavedFileError, match="is a link that leaves the folder"):
        load_table(tmp_path / "data")


# Archives


def test_archives_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("drum_hf.utils.files._FREE", 1000)
    link = zipfile.ZipInfo("link.csv")
    link.external_attr = 0o120777 << 16
    table = "prompt,response\np,r\n"
    for name, content, match in (
        ("../out.csv", table, "leads out of it"),
        ("/out.csv", table, "leads out of it"),
        ("a\\..\\out.csv", table, "leads out of it"),
        (link, "/etc/passwd", "is a link"),
        ("t.csv", table + "a" * 3_000_000, "far more space"),
    ):
        with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr(name, content)
        with pytest.raises(SavedFileError, match=match):
            load_table(tmp_path / "t.zip")
        assert list(tmp_path.rglob("out.csv")) == [] and list((tmp_path / "cache" / "drum_hf").iterdir()) == []
    for data in (b"PK\x03\x04 no archive", b"none"):
        (tmp_path / "t.zip").write_bytes(data)
        with pytest.raises(SavedFileError, match="expected a zip archive"):
            load_table(tmp_path / "t.zip")
    for name, data in (("t.csv.gz", b"none"), ("t.jsonl.gz", gzip.compress(b"{}" * 900)[:-9])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SavedFileError, match="can't be read"):
            load_table(tmp_path / name)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a" * 3_000_000))
    with pytest.raises(SavedFileError, match="far more memory"):
        load_table(tmp_path / "t.csv.gz")


# Class folders


def test_what_class_folders_leave_out_is_counted(tmp_path, caplog):
    for name in ("cat/a.png", "cat/2024/may/b.png", "cat/__init__/c.PNG", "dog/a.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(len(name)).save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "fish").mkdir()
    table = load_table(tmp_path)
    assert table.ids == ["cat/a.png", "cat/2024/may/b.png", "cat/__init__/c.PNG", "dog/a.png"]
    assert table.labels == ["cat", "cat", "cat", "dog"]
    for said in (
        "1 files in class folders are no images of a known format and were left out: 'cat/notes.txt'",
        "1 images are in no class folder and were left out: 'loose.png'",
        "1 class folders hold no image: 'fish'",
    ):
        assert said in caplog.text


def test_folders_of_splits_are_no_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        picture(len(split)).save(tmp_path / split / "cat" / "a.png")
    with pytest.raises(ValueError, match="split= one of 'test', 'train'"):
        load_table(tmp_path)
    assert load_table(tmp_path, split="train").labels == ["cat"]
    shutil.rmtree(tmp_path / "test")
    assert load_table(tmp_path).ids == ["train/cat/a.png"]


def test_class_folders_of_a_mac(tmp_path):
    for name in ("Caf\u0065\u0301", "Caf\u00e9"):
        (tmp_path / name).mkdir()
        picture(len(name)).save(tmp_path / name / f"{len(name)}.png")
    table = load_table(tmp_path)
    assert table.label_set == ("Caf\u00e9",) and set(table.responses) == {"Caf\u00e9"}


# Groups and blanks


def test_rows_of_one_picture_are_one_group(folder):
    rows = [{"image": picture(n // 2), "prompt": f"q{n}", "response": "r", "kind": f"k{n % 2}"} for n in range(4)]
    table = load_table(rows)
    assert table.groups == [image_key(picture(n // 2))[:16] for n in range(4)]
    assert load_table(rows, group=None).groups == [None] * 4
    assert load_table(rows, group="kind").groups == ["k0", "k1", "k0", "k1"]
    with pytest.raises(ColumnError, match="expected a column 'site'"):
        load_table(rows, group="site")
    rows[1]["group"] = "mine"
    other = image_key(picture(1))[:16]
    assert load_table(rows).groups == ["mine", "mine", other, other]
    write(folder / "t.jsonl", [{"image": "images/0.png", "prompt": f"q{n}", "response": "r"} for n in range(2)])
    assert len(set(load_table(folder).groups) - {None}) == 1
    assert load_table([{"prompt": "p", "response": "r"}]).groups == [None]


def test_blanks_around_labels_and_answers(caplog):
    rows = [{"image": picture(n), "label": label} for n, label in enumerate(["cat ", "cat", "\u00a0dog\t"])]
    with caplog.at_level(logging.INFO, logger="drum_hf"):
        table = load_table(rows)
    assert table.label_set == ("cat", "dog") and table.responses == ["cat", "cat", "dog"]
    assert "column 'label': 2 cells are read without the blanks around them, such as 'cat '" in caplog.text
    (row,) = load_table([{"prompt": " p ", "answers": [" a", "a"]}])
    assert (row.prompt, row.response, row.references) == (" p ", "a", ("a", "a"))


@pytest.mark.parametrize("column", ["gold", "Antwort"])
def test_errors_name_the_users_columns(column):
    rows = [{"frage": "q", "bild": "x\x1b[31m" * 20_000, column: None}]
    columns = {"prompt": "frage", "image": "bild", "response": column}
    with pytest.raises(RowError, match=f"column '{column}': expected a text"):
        load_table(rows, columns=columns)
    with pytest.raises(ImageError, match="column 'bild': no such file") as raised:
        load_table([rows[0] | {column: "a"}], columns=columns)
    assert len(str(raised.value)) < 400 and str(raised.value).isprintable()


def test_an_image_that_the_lvlm_refuses_is_a_bad_row():
    def check(image):
        if image.width > 6:
            raise ImageError("too wide for it")

    rows = [{"image": Image.new("RGB", (width, 4)), "label": str(width)} for width in (6, 7)]
    with pytest.raises(ImageError, match="row 1, column 'image': too wide for it"):
        load_table(rows, check_image=check)
    table = load_table(rows, check_image=check, on_bad_rows="skip")
    assert table.labels == ["6"] and [row for row, _ in table.skipped] == [1]


@pytest.mark.parametrize("images", ["embedded", "reference"])
def test_pixels_are_compared_with_their_hash(images, tmp_path):
    picture(0).save(tmp_path / "p.png")
    table = load_table([{"image": tmp_path / "p.png", "label": "a"}])
    file = table.save(tmp_path / "t.parquet", images=images)
    picture(1).save(tmp_path / "p.png")
    if images == "embedded":
        with pytest.raises(ImageError, match="shows another picture"):
            table.save(tmp_path / "u.parquet")
        saved = pq.read_table(file)
        image = pa.array(
            [{"bytes": (tmp_path / "p.png").read_bytes(), "path": "p.png"}], saved.schema.field("image").type
        )
        pq.write_table(saved.set_column(saved.column_names.index("image"), saved.schema.field("image"), image), file)
    loaded = TripletTable.load(file, image_root=tmp_path)
    with pytest.raises(ImageError, match="shows another picture"):
        loaded[loaded.ids[0]]
    with pytest.raises(ImageError, match="shows another picture"):
        loaded.save(tmp_path / "v.parquet")
    assert not (tmp_path / "v.parquet").exists()
