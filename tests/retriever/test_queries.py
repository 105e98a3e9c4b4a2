"""The one parser of queries: what it takes, by whatever way in, and what it refuses."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from drum_hf.data import TripletTable
from drum_hf.errors import ColumnError, ImageError, RowError
from drum_hf.pipelines.inputs import as_inputs
from drum_hf.retriever.queries import as_query, as_rows, is_single
from drum_hf.types import Demonstration, Query, content_key, image_key

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def photo(folder: Path) -> Path:
    """Stored on its side, as a camera does it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(folder / "photo.png", exif=exif)
    return folder / "photo.png"


def test_one_picture_has_one_key_by_every_entrance(tmp_path):
    path = photo(tmp_path)
    upright = np.rot90(PIXELS, -1)
    expected = image_key(Image.fromarray(np.ascontiguousarray(upright)))
    text = base64.b64encode(path.read_bytes()).decode()
    held = Image.open(path)
    held.load()
    given = [str(path), path, path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), held, upright, text]
    given += [f"data:image/png;base64,{text}", {"bytes": path.read_bytes(), "path": None}]
    rows = [{"id": "a", "image": str(path), "prompt": "q", "response": "r"}]
    table = TripletTable.from_dataset(rows)
    hf = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    assert TripletTable.from_dataset(hf).image_keys == table.image_keys == [expected]
    keys = {content_key(expected, "q")}
    for image in given:
        if isinstance(image, io.BytesIO):
            image.seek(0)
        queries = [as_query({"image": image, "question": "q"}), as_query(image, default_prompt=lambda: "q")]
        queries += [Query(image, "q"), as_query(Query(image, "q"))]
        assert {query.key for query in queries} == keys, type(image)
        assert Demonstration("d", image, "q", "r").key == table.keys[0]
    assert {table.query("a").key, as_query(table["a"]).key, *table.query_keys} == keys
    assert as_query(table["a"]).id == "a"
    frame = pandas.DataFrame(rows)
    for several in (rows, hf, hf.to_iterable_dataset(), frame, table):
        (query,) = (as_query(row) for row in as_rows(several))
        assert query.key in keys and query.id == "a"


def test_keys_and_their_types():
    query = as_query({"prompt": "q", "id": 5, "group": np.int64(7), "draft": "d", "response": "gold", "label": "l"})
    assert query == Query(None, "q", "d", "5", "7")
    assert as_query({"question": "q", "prompt": None}) == Query(None, "q")
    with pytest.raises(RowError, match=r"query '5', column 'prompt': expected a text, got list"):
        as_query({"prompt": ["q"], "id": 5})
    with pytest.raises(RowError, match="column 'id': expected a text or an integer, got bool"):
        as_query({"prompt": "q", "id": True})


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"imgae": "a.png", "prompt": "q"}, ColumnError, r"unknown key 'imgae' \(is it 'image'\?\)"),
        ({"prompt": "q", "question": "q"}, ColumnError, "got both"),
        ({"draft": "d"}, ColumnError, "expected 'image' and 'prompt'"),
        ({"prompt": ""}, RowError, "both are empty"),
        (Query(None), RowError, "both are empty"),
        (Query(None, " ", id="x"), RowError, "query 'x': .*both are empty"),
        ({"image": "http://example.com/a.png", "prompt": "q"}, ImageError, "urls=True"),
        ("A" * 90_000, ImageError, r"90,000 characters.*; a query is an image, or a dict"),
        (3.5, ColumnError, "got float"),
    ],
)
def test_what_is_no_query(given, error, match):
    with pytest.raises(error, match=match) as caught:
        as_query(given)
    assert len(str(caught.value)) < 500


def test_one_or_several(tmp_path):
    path = photo(tmp_path)
    for one in (path, str(path), b"bytes", PIXELS, Image.open(path), io.BytesIO(), Query(None, "q"), {"prompt": "q"}):
        assert is_single(one) and as_inputs(one) is one
    for several in ([PIXELS], (path, path), np.stack([PIXELS, PIXELS])):
        assert not is_single(several) and len(list(as_inputs(several))) == len(several)
    rows = datasets.Dataset.from_dict({"image": [str(path)], "question": ["q"], "question_id": [1]})
    (row,) = as_inputs(rows.cast_column("image", datasets.Image()))
    assert row == {"image": {"bytes": None, "path": str(path)}, "question": "q"}  # not decoded, and only what is ours
    assert list(as_inputs(datasets.DatasetDict(test=rows))) == list(as_inputs(rows))
    with pytest.raises(ColumnError, match="one of its splits: train, test"):
        as_inputs(datasets.DatasetDict(train=rows, test=rows))
    named = {"file_name": [str(path)], "Question": ["q"], "label": [1]}
    for table in (datasets.Dataset.from_dict(named), pandas.DataFrame(named)):
        assert list(as_inputs(table)) == [{"image": str(path), "prompt": "q"}]
    with pytest.raises(ColumnError, match="got int"):
        as_inputs(3)
