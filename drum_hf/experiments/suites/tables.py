"""What people read of a suite: tables in Markdown and LaTeX, the figure, and the HTML report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...evaluation.registry import STRATEGIES
from ...utils.cards import as_text
from ...utils.files import write_text
from ..plots import plot_shots
from ..report import escape_latex, write_report
from .results import label_of
from .spec import SuiteSpec, split_name

__all__ = ["Table", "make_tables", "report_results", "write_pages"]

#: The figure's lines: what DRUM is compared with in its paper.
_FIGURE = {"sit": "CLIP (SIT)", "epr": "EPR", "drum": "DRUM"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title, note: what stands above it.
        header: of the columns; the first is of names.
        rows: as many cells each.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """With its title as a heading."""
        lines = [f"### {as_text(self.title)}", "", self.note, ""]
        lines += ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        lines += ["| " + " | ".join([as_text(row[0]), *row[1:]]) + " |" for row in self.rows]
        return "\n".join(lines)

    def latex(self) -> str:
        """A `tabular` of booktabs, its title a comment."""
        lines = [
            f"% {' '.join(f'{self.title}: {self.note}'.split())}",
            r"\begin{tabular}{l" + "r" * (len(self.header) - 1) + "}",
            r"\toprule",
            " & ".join(map(escape_latex, self.header)) + r" \\",
            r"\midrule",
            *(" & ".join(map(escape_latex, row)) + r" \\" for row in self.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines)


def _points(row: Mapping[str, Any] | None, *, interval: bool = False) -> str:
    if row is None:
        return "–"
    text = f"{100 * row['metric']:.1f}"
    return f"{text} [{100 * row['ci'][0]:.1f}, {100 * row['ci'][1]:.1f}]" if interval else text


def _difference(row: Mapping[str, Any]) -> list[str]:
    low, high = row["ci"]
    p = "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
    return [f"{100 * row['diff']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", p]


def _sections(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(title, a word on transfer, entry) of every task, the transferred ones last."""
    for name, task in summary["tasks"].items():
        yield name, "", task
    for lvlm, tasks in summary.get("transfer", {}).items():
        for name, task in tasks.items():
            about = (
                f" Retrievers were trained on the feedback of {task['trained_on']} and are evaluated on {lvlm}, whose "
                "own drafts they are given."
            )
            yield f"{name}, transfer to {lvlm}", about, task


def make_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a summary: strategies by shots, paired differences, and budgets, task by task."""
    head = str(summary["shots"])
    tables = []
    for title, about, task in _sections(summary):
        worlds = len(task["groups"])
        over = f" over {worlds} seeds ({', '.join(map(str, task['groups']))})" if worlds > 1 else ""
        note = f"{task['metric_name']} × 100, {task['queries']} queries{over}; 95% interval at {head} shots.{about}"
        rows = task["strategies"]
        counts = sorted({n for row in rows.values() for n in row}, key=int)
        header = ["strategy", *(f"{n} [95% interval]" if n == head else n for n in counts)]
        body = [
            [label_of(name), *(_points(row.get(n), interval=n == head) for n in counts)] for name, row in rows.items()
        ]
        note = " ".join([note, *task["limits"]])
        tables.append(Table(title, note, header, body))
        if task["paired"]:
            compared = [
                [" > ".join(map(label_of, key.split(">"))), *_difference(row)] for key, row in task["paired"].items()
            ]
            note = f"Differences × 100 on the same queries at {head} shots, with 95% intervals, two-sided p.{about}"
            tables.append(Table(f"{title}: paired differences", note, ["comparison", "difference", "p"], compared))
        if task.get("by_pairs"):
            budgets = [
                [
                    f"{row['pairs']:,}",
                    f"{100 * row['drum']:.1f}",
                    f"{100 * row['epr']:.1f}",
                    *_difference(row),
                    *_difference(row["to_final"]),
                ]
                for row in task["by_pairs"]
            ]
            header = ["scored pairs", "DRUM", "EPR", "DRUM − EPR", "p", "DRUM − EPR with all pairs", "p"]
            note = f"{task['metric_name']} × 100 at {head} shots after each mining round."
            tables.append(Table(f"{title}: by LVLM scores paid for", note, header, budgets))
    return tables


def report_results(summary: Mapping[str, Any], *, command: str = "", seconds: float | None = None) -> dict[str, Any]:
    """A summary in the form that `drum_hf.experiments.report` reads."""
    head = summary["shots"]
    tasks = {}
    for title, _, task in _sections(summary):
        strategies = {}
        for name, rows in task["strategies"].items():
            main = rows.get(str(head)) or rows["0"]
            shown = {n: _plain(row) for n, row in rows.items() if n != "0"}
            about = STRATEGIES[split_name(name)[0]]
            entry: dict[str, Any] = _plain(main) | {
                "label": label_of(name),
                "learnt": about.trained,
                "by_shots": shown,
            }
            curve = task["curves"].get(name)
            if curve:
                entry["by_pairs"] = [[pairs, value] for pairs, value in curve]
                entry["by_round"] = [value for _, value in curve]
            strategies[name] = entry
        paired = {
            key.replace(">", " - "): {"mean": row["diff"], "lo": row["ci"][0], "hi": row["ci"][1], "p": row["p"]}
            for key, row in task["paired"].items()
        }
        spent = max((pairs for curve in task["curves"].values() for pairs, _ in curve), default=None)
        tasks[title] = {
            "task": task["task"],
            "shots": head,
            "metric_name": task["metric_name"],
            "strategies": strategies,
            "queries": task["queries"],
            "limits": task["limits"],
            "paired": paired,
            "data": {"data": task["data"], "seeds": ", ".join(map(str, task["groups"])), "LVLM": task["lvlm"]},
            "scored_pairs": spent,
        }
    return {"tasks": tasks} | ({"command": command} if command else {})


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"metric": row["metric"], "ci": row["ci"]}


def _figure(spec: SuiteSpec, summary: Mapping[str, Any], path: Path) -> Path | None:
    """Metric against number of demonstrations for DRUM, EPR and CLIP; None where the suite has none of them."""
    tasks = {}
    for title, _, task in _sections(summary):
        lines = {}
        for name, label in _FIGURE.items():
            rows = task["strategies"].get(name)
            if rows and str(spec.headline) in rows:
                by_shots = {n: _plain(row) for n, row in rows.items()}
                lines[name] = _plain(rows[str(spec.headline)]) | {"label": label, "by_shots": by_shots}
        if lines:
            tasks[title] = {"shots": spec.headline, "metric_name": task["metric_name"], "strategies": lines}
    if not tasks:
        path.unlink(missing_ok=True)
        return None
    return plot_shots({"tasks": tasks}, path)


def write_pages(
    spec: SuiteSpec,
    summary: Mapping[str, Any],
    out: Path,
    *,
    examples: Sequence[Mapping[str, Any]] = (),
    command: str = "",
) -> None:
    """Write `tables.md`, `tables.tex`, `figure.png` and `report.html` with its figures.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    tables = make_tables(summary)
    write_text(out / "tables.md", "\n\n".join(t.markdown() for t in tables) + "\n")
    head = "% needs \\usepackage{booktabs}\n\n"
    write_text(out / "tables.tex", head + "\n\n".join(t.latex() for t in tables) + "\n")
    _figure(spec, summary, out / "figure.png")
    write_report(report_results(summary, command=command), examples, out)
