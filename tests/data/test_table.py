"""The checked table: ids from content, refused rows, laws of its operations, its file, and the leak guard."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from drum_hf.data import TripletTable, check_leaks
from drum_hf.data import saved as _reading
from drum_hf.errors import (
    ColumnError,
    DuplicateIdError,
    EmptySupportError,
    ImageError,
    LeakError,
    MissingIdError,
    RowError,
    SavedFileError,
)
from drum_hf.types import content_key, image_key


def picture(seed: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def row(id: str, **other) -> dict:
    return {"id": id, "prompt": f"what is {id}?", "response": f"it is {id}"} | other


def huge_png(width: int, height: int) -> bytes:
    """A few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def table() -> TripletTable:
    return TripletTable.from_dataset(
        [
            row("a", image=picture(1), group="g", label="cat", references=["it is a", "a"]),
            row("b", image=picture(2), group="g", label="dog", references=[]),
            row("c", image=None, group=None, label="cat"),
            row("d", image=picture(1), group="", label=None),
        ],
        group=None,
    )


# What the table holds


def test_columns_come_back_in_row_order(table):
    assert len(table) == 4
    assert table.ids == ["a", "b", "c", "d"]
    assert table.prompts[2] == "what is c?"
    assert table.responses == ["it is a", "it is b", "it is c", "it is d"]
    assert table.references == [("it is a", "a"), (), (), ()]
    assert table.groups == ["g", "g", None, None]
    assert table.labels == ["cat", "dog", "cat", None]
    assert table.label_set == ("cat", "dog")
    assert [table.row(id) for id in table.ids] == [0, 1, 2, 3]
    assert "a" in table and "z" not in table


def test_keys_are_the_ones_that_types_computes(table):
    for demonstration, key, query_key, pixels in zip(
        table, table.keys, table.query_keys, table.image_keys, strict=True
    ):
        assert pixels == image_key(demonstration.image)
        assert key == demonstration.key == content_key(pixels, demonstration.prompt, demonstration.response)
        assert query_key == content_key(pixels, demonstration.prompt)


def test_demonstration_and_query(table):
    demonstration = table["a"]
    assert (demonstration.id, demonstration.response, demonstration.group) == ("a", "it is a", "g")
    assert np.array_equal(np.asarray(demonstration.image), np.asarray(picture(1)))
    assert table["c"].image is None
    assert [d.id for d in table.demonstrations(["d", "a"])] == ["d", "a"]
    query = table.query("a", draft="a cat?")
    assert (query.id, query.group, query.draft, query.key) == ("a", "g", "a cat?", table.query_keys[0])
    assert query.prompt == "what is a?" and image_key(query.image) == table.image_keys[0]


@pytest.mark.parametrize("id", ["z", 0, None, ["a"]])
def test_unknown_id_names_id_and_column(table, id):
    with pytest.raises(MissingIdError, match=r"column 'id'") as error:
        table[id]
    assert repr(id) in str(error.value)


def test_ids_come_from_content_where_the_column_is_absent():
    rows = [{"image": picture(1), "prompt": "p", "response": r} for r in ("x", "y")]
    table = TripletTable.from_dataset(rows)
    assert table.ids == [content_key(image_key(picture(1)), "p", r)[:16] for r in ("x", "y")]
    assert TripletTable.from_dataset(rows[::-1]).ids == table.ids[::-1]


def test_a_table_comes_back_as_it_is(table):
    assert TripletTable.from_dataset(table) is table


# Images


def test_one_picture_has_one_key_however_it_came(tmp_path, monkeypatch):
    file = tmp_path / "p.png"
    picture(3).save(file)
    data = file.read_bytes()
    monkeypatch.chdir(tmp_path)
    sources = [picture(3), file, str(file), "p.png", data, {"bytes": data, "path": None}, {"path": str(file)}]
    table = TripletTable.from_dataset([row(str(i), image=source) for i, source in enumerate(sources)])
    assert set(table.image_keys) == {image_key(picture(3))}
    for feature, value in {
        "string": str(file),
        "large_string": str(file),
        "binary": data,
        "image": str(file),
        "struct": {"bytes": data, "path": "elsewhere.png"},
    }.items():
        features = datasets.Features({c: datasets.Value("string") for c in ("id", "prompt", "response")})
        if feature == "image":
            features["photo"] = datasets.Image(mode="RGB")
        elif feature == "struct":
            features["photo"] = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        else:
            features["photo"] = datasets.Value(feature)
        dataset = datasets.Dataset.from_list([row("x", photo=value), row("y", photo=None)], features=features)
        from_dataset = TripletTable.from_dataset(dataset, columns={"image": "photo"})
        assert from_dataset.image_keys == [image_key(picture(3)), ""], feature
        assert np.array_equal(np.asarray(from_dataset["x"].image), np.asarray(picture(3))), feature


