"""Pages of the site that stand elsewhere in the repository: the README, the project's own pages, and the examples.

They are read from where GitHub shows them, and links between the two places are turned into links between pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

#: Page -> the file in the repository that it is made from.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "releasing.md": "RELEASING.md",
    "security-policy.md": "SECURITY.md",
    "examples.md": "examples/README.md",
}

_LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[)#])")
_CELL = re.compile(r"^# %%(?P<kind> \[markdown\])?.*\n", flags=re.MULTILINE)


def repository(config) -> Path:
    return Path(config.config_file_path).parent


def page_of(path: str) -> str:
    """Where a file of the repository stands in the site; the path itself where it doesn't."""
    for page, source in PAGES.items():
        if path == source:
            return page
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    return path.removeprefix("docs/") if path.startswith("docs/") else path


def relink(text: str, *, source: str, page: str) -> str:
    """Turn links that are true at `source`, a path in the repository, into links that are true at `page`."""

    def turn(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(page_of(target), posixpath.dirname(page) or ".")

    return _LINK.sub(turn, text)


def script_page(code: str, path: str) -> str:
    """A percent-format script as Markdown: its `# %% [markdown]` cells as text, the others as code."""
    _, *cells = _CELL.split(code)
    parts = []
    for kind, body in zip(cells[::2], cells[1::2], strict=True):
        if kind:
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join([*parts, f"*This page is `{path}`.*\n"])


def on_files(files: Files, config) -> Files:
    top = repository(config)
    for page, source in PAGES.items():
        text = (top / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relink(text, source=source, page=page)))
    for script in sorted((top / "examples").glob("*.py")):
        source = f"examples/{script.name}"
        page = page_of(source)
        text = relink(script_page(script.read_text(encoding="utf-8"), source), source=source, page=page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    path = page.file.src_uri
    if path in PAGES or path.startswith("examples/"):
        return markdown  # already turned
    return relink(markdown, source=f"docs/{path}", page=path)
