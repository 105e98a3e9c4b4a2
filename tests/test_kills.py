"""Commands that are killed and given again, a few times; `python -m tests.kill` does it as often as it is told."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from kill.__main__ import VERBS, check, compare, make_data, outcome, servers, timed, uninterrupted

from drum_hf.errors import SavedFileError
from drum_hf.training.checkpoints import WholeCheckpoints, last_checkpoint, same_run

# ---- checkpoints ----


class Platform:
    """Writes as the platform does: file by file, and would remove the oldest by its clock."""

    def __init__(self, folder: Path, *, fail_at: str = "") -> None:
        self.folder, self.fail_at = folder, fail_at
        self.args = type("Args", (), {"save_total_limit": 2, "output_dir": str(folder), "should_save": True})()
        self.state = type("State", (), {"global_step": 0, "best_model_checkpoint": None})()
        self.accelerator = type("Accelerator", (), {"wait_for_everyone": lambda self: None})()

    def _save_checkpoint(self, model, trial):
        assert self.args.save_total_limit is None  # else it would remove by modification time
        place = self.folder / f"checkpoint-{self.state.global_step}"
        place.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            if name == self.fail_at:
                raise OSError(28, "No space left on device")
            (place / name).write_text(f"{name} of {self.state.global_step}")


class Trainer(WholeCheckpoints, Platform):
    def save_state_beside(self, checkpoint):
        (checkpoint / "ours").write_text("x")

    def save(self, step):
        self.state.global_step = step
        self._save_checkpoint(None, None)


def test_only_whole_checkpoints_count(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.save(3)
    trainer.save(12)
    assert last_checkpoint(tmp_path).name == "checkpoint-12"
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_text("cut")
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-3" / "ours").unlink()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("fail_at", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path, fail_at):
    Trainer(tmp_path).save(3)
    full = Trainer(tmp_path, fail_at=fail_at)
    with pytest.raises(SavedFileError, match=r"checkpoint-6: writing it failed .*No space left"):
        full.save(6)
    assert full.args.save_total_limit == 2
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    with pytest.raises(SavedFileError):  # half of an earlier one of that name does not pass for whole either
        full.save(3)
    assert last_checkpoint(tmp_path) is None


def test_a_clock_set_back_removes_the_right_ones(tmp_path):
    trainer = Trainer(tmp_path)
    for step, clock in ((2, 3_000_000_000), (4, 2_000_000_000), (6, 1_000_000_000), (8, 500_000_000)):
        trainer.save(step)
        os.utime(tmp_path / f"checkpoint-{step}", (clock, clock))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert last_checkpoint(tmp_path).name == "checkpoint-8"


def test_the_best_checkpoint_stays(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.save(1)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    for step in (2, 3, 4):
        trainer.save(step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_the_same_command_goes_on_and_another_is_refused(tmp_path):
    assert same_run(tmp_path, {"seed": 0, "lists": (1, 2)}) is None
    Trainer(tmp_path).save(4)
    assert same_run(tmp_path, {"seed": 0, "lists": (1, 2)}).name == "checkpoint-4"
    with pytest.raises(SavedFileError, match=r"other settings \(rounds, seed\); .*--restart"):
        same_run(tmp_path, {"seed": 1, "lists": [1, 2], "rounds": 3})
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert same_run(tmp_path, {"seed": 1}, anew=True) is None and last_checkpoint(tmp_path) is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"seed": 1}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedFileError, match="can't be written"):
        same_run(tmp_path / "file" / "training", {})


# ---- commands ----


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    make_data(folder / "data")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_and_given_again_it_ends_as_if_it_had_not_been(work, verb):
    modules, expected = uninterrupted(verb, work / "data", work)
    with servers(modules) as pair:
        whole = timed(pair[0], verb, work / "data", work)
        compare(whole[1], expected, "a fork")
        done = check(pair, verb, work / "data", work, 2, random.Random(verb), whole)
    assert done <= 2


@pytest.mark.slow
def test_two_runs_of_one_seed_give_the_same_table_and_weights(work):
    if not (work / "train-whole" / "retriever").exists():
        uninterrupted("train", work / "data", work)
    first = outcome("train", work / "train-whole")
    shutil.rmtree(work / "train-whole")
    _, second = uninterrupted("train", work / "data", work)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
