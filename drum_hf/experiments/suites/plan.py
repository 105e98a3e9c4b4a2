"""What a suite would cost, counted without opening a model, a table or the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ...data import find_source
from ...evaluation.registry import STRATEGIES
from .runner import cells_of
from .spec import DataSpec, SuiteSpec, split_name

__all__ = ["format_plan", "plan_suite"]


@dataclasses.dataclass
class _Calls:
    """LVLM calls; None where a table's size is not known before it is read."""

    generate: int | None = 0
    score: int | None = 0

    def add(self, kind: str, count: int | None) -> None:
        now = getattr(self, kind)
        setattr(self, kind, None if now is None or count is None else now + count)


#: (difficulty, task) -> rows of a world's support set and queries, such as `drum_hf.playground.world_rows`.
WorldRows = Callable[[str, Any], tuple[int, int]]


def _rows(data: DataSpec, world_rows: WorldRows | None) -> tuple[int | None, int | None]:
    """Rows of support set and queries, at most; None where nothing says it."""
    known: tuple[int | None, int | None] = (None, None)
    if data.world:
        known = world_rows(data.world, data.task) if world_rows else known
    elif data.source:
        source = find_source(data.source)
        known = source.support.rows, source.query.rows
    asked = data.support_rows, data.query_rows
    support, queries = (
        min((n for n in pair if n is not None), default=None) for pair in zip(known, asked, strict=True)
    )
    return support, queries


def plan_suite(spec: SuiteSpec, world_rows: WorldRows | None = None) -> dict[str, Any]:
    """What carrying out a suite from nothing would take, at most; JSON-ready.

    Args:
        spec: what would be carried out.
        world_rows: `drum_hf.playground.world_rows`, for a suite that has playground worlds.

    Returns:
        {"downloads": [{"data" or "model", …}], "trainings": number of retrievers, "cells": number of them,
        "lvlm_calls": {lvlm: {"generate", "score"}}}. A call is a request: an answer, a draft, or the score of a pair.
        None where the size of a table of your own is not known before it is read.
    """
    downloads: list[dict[str, Any]] = []
    for data in spec.data:
        if data.source and data.data_dir is None:
            source = find_source(data.source)
            for side, part in (("support", source.support), ("query", source.query)):
                downloads.append({"data": data.name, "side": side, "streaming": data.streaming, **part.download})
    local = [m for m in (*spec.lvlms, *spec.transfer) if m.endpoint is None]
    models = [*((m.model, m.revision) for m in local), *((name, None) for name in spec.encoders)]
    downloads += [{"model": n, "revision": r} for n, r in dict.fromkeys(models) if not n.startswith("playground/")]
    trainings, cells = 0, 0
    calls: dict[str, dict[str, int | None]] = {}
    for lvlm in (*spec.lvlms, *spec.transfer):
        counted = _Calls()
        for data in spec.data:
            support, queries = _rows(data, world_rows)
            for seed in data.seeds:
                for encoder in spec.encoders:
                    todo = cells_of(spec, data, seed, lvlm, encoder)
                    cells += len(todo)
                    bases = {split_name(cell.strategy)[0] for cell in todo}
                    for _ in todo:
                        counted.add("generate", queries)
                    if any(STRATEGIES[b].needs_draft for b in bases):
                        counted.add("generate", queries)
                    exhaustive = "oracle-score" in bases or ("oracle" in bases and data.task == "captioning")
                    if exhaustive:
                        counted.add("score", None if support is None or queries is None else support * queries)
                    methods = [b for b in bases if STRATEGIES[b].trained and lvlm in spec.lvlms]
                    if any(STRATEGIES[b].needs_draft for b in methods):
                        counted.add("generate", support)
                    for _ in range(len(methods) * len(spec.seeds)):
                        trainings += 1
                        if support is None:
                            counted.add("score", None)
                        else:
                            rounds, candidates = spec.training.schedule(support)
                            counted.add("score", support * rounds * candidates)
        calls[lvlm.name] = dataclasses.asdict(counted)
    return {"suite": spec.name, "downloads": downloads, "trainings": trainings, "cells": cells, "lvlm_calls": calls}


def format_plan(plan: dict[str, Any]) -> str:
    """A plan as lines of text."""
    lines = [f"suite {plan['suite']}: {plan['cells']:,} cells, {plan['trainings']:,} retrievers to train", ""]
    lines.append("to download:" if plan["downloads"] else "nothing to download")
    for item in plan["downloads"]:
        if "model" in item:
            lines.append(f"  {item['model']}" + (f" at {item['revision']}" if item["revision"] else ""))
            continue
        rows = "? rows" if item["rows"] is None else f"{item['rows']:,} rows"
        size = "" if item["bytes"] is None else f", {item['bytes'] / 1e9:.1f} GB"
        part = ", streamed as far as needed" if item["streaming"] else ""
        lines.append(f"  {item['data']} ({item['side']}): {item['repo']} {item['files']}, {rows}{size}{part}")
    lines += ["", "LVLM calls, at most (what the results' folder holds already is not paid again):"]
    for name, count in plan["lvlm_calls"].items():
        shown = {kind: "unknown" if n is None else f"{n:,}" for kind, n in count.items()}
        lines.append(f"  {name}: {shown['generate']} answers and drafts, {shown['score']} scores")
    return "\n".join(lines)
