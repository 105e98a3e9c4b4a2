"""What every model card is made of: front matter, tables, and text that stays text whoever wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "CITATION",
    "as_code",
    "as_table",
    "as_text",
    "front_matter",
    "in_python",
    "is_hub_id",
    "join_sections",
    "linked",
    "list_of",
    "title_of",
    "usage",
]

CITATION = """## Citation

```bibtex
@inproceedings{yige2025drum,
  title     = {DRUM: Learning Demonstration Retriever for Large MUlti-modal Models},
  author    = {Yi-Ge, Ellen and Gao, Jiechao and Han, Wei and Zhu, Wei},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics
               (Volume 4: Student Research Workshop)},
  pages     = {1051--1063},
  year      = {2025},
  note      = {arXiv:2412.07619}
}
@article{doveh2024towards,
  title     = {Towards Multimodal In-Context Learning for Vision \\& Language Models},
  author    = {Doveh, Sivan and Perek, Shaked and Mirza, M. Jehanzeb and Lin, Wei and Alfassy, Amit and
               Arbelle, Assaf and Ullman, Shimon and Karlinsky, Leonid},
  journal   = {arXiv preprint arXiv:2403.12736},
  year      = {2024}
}
```"""

#: Characters that Markdown or HTML would read.
_SPECIAL = re.compile(r"[\\`*<>\[\]#|~$&!]")
#: What renderers make a link of.
_ADDRESS = re.compile(r"(\S*(?:://|www\.|[^\s@]@[^\s@]+\.)\S*)", re.IGNORECASE)
_LONGEST = 1_000


def front_matter(**meta: Any) -> str:
    """The YAML at the top of a card, as the Hub reads it; entries that are None or empty are left out.

    Args:
        meta: for `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(**{key: value for key, value in meta.items() if value})
    return f"---\n{data.to_yaml(line_break=None)}\n---"


def join_sections(*sections: str) -> str:
    """The text of a card, of the sections that are not empty."""
    return "\n\n".join(section for section in sections if section) + "\n"


def title_of(repo_id: Any, otherwise: str) -> str:
    """The first heading: the repository's last name."""
    return f"# {as_text(str(repo_id or otherwise).rpartition('/')[2])}"


def usage(code: str, *, install: str = "pip install drum-hf") -> str:
    """The section that shows how to load it."""
    shown = f"\n\n```python\n{code}\n```" if code else ""
    return f"## How to use\n\n```bash\n{install}\n```{shown}"


def list_of(values: Mapping[str, Any]) -> str:
    """A list of names, "_" as spaces, and values."""
    return "\n".join(f"- **{as_text(name.replace('_', ' '))}**: {_cell(value)}" for name, value in values.items())


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table; numbers are rounded and on the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    table = ["| " + " | ".join(as_text(key) for key in columns) + " |"]
    table.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    table += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(table)


def linked(name: str) -> str:
    """A model's name, with a link where it is a Hub id."""
    return f"[{as_text(name)}](https://huggingface.co/{name})" if is_hub_id(name) else as_text(name)


def is_hub_id(name: Any) -> bool:
    """Whether a text has the form "owner/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", str(name), re.ASCII) is not None


def in_python(name: Any, otherwise: str) -> str:
    """A name as a Python string, where it is a Hub id or one that ships; else what stands for it."""
    return json.dumps(name if is_hub_id(name) else otherwise)


def as_code(value: Any) -> str:
    """A text in a code span, which nothing in it can end.

    Example:
        >>> as_code("main` <img>")
        "`main' <img>`"
    """
    return f"`{_line(value).replace('`', chr(39))}`"


def as_text(value: Any) -> str:
    """One line that shows a text as it is: no markup, no HTML, no link, no end of a table's cell.

    Example:
        >>> print(as_text("# a | <b> see http://x.example/y"))
        \\# a \\| \\<b\\> see `http://x.example/y`
    """
    parts = _ADDRESS.split(_line(value))
    return "".join(
        as_code(part).replace("|", "\\|") if odd % 2 else _SPECIAL.sub(r"\\\g<0>", part)
        for odd, part in enumerate(parts)
    )


def _line(value: Any) -> str:
    """Printable characters on one line."""
    text = " ".join(str(value)[: 4 * _LONGEST].split())
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return as_text(value)