def test_relative_paths_outlive_the_working_folder(tmp_path, monkeypatch):
    picture(3).save(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    dataset = datasets.Dataset.from_list([row("x", image="p.png")])
    tables = [TripletTable.from_dataset(dataset), TripletTable.from_dataset([row("x", image="p.png")])]
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert [image_key(table["x"].image) for table in tables] == [image_key(picture(3))] * 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    source = picture(4).convert(mode)
    (demonstration,) = TripletTable.from_dataset([row("x", image=source)])
    assert demonstration.image.mode == "RGB"
    assert np.array_equal(np.asarray(demonstration.image), np.asarray(source.convert("RGB")))


def test_transparent_palette_is_read_without_a_warning(recwarn):
    palette = picture(4).convert("P")
    data = encoded(palette, transparency=bytes(range(256)))
    table = TripletTable.from_dataset([row("x", image=data)])
    numbers = np.asarray(palette)
    alpha, colours = numbers[..., None] / 255, np.asarray(palette.convert("RGB")).astype(float)
    laid_on_white = np.floor(colours * alpha + 255 * (1 - alpha) + 0.5)
    assert np.array_equal(np.asarray(table["x"].image), laid_on_white)
    assert not [w for w in recwarn if "Transparency" in str(w.message)]


def test_images_stand_upright_and_lose_their_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    exif[0x010F] = "maker"
    table = TripletTable.from_dataset([row("x", image=encoded(picture(5), exif=exif))])
    upright = picture(5).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(table["x"].image), np.asarray(upright))
    assert table["x"].image.info == {} and not table["x"].image.getexif()


def test_a_picture_drawn_on_is_kept_as_it_was_then(tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "w.png")
    image = Image.open(tmp_path / "w.png")
    ImageDraw.Draw(image).rectangle((0, 0, 3, 3), "red")
    before = np.asarray(image).copy()
    table = TripletTable.from_dataset([row("x", image=image)])
    ImageDraw.Draw(image).rectangle((0, 0, 8, 8), "blue")
    assert np.array_equal(np.asarray(table["x"].image), before)


def test_too_many_pixels_are_refused_from_the_header_alone():
    for data in (huge_png(9_000, 9_000), huge_png(100_000, 100_000)):  # the second is too large for Pillow itself
        with pytest.raises(ImageError, match=r"at most 64,000,000 pixels"):
            TripletTable.from_dataset([row("x", image=data)])
    ten = [row("x", image=picture(1, (10, 10)))]
    assert len(TripletTable.from_dataset(ten, max_pixels=100)) == 1
    with pytest.raises(ImageError, match=r"row 0 \(id 'x'\).*at most 99 pixels.*10 x 10.*max_pixels="):
        TripletTable.from_dataset(ten, max_pixels=99)


def test_images_are_decoded_late_and_kept_within_bounds(monkeypatch):
    rows = [row(str(i), image=encoded(picture(i))) for i in range(4)]
    table = TripletTable.from_dataset(rows, cache_images=2)
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or original(*a, **k))
    assert table["0"].image is table["0"].image and len(opened) == 1
    _ = table["1"], table["0"], table["2"]  # 1 was used least recently
    assert len(opened) == 3 and len(table._cache) == 2
    _ = table["0"]
    assert len(opened) == 3
    _ = table["1"]
    assert len(opened) == 4
    uncached = TripletTable.from_dataset(rows, cache_images=0)
    _ = uncached["0"], uncached["0"]
    assert len(uncached._cache) == 0


def test_the_cache_is_bounded_in_pixels_too(monkeypatch):
    monkeypatch.setattr("drum_hf.data.images._CACHED_PIXELS", 2 * 24)
    table = TripletTable.from_dataset([row(str(i), image=picture(i)) for i in range(4)])
    assert [d.id for d in table] == ["0", "1", "2", "3"]
    assert len(table._cache) == 2


