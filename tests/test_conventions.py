"""What a library must leave alone: logging, seeds, the network; and what it must pass on: trackers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

import drum_hf
from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, TransformersLVLM
from drum_hf.playground import make_world

OFFLINE = {"HF_HUB_OFFLINE": "1"}

#: Loads every room, then asks for models that are nowhere; prints what that changed, what was said, who was called.
PROBE = """
import json, logging, random, socket
import datasets, faiss, numpy, peft, sentence_transformers, torch, transformers

def state():
    ours = [l for l in map(logging.getLogger, list(logging.root.manager.loggerDict)) if l.name.startswith("drum_hf")]
    return [
        [repr(handler) for handler in logging.root.handlers], logging.root.level,
        [[l.name, l.level, l.handlers] for l in ours if l.level or l.handlers],
        repr(random.getstate()), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist(),
        torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
    ]

called = []
socket.getaddrinfo = lambda host, *rest, **more: called.append(host) or []
before = state()
import drum_hf
for name in drum_hf.__all__:
    getattr(drum_hf, name)
changed = [a for a, b in zip(state(), before, strict=True) if a != b]
said = []
for load in (drum_hf.TransformersLVLM.from_pretrained, drum_hf.DemoRetriever.from_pretrained):
    try:
        load("nobody/nothing-of-the-kind")
    except (drum_hf.errors.DrumError, OSError) as error:
        said.append(type(error).__name__)
print(json.dumps([repr(changed), said, called]))
"""


def test_logging_seeds_and_the_network_are_left_alone():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=900, env=os.environ | OFFLINE
    )
    assert done.returncode == 0, done.stderr
    changed, said, called = json.loads(done.stdout.strip().splitlines()[-1])
    assert changed == "[]" and called == []
    assert len(said) == 2  # offline is believed, and refused by name


def test_progress_bars_heed_the_users_word():
    code = (
        "from drum_hf.lvlm.local.runner import progress_bar\n"
        "from drum_hf.scores.transfer import _bar\n"
        "print(*(bar(title, 3, True).disable for bar, title in ((progress_bar, 'a'), (_bar, 'b'))))\n"
    )
    for value, disabled in (("1", "True True"), ("", "False False")):
        environment = os.environ | {"TQDM_DISABLE": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == disabled, done.stderr


def test_the_package_is_typed():
    assert (Path(drum_hf.__file__).parent / "py.typed").is_file()


# Trackers


class Tracker(TrainerCallback):
    """A tracker as transformers knows them: made without arguments, told what is logged."""

    made: list[Tracker]

    def __init__(self) -> None:
        self.logs: list[dict] = []
        Tracker.made.append(self)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train a little, reporting to a tracker by its name; returns the trackers made, and what the seed made of it."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "ours", Tracker)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["ours"])
    rows = make_world(0, difficulty="easy").support
    lvlm = TransformersLVLM.from_pretrained("playground/lvlm", device="cpu")

    def train(report_to: list[str] | str, out: str = "out", seed: int = 0):
        Tracker.made = []
        few = rows.select(rows.ids[:24])
        retriever = DemoRetriever.from_encoder("playground/clip", support=few, strategy="sit", device="cpu")
        arguments = DrumTrainingArguments(
            str(tmp_path / out), rounds=1, epochs_per_round=1, candidates_per_round=3, per_device_train_batch_size=8,
            logging_steps=1, save_strategy="no", use_cpu=True, report_to=report_to, seed=seed,
        )  # fmt: skip
        trainer = DrumTrainer(retriever, lvlm=lvlm, args=arguments)
        trainer.train()
        return Tracker.made, list(trainer.table.rows()), retriever.encode_support()

    return train


def test_trackers_by_name_are_told_every_step(trained):
    (tracker,), *_ = trained(["ours"])
    steps = [logs for logs in tracker.logs if "loss" in logs]
    assert len(steps) == 3 and all(logs["loss"] > 0 and logs["learning_rate"] >= 0 for logs in steps)
    assert "train_loss" in tracker.logs[-1]


def test_the_seed_decides_and_nothing_else_does(trained):
    nobody, table, vectors = trained([])
    assert nobody == []  # no tracker where none is named
    torch.manual_seed(99)  # a user's own seeds don't matter
    np.random.seed(99)
    _, same_table, same_vectors = trained("none", out="again")
    assert same_table == table and np.array_equal(same_vectors, vectors)
    assert trained([], out="other", seed=1)[1] != table
