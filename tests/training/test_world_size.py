"""A training that two processes began: one writes its table, and one or three go on with it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import world_processes
from processes import run_processes
from tiny_encoders import tiny_clip

from drum_hf.training import CandidateTable


def first_round(rows):
    """Without set-level scores, which the second round adds."""
    return [tuple(row[:5]) for row in rows]


def launched(folder, mode, count):
    statuses, results = run_processes(folder, mode, script=world_processes.__file__, count=count)
    assert statuses == [0] * count, [(folder / f"log{rank}").read_text()[-3000:] for rank in range(count)]
    return results


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """24 queries in batches of 4 by each of two processes: an epoch is three steps."""
    folder = tmp_path_factory.mktemp("world")
    tiny_clip(folder)
    return folder, launched(folder, "train", 2)


@pytest.fixture
def copied(begun, tmp_path):
    """A folder of one's own to go on in."""
    shutil.copytree(begun[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_one_process_writes_the_table_of_all(begun):
    folder, results = begun
    assert [result["saves"] for result in results] == [2, 0]
    for step, rounds in ((3, 1), (6, 2)):
        table = CandidateTable.load(folder / "run" / f"checkpoint-{step}" / "candidates.parquet")
        assert table.rounds == rounds and table.bought == results[1]["bought"][:rounds]
    assert [list(row) for row in table.rows()] == results[0]["rows"] == results[1]["rows"]


def check_went_on(begun, results, steps):
    """Table and scores were kept, and the second round alone was bought and trained."""
    before = begun[1][0]
    for result in results:
        assert first_round(result["rows"]) == first_round(before["rows"])
        assert (result["step"], result["epoch"]) == (2 * steps, 2.0)
        assert result["weights"] == results[0]["weights"]
    scored = [tuple(pair) for result in results for pair in result["scored"]]
    assert len(scored) == len(set(scored)) == before["bought"][1] - before["bought"][0]
    assert all(len(pair) == 3 for pair in scored)  # a query and two demonstrations


def test_one_process_goes_on(begun, copied):
    check_went_on(begun, [world_processes.run(copied, "resume")], 6)


@pytest.mark.slow
def test_three_processes_go_on(begun, copied):
    results = launched(copied, "resume", 3)
    check_went_on(begun, results, 2)
    assert [result["saves"] for result in results] == [1, 0, 0]


def test_with_batches_of_both_one_process_ends_where_two_do(begun, copied):
    result, before = world_processes.run(copied, "resume", per_device_train_batch_size=8), begun[1][0]
    check_went_on(begun, [result], 3)
    set_level = [np.array([row[-1] for row in rows["rows"]], float) for rows in (result, before)]
    np.testing.assert_allclose(*set_level, atol=1e-6)
    assert result["temperature"] == pytest.approx(before["temperature"], rel=1e-5)
    for name, value in before["weights"].items():
        np.testing.assert_allclose(result["weights"][name], value, atol=1e-5, err_msg=name)
