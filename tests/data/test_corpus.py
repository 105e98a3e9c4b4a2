"""Tables as people have them, made by the tools that people use, each compared with the rows it was made from.

`WAYS` are writers of files and makers of objects, `CONTENTS` what tables hold; each way takes each content. The
expectations are the rows themselves and Pillow's own reading of the pictures.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from drum_hf import DemoRetriever
from drum_hf.data import TripletTable, load_table
from drum_hf.types import image_key


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Archives are unpacked here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


#: Name -> (rows without images; what they mean: prompt, response, references, label).
CONTENTS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, tuple[str, ...], str | None]]]] = {
    "question-answer": (
        [{"question": "What is it?", "answer": "a bus"}, {"question": "Why?", "answer": "so"}],
        [("What is it?", "a bus", (), None), ("Why?", "so", (), None)],
    ),
    "odd-texts": (
        [
            {"prompt": 'Say "a, b";\nor | not\t?', "response": "=1+1"},
            {"prompt": "שלום, ¿qué? 猫 👩‍👩‍👧", "response": "'quoted'"},
        ],
        [
            ('Say "a, b";\nor | not\t?', "=1+1", (), None),
            ("שלום, ¿qué? 猫 👩‍👩‍👧", "'quoted'", (), None),
        ],
    ),
    "captions": (
        [{"caption": "A red bus."}, {"caption": "Two cats, asleep"}],
        [("", "A red bus.", (), None), ("", "Two cats, asleep", (), None)],
    ),
    "imagefolder-text": (
        [{"text": "one"}, {"text": "two, three"}],
        [("", "one", (), None), ("", "two, three", (), None)],
    ),
    "classes": ([{"label": "cat"}, {"label": "dog "}], [("", "cat", (), "cat"), ("", "dog", (), "dog")]),
    "text-and-class": (
        [{"text": "so good", "label": "pos"}, {"text": "so bad", "label": "neg"}],
        [("so good", "pos", (), "pos"), ("so bad", "neg", (), "neg")],
    ),
    "answers": (
        [{"question": "q", "answers": ["no", "yes", "yes"]}, {"question": "p", "answers": ["1"]}],
        [("q", "yes", ("no", "yes", "yes"), None), ("p", "1", ("1",), None)],
    ),
    "numbers": ([{"question": "How many?", "answer": 2}, {"question": "And?", "answer": 10}],
                [("How many?", "2", (), None), ("And?", "10", (), None)]),
    "choices": (
        [
            {"question": "Which?", "A": "cat", "B": "dog", "answer": "A"},
            {"question": "Or?", "A": "x", "B": "y", "answer": "B"},
        ],
        [("Which?\nA. cat\nB. dog", "A", (), "A"), ("Or?\nA. x\nB. y", "B", (), "B")],
    ),
}  # fmt: skip


def texts(rows):
    """Lists as JSON texts, as a CSV cell holds them."""
    return [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]


def beside(rows, folder):
    for i in range(len(rows)):
        (folder / "img").mkdir(exist_ok=True)
        picture(i).save(folder / "img" / f"{i}.png")
    return [{"file_name": f"img/{i}.png", **row} for i, row in enumerate(rows)]


def in_base64(rows, uri=False):
    head = "data:image/png;base64," if uri else ""
    return [{"image": head + base64.b64encode(png(i)).decode(), **row} for i, row in enumerate(rows)]


def in_bytes(rows):
    return [{"image": png(i), **row} for i, row in enumerate(rows)]


def in_structs(rows):
    return [{"image": {"bytes": png(i), "path": f"{i}.png"}, **row} for i, row in enumerate(rows)]


def write_csv(path: Path, rows, *, encoding="utf-8", packed=False, head="", **dialect):
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, rows[0], **dialect)
    writer.writeheader()
    writer.writerows(texts(rows))
    data = (head + sink.getvalue()).encode(encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def write_json(path: Path, rows, *, lines=False, packed=False, **options):
    text = "\n".join(json.dumps(row, **options) for row in rows) if lines else json.dumps(rows, **options)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def zipped(folder: Path, archive: Path, compression, top=""):
    with zipfile.ZipFile(archive, "w", compression) as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, Path(top) / file.relative_to(folder))
        packed.writestr("__MACOSX/._x", b"junk")
        packed.writestr(".DS_Store", b"junk")
    return archive


def arrow(rows, text=None, lists=None):
    """An Arrow table, its texts and lists of texts of the types given."""
    table = pa.Table.from_pylist(rows)

    def of(field):
        if text is not None and pa.types.is_string(field.type):
            return field.with_type(text)
        return field.with_type(lists) if lists is not None and pa.types.is_list(field.type) else field

    return table.cast(pa.schema([of(field) for field in table.schema]))


def ipc(path, table, new):
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def frame(rows, kind="pandas"):
    if kind == "polars":
        return pytest.importorskip("polars", reason="pip install polars").DataFrame(rows)
    return pd.DataFrame(rows)


def written(path, write):
    write(path)
    return path


def hf(rows):
    return datasets.Dataset.from_list(rows)


def hf_images(rows):
    """A Dataset with an Image feature."""
    data = hf([{"image": {"bytes": png(i), "path": None}, **row} for i, row in enumerate(rows)])
    return data.cast_column("image", datasets.Image())


def saved_dataset(folder, data):
    data.save_to_disk(folder)
    return folder


def imagefolder(metadata, folder):
    return datasets.load_dataset("imagefolder", data_dir=str(metadata.parent), cache_dir=folder / "hf", split="train")


def spaced_csv(path, rows):
    def line(cells):
        return ", ".join('"' + str(cell).replace('"', '""') + '"' for cell in cells)

    path.write_text(
        "\n".join([line(rows[0]), *(line(row.values()) for row in texts(rows))]), encoding="utf-8", newline=""
    )
    return path


def on_windows(row):
    return row | {"file_name": row["file_name"].replace("/", "\\")}


def capitals(row):
    """As people head a spreadsheet's columns; letters of options stay."""
    return {" ".join(name.split("_")).title(): cell for name, cell in row.items()}


