"""Carrying a suite out: every cell once, whatever stopped the run before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data import TripletTable
from ...evaluation.evaluator import ICLEvaluator
from ...evaluation.registry import STRATEGIES, Comparison, make_strategy
from ...evaluation.untrained import UntrainedRetrievers
from ...retriever.retriever import DemoRetriever
from ...scores.cached import CachedLVLM
from ...scores.feedback import Feedback
from ...scores.store import ScoreStore
from ...training.arguments import own_arguments
from ...training.methods import METHODS
from ...types import LVLM
from ..demo import TASK_METRICS, choices_of, left_out_of
from ..examples import at_their_best, pick_rows, shown_column
from .cells import Cell, CellFiles, Values, digest
from .opening import MakeWorld, encoder_key, open_data, open_lvlm
from .results import data_title, label_of
from .retrievers import TrainedRetriever, train_retriever
from .spec import DataSpec, LVLMSpec, SuiteSpec, split_name

__all__ = ["SuiteRun", "cells_of"]

logger = logging.getLogger(__name__)

#: Queries of each data set that the report shows; and what it shows of them, the first of each that there is.
_EXAMPLES = 6
_UNTRAINED = ("sit+draft", "sit", "si", "random")
_TRAINED = ("drum", "drum-rank", "epr", "udr", "msier")


def cells_of(spec: SuiteSpec, data: DataSpec, data_seed: int, lvlm: LVLMSpec, encoder: str) -> list[Cell]:
    """Every cell of one data set (and its seed) under one LVLM and one encoder, in the order they are carried out."""
    trained_on = "" if lvlm in spec.lvlms else spec.lvlms[0].name
    names = list(spec.transferred() if trained_on else spec.strategies)
    if 0 in spec.shots and "zero-shot" not in names:
        names.insert(0, "zero-shot")  # what every strategy is with no demonstration
    cells = []
    for name in names:
        base, selector = split_name(name)
        about = STRATEGIES[base]
        where = (data.name, data_seed, lvlm.name, trained_on if about.trained else "", encoder, name)
        seeds = spec.seeds if about.trained else range(spec.random_seeds) if about.seeded else (0,)
        for seed in seeds:
            if about.trained and selector is None and not trained_on and name in spec.curves and spec.headline:
                rounds = len(spec.training.pairs) or spec.training.rounds
                cells += [Cell(*where, seed, spec.headline, done) for done in range(1, rounds)]
            counts = [0] if base == "zero-shot" else [n for n in spec.shots if n > 0]
            cells += [Cell(*where, seed, count) for count in counts]
    return cells


@dataclasses.dataclass
class _Bench:
    """One data set under one LVLM and one encoder, with what its cells share, made when first needed."""

    data: DataSpec
    support: TripletTable
    queries: TripletTable
    lvlm: CachedLVLM
    encoder: str
    lora: bool
    evaluators: dict[bool, ICLEvaluator] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def feedback(self) -> Feedback:
        return Feedback(
            self.lvlm, self.support, self.queries, choices=self.asked[0], max_new_tokens=self.data.max_new_tokens
        )

    @functools.cached_property
    def asked(self) -> tuple[tuple[str, ...], list[str]]:
        """What queries are scored over, and what is to be told of it."""
        return choices_of(self.support, self.queries, self.data.task)

    @functools.cached_property
    def left_out(self) -> dict[str, str]:
        """Strategies that these tables don't allow, each with a sentence on what is missing."""
        return left_out_of(list(STRATEGIES), self.support, self.queries)

    @property
    def choices(self) -> tuple[str, ...]:
        return self.support.label_set if self.data.task == "classification" else ()

    @property
    def metric(self) -> str:
        return self.data.metric or TASK_METRICS[self.data.task]

    @functools.cached_property
    def drafts(self) -> dict[str, str]:
        return dict(zip(self.queries.ids, self.feedback.drafts(self.queries.ids, progress=False), strict=True))

    @functools.cached_property
    def untrained(self) -> UntrainedRetrievers:
        return UntrainedRetrievers(self.encoder, self.support)

    def evaluator(self, drafted: bool) -> ICLEvaluator:
        if drafted not in self.evaluators:
            self.evaluators[drafted] = ICLEvaluator(
                self.lvlm,
                self.support,
                self.queries,
                metric=self.metric,
                drafts=self.drafts if drafted else {},
                max_new_tokens=self.data.max_new_tokens,
            )
        return self.evaluators[drafted]

    def comparison(self, drafted: bool) -> Comparison:
        return Comparison(
            support=self.support,
            queries=self.queries,
            feedback=self.feedback,
            encoder=self.encoder,
            task=self.data.task,
            drafts=self.drafts if drafted else {},
            lora=self.lora,
            untrained=self.untrained,
        )


