"""How results are read, named, ordered and drawn: plain data in, PNG files out.

The input is the JSON that `drum-hf demo` prints, for one task or, under "tasks", for several::

    {"task": str, "shots": int, "strategies": {key: {"metric": float, "ci": [lo, hi],
        "by_shots": {"1": {"metric": float, "ci": [lo, hi]}, ...},
        "by_pairs": [[scored_pairs, metric], ...], "by_round": [metric after round 1, ...]}},
     "metric_name": str, "paired": {"drum - epr": {"mean", "lo", "hi", "p"}}, ...}

Of one task it may also hold "queries" (how many were asked) and "limits" (sentences on what the run can't show).

Metrics are fractions, drawn and printed × 100 as papers do; a `ci` is a 95% interval. `ci`, `by_shots`, `by_pairs`,
`by_round`, `metric_name` and `paired` may be absent. A strategy's `label` is its name for readers, and `learnt` tells
whether it was trained. Without them, one that is not known here keeps its key as its name and counts as learnt if it
has `by_pairs` or `by_round`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ColumnError
from ..utils.files import replacing_file
from ..utils.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Estimate", "StrategySeries", "TaskResult", "plot_pairs", "plot_rounds", "plot_shots", "read_results"]

#: Key -> display name, from what knows nothing about the query to what knows its answer.
_NAMES = {
    "zero-shot": "zero-shot",
    "random": "random",
    "fixed": "fixed",
    "bm25": "BM25",
    "st": "ST",
    "si": "SI (RICES)",
    "sit": "SIT",
    "sit+draft": "SIT + draft",
    "epr": "EPR",
    "drum-rank": "DRUM (rank weights)",
    "drum": "DRUM",
    "oracle": "oracle (same answer)",
}
_LEARNT = {"epr", "drum-rank", "drum"}

# Okabe and Ito's colours, told apart with any colour vision; untrained strategies stay grey behind them.
_COLOURS = {"drum": "#d55e00", "drum-rank": "#cc79a7", "epr": "#0072b2", "oracle": "#222222"}
_SPARE_COLOURS = ("#009e73", "#56b4e9", "#e69f00")
_MARKERS = {"drum": "o", "drum-rank": "s", "epr": "^", "oracle": "_", "zero-shot": "None"}
_SPARE_MARKERS = "vDPX<>pd"
_GREY, _INK = "#8a8a8a", "#333333"
_INCHES, _DPI, _FONT = (7.6, 4.4), 160, 9.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric as a fraction, with its 95% interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class StrategySeries:
    """One strategy's results on one task.

    Attributes:
        key: its key in the JSON.
        name: what readers see.
        learnt: the retriever was trained on LVLM feedback.
        main: at the task's main shot count.
        by_shots: shot count -> estimate.
        by_pairs: (scored pairs, metric), ascending.
        by_round: metric after round 1, 2, …
    """

    key: str
    name: str
    learnt: bool
    main: Estimate
    by_shots: Mapping[int, Estimate]
    by_pairs: tuple[tuple[float, float], ...]
    by_round: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's results, checked.

    Attributes:
        task: its name.
        metric_name: "accuracy", or "CIDEr-D" for captioning, unless the results say otherwise.
        shots: the main shot count.
        strategies: in display order.
        paired: "a - b" -> {"mean", "lo", "hi", "p"}, fractions.
        raw: the JSON it was read from.
    """

    task: str
    metric_name: str
    shots: int
    strategies: tuple[StrategySeries, ...]
    paired: Mapping[str, Mapping[str, float]]
    raw: Mapping[str, Any]

    def get(self, key: str) -> StrategySeries | None:
        """The strategy of this key, or None."""
        return next((s for s in self.strategies if s.key == key), None)

    @property
    def best_learnt(self) -> StrategySeries | None:
        """The learnt strategy of the highest metric; of equals, the later in display order."""
        return max(reversed([s for s in self.strategies if s.learnt]), key=lambda s: s.main.value, default=None)

    @property
    def best_untrained(self) -> StrategySeries | None:
        """The highest of those that neither learn nor look at the answer."""
        untrained = [s for s in self.strategies if not s.learnt and not s.key.startswith("oracle")]
        return max(untrained, key=lambda s: s.main.value, default=None)

    @property
    def shot_counts(self) -> list[int]:
        """Every shot count that some strategy was evaluated at, ascending; the main one is among them."""
        return sorted({self.shots, *(n for s in self.strategies if s.key != "zero-shot" for n in s.by_shots)})


