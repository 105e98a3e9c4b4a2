"""The report of an evaluation: a table, figures, and one HTML file that says what they show.

Numbers come in as the JSON of `drum-hf demo`, whose contract stands at the head of `plots.py`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ColumnError
from ..utils.cards import as_text
from ..utils.files import write_text
from ..utils.images import load_image
from .plots import Estimate, StrategySeries, TaskResult, plot_pairs, plot_rounds, plot_shots, read_results

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "escape_latex",
    "format_limits",
    "format_table",
    "headline",
    "limits",
    "plot_pairs",
    "plot_rounds",
    "plot_shots",
    "write_report",
]

_FEW_QUERIES, _MOST_QUERIES = 30, 100_000  # that make a number rough, and that nobody asks (our choice)
_SMALL, _LARGE = 96, 320  # pixels: drawn crisp up to the first, shrunk to the second (our choice)

#: File stem, field that must be there, drawing function, heading, what the figure shows.
_FIGURES: tuple[tuple[str, str, Callable[[Mapping[str, Any], Path], Path], str, str], ...] = (
    ("shots", "", plot_shots, "By number of demonstrations", "Bars are 95% intervals, set side by side to be seen."),
    (
        "pairs",
        "by_pairs",
        plot_pairs,
        "By LVLM scores paid for",
        "Each scored pair is one call of the LVLM: further left at the same height is cheaper. The grey line is the "
        "best strategy without training.",
    ),
    ("rounds", "by_round", plot_rounds, "By mining round", "Each round mines candidates, scores them and trains."),
)

_CSS = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1d1f23; --soft: #5c626c; --line: #d9dce1; --card: #f5f6f8;
  --good: #00684a; --bad: #a8320a; --mark: #fff1e6; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181c; --ink: #e8eaed; --soft: #a5abb5; --line: #3a3f47;
  --card: #1f2228; --good: #4fd1a1; --bad: #ff9b73; --mark: #3b2a1d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; } h4 { font-size: .95rem; margin: 0 0 .4rem; }
.headline { font-size: 1.15rem; border-left: .3rem solid #d55e00; padding-left: .8rem; }
.soft, figcaption, footer { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .3rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; } tr.best > * { background: var(--mark); font-weight: 700; }
figure { margin: 0; }
.plot img { width: 100%; max-width: 46rem; height: auto; background: #fff; border-radius: .4rem; }
.example { display: grid; grid-template-columns: minmax(10rem, 14rem) 1fr; gap: 1rem; padding: 1rem;
  margin: 1rem 0; background: var(--card); border-radius: .5rem; }
.query img { width: 100%; } .picture { border-radius: .3rem; display: block; height: auto; }
.pixels { image-rendering: pixelated; }
.columns { display: grid; gap: 1rem; } .columns > section { border-top: 1px solid var(--line); padding-top: .6rem; }
.columns > section:first-child { border-top: 0; padding-top: 0; }
.demos { display: flex; flex-wrap: wrap; gap: .7rem; list-style: none; margin: 0; padding: 0; }
.demos dt, .demos dd { display: inline; } .demos dt::after { content: ": "; } .demos .response dd { color: var(--ink);
  font-weight: 700; }
.demos li { width: 10rem; } .demos img { width: 100%; } .absent { padding: 1.5rem .5rem; text-align: center;
  border: 1px dashed var(--line); border-radius: .3rem; }
dl { margin: .5rem 0 0; } dt { color: var(--soft); font-size: .8rem; } dd { margin: 0 0 .3rem; }
.answer { margin: .6rem 0 0; } .right { color: var(--good); font-weight: 700; }
.wrong { color: var(--bad); font-weight: 700; }
code { overflow-wrap: anywhere; } footer { border-top: 1px solid var(--line); margin-top: 3rem; padding: 1rem 0; }
@media (max-width: 40rem) { .example { grid-template-columns: 1fr; padding: .7rem; } .query img { max-width: 14rem; }
  .demos li { width: calc(50% - .35rem); } th, td { padding: .25rem .5rem; } }
"""


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return _points(estimate.value)
    return f"{_points(estimate.value)} [{_points(estimate.low)}, {_points(estimate.high)}]"


def _shots(count: int) -> str:
    return f"{count} shot" if count == 1 else f"{count} shots"