VIEWS = {"text": pa.string_view(), "lists": pa.list_(pa.string_view())}
LARGE = {"text": pa.large_string(), "lists": pa.large_list(pa.large_string())}
WORDS = {"text": pa.dictionary(pa.int32(), pa.string())}

#: Name -> maker of a table from rows and a folder.
WAYS = {
    # csv, every dialect
    "csv": lambda r, d: write_csv(d / "t.csv", beside(r, d)),
    "csv-unix": lambda r, d: write_csv(d / "t.csv", beside(r, d), dialect="unix"),
    "csv-bom": lambda r, d: write_csv(d / "t.csv", beside(r, d), encoding="utf-8-sig"),
    "csv-utf16": lambda r, d: write_csv(d / "t.csv", beside(r, d), encoding="utf-16", delimiter="\t"),
    "csv-semicolon": lambda r, d: write_csv(d / "t.csv", beside(r, d), delimiter=";"),
    "csv-sep-line": lambda r, d: write_csv(d / "t.csv", beside(r, d), delimiter=";", head="sep=;\r\n"),
    "csv-pipe": lambda r, d: write_csv(d / "t.csv", beside(r, d), delimiter="|", lineterminator="\n"),
    "csv-quoted": lambda r, d: write_csv(d / "t.csv", beside(r, d), quoting=csv.QUOTE_ALL),
    "csv-gz": lambda r, d: write_csv(d / "t.csv.gz", beside(r, d), packed=True),
    "csv-base64": lambda r, d: write_csv(d / "t.csv", in_base64(r)),
    "csv-data-uri": lambda r, d: write_csv(d / "t.csv", in_base64(r, uri=True)),
    "tsv": lambda r, d: write_csv(d / "t.tsv", beside(r, d), dialect="excel-tab"),
    "tsv-gz-base64": lambda r, d: write_csv(d / "t.tsv.gz", in_base64(r), dialect="excel-tab", packed=True),
    "csv-blank-after-comma": lambda r, d: spaced_csv(d / "t.csv", beside(r, d)),
    "csv-pandas-index": lambda r, d: written(d / "t.csv", frame(beside(r, d)).to_csv),
    "csv-pandas-gz": lambda r, d: written(d / "t.csv.gz", lambda p: frame(beside(r, d)).to_csv(p, index=False)),
    "csv-windows-paths": lambda r, d: write_csv(d / "t.csv", [on_windows(row) for row in beside(r, d)]),
    "csv-python-bytes": lambda r, d: write_csv(
        d / "t.csv", [{**row, "image": str(row["image"])} for row in in_bytes(r)]
    ),
    "csv-python-structs": lambda r, d: written(d / "t.csv", lambda p: frame(in_structs(r)).to_csv(p, index=False)),
    "csv-capitals": lambda r, d: write_csv(d / "t.csv", [capitals(row) for row in beside(r, d)]),
    "csv-metadata-in-folder": lambda r, d: write_csv(d / "metadata.csv", beside(r, d)).parent,
    # json
    "json": lambda r, d: write_json(d / "t.json", beside(r, d)),
    "json-indented": lambda r, d: write_json(d / "t.json", beside(r, d), indent=2, ensure_ascii=False),
    "json-gz": lambda r, d: write_json(d / "t.json.gz", beside(r, d), packed=True),
    "jsonl": lambda r, d: write_json(d / "metadata.jsonl", beside(r, d), lines=True).parent,
    "jsonl-base64": lambda r, d: write_json(d / "t.jsonl", in_base64(r), lines=True, ensure_ascii=False),
    "jsonl-gz": lambda r, d: write_json(d / "t.jsonl.gz", in_base64(r, uri=True), lines=True, packed=True),
    # pandas and polars
    "pandas-csv": lambda r, d: written(d / "t.csv", frame(beside(r, d)).to_csv),
    "pandas-csv-no-index": lambda r, d: written(d / "t.csv", lambda p: frame(beside(r, d)).to_csv(p, index=False)),
    "pandas-tsv": lambda r, d: written(
        d / "t.tsv", lambda p: frame(texts(beside(r, d))).to_csv(p, sep="\t", index=False)
    ),
    "pandas-csv-gz": lambda r, d: written(d / "t.csv.gz", lambda p: frame(beside(r, d)).to_csv(p, index=False)),
    "pandas-json": lambda r, d: written(d / "t.json", lambda p: frame(beside(r, d)).to_json(p, orient="records")),
    "pandas-json-table": lambda r, d: written(d / "t.json", lambda p: frame(beside(r, d)).to_json(p, orient="table")),
    "pandas-jsonl": lambda r, d: written(
        d / "t.jsonl", lambda p: frame(beside(r, d)).to_json(p, orient="records", lines=True)
    ),
    "pandas-parquet": lambda r, d: written(d / "t.parquet", frame(in_bytes(r)).to_parquet),
    "pandas-parquet-paths": lambda r, d: written(d / "t.parquet", frame(beside(r, d)).to_parquet),
    "pandas-object": lambda r, d: frame([{"image": picture(i), **row} for i, row in enumerate(r)]),
    "pandas-object-strings": lambda r, d: frame(in_bytes(r)).convert_dtypes(),
    "polars-csv": lambda r, d: written(d / "t.csv", frame(texts(beside(r, d)), "polars").write_csv),
    "polars-parquet": lambda r, d: written(d / "t.parquet", frame(in_bytes(r), "polars").write_parquet),
    "polars-ipc": lambda r, d: written(d / "t.arrow", frame(in_bytes(r), "polars").write_ipc),
    "polars-ndjson": lambda r, d: written(d / "t.ndjson", frame(beside(r, d), "polars").write_ndjson),
    "polars-object": lambda r, d: frame(in_bytes(r), "polars"),
    "polars-lazy": lambda r, d: frame(in_bytes(r), "polars").lazy(),
    # pyarrow
    "arrow-csv": lambda r, d: written(d / "t.csv", lambda p: pa.csv.write_csv(arrow(texts(beside(r, d))), p)),
    "parquet": lambda r, d: written(d / "t.parquet", lambda p: pq.write_table(arrow(in_structs(r)), p)),
    "parquet-zstd-rows": lambda r, d: written(
        d / "t.parquet", lambda p: pq.write_table(arrow(in_bytes(r)), p, compression="zstd", row_group_size=1)
    ),
    "parquet-views": lambda r, d: written(d / "t.parquet", lambda p: pq.write_table(arrow(in_bytes(r), **VIEWS), p)),
    "parquet-large": lambda r, d: written(d / "t.parquet", lambda p: pq.write_table(arrow(in_bytes(r), **LARGE), p)),
    "parquet-words": lambda r, d: written(d / "t.parquet", lambda p: pq.write_table(arrow(in_bytes(r), **WORDS), p)),
    "parquet-base64": lambda r, d: written(d / "t.parquet", lambda p: pq.write_table(arrow(in_base64(r)), p)),
    "arrow-file": lambda r, d: ipc(d / "t.arrow", arrow(in_bytes(r)), pa.ipc.new_file),
    "arrow-stream": lambda r, d: ipc(d / "t.arrow", arrow(in_bytes(r), **LARGE), pa.ipc.new_stream),
    "arrow-views": lambda r, d: ipc(d / "t.arrow", arrow(in_bytes(r), **VIEWS), pa.ipc.new_file),
    "arrow-feather": lambda r, d: written(
        d / "t.arrow", lambda p: pa.feather.write_feather(arrow(in_bytes(r)), str(p), compression="lz4")
    ),
    "arrow-object": lambda r, d: arrow(in_structs(r)),
    "arrow-object-views": lambda r, d: arrow(in_bytes(r), **VIEWS),
    # datasets
    "hf-csv": lambda r, d: written(d / "t.csv", lambda p: hf(texts(beside(r, d))).to_csv(p)),
    "hf-json": lambda r, d: written(d / "t.json", lambda p: hf(beside(r, d)).to_json(p)),
    "hf-parquet": lambda r, d: written(d / "t.parquet", lambda p: hf_images(r).to_parquet(p)),
    "hf-saved": lambda r, d: saved_dataset(d / "saved", hf_images(r)),
    "hf-saved-dict": lambda r, d: saved_dataset(d / "saved", datasets.DatasetDict(train=hf_images(r))),
    "hf-object": lambda r, d: hf_images(r),
    "hf-object-bytes": lambda r, d: hf(in_bytes(r)),
    "hf-object-numpy": lambda r, d: hf_images(r).with_format("numpy"),
    "hf-dict": lambda r, d: datasets.DatasetDict(train=hf_images(r)),
    "hf-stream": lambda r, d: hf_images(r).to_iterable_dataset(),
    "hf-stream-dict": lambda r, d: datasets.IterableDatasetDict(train=hf_images(r).to_iterable_dataset()),
    "hf-imagefolder": lambda r, d: imagefolder(write_json(d / "x/metadata.jsonl", beside(r, d / "x"), lines=True), d),
    "hf-imagefolder-dict": lambda r, d: datasets.DatasetDict(
        train=imagefolder(write_json(d / "x/metadata.jsonl", beside(r, d / "x"), lines=True), d)
    ),
    # zip
    "zip-base64": lambda r, d: zipped(
        write_csv(d / "x/t.csv", in_base64(r)).parent, d / "x.zip", zipfile.ZIP_DEFLATED
    ),
    "zip-jsonl-gz": lambda r, d: zipped(
        write_json(d / "x/metadata.jsonl.gz", beside(r, d / "x"), lines=True, packed=True).parent, d / "x.zip",
        zipfile.ZIP_LZMA, "data",
    ),
    "zip": lambda r, d: zipped(
        write_csv(d / "x/metadata.csv", beside(r, d / "x")).parent, d / "x.zip", zipfile.ZIP_DEFLATED
    ),
    "zip-stored-folder": lambda r, d: zipped(
        write_json(d / "x/t.jsonl", beside(r, d / "x"), lines=True).parent, d / "x.zip", zipfile.ZIP_STORED, "data"
    ),
    # lists
    "list-pil": lambda r, d: [{"image": picture(i), **row} for i, row in enumerate(r)],
    "list-paths": lambda r, d: [{**row, "image": d / row.pop("file_name")} for row in beside(r, d)],
    "list-base64": lambda r, d: in_base64(r),
    "list-of-one": lambda r, d: [{"images": [picture(i)], **row} for i, row in enumerate(r)],
}  # fmt: skip


