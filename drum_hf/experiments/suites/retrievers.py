"""Trained retrievers of a suite: each trained once, kept beside the results, and gone on with where a run stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data import TripletTable
from ...errors import SavedFileError
from ...retriever.retriever import DemoRetriever
from ...scores.cached import CachedLVLM
from ...training import DrumTrainer, DrumTrainingArguments
from ...training.checkpoints import last_checkpoint
from ...training.methods import METHODS
from ...utils.files import read_json, write_text
from .spec import TrainingSpec

__all__ = ["TrainedRetriever", "train_retriever"]

logger = logging.getLogger(__name__)

_DONE = "training.json"


@dataclasses.dataclass(frozen=True)
class TrainedRetriever:
    """A folder with a retriever, as it was after each round.

    Attributes:
        folder: it holds `round-1`, …, saved without the support set, and `training.json`.
        pairs: scored pairs in all after each round.
    """

    folder: Path
    pairs: tuple[int, ...]

    @classmethod
    def find(cls, folder: Path) -> TrainedRetriever | None:
        """What an earlier run finished here, or None."""
        path = folder / _DONE
        if not path.is_file():
            return None
        try:
            return cls(folder, tuple(int(n) for n in read_json(path)["pairs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SavedFileError(f"{path}: expected what a training left ({error}); delete {folder}") from error

    def load(self, support: TripletTable, *, round: int | None = None) -> DemoRetriever:
        """The retriever after a round; None: after the last."""
        return DemoRetriever.from_pretrained(self.folder / f"round-{round or len(self.pairs)}", support=support)


def train_retriever(
    method: str,
    folder: Path,
    *,
    support: TripletTable,
    lvlm: CachedLVLM,
    encoder: str,
    training: TrainingSpec,
    seed: int,
    choices: Sequence[str] = (),
    draft_tokens: int = 32,
) -> TrainedRetriever:
    """Train a method of `METHODS`, or go on with a training that was stopped.

    Every method gets the same start, rounds, pairs, epochs and learning rate; what differs is in its `training`.

    Args:
        folder: as `TrainedRetriever` has it. While the training goes on it also holds the platform's checkpoints, one
            an epoch, from which a later call goes on.
        lvlm: its store keeps every score.
    """
    from transformers import set_seed

    chosen = METHODS[method]
    rounds, candidates = training.schedule(len(support))
    work = folder / "training"
    common: dict[str, Any] = {
        "output_dir": str(work),
        "rounds": rounds,
        "candidates_per_round": candidates,
        "epochs_per_round": training.epochs,
        "set_level_rounds": training.set_level_rounds,
        "learning_rate": training.learning_rate,
        "per_device_train_batch_size": training.batch_size,
        "list_size": training.list_size,
        "draft_tokens": draft_tokens,
        "warmup_steps": 0.1,  # a share of all steps
        "seed": seed,
        "score_store": str(lvlm.store.path),
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = DrumTrainingArguments(**common | dict(chosen.training))
    set_seed(seed)  # adapters start at random: from here, not from whatever ran before
    retriever = DemoRetriever.from_encoder(encoder, support=support, strategy=chosen.query, lora=training.lora)

    def keep_round(trainer: DrumTrainer, done: int) -> None:
        if done < arguments.rounds:
            trainer.retriever.save_pretrained(folder / f"round-{done}", include_support=False)

    trainer = DrumTrainer(retriever, lvlm=lvlm, args=arguments, choices=choices, on_round_end=keep_round)
    checkpoint = last_checkpoint(work)
    if checkpoint is not None:
        logger.info("%s goes on from %s", method, checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    pairs = tuple(trainer.table.bought)
    retriever.save_pretrained(folder / f"round-{len(pairs)}", include_support=False)
    write_text(folder / _DONE, json.dumps({"method": method, "seed": seed, "pairs": pairs}))
    shutil.rmtree(work, ignore_errors=True)
    return TrainedRetriever(folder, pairs)