def _cells(task: TaskResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a task's table, not yet escaped or marked."""
    others = [n for n in task.shot_counts if n != task.shots]
    header = ["strategy", f"{_shots(task.shots)} [95% interval]", *map(_shots, others)]
    rows = []
    for s in task.strategies:
        rest = [_points(s.by_shots[n].value) if n in s.by_shots else "–" for n in others]
        rows.append([s.name, _interval(s.main), *rest])
    return header, rows


def _text_table(task: TaskResult) -> str:
    header, rows = _cells(task)
    for strategy, row in zip(task.strategies, rows, strict=True):
        row[0] += " *" if strategy is task.best_learnt else ""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    lines = [f"{task.task}: {task.metric_name} × 100", line(header), "-" * len(line(header)), *map(line, rows)]
    if task.best_learnt:
        lines.append("* highest of the learnt strategies")
    return "\n".join(lines)


def _markdown_table(task: TaskResult) -> str:
    header, rows = _cells(task)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for strategy, row in zip(task.strategies, rows, strict=True):
        cells = [as_text(row[0]), *row[1:]]
        if strategy is task.best_learnt:
            cells = [cell if cell == "–" else f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    note = " In bold: the highest of the learnt strategies." if task.best_learnt else ""
    return "\n".join([f"### {as_text(task.task)}", "", f"{as_text(task.metric_name)} × 100.{note}", "", *lines])


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    ">": r"\textgreater{}",
    "<": r"\textless{}",
    "×": r"$\times$",
}


def escape_latex(text: str) -> str:
    r"""Text for a cell of a LaTeX table.

    >>> escape_latex("95% of a_b")
    '95\\% of a\\_b'
    """
    return "".join(_LATEX.get(c, c) for c in text)


def _latex_table(task: TaskResult) -> str:
    escape = escape_latex
    header, rows = _cells(task)
    lines = [
        f"% {escape(' '.join(task.task.split()))}: {escape(task.metric_name)} x 100; needs \\usepackage{{booktabs}}",
        r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
        r"\toprule",
        " & ".join(map(escape, header)) + r" \\",
        r"\midrule",
    ]
    for strategy, row in zip(task.strategies, rows, strict=True):
        cells = [escape(cell) for cell in row]
        if strategy is task.best_learnt:
            cells = [rf"\textbf{{{cell}}}" for cell in cells]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def format_table(results: Mapping[str, Any], *, style: Literal["text", "markdown", "latex"] = "text") -> str:
    """Print results as a table: the main shot count with its 95% interval, then a column for each other shot count.

    Metrics are shown × 100. The learnt strategy of the highest metric is marked; whether it is *separably* the best
    is for the intervals (see `headline`).

    Args:
        results: the JSON of `drum-hf demo`, of one task or several.
        style: "text" for a terminal, "markdown", or "latex" (a tabular of booktabs).

    Returns:
        The table; several tasks stand one below another.

    Raises:
        ColumnError: the results break their contract.
        ValueError: another style.

    >>> drum, si = {"metric": 0.9, "ci": [0.88, 0.92]}, {"metric": 0.42, "ci": [0.4, 0.44]}
    >>> print(format_table({"task": "vqa", "shots": 4, "strategies": {"drum": drum, "si": si}}))
    vqa: accuracy × 100
    strategy    4 shots [95% interval]
    ----------------------------------
    SI (RICES)       42.0 [40.0, 44.0]
    DRUM *           90.0 [88.0, 92.0]
    * highest of the learnt strategies
    """
    styles = {"text": _text_table, "markdown": _markdown_table, "latex": _latex_table}
    if style not in styles:
        raise ValueError(f"style should be one of {', '.join(map(repr, styles))}, found {style!r}; choose one of them")
    return "\n\n".join(styles[style](task) for task in read_results(results))


def _verdict(task: TaskResult, a: StrategySeries, b: StrategySeries) -> Literal["ahead", "behind", "unclear"]:
    """Compare two strategies by their paired interval, or, without one, by whether their own intervals overlap."""
    if contrast := task.paired.get(f"{a.key} - {b.key}"):
        low, high = contrast["lo"], contrast["hi"]
    elif contrast := task.paired.get(f"{b.key} - {a.key}"):
        low, high = -contrast["hi"], -contrast["lo"]
    elif a.main.low is None or a.main.high is None or b.main.low is None or b.main.high is None:
        return "unclear"
    else:
        low, high = a.main.low - b.main.high, a.main.high - b.main.low
    return "ahead" if low > 0 else "behind" if high < 0 else "unclear"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _sentence(task: TaskResult) -> str:
    hero = task.get("drum") or task.best_learnt or task.best_untrained
    if hero is None:
        return f"{task.task}: these results hold the oracle alone, so there is nothing to compare."
    if hero.main.low is not None and hero.main.high is not None:
        interval = f" (95% interval {_points(hero.main.low)} to {_points(hero.main.high)})"
    else:
        interval = ""
    text = f"With {_shots(task.shots)}, {hero.name} reaches {task.metric_name} {_points(hero.main.value)}{interval}."
    rivals = [s for s in task.strategies if s.learnt and s is not hero]
    if task.best_untrained not in (None, hero):
        rivals.insert(0, task.best_untrained)  # type: ignore[arg-type]
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "unclear": []}
    for rival in rivals:
        label = "; the best without training" if rival is task.best_untrained else ""
        groups[_verdict(task, hero, rival)].append(f"{rival.name} ({_points(rival.main.value)}{label})")
    for verdict, words in (("ahead", "It is ahead of"), ("behind", "It is behind")):
        if groups[verdict]:
            text += f" {words} {_and(groups[verdict])}."
    if groups["unclear"]:
        text += f" The intervals do not tell it from {_and(groups['unclear'])}."
    if not hero.learnt:
        text += " No learnt strategy was evaluated."
    if oracle := task.get("oracle"):
        text += f" The {oracle.name} reaches {_points(oracle.main.value)}."
    return text