def _get(mapping: Any, key: str, where: str) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        found = f"the keys {sorted(map(str, mapping))}" if isinstance(mapping, Mapping) else type(mapping).__name__
        raise ColumnError(f"{where} needs the key {key!r}, found {found}; pass the JSON of `drum-hf demo` unchanged")
    return mapping[key]


def _optional(entry: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = entry.get(key)
    if value is None:
        return {} if kind is Mapping else ()
    if isinstance(value, str) or not isinstance(value, kind):
        expected = "an object" if kind is Mapping else "a list"
        raise ColumnError(f"{where}[{key!r}] should be {expected}, found {value!r}; mend or remove it")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ColumnError(f"{where} should be a finite number, found {value!r}; leave the strategy out if it failed")
    return float(value)


def _pair(value: Any, where: str) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ColumnError(f"{where} should be two numbers, found {value!r}; mend or remove it")
    return _number(value[0], where), _number(value[1], where)


def _estimate(entry: Any, where: str) -> Estimate:
    value = _number(_get(entry, "metric", where), f"{where}['metric']")
    if entry.get("ci") is None:
        return Estimate(value)
    low, high = _pair(entry["ci"], f"{where}['ci']")
    if low > high:
        raise ColumnError(f"{where}['ci'] should be [low, high], found [{low}, {high}]; swap them")
    return Estimate(value, low, high)


def _strategy(key: str, entry: Any, shots: int, where: str) -> StrategySeries:
    main = _estimate(entry, where)
    by_shots = {}
    for count, item in _optional(entry, "by_shots", Mapping, where).items():
        if not str(count).isdecimal():
            raise ColumnError(f"{where}['by_shots'] should have whole numbers as keys, found {count!r}; rename it")
        by_shots[int(count)] = _estimate(item, f"{where}['by_shots'][{count!r}]")
    by_shots[shots] = main
    pairs = sorted(_pair(point, f"{where}['by_pairs']") for point in _optional(entry, "by_pairs", Sequence, where))
    rounds = tuple(_number(value, f"{where}['by_round']") for value in _optional(entry, "by_round", Sequence, where))
    learnt = bool(entry.get("learnt", key in _LEARNT or (key not in _NAMES and bool(pairs or rounds))))
    name = str(entry.get("label") or _NAMES.get(key, key))
    return StrategySeries(key, name, learnt, main, by_shots, tuple(pairs), rounds)


def _place(strategy: StrategySeries) -> tuple[int, int]:
    known = list(_NAMES)
    if strategy.key in known:
        return known.index(strategy.key), 0
    return known.index("epr" if strategy.learnt else "sit+draft"), 1


def read_results(results: Mapping[str, Any]) -> list[TaskResult]:
    """Check results and put them in display order.

    Args:
        results: the JSON of `drum-hf demo`; see this module's head.

    Returns:
        One entry for each task.

    Raises:
        ColumnError: a key is missing, or a number is not one.

    >>> demo = {"task": "vqa", "shots": 4, "strategies": {"drum": {"metric": 0.9}, "random": {"metric": 0.2}}}
    >>> [s.name for s in read_results(demo)[0].strategies]
    ['random', 'DRUM']
    """
    if isinstance(results, Mapping) and "tasks" in results:
        if not isinstance(results["tasks"], Mapping) or not results["tasks"]:
            raise ColumnError(f"results['tasks'] should map task to results, found {results['tasks']!r}; add a task")
        named = [(str(task), entry, f"results['tasks'][{task!r}]") for task, entry in results["tasks"].items()]
    else:
        named = [(str(_get(results, "task", "results")), results, "results")]
    read = []
    for task, entry, where in named:
        shots = int(_number(_get(entry, "shots", where), f"{where}['shots']"))
        strategies = _get(entry, "strategies", where)
        if not isinstance(strategies, Mapping) or not strategies:
            raise ColumnError(f"{where}['strategies'] should hold a strategy or more, found {strategies!r}; add one")
        rows = [_strategy(str(k), v, shots, f"{where}['strategies'][{k!r}]") for k, v in strategies.items()]
        paired = {}
        for name, contrast in _optional(entry, "paired", Mapping, where).items():
            spot = f"{where}['paired'][{name!r}]"
            paired[str(name)] = {k: _number(_get(contrast, k, spot), spot) for k in ("mean", "lo", "hi", "p")}
        metric = str(entry.get("metric_name") or ("CIDEr-D" if "caption" in task else "accuracy"))
        read.append(TaskResult(task, metric, shots, tuple(sorted(rows, key=_place)), paired, entry))
    return read


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending values as little as possible (least squares) until neighbours stand `gap` apart.

    Isotonic regression of values[i] − i·gap by pooling adjacent violators, clipped so that all lie in [low, high].
    """
    blocks: list[tuple[float, int]] = []  # mean, size
    for i, value in enumerate(values):
        mean, size = value - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, n = blocks.pop()
            mean, size = (mean * size + other * n) / (size + n), size + n
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    top = max(low, high - gap * (len(flat) - 1))
    return [min(max(value, low), top) + i * gap for i, value in enumerate(flat)]


def _styles(strategies: Sequence[StrategySeries]) -> dict[str, dict[str, Any]]:
    colours, markers = iter(_SPARE_COLOURS * len(strategies)), iter(_SPARE_MARKERS * len(strategies))
    styles = {}
    for s in strategies:
        emphasis = s.key == "drum"
        styles[s.key] = {
            "color": _COLOURS.get(s.key) or (next(colours) if s.learnt else _GREY),
            "marker": _MARKERS.get(s.key) or next(markers),
            "linestyle": {"oracle": "--", "zero-shot": ":"}.get(s.key, "-"),
            "linewidth": 2.8 if emphasis else 1.8 if s.learnt else 1.1,
            "markersize": 7 if emphasis else 5.5 if s.learnt else 4.5,
            "zorder": 5 if emphasis else 4 if s.learnt else 3,
        }
    return styles


def _label_ends(ax: Axes, ends: Sequence[tuple[StrategySeries, float, float]], styles: Mapping[str, Any]) -> None:
    """Name each line at its right end, outside the axes, so that no legend can cover the data."""
    ends = sorted(ends, key=lambda end: end[2])
    to_axes = ax.transAxes.inverted()
    heights = [float(to_axes.transform(ax.transData.transform((x, y)))[1]) for _, x, y in ends]
    gap = _FONT * 1.4 / 72 * ax.figure.dpi / ax.bbox.height
    for (strategy, x, y), height in zip(ends, _spread(heights, gap, 0.0, 1.0), strict=True):
        colour = styles[strategy.key]["color"]
        ax.annotate(
            strategy.name,
            xy=(x, y),
            xycoords="data",
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=_FONT,
            parse_math=False,
            color=_INK if colour == _GREY else colour,
            fontweight="bold" if strategy.key == "drum" else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def _bar(ax: Axes, x: float, estimate: Estimate, style: Mapping[str, Any]) -> None:
    if estimate.low is not None and estimate.high is not None:
        wide = style["linewidth"] * 0.6
        ax.vlines(x, 100 * estimate.low, 100 * estimate.high, style["color"], linewidth=wide, zorder=style["zorder"])


def _level(ax: Axes, strategy: StrategySeries, style: Mapping[str, Any]) -> None:
    """A horizontal line for a strategy that does not vary along x, with its interval as a band."""
    line = {k: style[k] for k in ("color", "linestyle", "zorder")}
    ax.axhline(100 * strategy.main.value, linewidth=1.2, **line)
    if strategy.main.low is not None and strategy.main.high is not None:
        span = 100 * strategy.main.low, 100 * strategy.main.high
        ax.axhspan(*span, color=style["color"], alpha=0.10, linewidth=0, zorder=1)


def _shots_panel(ax: Axes, task: TaskResult) -> None:
    styles, counts = _styles(task.strategies), task.shot_counts
    if len(counts) == 1:
        return _dots_panel(ax, task, styles)
    lines = [s for s in task.strategies if s.key != "zero-shot"]
    ax.set_xlim(-0.25, len(counts) - 0.75)
    # Side by side within a shot count, so that the interval bars do not hide one another.
    width, ends = min(0.36, 0.06 * (len(lines) - 1)), []
    for place, strategy in enumerate(lines):
        style = styles[strategy.key]
        shift = width * (place / max(1, len(lines) - 1) - 0.5)
        points = [(i + shift, strategy.by_shots[n]) for i, n in enumerate(counts) if n in strategy.by_shots]
        ax.plot([x for x, _ in points], [100 * e.value for _, e in points], **style)
        for x, estimate in points:
            _bar(ax, x, estimate, style)
        ends.append((strategy, points[-1][0], 100 * points[-1][1].value))
    if zero := task.get("zero-shot"):
        _level(ax, zero, styles["zero-shot"])
        ends.append((zero, ax.get_xlim()[1], 100 * zero.main.value))
    ax.set_xticks(range(len(counts)), [str(n) for n in counts])
    ax.set_xlabel("demonstrations in the context (shots)")
    _label_ends(ax, ends, styles)


def _dots_panel(ax: Axes, task: TaskResult, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Where there is one shot count only: a row for each strategy, its interval lying."""
    for row, strategy in enumerate(task.strategies):
        style, estimate = styles[strategy.key], strategy.main
        marker = "|" if style["marker"] in ("_", "None") else style["marker"]
        ax.plot(100 * estimate.value, row, **{**style, "marker": marker})
        if estimate.low is not None and estimate.high is not None:
            wide = style["linewidth"] * 0.6
            ax.hlines(row, 100 * estimate.low, 100 * estimate.high, style["color"], linewidth=wide)
    ax.set_xlim(*ax.get_ylim())
    ax.set_ylim(-0.6, len(task.strategies) - 0.4)
    ax.set_yticks(range(len(task.strategies)), [s.name for s in task.strategies], parse_math=False)
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    ax.set_ylabel("")
    ax.set_xlabel(f"{task.metric_name} × 100, {task.shots} shots", parse_math=False)


def _curves_panel(ax: Axes, task: TaskResult, field: str, xlabel: str) -> None:
    """Learning curves over `by_pairs` or `by_round`, with the best untrained strategy and the oracle as levels."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    styles = _styles(task.strategies)
    drawn: list[float] = []
    ends: list[tuple[StrategySeries, float, float]] = []
    curves = [s for s in task.strategies if getattr(s, field)]
    for strategy in curves:
        style = styles[strategy.key]
        points = strategy.by_pairs if field == "by_pairs" else tuple(enumerate(strategy.by_round, 1))
        xs, ys = [x for x, _ in points], [100 * y for _, y in points]
        ax.plot(xs, ys, **style)
        drawn += ys
        if math.isclose(points[-1][1], strategy.main.value, abs_tol=1e-9):
            _bar(ax, xs[-1], strategy.main, style)
        ends.append((strategy, xs[-1], ys[-1]))
    ax.margins(x=0.06)
    levels = [s for s in (task.best_untrained, task.get("oracle")) if s is not None and s not in curves]
    # Learning curves lie close together far from 0: show the range that they and the levels take.
    ceiling = ax.get_ylim()[1]
    lowest = min([*drawn, *(100 * level.main.value for level in levels)])
    ax.set_ylim(bottom=max(ax.get_ylim()[0], lowest - 0.12 * (ceiling - lowest)))
    for level in levels:
        _level(ax, level, styles[level.key])
        ends.append((level, ax.get_xlim()[1], 100 * level.main.value))
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    _label_ends(ax, ends, styles)


def _save(tasks: Sequence[TaskResult], path: str | Path, draw: Any, *args: Any) -> Path:
    """One panel a task, one below another. Figures are made without pyplot, whose state is the user's."""
    purpose = "a figure of the report"
    figure = require("matplotlib.figure", purpose).Figure((_INCHES[0], _INCHES[1] * len(tasks)), facecolor="white")
    canvas = require("matplotlib.backends.backend_agg", purpose).FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.1, right=0.74, bottom=0.13 / len(tasks), top=1 - 0.08 / len(tasks), hspace=0.32)
    for row, task in enumerate(tasks, 1):
        ax = figure.add_subplot(len(tasks), 1, row)
        ax.set_facecolor("white")
        ax.set_title(task.task, fontsize=_FONT + 2, loc="left", color=_INK, parse_math=False)
        ax.set_ylabel(f"{task.metric_name} × 100", parse_math=False)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        # Labels are placed by the final limits: set them before drawing, from all the values that can appear.
        points = [e.high or e.value for s in task.strategies for e in s.by_shots.values()]
        top = max([*points, *(y for s in task.strategies for y in (*s.by_round, *(y for _, y in s.by_pairs)))])
        ceiling = 103 if 0.8 < top <= 1 else 108 * top or 1
        ax.set_ylim(-0.03 * ceiling, ceiling)  # a strategy at 0 must not hide behind the axis
        draw(ax, task, *args)
        ax.tick_params(labelsize=_FONT)
    path = Path(path)
    with replacing_file(path) as partial:
        canvas.print_figure(partial, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.12)
    return path


