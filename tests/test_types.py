"""Queries and demonstrations: their pictures, and keys that follow their content."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw

from drum_hf.data import TripletTable
from drum_hf.errors import ImageError, RowError
from drum_hf.tuning.episodes.types import Turn
from drum_hf.types import Demonstration, Query, content_key, image_key

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
TABLE = TripletTable.from_dataset([{"id": "a", "image": RED, "prompt": "q", "response": "r"}])


@pytest.mark.parametrize("query", [Query(RED, "q", id="a"), TABLE.query("a")], ids=["made", "from a table"])
@pytest.mark.parametrize("read_before", [False, True])
def test_an_edited_query_has_a_new_key(query, read_before):
    query = dataclasses.replace(query) if read_before else query
    expected = content_key(image_key(RED), "q")
    assert not read_before or query.key == expected
    assert dataclasses.replace(query, prompt="other").key == content_key(image_key(RED), "other")
    assert dataclasses.replace(query, image=BLUE).key == content_key(image_key(BLUE), "q")
    assert dataclasses.replace(query, image=None).key == content_key("", "q")
    same = [
        query,
        dataclasses.replace(query, draft="d", id="b"),
        copy.deepcopy(query),
        pickle.loads(pickle.dumps(query)),
    ]
    assert {each.key for each in same} == {expected}


@pytest.mark.parametrize("shown", [Demonstration("a", RED, "q", "r"), TABLE["a"]], ids=["made", "from a table"])
def test_an_edited_demonstration_has_a_new_key(shown):
    assert shown.key == TABLE.keys[0] == content_key(image_key(RED), "q", "r")
    assert dataclasses.replace(shown, response="s").key == content_key(image_key(RED), "q", "s")
    assert dataclasses.replace(shown, image=BLUE).key == content_key(image_key(BLUE), "q", "r")
    assert dataclasses.replace(shown, id="b").key == shown.key


def test_a_turn_has_the_key_of_its_picture():
    turn = Turn(RED, "q", "a")
    assert turn.image_key == image_key(RED) and dataclasses.replace(turn, image=BLUE).image_key == image_key(BLUE)
    assert dataclasses.replace(turn, image=None).image_key == image_key(RED)


def test_what_is_drawn_afterwards_is_not_in_the_query():
    canvas = RED.copy()
    query, shown = Query(canvas, "q"), Demonstration("a", canvas, "q", "r")
    ImageDraw.Draw(canvas).rectangle((0, 0, 4, 4), "white")
    assert query.image.tobytes() == shown.image.tobytes() == RED.tobytes()
    assert Query(canvas, "q").key != query.key


def test_pictures_are_opened_when_made(tmp_path):
    RED.save(tmp_path / "p.png")
    clear = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert np.array_equal(np.asarray(Query(tmp_path / "p.png").image), np.asarray(RED))
    assert Demonstration("a", str(tmp_path / "p.png"), "q", "r").key == TABLE.keys[0]
    assert Query(clear).key == Query(Image.new("RGB", (8, 6), "white")).key != Query(RED).key
    with pytest.raises(ImageError, match=r"no such file: 'gone\.png'"):
        Query("gone.png")
    with pytest.raises(ImageError, match="urls=True"):
        Query("https://example.com/a.png")
    with pytest.raises(RowError, match=r"expected Query\.prompt as a text, got int"):
        Query(RED, 3)
    with pytest.raises(RowError, match=r"expected Demonstration\.response as a text, got int"):
        Demonstration("a", RED, "q", 3)
