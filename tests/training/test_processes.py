"""Two real processes over gloo: they share the LVLM's work, fail together, and train one retriever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import environment, free_port, run_processes
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_table
from two_processes import PAIRS, make_trainer

from drum_hf.playground import make_world
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.store import ScoreStore


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def table():
    return coloured_table(24)


@pytest.fixture(scope="module")
def both(tmp_path_factory, table) -> list[dict]:
    """What each process saw; the store held the first ten pairs before they began."""
    folder = tmp_path_factory.mktemp("two")
    tiny_clip(folder)
    with ScoreStore(folder / "scores.sqlite") as store:
        Feedback(StubLVLM(), table, table, store=store).score(PAIRS[:10])
    statuses, results = run_processes(folder)
    assert statuses == [0, 0], [(folder / f"log{rank}").read_text()[-3000:] for rank in range(2)]
    with ScoreStore(folder / "scores.sqlite") as store:
        assert len(store) == len(PAIRS) + 2  # and the two that the main process asked for by itself
    return results


def pairs_of(rows):
    return [tuple(row) for row in rows]


def named(pairs):
    return [(query, *shown) for query, shown in pairs]


def test_no_pair_is_scored_twice_and_all_get_all_scores(both, table):
    expected = Feedback(StubLVLM(), table, table).score([*PAIRS, PAIRS[0]])
    for result in both:
        assert (result["count"], result["again"], result["new"]) == (2, True, 1)
        np.testing.assert_allclose(result["scores"], expected, atol=1e-12)
    shares = [pairs_of(result["scored"])[: len(PAIRS)] for result in both]
    shares[0] = [pair for pair in shares[0] if len(pair) == 2]  # without its zero-shot scores
    assert sorted(shares[0] + shares[1]) == sorted(named(PAIRS[10:]))
    assert not {shown for _, shown in shares[0]} & {shown for _, shown in shares[1]}  # whole demonstrations
    assert abs(len(shares[0]) - len(shares[1])) <= 6


def test_drafts_are_shared_too(both, table):
    assert sorted(both[0]["asked"] + both[1]["asked"]) == sorted(table.ids)
    assert len(both[0]["asked"]) == len(both[1]["asked"])
    assert both[0]["drafts"] == both[1]["drafts"] == ["unsure"] * 24


def test_a_call_of_one_process_alone_does_not_wait(both):
    assert both[0]["alone"] == [-2.0, -2.0]


def test_what_one_machines_store_knows_is_not_scored_on_another(both):
    assert both[0]["machines"] == both[1]["machines"]
    assert sorted(pairs_of(both[0]["by_machine"] + both[1]["by_machine"])) == sorted(named(PAIRS[40:]))


def test_a_fault_in_one_is_raised_by_name_in_both_and_stops_the_other(both):
    main, other = both
    kind, said = other["overflow"]
    assert kind == "ContextOverflowError"
    assert re.fullmatch(r"query 'r\d+' with demonstrations \['r\d+'\]: too long; use fewer shots", said)
    assert main["overflow"] == [kind, f"process 2 of 2: {said}"]
    assert main["batches"] < 10 < len(PAIRS) / 2 / 2  # of some thirty
    assert main["strange"][0] == "RuntimeError" and "process 2 of 2: KeyError: 'x'" in main["strange"][1]
    assert other["strange"] == ["KeyError", "'x'"]
    assert main["main fault"][0] == "ZeroDivisionError"
    assert other["main fault"][0] == "RuntimeError" and "process 1 of 2: ZeroDivisionError" in other["main fault"][1]
    assert main["after"] == other["after"] == main["scores"][:5]


def test_both_have_one_price_and_its_calibration_is_part_of_the_bill(both):
    assert both[0]["plan"] == both[1]["plan"]
    new, known, images, paid, text = both[0]["plan"]
    assert (new, known, images, paid) == (len(PAIRS), 0, 24, 32)
    assert "on these 2 processes" in text
    assert both[0]["seconds"][0] == both[1]["seconds"][0] > 0
    assert sorted(pairs_of(both[0]["bought"] + both[1]["bought"])) == sorted(named(PAIRS))


@pytest.mark.parametrize("kind", ["trained", "cached", "words"])
def test_both_end_with_the_same_table_weights_and_temperature(both, kind):
    one, other = (result[kind] for result in both)
    assert one["rows"] == other["rows"]
    assert one["weights"] == other["weights"]
    assert one["temperature"] == other["temperature"] != pytest.approx(0.05, abs=1e-9)
    bought = pairs_of(one["scored"] + other["scored"])
    assert len(bought) == len(set(bought)) == len(one["rows"]) + sum(row[-1] is not None for row in one["rows"])


def test_batches_that_no_process_could_fill_are_refused(both):
    kind, message = both[0]["too few"]
    assert kind == "ValueError" and "at most 12" in message and both[1]["too few"] == both[0]["too few"]


def test_the_first_rounds_table_is_that_of_one_process(both, clip, tmp_path):
    trainer = make_trainer(clip, tmp_path)
    trainer.write_drafts()
    trainer.mine()
    rows = [row for row in both[0]["trained"]["rows"] if row[-2] == 0]
    assert [(q, c, place) for q, c, _, place, *_ in rows] == [(q, c, p) for q, c, _, p, *_ in trainer.table.rows()]
    np.testing.assert_allclose([row[2] for row in rows], [row[2] for row in trainer.table.rows()], atol=1e-6)


def test_a_real_lvlms_scores_are_those_of_one_process(both, table):
    from drum_hf.lvlm.local.model import TransformersLVLM

    lvlm = TransformersLVLM.from_pretrained("playground/lvlm", device="cpu", dtype="float32")
    expected = Feedback(lvlm, table, table).score(PAIRS[:48])
    assert both[0]["real"] == both[1]["real"]
    np.testing.assert_allclose(both[0]["real"], expected, atol=1e-5)


def test_a_killed_process_does_not_leave_the_other_hanging(tmp_path):
    statuses, results = run_processes(tmp_path, "die")
    assert statuses == [0, -9]
    kind, message = results[0]["gone"]
    assert kind == "RuntimeError" and "another process is gone" in message and "run the same command again" in message


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_line_under_its_launchers(tmp_path, launcher):
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for row in list(make_world(21, difficulty="easy").support)[:24]:
        row.image.save(data / f"{row.id}.png")
        rows.append({"id": row.id, "image": f"{row.id}.png", "prompt": row.prompt, "response": row.response})
    (data / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def command(*arguments: str) -> str:
        launch = [sys.executable, "-m", *LAUNCHERS[launcher]]
        port = [f"--{'main_process_port' if launcher == 'accelerate' else 'master_port'}", str(free_port())]
        done = subprocess.run(
            [*launch, *port, "-m", "drum_hf.cli", "-q", *arguments, "--data", str(data), "--candidates", "3"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = command("score", "--store", str(tmp_path / "scores.sqlite"))
    assert said.count("72 new pairs, 0 already in the store") == 1 and "on these 2 processes" in said
    assert said.count("72 pairs scored") == 1
    said = command(
        "train", "--out", str(tmp_path / "out"), "--rounds", "1", "--epochs", "1", "--train-batch-size", "8"
    )
    assert said.count("72 scored pairs") == 1
    assert (tmp_path / "out" / "retriever" / "drum_config.json").exists()
