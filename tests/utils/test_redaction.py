"""What is shown and published holds no secret, and what is no secret stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drum_hf.utils.redaction import address_secrets, body_secrets, redact, redacted, shown_command, shown_path
from drum_hf.utils.text import shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@gw/v1", "https://gw/v1"),
        ("at https://gw:80/v1?api-key=abc&v=2#top twice", "at https://gw:80/v1?api-key=…&v=…# twice"),
        ("https://gw/v1?onlythekey", "https://gw/v1?…"),
        ("key sk-abcdefgh123 or hf_abcdefghij.", "key … or …."),
        ("Authorization: Bearer abc.def-123=", "Authorization: Bearer …"),
        ("GET http://host/a/b failed (404)", "GET http://host/a/b failed (404)"),
        ("the key word, a task-list and me@host.org", "the key word, a task-list and me@host.org"),
    ],
)
def test_texts(text, expected):
    assert redact(text) == expected


@given(st.text(alphabet="aB1%/+=-_ ", min_size=6, max_size=20).filter(str.strip))
def test_a_known_secret_is_found_in_any_case_and_quoted(secret):
    from urllib.parse import quote

    for spelling in (secret, secret.upper(), secret.lower(), quote(secret, safe="")):
        assert redact(f"<{spelling}>", [secret], "#") == "<#>"


def test_settings():
    given = {
        "api_key": "a", "headers": {"X-Api-Key": "b", "Authorization": "c"}, "list": [{"password": "d"}], "seed": 3,
        "max_tokens": 5, "eos_token": "</s>", "url": "https://me:pw@gw?token=e", "key": 7, "note": None,
    }  # fmt: skip
    assert redacted(given) == {
        "api_key": "…", "headers": {"X-Api-Key": "…", "Authorization": "…"}, "list": [{"password": "…"}], "seed": 3,
        "max_tokens": 5, "eos_token": "</s>", "url": "https://gw?token=…", "key": 7, "note": None,
    }  # fmt: skip
    assert body_secrets(given) == {"a", "b", "c", "d"}
    assert address_secrets("https://gw/v1?api-key=TOPSECRET&api-version=2024-02-01&v=2&alt=json") == {"TOPSECRET"}
    assert address_secrets("https://gw/v1?TOPSECRET") == {"TOPSECRET"} and address_secrets("https://gw/v1") == set()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x", "--endpoint", "https://gw/v1?api-key=TOPSECRET"], "x --endpoint https://gw/v1?api-key=…"),
        (["x", "--endpoint=https://me:pw@gw/v1"], "x --endpoint=https://gw/v1"),
        (["x", "--extra-body", '{"api_key": "abc", "top_k": 1}'], 'x --extra-body {"api_key": "…", "top_k": 1}'),
        (["x", "--api-key-env", "MY_KEY", "--seed", "3"], "x --api-key-env MY_KEY --seed 3"),
        (["x", "--password", "abc", "--data=/home/me/birds"], "x --password … --data=birds"),
        (["x", "--columns", "prompt=question", "--out", "runs/a"], "x --columns prompt=question --out runs/a"),
        (["x", "--data", "C:\\Users\\me\\birds"], "x --data birds"),
    ],
)
def test_commands(words, expected):
    assert shown_command(words) == expected


def test_paths_and_terminals():
    assert [shown_path(path) for path in ("/home/me/birds/", "birds", "C:\\me\\birds")] == ["birds", "birds", "birds"]
    assert (
        shown("a\x1b[2Jb\u202e\ud800\x9b1\n") == r"a\x1b[2Jb\u202e\ud800\x9b1\n"
        and shown("größe 日本 🐟") == "größe 日本 🐟"
    )
