"""From cells to numbers: `results.parquet`, every answer with what it was asked for, and `summary.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...evaluation.metrics import get_metric
from ...evaluation.registry import STRATEGIES
from ...evaluation.statistics import paired_bootstrap
from ...utils.files import replacing_file, write_text
from ..demo import TASK_METRICS
from .cells import Cell, CellFiles, Values
from .spec import DataSpec, LVLMSpec, SuiteSpec, split_name

__all__ = ["label_of", "read_cells", "summarize_suite", "data_title", "write_results"]


def label_of(name: str) -> str:
    """What readers see of a strategy: "DRUM", or "DRUM + mmr" with a selector."""
    base, selector = split_name(name)
    return STRATEGIES[base].label + (f" + {selector}" if selector else "")


class _Block:
    """The cells of one data set under one LVLM and one encoder, over its seeds.

    Values are over the queries of all data seeds, in order, each the mean over the strategy's own seeds.
    """

    def __init__(self, data: DataSpec, cells: Mapping[Cell, Values]) -> None:
        self.data = data
        self.parts: dict[tuple[str, int, int | None], dict[int, dict[int, Values]]] = {}
        for cell, values in cells.items():
            place = cell.strategy, cell.shots, cell.round
            self.parts.setdefault(place, {}).setdefault(cell.data_seed, {})[cell.seed] = values

    def __contains__(self, place: tuple[str, int, int | None]) -> bool:
        return place in self.parts

    def values(self, strategy: str, shots: int, round: int | None = None) -> np.ndarray:
        parts = self.parts[strategy, shots, round]
        return np.concatenate([np.mean([v.values for v in parts[s].values()], axis=0) for s in self.data.seeds])

    def groups(self, strategy: str, shots: int) -> list[int]:
        parts = self.parts[strategy, shots, None]
        return [s for s in self.data.seeds for _ in next(iter(parts[s].values())).query_ids]

    def seed_means(self, strategy: str, shots: int) -> list[float]:
        """The metric of each of the strategy's seeds, over all data seeds."""
        parts = self.parts[strategy, shots, None]
        seeds = next(iter(parts.values()))
        return [float(np.concatenate([parts[s][seed].values for s in self.data.seeds]).mean()) for seed in seeds]

    def pairs(self, strategy: str, shots: int, round: int | None = None) -> int | None:
        """Scored pairs behind one retriever, the mean over seeds."""
        found = [v.pairs for seeds in self.parts[strategy, shots, round].values() for v in seeds.values()]
        counts = [n for n in found if n is not None]
        return int(np.rint(np.mean(counts))) if counts else None