def test_the_corpus_is_large_enough():
    assert len(WAYS) * len(CONTENTS) >= 500


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_table_holds_what_it_was_made_from(way, content, tmp_path):
    rows, expected = CONTENTS[content]
    (tmp_path / "x").mkdir()
    table = load_table(WAYS[way](rows, tmp_path))
    assert list(zip(table.prompts, table.responses, table.references, table.labels, strict=True)) == expected
    for i, demonstration in enumerate(table):
        assert np.array_equal(np.asarray(demonstration.image), np.asarray(picture(i)))
    assert table.image_keys == [image_key(picture(i)) for i in range(len(rows))]
    assert TripletTable.load(table.save(tmp_path / "saved.parquet")).fingerprint == table.fingerprint


# Pictures


FORMATS = {
    "PNG": ("RGB", "L", "1", "P"),
    "JPEG": ("RGB", "L", "CMYK"),
    "BMP": ("RGB", "L", "1", "P"),
    "GIF": ("L", "1", "P"),
    "TIFF": ("RGB", "L", "1", "P", "CMYK"),
    "WEBP": ("RGB",),
    "PPM": ("RGB", "L", "1"),
    "TGA": ("RGB", "L", "P"),
    "JPEG2000": ("RGB", "L"),
    "ICO": ("RGB",),
}
SUFFIXES = {"TIFF": ".tif", "JPEG2000": ".jp2", "JPEG": ".JPG"}


