"""The run manifest: what it says, and what it must not."""

from __future__ import annotations

import json
import sys

import pytest

from drum_hf.utils.manifest import manifest_beside, write_manifest
from drum_hf.utils.redaction import shown_command


class LVLM:
    name, revision, fingerprint = "/home/me/models/lvlm", None, "f" * 32
    identity = {"chat_template": "a" * 32, "system": None, "weights": "w" * 32}  # noqa: RUF012


def test_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/drum-hf", "train", "--data", "/home/me/birds", "--seed", "7"])
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    path = write_manifest(tmp_path / "new", seed=7, data={"support": "0f"}, lvlm=LVLM(), settings={"rounds": 2})
    assert path == tmp_path / "new" / "manifest.json"
    text = path.read_text()
    told = json.loads(text)
    assert told["seed"] == 7 and told["data"] == {"support": "0f"} and told["settings"] == {"rounds": 2}
    assert told["command"] == "drum-hf train --data birds --seed 7"
    assert told["python"] == ".".join(map(str, sys.version_info[:3])) and told["time"].endswith("+00:00")
    assert {"torch", "transformers", "huggingface_hub"} <= set(told["packages"])
    assert told["lvlm"]["name"] == "lvlm" and told["lvlm"]["fingerprint"] == "f" * 32
    assert told["lvlm"]["prompt"]["chat_template"] == "a" * 32
    assert "hf_abc" not in text and "/home" not in text


def test_beside_a_file(tmp_path):
    assert manifest_beside(tmp_path / "results.json", seed=1) == tmp_path / "results.manifest.json"
    assert json.loads((tmp_path / "results.manifest.json").read_text())["lvlm"] is None
    assert manifest_beside(tmp_path / "scores.sqlite") == tmp_path / "scores.sqlite.manifest.json"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["x", "--api-key=sk-abcdefghij", "--k", "4"], "x --api-key=… --k 4"),
        (["x", "--token", "abc", "--out", "run"], "x --token … --out run"),
        (["x", "--max-tokens", "100", "hf_abcdefghijk"], "x --max-tokens 100 …"),
        (["x", "--endpoint", "https://me:pass@host/v1"], "x --endpoint https://host/v1"),
        (["x", "--out=/data/me/run"], "x --out=run"),
    ],
)
def test_secrets_and_folders_are_left_out(words, shown):
    assert shown_command(words) == shown