def _with_curves(results: Mapping[str, Any], field: str) -> list[TaskResult]:
    tasks = [task for task in read_results(results) if any(getattr(s, field) for s in task.strategies)]
    if not tasks:
        raise ColumnError(f"this figure needs {field!r} of at least one strategy, found none; evaluate along training")
    return tasks


def plot_shots(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the metric against the number of demonstrations, with 95% intervals, one panel a task.

    Args:
        results: the JSON of `drum-hf demo`.
        path: the PNG to write; its folder is made where it is missing.

    Returns:
        `path`.

    Raises:
        ColumnError: the results break their contract.
        DependencyError: matplotlib is not installed.
    """
    return _save(read_results(results), path, _shots_panel)


def plot_pairs(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the metric against the pairs that the LVLM has scored: what a retriever costs.

    Args:
        results: the JSON of `drum-hf demo`; tasks without any `by_pairs` are left out.
        path: the PNG to write; its folder is made where it is missing.

    Returns:
        `path`.

    Raises:
        ColumnError: no strategy has `by_pairs`, or the results break their contract.
        DependencyError: matplotlib is not installed.
    """
    label = "(query, demonstration) pairs scored by the LVLM"
    return _save(_with_curves(results, "by_pairs"), path, _curves_panel, "by_pairs", label)


def plot_rounds(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the metric after each mining round.

    Args:
        results: the JSON of `drum-hf demo`; tasks without any `by_round` are left out.
        path: the PNG to write; its folder is made where it is missing.

    Returns:
        `path`.

    Raises:
        ColumnError: no strategy has `by_round`, or the results break their contract.
        DependencyError: matplotlib is not installed.
    """
    return _save(_with_curves(results, "by_round"), path, _curves_panel, "by_round", "mining rounds done")
