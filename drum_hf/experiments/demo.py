"""The main job: do demonstrations chosen with an LVLM's feedback beat those chosen by similarity, on this data?

Baselines, DRUM and EPR are given the same encoder to start from, the same mining rounds, the same number of LVLM calls
and the same training settings. What differs is the loss, EPR's way of drawing its lists, and that the calls of DRUM's
last round show two demonstrations: the candidate and the one that served best.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import TripletTable
from ..errors import EmptySupportError, TooFewDemonstrationsError
from ..evaluation.evaluator import ICLEvaluator, StrategyResult
from ..evaluation.metrics import Metric, get_metric
from ..evaluation.registry import STRATEGIES, Comparison, check_names, make_strategy, missing_part, takes_selector
from ..evaluation.statistics import paired_bootstrap
from ..evaluation.strategies import Retrieved, SameAnswerOracle, ScoreOracle, Strategy
from ..retriever.retriever import DemoRetriever
from ..scores.cached import CachedLVLM
from ..scores.feedback import Feedback
from ..scores.store import ScoreStore
from ..selection import Order
from ..training import DrumTrainer, DrumTrainingArguments, methods
from ..training.methods import Method
from ..training.pricing import ScorePlan, plan_scores
from ..types import LVLM
from ..utils.files import write_text
from ..utils.manifest import write_manifest
from .examples import at_their_best, pick_rows, shown_column
from .plots import plot_shots
from .report import limits, write_report

__all__ = ["TRAINED", "ScorePlan", "Settings", "evaluate_strategies", "plan_scores", "run_experiment", "split_table"]

logger = logging.getLogger(__name__)

#: The methods that an experiment trains.
TRAINED: dict[str, Method] = {name: methods.METHODS[name] for name in ("drum", "drum-rank", "epr")}

#: Task of a comparison -> the pipeline that does it.
PIPELINES = {
    "vqa": "icl-vqa",
    "classification": "icl-image-classification",
    "captioning": "icl-image-captioning",
}
TASK_METRICS = {"vqa": "exact_match", "classification": "top1", "captioning": "cider_d"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all strategies of one comparison share.

    Attributes:
        shots: the number of demonstrations that the headline is about.
        by_shots: further numbers of demonstrations to evaluate at.
        rounds, candidates, epochs: mining rounds, pairs that a query buys in each, epochs in each.
        learning_rate, batch_size, list_size: of training; the same for every method.
        set_level_rounds: last rounds that set-level score; for DRUM, since its ancestors score alone.
        random_seeds: how many seeds the random and fixed strategies are averaged over.
        oracle: "answer" (rows with the gold answer), "score" (the LVLM's own exhaustive ranking, queries x support
            set calls) or "none".
        lora: train adapters rather than all weights.
        seed: of training and sampling.
    """

    shots: int = 4
    by_shots: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3
    candidates: int = 10
    epochs: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 64
    list_size: int = 8
    set_level_rounds: int = 1
    random_seeds: int = 3
    oracle: str = "answer"
    lora: bool = False
    seed: int = 0
    max_new_tokens: int = 32


def split_table(table: TripletTable, *, queries: float = 0.2, seed: int = 0) -> tuple[TripletTable, TripletTable]:
    """Split a table into support set and queries, whole groups and equal pictures kept on one side.

    Args:
        queries: share of rows to be asked.

    Raises:
        EmptySupportError: all rows belong together.
    """
    rng = np.random.default_rng(seed)
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row_id, group, picture, asked_of in zip(
        table.ids, table.groups, table.image_keys, table.query_keys, strict=True
    ):
        # without a picture, the same prompt is what gives a query away
        parent[root(f"row {row_id}")] = root(f"content {picture or asked_of}")
        if group is not None:
            parent[root(f"row {row_id}")] = root(f"group {group}")
    blocks: dict[str, list[str]] = {}
    for row_id in table.ids:
        blocks.setdefault(root(f"row {row_id}"), []).append(row_id)
    names = list(blocks)
    wanted = max(1, round(len(table) * queries))
    asked: set[str] = set()
    for i in rng.permutation(len(names)):
        if len(asked) >= wanted:
            break
        if len(asked) + len(blocks[names[i]]) < len(table):
            asked.update(blocks[names[i]])
    if not asked:
        groups = {group for group in table.groups if group is not None}
        is_one_picture = len(set(table.image_keys)) == 1 and any(table.image_keys)
        joined = "one prompt, or groups that share pictures"
        joined = "one picture" if is_one_picture else f"the group {groups.pop()!r}" if len(groups) == 1 else joined
        raise EmptySupportError(
            f"expected rows that can be split into demonstrations and queries, but {joined} holds all {len(table)} "
            "rows together; give rows other groups (column 'group'), or name a table of queries (--queries)"
        )
    return table.without(sorted(asked)), table.select([i for i in table.ids if i in asked])