def headline(results: Mapping[str, Any]) -> dict[str, str]:
    """Say in words what the numbers show, and no more.

    DRUM (or, without it, the best learnt strategy) is compared with the best untrained strategy and with every other
    learnt one: "ahead" or "behind" only where the interval of the paired difference leaves out 0 or, where `paired`
    lacks the two, where their 95% intervals do not overlap (which is stricter).

    Args:
        results: the JSON of `drum-hf demo`.

    Returns:
        Task -> sentences.

    Raises:
        ColumnError: the results break their contract.

    >>> drum, si = {"metric": 0.5, "ci": [0.4, 0.6]}, {"metric": 0.45, "ci": [0.35, 0.55]}
    >>> headline({"task": "vqa", "shots": 1, "strategies": {"drum": drum, "si": si}})["vqa"].split(". ")[1]
    'The intervals do not tell it from SI (RICES) (45.0; the best without training).'
    """
    return {task.task: _sentence(task) for task in read_results(results)}


def limits(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a run can't show or can't help with, each a sentence with what to do.

    These are what the run itself noted (`limits` of the JSON), and what the numbers say.

    Args:
        results: the JSON of `drum-hf demo`.

    Returns:
        Task -> sentences; an empty list where all seems well.

    Raises:
        ColumnError: the results break their contract.

    >>> drum, si = {"metric": 0.5, "ci": [0.4, 0.6]}, {"metric": 0.45, "ci": [0.35, 0.55]}
    >>> (told,) = limits({"task": "vqa", "shots": 1, "strategies": {"drum": drum, "si": si}})["vqa"]
    >>> told.split(":")[0]
    'These queries do not tell DRUM from SI (RICES), the best without training, since their 95% intervals overlap'
    """
    return {task.task: _limits(task) for task in read_results(results)}


def format_limits(results: Mapping[str, Any]) -> str:
    """`limits` as lines for a terminal, each ended; "" where there are none."""
    told = limits(results)
    return "".join(
        f"note{f' on {task}' if len(told) > 1 else ''}: {sentence}\n"
        for task, found in told.items()
        for sentence in found
    )


def _limits(task: TaskResult) -> list[str]:
    told = [str(sentence) for sentence in task.raw.get("limits") or ()]
    queries = task.raw.get("queries")
    if queries is not None and queries < _FEW_QUERIES:
        told.append(
            f"Only {queries} {'query was' if queries == 1 else 'queries were'} asked, so every number here is rough: "
            f"ask {_FEW_QUERIES} or more."
        )
    if max(s.main.value for s in task.strategies) <= 0:
        told.append(
            "No strategy gets a single answer right: compare the LVLM's answers with the gold ones, write responses "
            "as it would answer, or use another metric or LVLM."
        )
        return told
    oracle, bare = task.get("oracle"), task.get("zero-shot")
    if oracle is not None and bare is not None and oracle.main.value <= bare.main.value:
        told.append(
            "Even demonstrations with the gold answer do no better than none, so no choice of demonstrations can "
            "help: use an LVLM that learns in context, or check the prompts and responses."
        )
    hero, rival = task.get("drum") or task.best_learnt, task.best_untrained
    if hero is None or rival is None:
        return told
    verdict = _verdict(task, hero, rival)
    if verdict == "behind":
        told.append(
            f"{hero.name} is behind {rival.name}, which needs no training: use {rival.name}, or train with more rows, "
            "candidates or rounds."
        )
    elif verdict == "unclear":
        told.append(_unclear(task, hero, rival))
    return told


def _unclear(task: TaskResult, hero: StrategySeries, rival: StrategySeries) -> str:
    contrast, queries = task.paired.get(f"{hero.key} - {rival.key}"), task.raw.get("queries")
    said = "since their 95% intervals overlap"
    more = "ask more queries"
    if contrast:
        said = (
            f"since the 95% interval of their difference, {100 * contrast['lo']:+.1f} to {100 * contrast['hi']:+.1f}, "
            "holds 0"
        )
        if queries and contrast["mean"]:
            # An interval narrows with the root of the number of queries.
            needed = queries * ((contrast["hi"] - contrast["lo"]) / 2 / contrast["mean"]) ** 2
            if queries < needed < _MOST_QUERIES:
                more += (
                    f" (a difference of this size takes about {float(f'{needed:.1g}'):,.0f}, and there were {queries})"
                )
    return (
        f"These queries do not tell {hero.name} from {rival.name}, the best without training, {said}: {more}, or use "
        f"{rival.name}, which needs no training."
    )


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _picture(image: Image | None, alt: str) -> str:
    if image is None:
        return '<p class="absent soft">no image</p>'
    if not hasattr(image, "convert"):
        raise ColumnError(f"an example's image should be a PIL image or None, found {image!r}; open it first")
    small = max(image.size) <= _SMALL
    copy = load_image(image).copy()
    copy.thumbnail((_LARGE, _LARGE))
    kind, pixels = ("png", " pixels") if small else ("jpeg", "")
    buffer = io.BytesIO()
    copy.save(buffer, format=kind)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f'width="{copy.width}" height="{copy.height}"'
    return f'<img class="picture{pixels}" alt="{_escape(alt)}" {size} src="data:image/{kind};base64,{data}">'


def _terms(pairs: Sequence[tuple[str, Any]]) -> str:
    given = [(key, value) for key, value in pairs if value is not None and value != ""]
    items = (f'<div class="{key}"><dt>{key}</dt><dd>{_escape(value)}</dd></div>' for key, value in given)
    return f"<dl>{''.join(items)}</dl>"


def _demonstration(number: int, demo: Mapping[str, Any]) -> str:
    utility = demo.get("utility")
    pairs = [
        ("prompt", demo.get("prompt")),
        ("response", demo["response"]),
        ("score", None if demo.get("score") is None else f"{demo['score']:.3f}"),
        ("utility", None if utility is None else f"{utility:+.2f}"),
        ("note", demo.get("note")),
    ]
    alt = f"Demonstration {number}: {demo.get('prompt') or 'image'} → {demo['response']}"
    return f"<li><figure>{_picture(demo.get('image'), alt)}<figcaption>{_terms(pairs)}</figcaption></figure></li>"


def _column(name: str, column: Mapping[str, Any]) -> str:
    demos = "".join(_demonstration(i, demo) for i, demo in enumerate(column["demonstrations"], 1))
    correct = column.get("correct")
    mark = {None: "", True: ' <span class="right">✓ right</span>', False: ' <span class="wrong">✗ wrong</span>'}
    shown = f'<ol class="demos">{demos}</ol>' if demos else '<p class="soft">no demonstrations</p>'
    answer = f'<p class="answer">The LVLM answers: <strong>{_escape(column["answer"])}</strong>'
    verdict = mark[None if correct is None else bool(correct)]
    return f"<section><h4>{_escape(name)}</h4>{shown}{answer}{verdict}</p></section>"


def _example(number: int, example: Mapping[str, Any]) -> str:
    try:
        query = example["query"]
        pairs = [(key, query.get(key)) for key in ("prompt", "gold", "draft")]
        picture = _picture(query.get("image"), f"Query {number}: {query.get('prompt') or 'image'}")
        columns = "".join(_column(str(name), column) for name, column in example["columns"].items())
    except KeyError as error:
        raise ColumnError(
            f"examples[{number - 1}] lacks the key {error}; expected query: {{image, prompt, gold, draft}} and "
            "columns: {name: {demonstrations: [{image, prompt, response, score, utility, note}], answer, correct}}"
        ) from error
    left = f'<div class="query"><h4>Query {number}</h4>{picture}{_terms(pairs)}</div>'
    return f'<article class="example">{left}<div class="columns">{columns}</div></article>'


def _html_table(task: TaskResult) -> str:
    header, rows = _cells(task)
    head = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in header)
    body = ""
    for strategy, row in zip(task.strategies, rows, strict=True):
        best = ' class="best"' if strategy is task.best_learnt else ""
        cells = "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:])
        body += f'<tr{best}><th scope="row">{_escape(row[0])}</th>{cells}</tr>'
    note = "; shaded: the highest of the learnt strategies" if task.best_learnt else ""
    caption = f"<caption>{_escape(task.metric_name)} × 100, higher is better{note}</caption>"
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Results of {_escape(task.task)}">{table}</div>'


def _html_limits(task: TaskResult) -> str:
    told = _limits(task)
    items = "".join(f"<li>{_escape(sentence)}</li>" for sentence in told)
    return f'<h3>What to know before you use these numbers</h3><ul class="limits">{items}</ul>' if told else ""


def _paired(task: TaskResult) -> str:
    if not task.paired:
        return ""
    names = {s.key: s.name for s in task.strategies}
    items = ""
    for key, c in task.paired.items():
        name = " − ".join(names.get(part, part) for part in key.split(" - "))
        p = "p < 0.001" if c["p"] < 0.001 else f"p = {c['p']:.3f}"
        items += f"<li>{_escape(name)}: {100 * c['mean']:+.1f} [{100 * c['lo']:+.1f}, {100 * c['hi']:+.1f}], {p}</li>"
    note = "On the same queries, × 100, with 95% intervals."
    return f'<h3>Paired differences</h3><p class="soft">{note}</p><ul>{items}</ul>'


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _setting(raw: Mapping[str, Any]) -> str:
    parts = []
    if raw.get("world") is not None or raw.get("world_seed") is not None:
        seed = f"seed {raw['world_seed']}" if raw.get("world_seed") is not None else ""
        parts.append(f"generated world ({', '.join(filter(None, [str(raw.get('world') or ''), seed]))})")
    if raw.get("data"):
        data = raw["data"]
        parts.append(", ".join(f"{k}: {v}" for k, v in data.items()) if isinstance(data, Mapping) else str(data))
    if raw.get("scored_pairs") is not None:
        parts.append(f"{raw['scored_pairs']:,} pairs scored by the LVLM")
    if raw.get("seconds") is not None:
        parts.append(_minutes(raw["seconds"]))
    return f'<p class="soft">{_escape(" · ".join(parts))}</p>' if parts else ""


_HOW_TO_READ = """<section><h2>How to read this</h2>
<p>A strategy chooses the demonstrations that stand in the LVLM's context before the query; everything else is the same
in every row. Metrics are × 100, and a bracket or a bar is a 95% interval. The text calls one strategy ahead of another
only where the interval of their paired difference leaves out 0 or, without one, where their intervals do not overlap.
The oracle looks at the query's gold answer: it is a ceiling, not a competitor. In the examples, <em>score</em> is the
retriever's similarity of query and demonstration, and <em>utility</em> is how much that demonstration alone raises the
log-likelihood of the gold answer over none: above 0 it helps.</p></section>"""


def _footer(results: Mapping[str, Any], tasks: Sequence[TaskResult]) -> str:
    raws = [results, *(task.raw for task in tasks)]
    commands = dict.fromkeys(str(raw["command"]) for raw in raws if raw.get("command"))
    versions = {str(k): str(v) for raw in raws for k, v in (raw.get("versions") or {}).items()}
    lines = [f"<p>Made by <code>{_escape(command)}</code></p>" for command in commands]
    if versions:
        lines.append(f"<p>{_escape(', '.join(f'{k} {v}' for k, v in versions.items()))}</p>")
    return f"<footer>{''.join(lines)}<p>The same numbers stand in results.json and table.md.</p></footer>"


def _figures(task: TaskResult, out: Path, prefix: str) -> str:
    """Write a task's PNG files and return them as inline figures."""
    text = ""
    for stem, field, draw, heading, caption in _FIGURES:
        path = out / f"{prefix}{stem}.png"
        if field and not any(getattr(s, field) for s in task.strategies):
            path.unlink(missing_ok=True)  # an earlier report's figure would pass for this one's
            continue
        draw({"tasks": {task.task: task.raw}}, path)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        alt = f"{task.task}: {task.metric_name} of each strategy, {heading[0].lower()}{heading[1:]}"
        image = f'<img alt="{_escape(alt)}" src="data:image/png;base64,{data}">'
        text += f'<h3>{heading}</h3><figure class="plot">{image}<figcaption>{caption}</figcaption></figure>'
    return text


def write_report(
    results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = (), out_dir: str | Path = "report"
) -> Path:
    """Write `report.html`, and beside it the figures (PNG), `results.json` and `table.md`.

    The page holds its pictures and style itself and has no script: it can be mailed, or opened offline.

    Args:
        results: the JSON of `drum-hf demo`, of one task or several; each task gets a section.
        examples: queries with what each strategy showed the LVLM: {"query": {"image": PIL image or None, "prompt",
            "gold", "draft"}, "columns": {strategy name: {"demonstrations": [{"image", "prompt", "response", "score",
            "utility", "note"}], "answer": str, "correct": bool or None}}}. A "task" key puts an example into that
            task's section; without one it goes to the only task's, or to a section at the end.
        out_dir: the folder, made where it is missing; files of an earlier report are replaced.

    Returns:
        The path of `report.html`. Figures are `shots.png`, `pairs.png`, `rounds.png` (the last two where the results
        have `by_pairs`, `by_round`), with the task's name in front where there are several.

    Raises:
        ColumnError: results or examples break their contract; nothing is written.
        DependencyError: matplotlib is not installed.
    """
    tasks = read_results(results)
    names = [task.task for task in tasks]
    cards: dict[str | None, str] = {}
    for number, example in enumerate(examples, 1):
        task_name = example.get("task", names[0] if len(names) == 1 else None)
        place = task_name if task_name in names else None
        cards[place] = cards.get(place, "") + _example(number, example)
    try:
        numbers_json = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ColumnError(
            f"results should hold plain, finite JSON values: {error}; convert NumPy numbers and paths first"
        ) from error

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    sections = ""
    for task in tasks:
        prefix = re.sub(r"[^\w.-]+", "-", task.task) + "-" if len(tasks) > 1 else ""
        shown = f"<h3>Examples</h3>{cards[task.task]}" if task.task in cards else ""
        head = f'<h2>{_escape(task.task)}</h2><p class="headline">{_escape(_sentence(task))}</p>'
        numbers = f"{_setting(task.raw)}{_html_limits(task)}{_html_table(task)}{_paired(task)}"
        sections += f"<section>{head}{numbers}{_figures(task, out, prefix)}{shown}</section>"
    if None in cards:
        sections += f"<section><h2>Examples</h2>{cards[None]}</section>"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>drum-hf report: {_escape(", ".join(names))}</title><link rel="icon" href="data:,">'
        f"<style>{_CSS}</style></head>\n<body><header><h1>Which demonstrations help the LVLM?</h1></header>\n"
        f"<main>{sections}\n{_HOW_TO_READ}</main>\n{_footer(results, tasks)}</body></html>\n"
    )
    write_text(out / "results.json", numbers_json + "\n")
    write_text(out / "table.md", format_table(results, style="markdown") + "\n")
    path = out / "report.html"
    write_text(path, page)
    return path
