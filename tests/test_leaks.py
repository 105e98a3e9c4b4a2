"""Nothing demonstrates itself or its group, wherever it is retrieved; the million is `python -m tests.leaks`."""

from __future__ import annotations

import leaks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drum_hf.data import TripletTable, check_leaks, find_twins, load_table
from drum_hf.errors import LeakError


def test_no_retrieval_shows_the_query_or_its_group():
    results = leaks.run(12_000, seed=1)
    assert sum(asked for asked, _ in results.values()) >= 12_000 and len(results) >= 30
    assert {name: found for name, (_, found) in results.items() if found} == {}


def test_the_count_of_leaks_sees_them():
    world = leaks.World(0)
    mate = next(i for i in world.ids if world.groups.count(world.group_of[i]) > 1 and world.group_of[i])
    other = next(i for i in world.ids if i != mate and world.group_of[i] == world.group_of[mate])
    free = next(i for i in world.ids if world.group_of[i] is None)
    assert world.leaks([mate, free, free], [[mate, other], [free], [mate]]) == 3


@pytest.mark.slow
def test_no_retrieval_of_a_million_leaks():
    results = leaks.run(1_000_000)
    assert sum(asked for asked, _ in results.values()) >= 1_000_000
    assert {name: found for name, (_, found) in results.items() if found} == {}


def test_the_same_pixels_under_other_names_and_formats_are_found(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    saved = {"train/a.png": picture, "test/b.bmp": picture, "test/d.png": Image.fromarray(255 - pixels)}
    for name, image in saved.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    tables = []
    for part, files in (("train", ["a.png"]), ("test", ["b.bmp", "d.png"])):
        lines = [f"{part}{i},{file},what is it?,x" for i, file in enumerate(files)]
        (tmp_path / part / "table.csv").write_text("id,image,prompt,response\n" + "\n".join(lines))
        tables.append(load_table(tmp_path / part))
    assert check_leaks(*tables, on_leak="ignore") == [("test0", "train0")]
    with pytest.raises(LeakError, match="test0"):
        check_leaks(*tables)


cells = st.tuples(st.integers(0, 3), st.sampled_from(["", "g", "h"]))  # content, group


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "g", "h"])), min_size=1, max_size=9), st.integers(0, 9)
)
def test_twins_are_rows_of_the_same_content_that_nothing_keeps_apart(cells, cut):
    rows = [
        {"id": f"r{i}", "prompt": f"prompt {content}", "response": "x", "group": group}
        for i, (content, group) in enumerate(cells)
    ]
    support, queries = TripletTable.from_dataset(rows[: max(1, cut)]), TripletTable.from_dataset(rows)
    expected = [
        query["id"]
        for query in rows
        if any(
            row["prompt"] == query["prompt"]
            and row["id"] != query["id"]
            and not (row["group"] and row["group"] == query["group"])
            for row in rows[: max(1, cut)]
        )
    ]
    assert find_twins(support, queries) == expected