def _row(result: StrategyResult) -> dict[str, Any]:
    return result.to_dict()


@dataclasses.dataclass
class _Run:
    """One comparison under way."""

    evaluator: ICLEvaluator
    settings: Settings
    comparison: Comparison
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    results: dict[tuple[str, int], StrategyResult] = dataclasses.field(default_factory=dict)

    def evaluate(self, strategy: Strategy | Sequence[Strategy], shots: Sequence[int]) -> None:
        for count in shots:
            result = self.evaluator.evaluate(strategy, count)
            self.results[result.strategy, count] = result
            row = self.rows.setdefault(result.strategy, {"by_shots": {}})
            row["by_shots"][str(count)] = _row(result)
            if count == self.settings.shots:
                row.update(_row(result))
        used = f" at {self.settings.shots} shots" if any(result.ids) else ""
        logger.info("%s: %.3f%s", result.strategy, self.rows[result.strategy]["metric"], used)

    def evaluate_named(
        self, name: str, shots: Sequence[int], *, retriever: DemoRetriever | None = None, selector: str | None = None
    ) -> None:
        """A strategy of the registry, over several seeds where it is seeded."""
        chosen_by = selector if takes_selector(name) else None
        seeds = range(self.settings.random_seeds if STRATEGIES[name].seeded else 1)
        self.evaluate(
            [make_strategy(name, self.comparison, seed=s, retriever=retriever, selector=chosen_by) for s in seeds],
            shots,
        )


