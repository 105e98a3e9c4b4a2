"""What a library must leave alone: logging, seeds, the network; and what it must pass on: trackers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

import drum_hf
from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, TransformersLVLM
from drum_hf.playground import make_world

#: Every public name, which loads every room.
USE = "import drum_hf\nfor name in drum_hf.__all__: getattr(drum_hf, name)\n"


def run(code: str, **environment: str) -> dict:
    """What a fresh interpreter prints, as JSON."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_importing_leaves_logging_seeds_and_the_network_alone():
    found = run(
        "import json, logging, random, socket, sys\n"
        "import numpy, torch, transformers, sentence_transformers, datasets, faiss, peft\n"
        "def state():\n"
        "    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]\n"
        "    ours = [l for l in loggers if l.name.split('.')[0] == 'drum_hf']\n"
        "    return {'root': [repr(h) for h in logging.root.handlers], 'level': logging.root.level,\n"
        "        'ours': [[l.name, l.level, len(l.handlers)] for l in ours if l.level or l.handlers],\n"
        "        'python': hash(random.getstate()), 'numpy': numpy.random.get_state()[1].tolist(),\n"
        "        'torch': torch.random.get_rng_state().tolist(), 'threads': torch.get_num_threads(),\n"
        "        'deterministic': torch.are_deterministic_algorithms_enabled()}\n"
        "class Refused(socket.socket):\n"
        "    def connect(self, address): raise AssertionError(f'connected to {address}')\n"
        "socket.socket = Refused\n"
        "before = state()\n" + USE + "print(json.dumps([before == state(), state()['ours']]))"
    )
    assert found == [True, []]


def test_offline_is_believed():
    found = run(
        "import json, time\n"
        + USE
        + "from drum_hf.errors import DrumError\n"
        + "import socket\n"
        + "asked = []\n"
        + "real = socket.getaddrinfo\n"
        + "socket.getaddrinfo = lambda *a, **k: asked.append(a[0]) or real(*a, **k)\n"
        + "said = []\n"
        + "for load in (drum_hf.TransformersLVLM.from_pretrained, drum_hf.DemoRetriever.from_pretrained):\n"
        + "    try: load('nobody/nothing-of-the-kind')\n"
        + "    except (DrumError, OSError) as error: said.append(type(error).__name__)\n"
        + "print(json.dumps([said, asked]))",
        HF_HUB_OFFLINE="1",
    )
    assert len(found[0]) == 2 and found[1] == []


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


def test_no_tracker_where_none_is_named(trained):
    assert trained([])[0] == [] == trained("none")[0]


def test_the_seed_decides_and_nothing_else_does(trained):
    import numpy as np
    import torch

    _, table, vectors = trained([])
    torch.manual_seed(99)  # a user's own seeds don't matter
    np.random.seed(99)
    _, same_table, same_vectors = trained([], out="again")
    assert same_table == table and np.array_equal(same_vectors, vectors)
    assert trained([], out="other", seed=1)[1] != table