@pytest.mark.parametrize(("format", "mode"), [(f, m) for f, modes in FORMATS.items() for m in modes])
def test_every_format_in_class_folders(format, mode, tmp_path):
    large = Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    file = tmp_path / "one class" / "deep" / f"p{SUFFIXES.get(format, '.' + format.lower())}"
    file.parent.mkdir(parents=True)
    large.convert(mode).save(file, format)
    table = load_table(tmp_path)
    assert table.labels == ["one class"] and table.ids == [file.relative_to(tmp_path).as_posix()]
    with Image.open(file) as plain:
        assert np.array_equal(np.asarray(table[table.ids[0]].image), np.asarray(plain.convert("RGB")))


# Conversations

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus. "}
USER, ASSISTANT = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A bus."}
PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
CHATS = {
    "llava": {"conversations": [HUMAN, GPT]},
    "llava-turns": {"conversations": [HUMAN, GPT, HUMAN | {"value": "Sure?"}, GPT | {"value": "Yes"}]},
    "llava-image-after": {"conversations": [{"from": "human", "value": "What is it?\n<image>"}, GPT]},
    "messages": {"messages": [USER, ASSISTANT]},
    "messages-system": {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
    "messages-parts": {"messages": [{"role": "user", "content": PARTS},
                                    {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]},
}  # fmt: skip
CHAT_WAYS = {
    "json": lambda rows, d: write_json(d / "t.json", beside(rows, d)),
    "jsonl": lambda rows, d: write_json(d / "t.jsonl", beside(rows, d), lines=True),
    "csv": lambda rows, d: write_csv(d / "t.csv", beside(rows, d)),
    "parquet": lambda rows, d: written(d / "t.parquet", lambda p: pq.write_table(arrow(in_bytes(rows)), p)),
    "hf": lambda rows, d: hf_images(rows),
    "hf-images": lambda rows, d: hf([{"images": [picture(i)], **row} for i, row in enumerate(rows)]),
    "hf-stream": lambda rows, d: hf_images(rows).to_iterable_dataset(),
    "pandas": lambda rows, d: frame(in_bytes(rows)),
    "list": lambda rows, d: [{"images": [picture(i)], **row} for i, row in enumerate(rows)],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("way", CHAT_WAYS)
def test_a_conversations_first_exchange(way, chat, tmp_path):
    table = load_table(CHAT_WAYS[way]([CHATS[chat]], tmp_path))
    assert table.prompts == ["What is it?"] and table.responses == ["A bus."]
    assert table.image_keys == [image_key(picture(0))]


def test_an_image_that_is_a_part_of_a_message():
    uri = in_base64([{}], uri=True)[0]["image"]
    for part in ({"type": "image", "image": picture(0)}, {"type": "image_url", "image_url": {"url": uri}}):
        turns = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, ASSISTANT]
        table = load_table([{"messages": turns}])
        assert table.prompts == ["What?"] and table.image_keys == [image_key(picture(0))]


# VQAv2's annotators, VLMEvalKit's index

ANNOTATORS = [{"answer": "no", "answer_id": 1}, {"answer": "yes", "answer_id": 2}, {"answer": "yes", "answer_id": 3},
              {"answer": "", "answer_id": 4}]  # fmt: skip


@pytest.mark.parametrize("column", ["answers", "gold"])
@pytest.mark.parametrize("way", ["json", "csv", "csv-python", "parquet", "hf", "pandas", "list"])
def test_annotators_answers(way, column, tmp_path):
    rows = [{"question": "q", column: ANNOTATORS}]
    made = {
        "json": lambda: write_json(tmp_path / "t.json", rows),
        "csv": lambda: write_csv(tmp_path / "t.csv", rows),
        "csv-python": lambda: written(tmp_path / "t.csv", lambda p: pd.DataFrame(rows).to_csv(p, index=False)),
        "parquet": lambda: written(tmp_path / "t.parquet", lambda p: pq.write_table(pa.Table.from_pylist(rows), p)),
        "hf": lambda: hf(rows),
        "pandas": lambda: pd.DataFrame(rows),
        "list": lambda: rows,
    }[way]()
    table = load_table(made, columns={} if column == "answers" else {"references": "gold"})
    assert table.references == [("no", "yes", "yes")] and table.responses == ["yes"]


def test_a_row_that_shows_another_rows_image(tmp_path):
    first = {"index": 7, "question": "q", "hint": "h", "A": "x", "B": "y", "C": "z", "answer": "C"}
    second = {"index": 9, "question": "p", "hint": None, "A": "x", "B": "y", "C": None, "answer": "A", "image": "7"}
    frame([*in_base64([first]), second]).to_csv(tmp_path / "bench.tsv", sep="\t", index=False)
    table = load_table(tmp_path / "bench.tsv")
    assert table.prompts == ["h\nq\nA. x\nB. y\nC. z", "p\nA. x\nB. y"] and table.labels == ["C", "A"]
    assert table.image_keys == [image_key(picture(0))] * 2 and len(set(table.groups)) == 1


# Every reader


def test_readers_take_the_same_things(tmp_path):
    from drum_hf import ICLEvaluator

    file = WAYS["csv-semicolon"](CONTENTS["classes"][0], tmp_path)
    table = load_table(file)
    made = pd.read_csv(file, sep=";").assign(image=[picture(0), picture(1)]).drop(columns="file_name")
    for data in (file, made):
        retriever = DemoRetriever.from_encoder("playground/clip", support=data, strategy="si", device="cpu")
        assert retriever.support.keys == table.keys and retriever.support.groups == table.groups
        evaluator = ICLEvaluator(lambda: None, data, data, on_leak="ignore", max_new_tokens=1)
        assert evaluator.support.keys == evaluator.queries.keys == table.keys