def test_a_table_travels_to_another_process(table):
    _ = table["a"]
    copy = pickle.loads(pickle.dumps(table))
    assert copy.fingerprint == table.fingerprint and len(copy._cache) == 0
    assert image_key(copy["a"].image) == table.image_keys[0]


# Refused rows

BAD_ROWS = {
    "response None": ({"response": None}, RowError, "column 'response'.*got None"),
    "response empty": ({"response": " "}, RowError, "column 'response'.*not empty"),
    "response number": ({"response": 5.5}, RowError, "column 'response'.*got 5.5"),
    "prompt None": ({"prompt": None}, RowError, "column 'prompt'"),
    "no image, no prompt": ({"prompt": "", "image": None}, RowError, "'image' and 'prompt'"),
    "id None": ({"id": None}, RowError, "column 'id'"),
    "id empty": ({"id": ""}, RowError, "column 'id'"),
    "id true": ({"id": True}, RowError, "column 'id'.*got True"),
    "references text": ({"references": "a"}, RowError, "column 'references'.*list of texts"),
    "references of numbers": ({"references": [1.5]}, RowError, "column 'references'"),
    "references with empty": ({"references": ["a", ""]}, RowError, "column 'references'"),
    "group number": ({"group": 1.5}, RowError, "column 'group'"),
    "label list": ({"label": ["a"]}, RowError, "column 'label'"),
    "half a surrogate": ({"response": "\ud800"}, RowError, "column 'response'.*Unicode"),
    "image number": ({"image": 3}, ImageError, "column 'image'.*got int"),
    "image missing": ({"image": "nowhere/x.png"}, ImageError, "column 'image': no such file"),
    "image address": ({"image": "https://example.org/x.png"}, ImageError, "local file"),
    "image truncated": ({"image": encoded(picture(1, (64, 64)))[:900]}, ImageError, "can't be read"),
    "image of text": ({"image": b"not an image"}, ImageError, "can't be read"),
    "image empty": ({"image": b""}, ImageError, "can't be read"),
    "image zero size": ({"image": Image.new("RGB", (0, 4))}, ImageError, "no pixels"),
    "image of an odd format": ({"image": encoded(picture(1), "SGI")}, ImageError, "common format"),
    "image postscript": ({"image": encoded(picture(1), "EPS")}, ImageError, "common format"),
    "image bomb": ({"image": huge_png(30_000, 30_000)}, ImageError, "pixels"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(name, caplog):
    change, error, match = BAD_ROWS[name]
    rows = [row("a", image=picture(1)), row("b", image=picture(2)) | change]
    with pytest.raises(error, match=match) as raised:
        TripletTable.from_dataset(rows)
    assert str(raised.value).startswith("row 1 (id ")
    assert "counted from 0" in str(raised.value) and "on_bad_rows='skip' (--skip-bad-rows)" in str(raised.value)
    with caplog.at_level(logging.WARNING):
        table = TripletTable.from_dataset(rows, on_bad_rows="skip")
    assert table.ids == ["a"]
    ((number, reason),) = table.skipped
    assert number == 1 and reason in caplog.text and "1 of 2 rows" in caplog.text and len(caplog.records) == 1


def test_a_row_that_is_no_dict():
    with pytest.raises(RowError, match="row 1, expected a dict of columns, got str"):
        TripletTable.from_dataset([row("a"), "b"])


def test_skipping_keeps_images_with_their_rows():
    rows = [row(str(i), image={"bytes": encoded(picture(i)), "path": None}) for i in range(6)]
    rows[1]["response"] = rows[4]["response"] = ""
    features = datasets.Features({c: datasets.Value("string") for c in ("id", "prompt", "response")})
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(**features, image=datasets.Image()))
    for data in (rows, dataset):
        table = TripletTable.from_dataset(data, on_bad_rows="skip")
        assert table.ids == ["0", "2", "3", "5"] and [number for number, _ in table.skipped] == [1, 4]
        assert [image_key(d.image) for d in table] == [image_key(picture(i)) for i in (0, 2, 3, 5)]


@pytest.mark.parametrize("on_bad_rows", ["raise", "skip"])
def test_duplicate_ids_are_always_refused(on_bad_rows):
    rows = [row("a"), row("b"), row("a", response=""), row("b")]
    with pytest.raises(DuplicateIdError, match=r"'a' in rows 0 and 2, 'b' in rows 1 and 3"):
        TripletTable.from_dataset(rows, on_bad_rows=on_bad_rows)


def test_the_same_content_twice_without_ids():
    rows = [{"prompt": p, "response": "r"} for p in ("x", "y", "x")]
    with pytest.raises(DuplicateIdError, match="rows 0 and 2"):
        TripletTable.from_dataset(rows)
    table = TripletTable.from_dataset(rows, on_bad_rows="skip")
    assert table.prompts == ["x", "y"]
    assert table.skipped == [(2, "same image, prompt and response as row 0")]


@pytest.mark.parametrize("data", [[], datasets.Dataset.from_dict({"prompt": [], "response": []})])
def test_an_empty_table(data):
    with pytest.raises(EmptySupportError, match="at least one"):
        TripletTable.from_dataset(data)


def test_nothing_left_after_skipping():
    with pytest.raises(EmptySupportError, match=r"all 1 rows were left out.*'response'"):
        TripletTable.from_dataset([row("a", response="")], on_bad_rows="skip")


def test_a_mistyped_option():
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        TripletTable.from_dataset([row("a")], on_bad_rows="ignore")


# Columns


@pytest.mark.parametrize("as_dataset", [False, True])
def test_missing_columns_name_what_is_there_and_the_remedy(as_dataset):
    rows = [{"Frage": "q", "response": "r"}]
    data = datasets.Dataset.from_list(rows) if as_dataset else rows
    with pytest.raises(ColumnError, match=r"column 'prompt', got columns 'Frage', 'response'; .*columns=\{'prompt'"):
        TripletTable.from_dataset(data)
    assert TripletTable.from_dataset(data, columns={"prompt": "Frage"}).prompts == ["q"]
    with pytest.raises(ColumnError, match="expected a column 'question'"):
        TripletTable.from_dataset(data, columns={"prompt": "question"})
    with pytest.raises(ColumnError, match="names 'Frage', which is none of ours"):
        TripletTable.from_dataset(data, columns={"Frage": "prompt"})


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [
        ("response", [1.5], "'response': expected text"),
        ("id", [1.5], "'id': expected text.*cast_column"),
        ("prompt", [1], "'prompt': expected text"),
        ("references", ["a"], "'references': expected lists of texts"),
        ("references", [[1]], "'references': expected lists of texts"),
        ("image", [1.5], "'image': expected an Image feature"),
    ],
)
def test_columns_of_the_wrong_type_are_refused_before_any_row(column, values, match):
    dataset = datasets.Dataset.from_dict({"prompt": ["p"], "response": ["r"]} | {column: values})
    with pytest.raises(ColumnError, match=match):
        TripletTable.from_dataset(dataset)


