"""Text from outside: how it is shown, stored, and compared."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["normalize_text", "printable", "shown", "well_formed"]

#: Joiners that Persian, Hindi and emoji are written with; every other format character is escaped or removed.
_JOINERS = "\u200c\u200d"
_UNIFIED = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u02b9`\u00b4\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-"),
    }
)


def shown(text: object, *, most: int = 300) -> str:
    """Text that is safe to print on one line of a terminal.

    Control characters, line breaks, direction marks and everything else that doesn't print become escapes such as
    `\\x1b`. Letters of all scripts, spaces, and the joiners of Persian, Hindi and emoji stay.

    Args:
        text: any object; `str(text)` is shown.
        most: characters; what is longer is cut and ends with "…".

    Example:
        >>> shown("94c5\\x1b[2K\\rforged")
        '94c5\\\\x1b[2K\\\\rforged'
    """
    said = str(text)
    cut = said if len(said) <= most else f"{said[: most - 1]}…"
    if cut.isprintable():
        return cut
    return "".join(c if _prints(c) else c.encode("unicode_escape").decode("ascii") for c in cut)


def printable(text: str) -> str:
    r"""Text of several lines that is safe to print at a terminal, as by `shown`: line breaks and tabs stay.

    The escapes are JSON's, so that JSON stays JSON.

    Example:
        >>> printable("a table\n\x1b[2J\x7f")
        'a table\n\\u001b[2J\\u007f'
    """
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or _prints(c) else _json_escape(c) for c in text)


def _prints(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _json_escape(character: str) -> str:
    data = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{data[at : at + 2].hex()}" for at in range(0, len(data), 2))


def well_formed(text: str, *, most: int = 1_000_000) -> str:
    """Text that every database and file format takes: half surrogate pairs and NUL become U+FFFD.

    Args:
        most: characters; what is longer is cut.

    Example:
        >>> well_formed("a cut emoji: \\ud83d")
        'a cut emoji: �'
    """
    # UTF-16 joins both halves of a pair, and finds the halves that stand alone.
    whole = text[:most].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "\ufffd")


def normalize_text(text: str) -> str:
    """Text as answers and labels are compared: what looks the same is the same.

    Unicode's compatibility forms are unified (NFKC: full-width digits, ligatures, combining accents), case is folded,
    curly and straight apostrophes, quotation marks and dashes are one each, zero-width and other format characters
    are removed, and runs of white space become one space. Punctuation, articles and word order stay.

    Example:
        >>> normalize_text("  Don’t\\u200b –  ＳＴＯＰ １２ ")
        "don't - stop 12"
    """
    # A mark such as the acute accent is unified first: NFKC would split it into a space and a combining accent.
    folded = unicodedata.normalize("NFKC", text.translate(_UNIFIED)).casefold()
    folded = "".join(c for c in folded if unicodedata.category(c) != "Cf")
    # Folding and removal can leave a letter and its accent apart, which a second pass joins.
    folded = unicodedata.normalize("NFKC", folded).casefold()
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", folded).translate(_UNIFIED)).strip()