def summarize_suite(
    spec: SuiteSpec, cells: Mapping[Cell, Values], *, limits: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """The numbers of a suite, JSON-ready.

    Args:
        cells: every cell of `spec` with its values, but for strategies that the tables don't allow.
        limits: data set -> sentences on what its tables don't allow.

    Returns:
        {"suite", "shots", "tasks": {task: {"data", "lvlm", "encoder", "metric_name", "queries", "limits", "groups",
            "strategies": {name: {shots: {"metric", "ci"}}}, "paired": {"a>b": {"diff", "ci", "p"}},
            "paired_by_shots": {"a>b": {shots: …}}, "by_pairs": […], "curves", "gap_closed"}},
         "transfer": {lvlm: {task: …}}}. Metrics are fractions, intervals 95%, `paired` at the headline's shots. A task
        is called by its data set where there are one LVLM and one encoder, else "data · lvlm · encoder".
        `by_pairs` lists {"pairs", "drum", "epr", "diff", "ci", "p", "to_final"} at each budget, `to_final` being DRUM
        at that budget against EPR at the last; `curves` has [scored pairs, metric] of what was evaluated
        after each round. `gap_closed` is (DRUM - SIT+draft) / (oracle - SIT+draft), None without
        such a gap.
    """
    content: dict[str, Any] = {"suite": spec.name, "shots": spec.headline, "tasks": {}}
    for lvlm in (*spec.lvlms, *spec.transfer):
        moved = lvlm in spec.transfer
        tasks = content.setdefault("transfer", {}).setdefault(lvlm.name, {}) if moved else content["tasks"]
        for data, encoder, block in _blocks(spec, lvlm, cells):
            names = spec.transferred() if moved else list(spec.strategies)
            task = _summarise(spec, block, names)
            task["limits"] = list((limits or {}).get(data.name, ()))
            about = {"data": data.name, "task": data.task, "lvlm": lvlm.name, "encoder": encoder}
            trained_on = {"trained_on": spec.lvlms[0].name} if moved else {}
            tasks[data_title(spec, data, lvlm, encoder)] = about | trained_on | task
    return content


def data_title(spec: SuiteSpec, data: DataSpec, lvlm: LVLMSpec, encoder: str) -> str:
    """What a task is called in the summary; see `summarize_suite`."""
    several = len(spec.lvlms) * len(spec.encoders) > 1
    moved = lvlm in spec.transfer
    return " · ".join([data.name, *([lvlm.name] if several and not moved else []), *([encoder] if several else [])])


def _blocks(spec: SuiteSpec, lvlm: LVLMSpec, cells: Mapping[Cell, Values]) -> Iterator[tuple[DataSpec, str, _Block]]:
    for data in spec.data:
        for encoder in spec.encoders:
            where = data.name, lvlm.name, encoder
            found = {c: v for c, v in cells.items() if (c.data, c.lvlm, c.encoder) == where}
            yield data, encoder, _Block(data, found)


def _summarise(spec: SuiteSpec, block: _Block, names: Sequence[str]) -> dict[str, Any]:
    data, head = block.data, spec.headline
    strategies: dict[str, Any] = {}
    for name in names:
        rows = strategies[name] = {}
        for shots in sorted({0, *spec.shots} if name == "zero-shot" else spec.shots):
            shown = name if shots else "zero-shot"
            if (shown, shots, None) in block:
                rows[str(shots)] = _estimate(block, shown, shots)
        if not rows or (name != "zero-shot" and set(rows) == {"0"} != set(map(str, spec.shots))):
            del strategies[name]
    pairs = spec.comparisons(names)
    by_shots = {
        f"{a}>{b}": {
            str(n): _difference(block.values(a, n), block.values(b, n), block.groups(a, n))
            for n in spec.shots
            if (a, n, None) in block and (b, n, None) in block
        }
        for a, b in pairs
    }
    some = next((name, shots) for name, shots, done in block.parts if done is None)
    content: dict[str, Any] = {
        "metric_name": get_metric(data.metric or TASK_METRICS[data.task]).label,
        "queries": len(block.groups(*some)),
        "groups": list(data.seeds),
        "strategies": strategies,
        "paired": {key: rows[str(head)] for key, rows in by_shots.items() if str(head) in rows},
        "paired_by_shots": by_shots,
        "gap_closed": _gap_closed(block, head),
    }
    content["curves"] = {
        name: [
            [block.pairs(name, head, done), float(block.values(name, head, done).mean())]
            for done in _rounds(block, name, head)
        ]
        for name in names
        if (name, head, 1) in block
    }
    if {"drum", "epr"} <= set(content["curves"]):
        content["by_pairs"] = _budgets(block, head)
    return content


def _estimate(block: _Block, name: str, shots: int) -> dict[str, Any]:
    values = block.values(name, shots)
    # against nothing: the interval of the mean, data seeds kept apart
    interval = paired_bootstrap(values, np.zeros_like(values), groups=block.groups(name, shots))
    row: dict[str, Any] = {"metric": float(values.mean()), "ci": [interval.lo, interval.hi]}
    seeds = block.seed_means(name, shots)
    if len(seeds) > 1:
        row["seeds"] = seeds
    if len(block.data.seeds) > 1:
        groups = np.array(block.groups(name, shots))
        row["by_group"] = {str(s): float(values[groups == s].mean()) for s in block.data.seeds}
    return row


def _difference(a: np.ndarray, b: np.ndarray, groups: Sequence[int]) -> dict[str, Any]:
    d = paired_bootstrap(a, b, groups=groups)
    return {"diff": d.mean, "ci": [d.lo, d.hi], "p": d.p}


def _gap_closed(block: _Block, shots: int) -> float | None:
    if not all((name, shots, None) in block for name in ("drum", "sit+draft", "oracle")):
        return None
    drum, start, top = (float(block.values(name, shots).mean()) for name in ("drum", "sit+draft", "oracle"))
    return (drum - start) / (top - start) if top > start else None


def _rounds(block: _Block, name: str, shots: int) -> list[int | None]:
    """Rounds that a strategy was evaluated after, the last as None."""
    done = sorted(r for n, s, r in block.parts if (n, s) == (name, shots) and r is not None)
    return [*done, None] if (name, shots, None) in block else list(done)


def _budgets(block: _Block, head: int) -> list[dict[str, Any]]:
    """DRUM and EPR after each round: as many pairs, paired; and DRUM there against EPR after all of its rounds."""
    groups = block.groups("drum", head)
    final = block.values("epr", head)
    rows = []
    for done in _rounds(block, "drum", head):
        ours, theirs = block.values("drum", head, done), block.values("epr", head, done)
        row = {"pairs": block.pairs("drum", head, done), "drum": float(ours.mean()), "epr": float(theirs.mean())}
        rows.append(row | _difference(ours, theirs, groups) | {"to_final": _difference(ours, final, groups)})
    return rows


def write_results(
    spec: SuiteSpec, cells: Mapping[Cell, Values], summary: Mapping[str, Any], out: Path
) -> tuple[Path, Path]:
    """Write `results.parquet` (a row a query and cell) and `summary.json`; both are replaced whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = out / "results.parquet", out / "summary.json"
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("data", "task")),
            ("data_seed", pa.int64()),
            *((name, pa.string()) for name in ("lvlm", "trained_on", "encoder", "strategy")),
            *((name, pa.int64()) for name in ("seed", "shots", "round", "pairs")),
            ("query_id", pa.string()),
            ("value", pa.float64()),
            ("answer", pa.string()),
            ("demonstrations", pa.list_(pa.string())),
        ]
    )
    tasks = {data.name: data.task for data in spec.data}
    with replacing_file(paths[0]) as partial, pq.ParquetWriter(partial, schema) as writer:
        for cell, values in cells.items():
            size = len(values.query_ids)
            same = dataclasses.asdict(cell) | {"task": tasks[cell.data], "pairs": values.pairs}
            columns = {name: [value] * size for name, value in same.items()} | {
                "query_id": values.query_ids,
                "value": values.values,
                "answer": values.answers,
                "demonstrations": values.demonstrations,
            }
            writer.write_table(pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema))
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(paths[1], text)
    return paths


def read_cells(keys: Mapping[Cell, str], files: CellFiles) -> dict[Cell, Values]:
    """The values of every cell."""
    return {cell: files.read(key) for cell, key in keys.items()}
