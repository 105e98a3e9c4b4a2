"""Columns of a public data set: of the kind that its registry entry expects, or named in an error."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ColumnError

logger = logging.getLogger(__name__)

#: Kind of a column -> how an error names it.
COLUMN_KINDS = {
    "text": "text",
    "number": "whole numbers",
    "key": "text or whole numbers",
    "texts": "lists of texts",
    "answers": "lists of {answer: text, …}",
    "class": "a ClassLabel, or class names",
    "image": "images",
    "images": "lists of images",
}


def check_features(
    features: Mapping[str, Any],
    columns: Mapping[str, str],
    *,
    needed: Collection[str],
    where: str,
    open_ended: bool = False,
) -> None:
    """Refuse a table whose columns are not those expected; log what is new or changed but not read.

    Args:
        features: name -> feature, as a Dataset has them.
        columns: name -> kind, one of `COLUMN_KINDS`, of every column that is known.
        needed: the columns that are read.
        where: the data set, for messages.
        open_ended: the table is known to hold further columns, which are not worth a word.

    Raises:
        ColumnError: needed columns are missing or of another type; all of them are named.
    """
    faults = {}
    for name, kind in columns.items():
        got = f"got {_brief(features[name])}" if name in features else "there is none"
        if name not in features or not _fits(kind, features[name]):
            faults[name] = f"{name!r}: expected {COLUMN_KINDS[kind]}, {got}"
    unknown = [] if open_ended else [name for name in features if name not in columns]
    new = f"; new here: {', '.join(map(repr, unknown))}" if unknown else ""
    wrong = [fault for name, fault in faults.items() if name in needed]
    if wrong:
        raise ColumnError(
            f"{where}: {len(wrong)} of its columns are not as known: {'; '.join(wrong)}{new}. The data set may have "
            "changed: pass revision= with an older commit, or data_dir= with a copy in the layout known"
        )
    if faults or unknown:
        logger.warning("%s: columns that are not read differ: %s%s", where, "; ".join(faults.values()) or "none", new)


def _fits(kind: str, feature: Any) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if kind == "images":
        return inner is not None and _fits("image", inner)
    if kind == "image":
        is_struct = isinstance(feature, dict) and "bytes" in feature and feature.keys() <= {"bytes", "path"}
        return isinstance(feature, datasets.Image) or is_struct or _dtype(feature) in ("binary", "large_binary")
    if kind == "texts":
        return inner is not None and _is_text(inner)
    if kind == "answers":
        return isinstance(inner, dict) and _is_text(inner.get("answer"))
    if kind == "class":
        return isinstance(feature, datasets.ClassLabel) or _is_text(feature)
    whole = not isinstance(feature, datasets.ClassLabel) and "int" in _dtype(feature)
    return (kind != "number" and _is_text(feature)) or (kind != "text" and whole)


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _dtype(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return dtype if isinstance(dtype, str) else ""


def _brief(feature: Any) -> str:
    shown = getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else None
    shown = shown or str(feature)
    return f"{shown[:77]}..." if len(shown) > 80 else shown
