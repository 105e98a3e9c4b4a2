"""What each of several processes computes in test_gathering.py: the loss of its share of a batch, and its gradient."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_training import coloured_table
from two_processes import make_trainer, raised, summary

from drum_hf.scores.sharding import Processes
from drum_hf.training import DrumTrainer, ListwiseLVLMLoss
from drum_hf.training.losses import ListBatch, join_batches

BATCH = 12
KINDS: dict[str, dict[str, Any]] = {
    "soft": {},
    "best": {"in_batch": "best", "weighting": "rank"},
    "contrastive": {"loss": "contrastive"},
    "cached": {"mini_batch_size": 3},
    "cached best": {"mini_batch_size": 3, "in_batch": "best"},
    "frozen": {"frozen_candidates": True},
    "frozen cached": {"frozen_candidates": True, "mini_batch_size": 3},
}


def prepared(folder: Path, kind: str, **more: Any) -> DrumTrainer:
    """A trainer of `rank_weight` 0.3 whose queries have scores of half of all demonstrations; two have none."""
    settings = {"rank_weight": 0.3, "rounds": 1, "list_size": 6, "per_device_train_batch_size": 4}
    trainer = make_trainer(
        folder / "clip", folder / "out", support=coloured_table(24), **settings | KINDS[kind] | more
    )
    rng, ids = np.random.default_rng(5), trainer.queries.ids
    groups = dict(zip(ids, trainer.queries.groups, strict=True))
    mined = {}
    for query in ids:
        allowed = [c for c in ids if c != query and (groups[c] is None or groups[c] != groups[query])]
        drawn = rng.permutation(allowed)[:12].tolist()
        mined[query] = [] if query in ("r1", "r5") else [(c, place) for place, c in enumerate(drawn)]
    trainer.table.extend(mined, rng.normal(-1.5, 0.7, sum(map(len, mined.values()))))
    return trainer


def step(trainer: DrumTrainer, rows: list[int]) -> dict[str, Any]:
    """Loss and gradients of these queries' lists."""
    trainer.loss.zero_grad()
    lists = [trainer.train_dataset[row] for row in rows]
    loss = trainer.loss(*trainer.collect_features(dict(trainer.data_collator(lists))))
    loss.backward()
    grads = {n: p.grad for n, p in trainer.loss.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "grads": grads, "shown": [set(row["candidates"]) for row in lists]}


def share(rows: list[int]) -> list[int]:
    """This process's part of a batch."""
    processes = Processes.current()
    size = len(rows) // processes.count
    return rows[processes.rank * size : (processes.rank + 1) * size]


def mean_step(trainer: DrumTrainer, rows: list[int]) -> dict[str, Any]:
    """Loss and gradients of the processes' shares, averaged over the processes as DDP does."""
    processes = Processes.current()
    out = step(trainer, share(rows))
    processes.average([out["loss"], *out["grads"].values()])
    return {"loss": out["loss"].item(), "grads": {n: g.flatten().tolist() for n, g in out["grads"].items()}}


def plain(gather_negatives: bool) -> dict[str, Any]:
    """The loss of a plain data set's columns: vectors that depend on the row alone."""
    processes = Processes.current()
    loss = ListwiseLVLMLoss(torch.nn.Identity(), rank_weight=0.3, gather_negatives=gather_negatives)
    queries, demonstrations, scores = plain_columns()
    mine = share(list(range(len(queries))))
    reps = [queries[mine], *(column[mine] for column in demonstrations)]
    for rep in reps:
        rep.requires_grad_()
    value = loss.calculate_loss([[rep] for rep in reps], scores[mine])
    value.backward()
    parts = [None] * processes.count
    dist.all_gather_object(parts, [value.item(), [(rep.grad / processes.count).tolist() for rep in reps]])
    return {"loss": float(np.mean([part[0] for part in parts])), "grads": [part[1] for part in parts]}


def plain_columns() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(4)

    def unit() -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(6, 8, generator=draw), dim=-1)

    return unit(), [unit() for _ in range(3)], torch.randn(6, 3, generator=draw) - 1


def run(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in KINDS:
        trainer = prepared(folder, kind)
        out[kind] = mean_step(trainer, list(range(BATCH)))
        out[f"{kind} empty"] = mean_step(trainer, [1, 5] * 3)
    out["apart"] = mean_step(prepared(folder, "soft", gather_negatives=False), list(range(BATCH)))
    out["plain"], out["plain apart"] = plain(True), plain(False)
    zeros = torch.zeros(1, 1)
    bare = ListBatch(zeros.long(), zeros, zeros > 0, zeros, zeros > 0)
    out["bare"] = raised(lambda: join_batches(zeros, bare))
    for kind in ("soft", "cached"):
        trainer = make_trainer(folder / "clip", folder / "run", rounds=1, epochs_per_round=2, **KINDS[kind])
        trainer.train()
        out[f"trained {kind}"] = summary(trainer)
    return out


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / f"result{os.environ['RANK']}.json").write_text(json.dumps(run(place)))