@pytest.mark.parametrize("data", [{"prompt": ["p"]}, "rows.csv", None, 3])
def test_what_is_no_table_at_all(data):
    with pytest.raises(ColumnError, match=r"expected a datasets\.Dataset, a list of dicts"):
        TripletTable.from_dataset(data)


def test_a_dictionary_of_splits_names_them():
    rows = datasets.Dataset.from_list([row("a")])
    splits = datasets.DatasetDict(train=rows, test=datasets.Dataset.from_list([row("b")]))
    with pytest.raises(ColumnError, match="one of its splits: train, test"):
        TripletTable.from_dataset(splits)
    assert TripletTable.from_dataset(splits, split="test").ids == ["b"]
    assert TripletTable.from_dataset(datasets.DatasetDict(only=rows)).ids == ["a"]
    with pytest.raises(ValueError, match="split= one of 'train', 'test', got 'dev'"):
        TripletTable.from_dataset(splits, split="dev")


def test_class_numbers_become_class_names():
    features = datasets.Features(prompt=datasets.Value("string"), kind=datasets.ClassLabel(names=["cat", "dog"]))
    dataset = datasets.Dataset.from_dict({"prompt": ["x", "y", "z"], "kind": [1, 0, -1]}, features=features)
    columns = {"response": "kind", "label": "kind"}
    with pytest.raises(RowError, match=r"row 2, column 'kind'.*got None"):
        TripletTable.from_dataset(dataset, columns=columns)
    table = TripletTable.from_dataset(dataset.select([0, 1]), columns=columns)
    assert table.responses == table.labels == ["dog", "cat"] and table.label_set == ("dog", "cat")


