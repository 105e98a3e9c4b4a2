"""What one of two processes does in test_processes.py: `RANK=0 WORLD_SIZE=2 … python two_processes.py FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_rows, coloured_table

from drum_hf.data import TripletTable
from drum_hf.errors import ContextOverflowError
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.processes import Processes
from drum_hf.scores.store import ScoreStore
from drum_hf.training import DrumTrainer, DrumTrainingArguments
from drum_hf.training.pricing import price

PAIRS = [(f"r{q}", (f"r{d}",)) for q in range(24) for d in range(24) if q != d and (q * 7 + d * 5) % 4 == 0]


class Faulty(StubLVLM):
    """Takes its time; raises at the batch that it is told."""

    def __init__(self, error: BaseException | None = None, *, at: int = 0, seconds: float = 0.0) -> None:
        super().__init__()
        self.error, self.at, self.seconds, self.batches = error, at, seconds, 0

    def score(self, requests):
        if self.error is not None and self.batches == self.at:
            raise self.error
        self.batches += 1
        time.sleep(self.seconds)
        return super().score(requests)


def without_images(count: int) -> TripletTable:
    """Demonstrations in words, so that only a step's queries pass the image tower."""
    rows = coloured_rows(count)
    return TripletTable.from_dataset([row | {"image": None, "prompt": f"number {i}?"} for i, row in enumerate(rows)])


def make_trainer(clip: Path, out: Path, *, support: Any = None, queries: Any = None, **arguments: Any) -> DrumTrainer:
    """As test_trainer.py makes them."""
    rows = coloured_table(24) if support is None else support
    retriever = DemoRetriever.from_encoder(clip, support=rows, strategy="sit+draft", device="cpu")
    settings: dict[str, Any] = {
        "rounds": 2,
        "epochs_per_round": 1,
        "candidates_per_round": 5,
        "list_size": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    args = DrumTrainingArguments(str(out), **settings | arguments)
    return DrumTrainer(retriever, lvlm=StubLVLM(), args=args, train_dataset=queries)


def fingerprints(encoder: Any) -> dict[str, list[float]]:
    """Name -> three random projections of a parameter; a change of each weight by d shows as about d.

    Without the keys' biases: attention does not depend on them, so they follow rounding alone.
    """
    found = {}
    for name, parameter in encoder.named_parameters():
        if name.endswith("k_proj.bias"):
            continue
        draw = np.random.default_rng(len(name)).normal(size=(3, parameter.numel())) / np.sqrt(parameter.numel())
        found[name] = (draw @ parameter.detach().double().flatten().numpy()).tolist()
    return found


def summary(trainer: DrumTrainer) -> dict[str, Any]:
    weights = fingerprints(trainer.retriever.encoder)
    return {
        "rows": list(trainer.table.rows()),
        "temperature": trainer.loss.temperature.item(),
        "weights": weights,
        "scored": [[q, *ds] for q, ds in trainer.feedback.lvlm.lvlm.scored],
    }


def raised(work: Any) -> list[str]:
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def run(folder: Path) -> dict[str, Any]:
    clip = tiny_clip(folder)
    table = coloured_table(24)
    processes = Processes.current()
    out: dict[str, Any] = {"rank": processes.rank, "count": processes.count}

    # shared scores and drafts: the first 10 pairs are known to the store beforehand
    lvlm = StubLVLM()
    feedback = Feedback(lvlm, table, table, store=ScoreStore(folder / "scores.sqlite"))
    out["scores"] = feedback.score([*PAIRS, PAIRS[0]], processes=processes).tolist()
    out["scored"] = [[q, *ds] for q, ds in lvlm.scored]
    out["again"] = feedback.score(PAIRS, processes=processes).tolist() == out["scores"][:-1]
    out["drafts"] = feedback.drafts(table.ids, processes=processes)
    out["asked"] = [request.query.id for request in lvlm.asked]
    out["new"] = len(feedback.unscored([*PAIRS, ("r0", ())], processes=processes))
    if processes.is_main:  # a call of its own is nobody else's business
        out["alone"] = feedback.zero_shot(["r0", "r1"]).tolist()

    # stores of their own, as two machines have them: what either knows counts
    own = ScoreStore(folder / f"machine{processes.rank}.sqlite")
    machine = Processes(processes.rank, processes.count, local_rank=0)
    mine = Feedback(StubLVLM(), table, table, store=own)
    mine.score(PAIRS[:20] if processes.is_main else PAIRS[10:40])
    before = len(mine.lvlm.lvlm.scored)
    out["machines"] = mine.score(PAIRS, processes=machine).tolist()
    out["by_machine"] = [[q, *ds] for q, ds in mine.lvlm.lvlm.scored[before:]]

    # faults
    def fault(error: BaseException) -> Feedback:
        broken = Faulty(error, at=1) if processes.rank == 1 else Faulty(seconds=0.2)
        return Feedback(CachedLVLM(broken, ScoreStore(), batch_size=2), table, table)

    overflowing, strange = fault(ContextOverflowError("too long; use fewer shots")), fault(KeyError("x"))
    out["overflow"] = raised(lambda: overflowing.score(PAIRS, processes=processes))
    out["batches"] = overflowing.lvlm.lvlm.batches
    out["strange"] = raised(lambda: strange.score(PAIRS, processes=processes))
    out["main fault"] = raised(lambda: processes.from_main(lambda: 1 / 0))
    out["after"] = feedback.score(PAIRS[:5], processes=processes).tolist()  # and all is well again

    # a price
    slow = Feedback(Faulty(seconds=0.001), table, table)
    plan = price(slow, PAIRS, processes=processes, calibrate=16)
    out["plan"] = [plan.new, plan.known, plan.images, plan.paid, plan.describe()]
    left = plan.seconds
    began = time.perf_counter()
    plan.run()
    out["seconds"] = [left, time.perf_counter() - began]
    out["bought"] = [[q, *ds] for q, ds in slow.lvlm.lvlm.scored if ds]

    # training
    trainer = make_trainer(clip, folder / "out")
    trainer.train()
    out["trained"] = summary(trainer)
    trainer = make_trainer(clip, folder / "cached", rounds=1, mini_batch_size=3, gradient_accumulation_steps=2)
    trainer.train()
    out["cached"] = summary(trainer)
    trainer = make_trainer(clip, folder / "words", rounds=1, support=without_images(24), queries=table)
    trainer.train()
    out["words"] = summary(trainer)

    out["too few"] = raised(lambda: make_trainer(clip, folder / "few", per_device_train_batch_size=13))

    # the shipped LVLM, each process at its batches
    from drum_hf.lvlm.local.model import TransformersLVLM

    real = Feedback(TransformersLVLM.from_pretrained("playground/lvlm", device="cpu", dtype="float32"), table, table)
    out["real"] = real.score(PAIRS[:48], processes=processes).tolist()
    return out


def die(folder: Path) -> dict[str, Any]:
    """The other process is killed while this one works."""
    processes = Processes.current()

    def work() -> None:
        if processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    processes.gather(lambda: None)
    return {"gone": raised(lambda: processes.gather(work))}


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    place = Path(sys.argv[1])
    result = die(place) if sys.argv[2:] == ["die"] else run(place)
    (place / f"result{os.environ['RANK']}.json").write_text(json.dumps(result))