class SuiteRun:
    """A suite and the folder of its results.

    Args:
        spec: what is compared.
        out_dir: gets `cells/`, `retrievers/` and `scores.sqlite`.
        lvlms: LVLMs by their name in the suite, in place of those that the names would load.
        make_world: `drum_hf.playground.make_world`, for a suite that has playground worlds.
        store: another file for LVLM answers and scores, which several suites may share.
        on_cell: called after each cell that was carried out.

    Attributes:
        calls: LVLM calls made so far (what came from the store is not among them).
    """

    def __init__(
        self,
        spec: SuiteSpec,
        out_dir: str | os.PathLike[str],
        *,
        lvlms: Mapping[str, LVLM] | None = None,
        make_world: MakeWorld | None = None,
        store: str | os.PathLike[str] | None = None,
        on_cell: Callable[[Cell], None] | None = None,
    ) -> None:
        self.spec, self.out = spec, Path(out_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        self.files = CellFiles(self.out / "cells")
        self.store = ScoreStore(store or self.out / "scores.sqlite")
        self.make_world, self.on_cell = make_world, on_cell
        self.calls = 0
        self._given = dict(lvlms or {})
        self._held: tuple[str, CachedLVLM] | None = None
        self._encoder_keys = {name: encoder_key(name) for name in spec.encoders}
        #: Every cell of the suite with the key of its file, filled by `run`.
        self.keys: dict[Cell, str] = {}
        #: Queries for the report, a few of each data set, filled by `run`.
        self.examples: list[dict[str, Any]] = []
        #: Data set -> sentences on what its tables don't allow, filled by `run`.
        self.limits: dict[str, list[str]] = {}
        #: Fingerprints of support sets and queries, and of LVLMs by name, filled by `run`.
        self.tables: dict[str, dict[str, str]] = {}
        self.fingerprints: dict[str, str] = {}
        self._retrievers: dict[tuple[str, int, int | None], tuple[DemoRetriever, int]] = {}

    def run(self) -> dict[Cell, str]:
        """Carry out what is missing. Returns every cell of the suite with the key of its file."""
        from tqdm.auto import tqdm

        spec = self.spec
        todo = [
            (lvlm, data, seed, encoder)
            for lvlm in (*spec.lvlms, *spec.transfer)
            for data in spec.data
            for seed in data.seeds
            for encoder in spec.encoders
        ]
        total = sum(len(cells_of(spec, data, seed, lvlm, encoder)) for lvlm, data, seed, encoder in todo)
        with tqdm(total=total, desc=f"suite {spec.name}", unit="cell") as bar:
            for lvlm, data, seed, encoder in todo:
                with self._bench(lvlm, data, seed, encoder) as bench:
                    self._tell(bench)
                    for cell in cells_of(spec, data, seed, lvlm, encoder):
                        bar.set_postfix_str(
                            f"{cell.data}/{cell.data_seed} {cell.strategy} {cell.shots}", refresh=False
                        )
                        if split_name(cell.strategy)[0] not in bench.left_out:
                            self._carry_out(cell, bench)
                        bar.update()
                    if (lvlm, seed, encoder) == (spec.lvlms[0], data.seeds[0], spec.encoders[0]):
                        self.examples += self._examples(bench, seed)
        return self.keys

    def _examples(self, bench: _Bench, seed: int) -> list[dict[str, Any]]:
        """What similarity chose beside what a trained retriever chose, from the cells: nothing is asked again."""
        spec, data = self.spec, bench.data
        named = [name for name in spec.strategies if split_name(name)[0] not in bench.left_out]
        names = [next((n for n in kind if n in named), None) for kind in (_UNTRAINED, _TRAINED)]
        found: dict[str, Values] = {}
        for name in filter(None, names):
            where = (data.name, seed, spec.lvlms[0].name, "", spec.encoders[0], name)
            seeds = spec.seeds if STRATEGIES[name].trained else (0,)
            found[name] = self.files.read(self.keys[Cell(*where, seeds[0], spec.headline)])
        if not found or not spec.headline:
            return []
        right = {name: at_their_best(values.values) for name, values in found.items()}
        examples = []
        for row in pick_rows(list(right.values()), _EXAMPLES):
            gold = bench.queries[bench.queries.ids[row]]
            columns = {}
            for name, values in found.items():
                demos = [bench.support[d] for d in values.demonstrations[row]]
                columns[label_of(name)] = shown_column(demos, values.answers[row], bool(right[name][row]))
            about = {"image": gold.image, "prompt": gold.prompt, "gold": gold.response}
            if any(STRATEGIES[name].needs_draft for name in found):
                about["draft"] = bench.drafts[gold.id]
            title = data_title(spec, data, spec.lvlms[0], spec.encoders[0])
            examples.append({"task": title, "query": about, "columns": columns})
        return examples

    def _tell(self, bench: _Bench) -> None:
        """Say, once for each data set, what its tables don't allow."""
        bases = dict.fromkeys(split_name(name)[0] for name in self.spec.strategies)
        told = [*bench.asked[1], *(bench.left_out[base] for base in bases if base in bench.left_out)]
        for sentence in told:
            if sentence not in self.limits.setdefault(bench.data.name, []):
                self.limits[bench.data.name].append(sentence)
                logger.warning("%s: %s", bench.data.name, sentence)

    # Models and tables

    def lvlm(self, spec: LVLMSpec) -> CachedLVLM:
        """The LVLM, answering from the store what it can. One is held at a time."""
        if self._held is None or self._held[0] != spec.name:
            self._count()
            self._held = None  # its memory is free before the next one is loaded
            lvlm = self._given.get(spec.name) or open_lvlm(spec)
            self._held = spec.name, CachedLVLM(lvlm, self.store)
            self.fingerprints[spec.name] = lvlm.fingerprint
        return self._held[1]

    def _count(self) -> None:
        if self._held is not None:
            self.calls += self._held[1].calls
            self._held[1].calls = 0

    @contextlib.contextmanager
    def _bench(self, lvlm: LVLMSpec, data: DataSpec, seed: int, encoder: str) -> Iterator[_Bench]:
        support, queries = open_data(data, seed, self.make_world)
        self.tables[f"{data.name}/{seed}"] = {"support": support.fingerprint, "queries": queries.fingerprint}
        try:
            yield _Bench(data, support, queries, self.lvlm(lvlm), encoder, self.spec.training.lora)
        finally:
            self._retrievers.clear()
            self._count()

    # Cells

    def _carry_out(self, cell: Cell, bench: _Bench) -> None:
        key = self.keys[cell] = self.files.key(cell, self._facts(cell, bench))
        if key in self.files:
            return
        base, selector = split_name(cell.strategy)
        about = STRATEGIES[base]
        retriever, pairs = self._retriever(cell, bench) if about.trained else (None, None)
        asked = bench.comparison(about.needs_draft)
        strategy = make_strategy(base, asked, seed=cell.seed, retriever=retriever, selector=selector)
        result = bench.evaluator(about.needs_draft).evaluate(strategy, cell.shots, progress=False)
        self.files.write(key, Values(bench.queries.ids, result.values, result.answers, result.ids, pairs))
        logger.info("%s: %.3f", cell, result.mean)
        if self.on_cell is not None:
            self.on_cell(cell)

    def _facts(self, cell: Cell, bench: _Bench) -> dict[str, Any]:
        """All that a cell's values depend on and that its place in the table doesn't say."""
        base, _ = split_name(cell.strategy)
        return {
            "task": bench.data.task,
            "support": [bench.support.fingerprint, bench.support.gold_fingerprint],
            "queries": [bench.queries.fingerprint, bench.queries.gold_fingerprint],
            "lvlm": self.fingerprints[cell.lvlm],
            "encoder": self._encoder_keys[cell.encoder],
            "metric": bench.metric,
            "max_new_tokens": bench.data.max_new_tokens,
            "retriever": self._training_facts(cell, bench) if base in METHODS else None,
        }

    def _training_facts(self, cell: Cell, bench: _Bench) -> dict[str, Any]:
        """All that the training of a cell's retriever depends on."""
        method = METHODS[split_name(cell.strategy)[0]]
        rounds, candidates = self.spec.training.schedule(len(bench.support))
        settings = dataclasses.asdict(self.spec.training) | {"rounds": rounds, "candidates": candidates, "pairs": ()}
        return {
            "method": {"training": own_arguments(method), "query": method.query},
            "settings": settings,
            "seed": cell.seed,
            "draft_tokens": bench.data.max_new_tokens,
            "support": [bench.support.fingerprint, bench.support.gold_fingerprint],
            "lvlm": self.fingerprints[cell.trained_on or cell.lvlm],
            "encoder": self._encoder_keys[cell.encoder],
            "choices": list(bench.choices),
        }

    def _retriever(self, cell: Cell, bench: _Bench) -> tuple[DemoRetriever, int]:
        """A cell's trained retriever, and the scored pairs behind it."""
        base, _ = split_name(cell.strategy)
        place = base, cell.seed, cell.round
        if place not in self._retrievers:
            trained = self._trained(cell, bench)
            # one that was saved, also right after its training: a resumed run has nothing else
            loaded = trained.load(bench.support, round=cell.round)
            self._retrievers[place] = loaded, trained.pairs[(cell.round or len(trained.pairs)) - 1]
        return self._retrievers[place]

    def _trained(self, cell: Cell, bench: _Bench) -> TrainedRetriever:
        base, _ = split_name(cell.strategy)
        name = f"{cell.data}-{cell.data_seed}-{base}-seed{cell.seed}"
        folder = self.out / "retrievers" / f"{name}-{digest(self._training_facts(cell, bench))[:12]}"
        found = TrainedRetriever.find(folder)
        if found is not None:
            return found
        logger.info("training %s (seed %d) on %s/%d", base, cell.seed, cell.data, cell.data_seed)
        teacher = bench.lvlm
        if cell.trained_on:  # its folder was deleted since
            first = self.spec.lvlms[0]
            teacher = CachedLVLM(self._given.get(first.name) or open_lvlm(first), self.store)
        calls = teacher.calls
        try:
            return train_retriever(
                base,
                folder,
                support=bench.support,
                lvlm=teacher,
                encoder=cell.encoder,
                training=self.spec.training,
                seed=cell.seed,
                choices=bench.choices,
                draft_tokens=bench.data.max_new_tokens,
            )
        finally:
            if teacher is not bench.lvlm:
                self.calls += teacher.calls - calls
