"""What each process of a training does in test_world_size.py: train from the start, or go on with what two began."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tiny_encoders import tiny_clip
from two_processes import make_trainer, summary

from drum_hf.scores.processes import Processes
from drum_hf.training import CandidateTable


def run(folder: Path, mode: str, **arguments: Any) -> dict[str, Any]:
    """Two rounds of an epoch each, saved after both; or the second alone, with an empty store of scores."""
    count = Processes.current().count
    if mode == "resume":
        arguments |= {"score_store": str(folder / f"again{count}{arguments}.sqlite")}
    trainer = make_trainer(tiny_clip(folder), folder / "run", save_strategy="epoch", **arguments)
    with mock.patch.object(CandidateTable, "save", autospec=True, side_effect=CandidateTable.save) as saved:
        trainer.train(str(folder / "run" / "checkpoint-3") if mode == "resume" else None)
    counts = {"saves": saved.call_count, "step": trainer.state.global_step, "epoch": trainer.state.epoch}
    return summary(trainer) | counts | {"bought": trainer.table.bought}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / f"result{os.environ['RANK']}.json").write_text(json.dumps(run(place, sys.argv[2])))
