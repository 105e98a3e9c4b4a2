"""`drum-hf bench cascade`: what a `Cascade` saves, and what it costs in agreement and in the trained retriever."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data import TripletTable
from ...evaluation.evaluator import ICLEvaluator
from ...evaluation.rankings import ndcg_at_k
from ...evaluation.strategies import Retrieved
from ...lvlm.local.model import TransformersLVLM
from ...retriever.retriever import DemoRetriever
from ...scores.cascade import Cascade
from ...scores.feedback import Feedback
from ...scores.store import ScoreStore
from ...training import CandidateTable, DrumTrainer, mine_candidates
from ...types import Task
from ..demo import TASK_METRICS, Settings, training_arguments

__all__ = ["bench_cascade", "describe"]

logger = logging.getLogger(__name__)


def bench_cascade(
    *,
    support: TripletTable,
    queries: TripletTable,
    task: Task = "vqa",
    keeps: Sequence[float] = (0.3, 0.5, 0.7),
    factor: int = 4,
    candidates: int = 20,
    train: bool = False,
    shots: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare cascades with the LVLM's own ranking, by the playground's models.

    Args:
        support, queries: where demonstrations come from, and what is asked, such as a playground world's.
        task: theirs.
        keeps: shares of the pairs that the LVLM scores itself.
        factor: image tokens joined into one by the cheaper LVLM.
        candidates: proposed for each query by the untrained encoder, half of them at random.
        train: also train a retriever with each cascade, and measure it on the world's queries.
        shots: demonstrations it is measured with.

    Returns:
        `token_share` (the cheaper LVLM's tokens a pair against the LVLM's) and `cascades`: for each keep, 1.0 too,
        `calls` (share of the pairs that the LVLM scored), `cost` (calls and cheaper calls, in tokens of the LVLM),
        `top1` (queries whose best candidate stays the best), `ndcg` (at 10, gains being the probability of the gold
        response relative to the query's best), and with `train` `metric` and `pairs_in_table`.
    """
    lvlm = TransformersLVLM.from_pretrained("playground/lvlm")
    cheap = lvlm.with_fewer_image_tokens(factor)
    choices = support.label_set if task == "classification" else ()
    with tempfile.TemporaryDirectory() as folder, ScoreStore(Path(folder) / "scores.sqlite") as store:
        full, less = (Feedback(m, support, support, store=store, choices=choices) for m in (lvlm, cheap))
        retriever = DemoRetriever.from_encoder("playground/clip", support=support, strategy="sit")
        mined = mine_candidates(
            retriever,
            CandidateTable(support.ids),
            support.query,
            count=candidates,
            random_share=0.5,
            rng=np.random.default_rng(seed),
        )
        pairs = [(query, (candidate,)) for query, found in mined.items() for candidate, _ in found]
        truth = full.score(pairs)
        sample = [full.request(*pair) for pair in pairs[:64]]
        token_share = sum(cheap.count_tokens(sample)) / sum(lvlm.count_tokens(sample))
        rows = np.array([query for query, _ in pairs])
        own = [np.flatnonzero(rows == query) for query in dict.fromkeys(rows)]
        results = []
        for keep in (*keeps, 1.0):
            cascade = Cascade(full, less, keep=keep, seed=seed)
            scores = cascade.score(pairs) if keep < 1.0 else truth
            calls = cascade.report.full / len(pairs) if cascade.report else 1.0
            gains = [np.exp(truth[i] - truth[i].max()) for i in own]
            orders = [np.argsort(-scores[i], kind="stable") for i in own]
            best = [truth[i][o[0]] == truth[i].max() for i, o in zip(own, orders, strict=True)]
            agreement = [ndcg_at_k(g[o], g, 10) for g, o in zip(gains, orders, strict=True)]
            result: dict[str, Any] = {
                "keep": keep,
                "calls": round(calls, 3),
                "cost": round(calls + (token_share if keep < 1.0 else 0.0), 3),
                "top1": round(float(np.mean(best)), 4),
                "ndcg": round(float(np.mean(agreement)), 4),
            }
            if train:
                result |= _trained(
                    support, queries, task, lvlm, cheap, store, keep, choices, shots, seed, Path(folder)
                )
            logger.info("%s", result)
            results.append(result)
    return {
        "task": task,
        "factor": factor,
        "pairs": len(pairs),
        "token_share": round(token_share, 3),
        "shots": shots if train else None,
        "cascades": results,
    }


def _trained(
    support: TripletTable,
    queries: TripletTable,
    task: Task,
    lvlm: TransformersLVLM,
    cheap: TransformersLVLM,
    store: ScoreStore,
    keep: float,
    choices: Sequence[str],
    shots: int,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """A retriever trained with the cascade, and how the LVLM answers with what it retrieves."""
    retriever = DemoRetriever.from_encoder("playground/clip", support=support, strategy="sit+draft")
    arguments = training_arguments(folder / f"keep-{keep}", Settings(seed=seed), store.path, cascade_keep=keep)
    trainer = DrumTrainer(retriever, lvlm=lvlm, cheap_lvlm=cheap, args=arguments, choices=choices)
    trainer.train()
    asked = Feedback(lvlm, support, queries, store=store, choices=choices)
    drafts = dict(zip(queries.ids, asked.drafts(queries.ids), strict=True))
    evaluator = ICLEvaluator(asked.lvlm, support, queries, metric=TASK_METRICS[task], drafts=drafts)
    result = evaluator.evaluate(Retrieved("drum", retriever), shots)
    return {"metric": round(100 * result.mean, 1), "pairs_in_table": len(trainer.table)}


def describe(result: dict[str, Any]) -> str:
    """A table for a terminal."""
    lines = [
        f"{result['task']}, world {result['world_seed']}, {result['pairs']} pairs; the cheaper LVLM runs "
        f"{result['token_share']:.0%} of the tokens",
        "keep   LVLM calls   cost   top-1   NDCG@10" + ("   metric" if result["shots"] else ""),
    ]
    for row in result["cascades"]:
        tail = f"   {row['metric']:6.1f}" if result["shots"] else ""
        spent = f"{row['keep']:4.1f}   {row['calls']:10.0%}   {row['cost']:4.2f}"
        lines.append(f"{spent}   {row['top1']:5.1%}   {row['ndcg']:7.4f}{tail}")
    return "\n".join(lines)