def test_a_progress_bar_for_long_tables_only(monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.auto.tqdm", lambda rows, **options: shown.append(len(rows)) or rows)
    rows = [row(str(i)) for i in range(1001)]
    TripletTable.from_dataset(rows[:1000])
    assert shown == []
    TripletTable.from_dataset(rows)
    assert shown == [1001]


# New tables: laws

NINE = TripletTable.from_dataset([row(str(i), image=picture(i) if i % 2 else None) for i in range(9)])
orders = st.lists(st.sampled_from(NINE.ids), min_size=1, max_size=9, unique=True)


@settings(max_examples=30, deadline=None)
@given(orders)
def test_select_without_concat_fit_together(ids):
    chosen = NINE.select(ids)
    assert chosen.ids == ids
    assert chosen.keys == [NINE.keys[NINE.row(id)] for id in ids]
    assert [image_key(d.image) for d in chosen] == chosen.image_keys
    if len(ids) == len(NINE):
        with pytest.raises(EmptySupportError):
            NINE.without(ids)
        return
    rest = NINE.without(ids)
    assert rest.ids == [id for id in NINE.ids if id not in ids]
    both = chosen.concat(rest)
    assert both.ids == chosen.ids + rest.ids
    assert [image_key(d.image) for d in both] == chosen.image_keys + rest.image_keys
    assert both.select(NINE.ids).fingerprint == NINE.fingerprint


@settings(max_examples=30, deadline=None)
@given(orders, orders)
def test_fingerprints_agree_exactly_where_rows_do(left, right):
    assert (NINE.select(left).fingerprint == NINE.select(right).fingerprint) == (left == right)


def test_the_gold_fingerprint_covers_references_and_labels():
    def table(**more):
        return TripletTable.from_dataset([row("a") | more])

    first = table(references=["r", "s"], label="l")
    for other in (table(references=["r"], label="l"), table(references=["r", "s"], label="m"), table()):
        assert other.fingerprint == first.fingerprint and other.gold_fingerprint != first.gold_fingerprint
    assert table(references=["r", "s"], label="l").gold_fingerprint == first.gold_fingerprint


def test_the_fingerprint_covers_content_and_groups():
    prints = {
        TripletTable.from_dataset([row("a") | change]).fingerprint
        for change in ({}, {"id": "b"}, {"response": "x"}, {"group": "g"}, {"image": picture(1)})
    }
    assert len(prints) == 5


def test_operations_refuse_what_they_should(table):
    with pytest.raises(MissingIdError, match="'z'"):
        table.select(["a", "z"])
    with pytest.raises(MissingIdError, match="'z'"):
        table.without(["z"])
    with pytest.raises(DuplicateIdError, match="'a'"):
        table.select(["a", "a"])
    with pytest.raises(EmptySupportError):
        table.select([])
    with pytest.raises(DuplicateIdError, match="share 1 ids: 'b'"):
        table.concat(table.select(["b"]))


# The file


def same(left: TripletTable, right: TripletTable) -> bool:
    texts = ("ids", "prompts", "responses", "references", "groups", "labels", "keys", "query_keys", "image_keys")
    return all(getattr(left, name) == getattr(right, name) for name in texts) and all(
        image_key(a.image) == image_key(b.image) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", ["t.parquet", "folder", "deep/er/t.parquet"])
def test_saved_and_loaded_tables_are_equal(table, tmp_path, name):
    file = table.save(tmp_path / name)
    assert file.suffix == ".parquet" and [p.name for p in file.parent.iterdir()] == [file.name]
    loaded = TripletTable.load(tmp_path / name)
    assert same(loaded, table) and loaded.fingerprint == table.fingerprint
    loaded.select(["d", "c"]).save(tmp_path / name)  # over itself
    assert TripletTable.load(tmp_path / name).ids == ["d", "c"]
    assert same(loaded.select(["b"]).concat(table.select(["a"])), table.select(["b", "a"]))


def test_the_file_holds_original_bytes_and_no_folder(tmp_path):
    jpeg = encoded(picture(1, (32, 32)), "JPEG", quality=60)
    (tmp_path / "secret-folder").mkdir()
    source = tmp_path / "secret-folder" / "p.jpg"
    source.write_bytes(jpeg)
    table = TripletTable.from_dataset([row("a", image=str(source)), row("b", image=jpeg)])
    file = table.save(tmp_path / "t.parquet")
    source.unlink()
    assert pq.read_table(file)["image"].to_pylist() == [
        {"bytes": jpeg, "path": "p.jpg"},
        {"bytes": jpeg, "path": None},
    ]
    assert b"secret-folder" not in file.read_bytes()
    loaded = TripletTable.load(file)
    assert image_key(loaded["a"].image) == table.image_keys[0] == table.image_keys[1]


def test_datasets_reads_the_file_as_images(table, tmp_path):
    read = datasets.Dataset(pq.read_table(table.save(tmp_path / "t.parquet")))
    assert read.features["image"] == datasets.Image() and read[0]["image"].size == (6, 4)
    assert read.column_names[:7] == ["id", "image", "prompt", "response", "references", "group", "label"]


def test_a_file_larger_than_one_chunk(tmp_path):
    table = TripletTable.from_dataset([row(str(i), image=picture(i % 7) if i % 3 else None) for i in range(600)])
    assert same(TripletTable.load(table.save(tmp_path)), table)


def test_an_image_that_went_away(tmp_path):
    picture(1).save(tmp_path / "p.png")
    table = TripletTable.from_dataset([row("a", image=tmp_path / "p.png")])
    (tmp_path / "p.png").unlink()
    assert table.prompts == ["what is a?"]
    with pytest.raises(ImageError, match=r"id 'a', column 'image': no such file"):
        table["a"]
    with pytest.raises(ImageError, match=r"id 'a'.*no longer is"):
        table.save(tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def rewrite(file, change) -> None:
    table = pq.read_table(file)
    pq.write_table(change(table), file)


def with_cell(column: str, value):
    def change(table: pa.Table) -> pa.Table:
        position = table.schema.get_field_index(column)
        values = table[column].to_pylist()
        values[0] = value
        return table.set_column(position, table.schema.field(position), pa.array(values, table[column].type))

    return change


ALTERED = {
    "text": (with_cell("response", "it is z"), "row 0 .*altered"),
    "prompt": (with_cell("prompt", "?"), "altered"),
    "empty cell": (with_cell("prompt", None), "altered"),
    "key": (with_cell("_key", "0" * 32), "altered"),
    "query key": (with_cell("_query_key", "0" * 32), "altered"),
    "id gone": (with_cell("id", None), "altered"),
    "id twice": (with_cell("id", "b"), "an id twice"),
    "id": (with_cell("id", "z"), "moved"),
    "group": (with_cell("group", "h"), "moved"),
    "references": (with_cell("references", None), "altered"),
    "image gone": (with_cell("image", None), "altered"),
    "image elsewhere": (with_cell("image", {"bytes": None, "path": "/etc/hostname"}), "altered"),
    "row gone": (lambda t: t.slice(1), "moved"),
    "rows moved": (lambda t: t.take([1, 0, 2, 3]), "moved"),
    "column gone": (lambda t: t.drop_columns(["_key"]), "with the columns id, image"),
    "column type": (lambda t: t.set_column(6, "label", pa.array([1] * 4)), "with the columns"),
    "no version": (lambda t: t.replace_schema_metadata(None), "format version 1, found none"),
    "other version": (
        lambda t: t.replace_schema_metadata({"drum_hf": json.dumps({"format_version": 99})}),
        "format version 1, found 99",
    ),
    "odd metadata": (lambda t: t.replace_schema_metadata({"drum_hf": "[]"}), "format version 1, found none"),
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_file_is_refused(table, tmp_path, name, mmap):
    change, match = ALTERED[name]
    file = table.save(tmp_path / "t.parquet")
    rewrite(file, change)
    with pytest.raises(SavedFileError, match=match) as error:
        TripletTable.load(file, mmap=mmap, cache_dir=tmp_path)
    assert not list(tmp_path.glob("drum_hf/*"))  # nothing half-made
    assert str(error.value).startswith(str(file)) and "save the table again" in str(error.value)


def test_a_broken_or_missing_file_is_refused(table, tmp_path):
    with pytest.raises(SavedFileError, match=r"triplets\.parquet.*no such file"):
        TripletTable.load(tmp_path)
    file = table.save(tmp_path)
    whole = file.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        for mmap in (False, True):
            with pytest.raises(SavedFileError, match="parquet can't read"):
                TripletTable.load(file, mmap=mmap, cache_dir=tmp_path)


# Mapped


def test_a_mapped_table_is_the_same_and_holds_ids_alone(tmp_path):
    rows = [row(str(i), image=picture(i % 7) if i % 3 else None, group=f"g{i // 2}") for i in range(600)]
    table = TripletTable.from_dataset(rows)
    file = table.save(tmp_path)
    mapped = TripletTable.load(file, mmap=True, cache_dir=tmp_path)
    assert mapped.mapped and not table.mapped and same(mapped, table)
    assert mapped.fingerprint == table.fingerprint and mapped.gold_fingerprint == table.gold_fingerprint
    assert repr(mapped) == repr(table) and mapped.query("41").group == "g20"
    assert mapped._records[-1] == table._records[-1] and mapped._records[3:7] == table._records[3:7]
    other = pickle.loads(pickle.dumps(mapped))
    assert other.mapped and same(other, table)
    for cut in (mapped.without(["3", "500"]), mapped.select(["599", "0", "7"])):
        expected = table.select(cut.ids)
        assert cut.mapped and same(cut, expected) and cut.fingerprint == expected.fingerprint
    more = TripletTable.from_dataset([row("new", image=picture(3))])
    for a, b in ((mapped, more), (more, mapped), (mapped.select(["5", "4"]), more)):
        plain = [table.select(part.ids) if part is not more else more for part in (a, b)]
        assert same(a.concat(b), plain[0].concat(plain[1])) and a.concat(b).mapped
    assert same(TripletTable.load(mapped.without(["0"]).save(tmp_path / "again")), table.without(["0"]))
    assert check_leaks(mapped, more, on_leak="ignore") == check_leaks(table, more, on_leak="ignore") != []


def test_rows_are_copied_once_and_again_where_the_copy_is_broken(table, tmp_path, monkeypatch):
    file, copied = table.save(tmp_path / "t.parquet"), []
    copy = _reading._copy
    monkeypatch.setattr(_reading, "_copy", lambda *given: copied.append(given) or copy(*given))
    for broken in (b"", b"no arrow", None, None):
        assert same(TripletTable.load(file, mmap=True, cache_dir=tmp_path), table)
        (arrow,) = tmp_path.glob("drum_hf/*")
        if broken is not None:
            arrow.write_bytes(broken)
    assert len(copied) == 3
    table.select(["b"]).save(file)  # other content, the same name
    assert TripletTable.load(file, mmap=True, cache_dir=tmp_path).ids == ["b"]


def test_mapped_images_by_reference(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        picture(1).save(tmp_path / place / "p.png")
    table = TripletTable.from_dataset([row("a", image=tmp_path / "here" / "p.png"), row("b")])
    file = table.save(tmp_path / "t.parquet", images="reference")
    for place in ("here", "there"):
        mapped = TripletTable.load(file, mmap=True, cache_dir=tmp_path, image_root=tmp_path / place)
        assert same(mapped, table) and place in mapped._images[0]["image"]["path"]
    with pytest.raises(SavedFileError, match="pass image_root="):
        TripletTable.load(file, mmap=True, cache_dir=tmp_path)
    picture(2).save(tmp_path / "there" / "p.png")
    with pytest.raises(ImageError, match="another picture"):
        TripletTable.load(file, mmap=True, cache_dir=tmp_path, image_root=tmp_path / "there")["a"]


def test_no_room_for_the_copy(table, tmp_path):
    file = table.save(tmp_path / "t.parquet")
    (tmp_path / "drum_hf").write_text("a file where the folder should be")
    with pytest.raises(SavedFileError, match="writing it failed"):
        TripletTable.load(file, mmap=True, cache_dir=tmp_path)


# Pictures that change


@pytest.mark.parametrize("mmap", [False, True])
def test_swapped_pictures_of_a_saved_table_are_found(mmap, tmp_path):
    rows = [row(id, image=picture(seed)) for seed, id in enumerate("abc")]
    file = TripletTable.from_dataset(rows).save(tmp_path / "t.parquet")
    whole = pq.read_table(file)
    stored = whole.to_pylist()
    stored[1]["image"] = stored[2]["image"]  # the picture alone: every text and hash stays
    pq.write_table(pa.Table.from_pylist(stored, schema=whole.schema), file)
    table = TripletTable.load(file, mmap=mmap, cache_dir=tmp_path)
    assert image_key(table["a"].image) == table.image_keys[0]
    for some in (table, table.select(["b"]), table.without(["a"]).concat(TripletTable.from_dataset([row("z")]))):
        with pytest.raises(ImageError, match=r"id 'b', column 'image': .*t\.parquet shows another picture"):
            some["b"]
        with pytest.raises(ImageError, match="id 'b'"):
            some.save(tmp_path / "again.parquet")
        assert not list(tmp_path.glob("*again*"))
    with pytest.raises(ImageError, match="id 'b'"):
        table.query("b")
    assert TripletTable.load(table.select(["a", "c"]).save(tmp_path / "rest.parquet")).ids == ["a", "c"]


@pytest.mark.parametrize("images", ["embedded", "reference"])
def test_a_picture_edited_after_it_was_read_is_never_saved_under_its_old_hash(images, tmp_path):
    for seed, id in enumerate("ab"):
        picture(seed).save(tmp_path / f"{id}.png")
    table = TripletTable.from_dataset([row(id, image=tmp_path / f"{id}.png") for id in "ab"])
    picture(1).save(tmp_path / "b.png", compress_level=0)  # other bytes, the same pixels
    assert same(TripletTable.load(table.save(tmp_path / "t", images=images), image_root=tmp_path), table)
    picture(2).save(tmp_path / "b.png")
    fresh = table.select(["a", "b"])  # with an empty cache
    for read in (lambda: fresh["b"], lambda: fresh.save(tmp_path / "t", images=images)):
        with pytest.raises(ImageError, match=r"id 'b', column 'image': .*b\.png shows another picture"):
            read()
    assert TripletTable.load(tmp_path / "t", image_root=tmp_path).ids == ["a", "b"]  # the older file is left alone


# Leaks


def test_leaks_by_id_and_by_image(caplog):
    support = TripletTable.from_dataset(
        [row("a", image=picture(1)), row("b", image=picture(2)), row("c"), row("d", image=picture(2))]
    )
    queries = TripletTable.from_dataset(
        [
            row("x", image=picture(9)),
            row("y", image=picture(2), prompt="another question"),
            row("a", image=picture(8)),
            row("z", prompt="what is c?"),
        ]
    )
    expected = [("y", "b"), ("y", "d"), ("a", "a"), ("z", "c")]
    assert check_leaks(support, queries, on_leak="ignore") == expected
    with pytest.raises(LeakError, match=r"3 of 4 queries .*4 pairs; query 'y'.*content of support row 'b'.*without"):
        check_leaks(support, queries)
    assert not caplog.records
    assert check_leaks(support, queries, on_leak="warn") == expected
    assert "3 of 4 queries" in caplog.text
    clean = support.without([id for _, id in expected if id != "a"])
    assert check_leaks(clean, queries.without(["a"])) == []
    with pytest.raises(ValueError, match="on_leak"):
        check_leaks(support, queries, on_leak="no")


cells = st.tuples(st.integers(0, 5), st.sampled_from(["", "p", "q"]))


@settings(max_examples=30, deadline=None)
@given(st.lists(cells, min_size=1, max_size=5), st.lists(cells, min_size=1, max_size=5), st.integers(0, 6))
def test_leaks_equal_brute_force(left, right, shift):
    def build(cells, start):
        return TripletTable.from_dataset(
            [
                row(
                    str(start + i),
                    image=picture(seed) if seed else None,
                    prompt=prompt or ("" if seed else "no image"),
                )
                for i, (seed, prompt) in enumerate(cells)
            ]
        )

    support, queries = build(left, 0), build(right, shift)
    expected = [
        (q.id, s.id)
        for q in queries
        for s in support
        if q.id == s.id
        or (q.image and s.image and image_key(q.image) == image_key(s.image))
        or (not q.image and not s.image and q.prompt == s.prompt)
    ]
    assert check_leaks(support, queries, on_leak="ignore") == expected
