"""Text from outside, made safe to show."""

from __future__ import annotations

import unicodedata

__all__ = ["shown"]

#: Unicode categories that a terminal acts on or hides: controls, formats (bidirectional marks among them), lone
#: surrogates, private-use characters, and separators of lines and paragraphs.
_UNSHOWN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def shown(text: str) -> str:
    r"""Text from outside on one line, with control and invisible characters escaped.

    Example:
        >>> print(shown("All is well\x1b[2J\nreally"))
        All is well\x1b[2J\nreally
    """
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in _UNSHOWN else char for char in text)