def run_experiment(
    support: TripletTable,
    queries: TripletTable,
    *,
    lvlm: LVLM,
    encoder: str,
    task: str,
    out_dir: str | Path,
    settings: Settings | None = None,
    metric: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate every strategy, train DRUM and EPR, write report, plots and JSON, and save the trained retriever.

    Args:
        support, queries: where demonstrations come from, and what is asked.
        lvlm: answers, drafts and gives feedback.
        encoder: directory or Hub id of a CLIP or SigLIP.
        task: "vqa", "classification" or "captioning"; picks the metric unless `metric` names one.
        out_dir: gets `report.html`, plots, `results.json`, `values.json` (the metric of every query at each budget of
            scored pairs), `retriever/` and the score store. Run again on the same folder, and nothing that was scored
            or generated is paid for twice.
        facts: more entries for the results (the world's seed, the command).

    Returns:
        The results, JSON-ready.
    """
    from transformers import set_seed

    settings = settings or Settings()
    began = time.perf_counter()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    logger.info("%s: %d demonstrations, %d queries", task, len(support), len(queries))
    store = ScoreStore(out / "scores.sqlite")
    cached = CachedLVLM(lvlm, store)
    choices = support.label_set if task == "classification" else ()
    every_choice, told = choices_of(support, queries, task)
    asked = Feedback(cached, support, queries, choices=every_choice, max_new_tokens=settings.max_new_tokens)
    drafts = dict(zip(queries.ids, asked.drafts(queries.ids), strict=True))
    evaluator = ICLEvaluator(
        cached,
        support,
        queries,
        metric=metric or TASK_METRICS[task],
        drafts=drafts,
        max_new_tokens=settings.max_new_tokens,
    )
    comparison = Comparison(support, queries, asked, encoder, task, drafts, lora=settings.lora)
    run = _Run(evaluator, settings, comparison)
    every = sorted({settings.shots, *settings.by_shots})
    run.evaluate_named("zero-shot", [settings.shots])
    run.rows["zero-shot"]["by_shots"] = {}
    baselines = ("random", "fixed", "si", "st", "sit", "sit+draft", "bm25")
    left_out = left_out_of(baselines, support, queries)
    for name in baselines:
        if name not in left_out:
            run.evaluate_named(name, every)
    told += left_out.values()
    for sentence in told:
        logger.warning("%s", sentence)
    if settings.oracle != "none":
        run.evaluate(SameAnswerOracle(support, queries) if settings.oracle == "answer" else ScoreOracle(asked), every)
        if settings.oracle == "score":
            run.rows["oracle"]["label"] = "oracle (the LVLM's own ranking)"

    start = run.results["sit+draft", settings.shots]
    curves: dict[str, list[tuple[int, StrategyResult]]] = {}
    trained: dict[str, DemoRetriever] = {}
    doubts: dict[str, None] = {}
    for name, method in TRAINED.items():
        curve = curves[name] = [(0, start)]
        set_seed(settings.seed)  # adapters start at random: the same for every method
        retriever = DemoRetriever.from_encoder(encoder, support=support, strategy=method.query, lora=settings.lora)

        def after_round(trainer: DrumTrainer, _: int, name: str = name, curve: list = curve) -> None:
            result = evaluator.evaluate(Retrieved(name, trainer.retriever), settings.shots)
            curve.append((len(trainer.table), result))
            logger.info("%s after %d scored pairs: %.3f", name, *(curve[-1][0], result.mean))

        trainer = DrumTrainer(
            retriever,
            lvlm=cached,
            args=training_arguments(out / "training" / name, settings, store.path, **method.training),
            choices=choices,
            on_round_end=after_round,
        )
        trainer.train()
        doubts |= dict.fromkeys(trainer.doubts)
        trained[name] = retriever
        run.evaluate(Retrieved(name, retriever), every)
        run.rows[name]["by_pairs"] = [[pairs, result.mean] for pairs, result in curve]
        run.rows[name]["by_round"] = [result.mean for _, result in curve[1:]]

    paired: dict[str, Any] = {}
    untrained = [name for name in run.rows if name not in TRAINED and not name.startswith("oracle")]
    rival = max(untrained, key=lambda name: run.rows[name]["metric"])
    for other in dict.fromkeys(("sit+draft", "epr", "drum-rank", rival)):
        ours, theirs = run.results["drum", settings.shots], run.results[other, settings.shots]
        paired[f"drum - {other}"] = dataclasses.asdict(paired_bootstrap(ours.values, theirs.values))
    by_pairs = [
        [pairs, dataclasses.asdict(paired_bootstrap(ours.values, theirs.values))]
        for (pairs, ours), (_, theirs) in zip(curves["drum"][1:], curves["epr"][1:], strict=True)
    ]
    results: dict[str, Any] = {
        "task": task,
        "shots": settings.shots,
        "metric_name": evaluator.metric.label,
        "queries": len(queries),
        "limits": [*doubts, *told],
        "seconds": round(time.perf_counter() - began, 1),
        "scored_pairs": max(len_ for len_, _ in curves["drum"]),
        "strategies": run.rows,
        "paired": paired,
        "paired_by_pairs": {"drum - epr": by_pairs},
        "settings": dataclasses.asdict(settings) | {"by_shots": every},
        **(facts or {}),
    }
    values = {name: {str(pairs): r.values.round(6).tolist() for pairs, r in curve} for name, curve in curves.items()}
    write_text(out / "values.json", json.dumps(values))
    _tell(trained["drum"], results, evaluator.metric, out)
    trained["drum"].save_pretrained(out / "retriever")
    shown_of = {"SIT + draft": comparison.untrained("sit+draft"), "DRUM": trained["drum"]}
    examples = make_examples(run, asked, shown_of, drafts)
    write_report(results, examples, out)
    write_manifest(
        out,
        seed=settings.seed,
        data={"support": support.fingerprint, "queries": queries.fingerprint},
        lvlm=lvlm,
        settings=results["settings"],
    )
    return results


def choices_of(support: TripletTable, queries: TripletTable, task: str) -> tuple[tuple[str, ...], list[str]]:
    """What a classification's queries are scored over, and a sentence on classes that only queries have.

    Such a class is scored beside the others, and is never the answer. Of other tasks both are empty.
    """
    if task != "classification":
        return (), []
    unseen = sorted(set(queries.label_set) - set(support.label_set))
    rows = sum(label in set(unseen) for label in queries.labels)
    names = ", ".join(map(repr, unseen[:5])) + (", …" if len(unseen) > 5 else "")
    said = (
        f"{rows} of {len(queries)} queries have labels that no demonstration has ({names}), and count as wrong: add "
        "demonstrations of them, or drop these queries."
    )
    return (*support.label_set, *unseen), [said] if unseen else []


def left_out_of(names: Sequence[str], support: TripletTable, queries: TripletTable) -> dict[str, str]:
    """The strategies that these tables don't allow, and of each a sentence on what is missing."""
    missing = {name: missing_part(name, support, queries) for name in names}
    return {
        name: f"{STRATEGIES[name].label} is left out: it compares {part}s, and the tables have none."
        for name, part in missing.items()
        if part is not None
    }


def _tell(retriever: DemoRetriever, results: Mapping[str, Any], metric: Metric, out: Path) -> None:
    """Put what was measured, baselines too, on the retriever's card."""
    shots, label, rows = results["shots"], results["metric_name"], results["strategies"]
    plotted = plot_shots(results, out / "shots.png")
    retriever.plot = plotted.read_bytes()
    retriever.teacher = {**(retriever.teacher or {}), "task": PIPELINES[results["task"]]}
    table = [{"strategy": row.get("label", name), label: row["metric"] * metric.scale} for name, row in rows.items()]
    ours = rows["drum"]
    rounds = [
        {"round": number, "scored pairs": pairs, label: value * metric.scale}
        for number, (pairs, value) in enumerate(ours["by_pairs"][1:], start=1)
    ]
    (found,) = limits(results).values()
    dataset = str(results.get("data") or results.get("world") or results["task"])
    retriever.card_data |= {
        "rounds": rounds,
        "results": table,
        "results_note": f"{label} at {shots} demonstrations, on held-out queries.",
        "metrics": [metric.name],
        "limits": found,
        "model_index": [
            {"dataset": Path(dataset).name, "metric": metric.name, "value": ours["metric"] * metric.scale}
        ],
    }


def training_arguments(folder: Path, settings: Settings, store: Any, **different: Any) -> DrumTrainingArguments:
    """The same arguments for every method but for `different`."""
    same: dict[str, Any] = {
        "set_level_rounds": settings.set_level_rounds,
        "draft_tokens": settings.max_new_tokens,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return DrumTrainingArguments(
        output_dir=str(folder),
        rounds=settings.rounds,
        epochs_per_round=settings.epochs,
        candidates_per_round=settings.candidates,
        list_size=settings.list_size,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=0.1,
        seed=settings.seed,
        score_store=str(store),
        report_to=[],
        **same | different,
    )


def make_examples(
    run: _Run, asked: Feedback, retrievers: Mapping[str, DemoRetriever], drafts: Mapping[str, str], count: int = 12
) -> list[dict[str, Any]]:
    """For a dozen queries, what similarity chose beside what DRUM chose: drawn evenly over who was right."""
    shots, queries = run.settings.shots, run.evaluator.queries
    names = {"SIT + draft": "sit+draft", "DRUM": "drum"}
    results = {title: run.results[name, shots] for title, name in names.items()}
    best = {title: at_their_best(result.values) for title, result in results.items()}
    rows = pick_rows([best[title] for title in names], count)
    ids = [queries.ids[r] for r in rows]
    bare = dict(zip(ids, asked.zero_shot(ids), strict=True))
    examples = []
    for row, query_id in zip(rows, ids, strict=True):
        gold = queries[query_id]
        columns = {}
        for title, retriever in retrievers.items():
            result = results[title]
            query = queries.query(query_id, draft=drafts[query_id])
            found = retriever(query, k=min(shots, len(retriever)))
            utilities = asked.score([(query_id, (d.id,)) for d in found.demonstrations]) - bare[query_id]
            columns[title] = shown_column(
                found.demonstrations,
                result.answers[row],
                bool(best[title][row]),
                scores=found.scores,
                utilities=utilities,
            )
        about = {"image": gold.image, "prompt": gold.prompt, "gold": gold.response, "draft": drafts[query_id]}
        examples.append({"query": about, "columns": columns})
    return examples


def evaluate_strategies(
    support: TripletTable,
    queries: TripletTable,
    *,
    names: Sequence[str],
    shots: Sequence[int],
    lvlm: LVLM,
    encoder: str,
    task: str,
    retriever: DemoRetriever | Mapping[str, DemoRetriever] | None = None,
    metric: str | None = None,
    store: Path | None = None,
    order: Order = "best_last",
    selector: str | None = None,
    random_seeds: int = 3,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Evaluate strategies by name. Results as `run_experiment` has them.

    Args:
        names: of `drum_hf.evaluation.registry.STRATEGIES`.
        retriever: trained ones by the names of their strategies; one alone is "drum".
        order: in which demonstrations are shown.
        selector: chooses among what retrievers found; strategies without one are evaluated as they are.
        random_seeds: how many seeds the seeded strategies are averaged over.

    Raises:
        ValueError: an unknown name, or a trained strategy without its retriever.
        TooFewDemonstrationsError: more shots than demonstrations.
    """
    given = {"drum": retriever} if isinstance(retriever, DemoRetriever) else dict(retriever or {})
    check_names([*names, *given])
    for name in names:
        if STRATEGIES[name].trained and name not in given:
            raise ValueError(f"strategy {name!r} needs a trained retriever: pass --retriever {name}=FOLDER")
    if max(shots, default=0) > len(support):
        raise TooFewDemonstrationsError(
            f"expected at most {len(support)} shots, as many as there are demonstrations, got {max(shots)}; ask for "
            "fewer, or give more demonstrations"
        )
    measured = get_metric(metric or TASK_METRICS[task])
    began = time.perf_counter()
    cached = CachedLVLM(lvlm, ScoreStore(store or ":memory:"))
    every_choice, told = choices_of(support, queries, task)
    asked = Feedback(cached, support, queries, choices=every_choice, max_new_tokens=max_new_tokens)
    drafts: dict[str, str] = {}
    if any(STRATEGIES[name].needs_draft for name in names) or any(r.uses_drafts for r in given.values()):
        drafts = dict(zip(queries.ids, asked.drafts(queries.ids), strict=True))
    evaluator = ICLEvaluator(
        cached,
        support,
        queries,
        metric=measured,
        order=order,
        drafts=drafts,
        max_new_tokens=max_new_tokens,
    )
    comparison = Comparison(support, queries, asked, encoder, task, drafts)
    run = _Run(evaluator, Settings(shots=max(shots), random_seeds=random_seeds), comparison)
    left_out = left_out_of(names, support, queries)
    for name in names:
        if name not in left_out:
            run.evaluate_named(name, sorted(shots), retriever=given.get(name), selector=selector)
    if not run.rows:
        raise EmptySupportError(f"expected a strategy that these tables allow: {' '.join(left_out.values())}")
    return {
        "task": task,
        "shots": max(shots),
        "metric_name": evaluator.metric.label,
        "queries": len(queries),
        "limits": [*told, *left_out.values()],
        "seconds": round(time.perf_counter() - began, 1),
        "strategies": run.rows,
    }
