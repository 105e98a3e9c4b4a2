"""Text that is safe to show, to store and to compare, against unicodedata."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drum_hf.utils.text import normalize_text, printable, shown, well_formed

anything = st.text(st.characters(exclude_categories=()), max_size=40)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("94c5\x1b[2K\rforged line\n0 scores", r"94c5\x1b[2K\rforged line\n0 scores"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\u202eb\u2028c\x9bd\ud83d", r"a\u202eb\u2028c\x9bd\ud83d"),
        ("größe 日本\u3000หมา क्\u200dष 👨\u200d👩", "größe 日本\u3000หมา क्\u200dष 👨\u200d👩"),
        (None, "None"),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_what_a_terminal_is_shown(text, said):
    assert shown(text) == said


@given(anything)
def test_nothing_shown_controls_a_terminal(text):
    said = shown(text)
    assert not {unicodedata.category(c) for c in said} & {"Cc", "Cs", "Zl", "Zp", "Co"}
    assert not any(unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI") for c in said)
    said.encode()
    if all(c.isprintable() for c in text):
        assert said == text


@given(anything)
def test_nothing_printable_controls_a_terminal_and_json_stays_json(text):
    said = printable(text)
    assert not {unicodedata.category(c) for c in said} & {"Cs", "Zl", "Zp", "Co"}
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in said)
    assert said.count("\n") == text.count("\n")
    read = json.loads(printable(json.dumps(text, ensure_ascii=False)))
    assert read.encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


@given(anything)
def test_well_formed_text_changes_only_what_can_not_be_stored(text):
    kept = well_formed(text)
    kept.encode()
    assert "\0" not in kept
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert kept == text.replace("\0", "\ufffd")


def test_halves_of_a_pair():
    assert well_formed("a\ud83db\ude00") == "a\ufffdb\ufffd" and well_formed("\ud83d\ude00") == "😀"
    assert well_formed("x" * 11, most=10) == "x" * 10


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", "cafe\u0301"),
        ("Don’t", "don't"),
        ("‘a’ “b” «c»", '\'a\' "b" "c"'),
        ("１２", "12"),
        ("left—right", "left-right"),
        ("−5", "-5"),
        ("a\u200bb\ufeff", "ab"),
        ("  no\u00a0\t finding\n", "no finding"),
        ("STRASSE", "straße"),
        ("ﬁn", "fin"),
        ("rock´n´roll", "rock'n'roll"),
    ],
)
def test_what_looks_the_same_is_the_same(one, other):
    assert normalize_text(one) == normalize_text(other) == normalize_text(normalize_text(one))


@pytest.mark.parametrize(
    ("one", "other"), [("1", "10"), ("resume", "résumé"), ("cat", "cats"), ("a-b", "ab"), ("²x", "x")]
)
def test_what_differs_stays_different(one, other):
    assert normalize_text(one) != normalize_text(other)


@given(st.text(max_size=30))
def test_normalizing_agrees_with_unicodedata(text):
    once = normalize_text(text)
    assert normalize_text(unicodedata.normalize("NFD", text)) == normalize_text(unicodedata.normalize("NFC", text))
    assert normalize_text(f" \u200b{text}\n") == once == " ".join(once.split())
    assert not any(unicodedata.category(c) == "Cf" for c in once)


@given(st.text("abcXYZ019 .,é", max_size=30))
def test_of_plain_text_only_case_and_spaces_change(text):
    assert normalize_text(text) == " ".join(text.casefold().split())
