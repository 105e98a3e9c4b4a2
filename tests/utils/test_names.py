"""Names of the shipped models stand for their folders wherever a model is named, and are what is written down."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drum_hf
from drum_hf import DemoRetriever, JointEncoder, TransformersLVLM
from drum_hf.encoders import build_encoder, encode_items, load_encoder
from drum_hf.errors import SavedFileError
from drum_hf.playground import encoder_path, lvlm_path
from drum_hf.utils.optional import local_name, resolve_name

COLOURS = ("red", "green", "blue", "white")
ROWS = [
    {"id": c, "image": Image.new("RGB", (32, 32), c), "prompt": "what colour is this?", "response": c} for c in COLOURS
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks the Hub for a shipped model is told no at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def lora():
    retriever = DemoRetriever.from_encoder(encoder_path(), support=ROWS, lora=True, device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in retriever.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    retriever.mark_stale()
    return retriever


def found(retriever: DemoRetriever) -> list[tuple[list[str], list[float]]]:
    return [(r.ids, [round(score, 5) for score in r.scores]) for r in retriever(ROWS, k=3)]


def test_a_name_and_its_folder_are_one_another(tmp_path, monkeypatch):
    for name, folder in (("playground/clip", encoder_path()), ("playground/lvlm", lvlm_path())):
        assert resolve_name(name) == folder and Path(folder, "config.json").is_file()
        assert local_name(folder) == local_name(Path(folder)) == local_name(name) == name
        assert local_name(os.path.relpath(folder)) == local_name(folder + os.sep) == name
    (tmp_path / "link").symlink_to(encoder_path())
    assert local_name(tmp_path / "link") == "playground/clip"
    for other in ("someone/else", "openai/clip-vit-base-patch32", str(tmp_path), "playground"):
        assert resolve_name(other) == local_name(other) == other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "playground" / "clip").mkdir(parents=True)
    assert resolve_name("./playground/clip") == local_name("./playground/clip") == "./playground/clip"


@pytest.mark.parametrize("lora", [False, True])
def test_an_encoder_by_name_is_the_shipped_one(lora, tmp_path):
    named, placed = (build_encoder(n, lora=lora, device="cpu") for n in ("playground/clip", encoder_path()))
    items = [{"image": row["image"], "text": [row["prompt"], row["response"]]} for row in ROWS]
    expected = encode_items(placed, items)
    assert np.array_equal(encode_items(named, items), expected)
    assert named[0].base_model == placed[0].base_model == "playground/clip"
    assert named[0].base_revision is None
    assert JointEncoder("playground/clip").base_model == "playground/clip"
    placed.save(str(tmp_path))
    if lora:
        assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == (
            "playground/clip"
        )
    for again in (load_encoder(tmp_path, device="cpu"), build_encoder(tmp_path, device="cpu")):
        assert np.array_equal(encode_items(again, items), expected)
        assert again[0].has_adapter == lora
        assert (again[0].base_model == "playground/clip") == lora


def test_a_lora_retriever_of_the_shipped_encoder_loads_anywhere(lora, tmp_path):
    lora.save_pretrained(tmp_path)
    written = [f for f in tmp_path.rglob("*") if f.suffix in (".json", ".md")]
    assert not [f for f in written if os.path.dirname(encoder_path()) in f.read_text()]
    loaded = DemoRetriever.from_pretrained(tmp_path, device="cpu")
    assert lora.base_model == loaded.base_model == loaded.encoder[0].base_model == "playground/clip"
    assert found(loaded) == found(lora)
    assert "huggingface.co/playground" not in (tmp_path / "README.md").read_text()  # no such place


def test_a_base_model_that_moved_is_pointed_at(tmp_path):
    base = tmp_path / "clip"
    shutil.copytree(encoder_path(), base)
    retriever = DemoRetriever.from_encoder(base, support=ROWS, lora=True, device="cpu")
    expected = found(retriever)
    retriever.save_pretrained(tmp_path / "saved")
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(SavedFileError, match=r"needs its base model .*clip.*pass base_model="):
        DemoRetriever.from_pretrained(tmp_path / "saved", device="cpu", local_files_only=True)
    with pytest.raises(SavedFileError, match=r"needs its base model .*nowhere"):
        DemoRetriever.from_pretrained(tmp_path / "saved", base_model=tmp_path / "nowhere", local_files_only=True)
    loaded = DemoRetriever.from_pretrained(tmp_path / "saved", base_model=moved, device="cpu")
    assert found(loaded) == expected
    assert loaded.base_model == loaded.encoder[0].base_model == str(moved)
    loaded.save_pretrained(tmp_path / "again")
    assert found(DemoRetriever.from_pretrained(tmp_path / "again", device="cpu")) == expected


def test_a_whole_encoder_needs_no_base_model(tmp_path):
    retriever = DemoRetriever.from_encoder("playground/clip", support=ROWS, strategy="sit", device="cpu")
    retriever.save_pretrained(tmp_path)
    loaded = DemoRetriever.from_pretrained(tmp_path, base_model=tmp_path / "nowhere", device="cpu")
    assert loaded.base_model == "playground/clip" and found(loaded) == found(retriever)


def test_an_lvlm_by_name_is_the_shipped_one():
    named, placed = (TransformersLVLM.from_pretrained(n, device="cpu") for n in ("playground/lvlm", lvlm_path()))
    assert named.name == placed.name == "playground/lvlm"
    assert named.revision is None and named.fingerprint == placed.fingerprint
    assert TransformersLVLM(named.model, named.processor).name == "playground/lvlm"
    assert TransformersLVLM(named.model, named.processor, name="mine").name == "mine"


def test_a_pipeline_takes_the_name_of_model_and_teacher():
    teacher = {"name": "playground/lvlm", "revision": None}
    retriever = DemoRetriever.from_encoder("playground/clip", support=ROWS, teacher=teacher, device="cpu")
    asked = {"image": ROWS[0]["image"], "question": "what colour is this?"}
    pipelines = [
        drum_hf.pipeline("icl-vqa", model, retriever=retriever, num_shots=2, max_new_tokens=4)
        for model in (lvlm_path(), "playground/lvlm", None)
    ]
    answers = [vqa(**asked) for vqa in pipelines]
    assert answers[0] == answers[1] == answers[2]
    assert {vqa.lvlm.name for vqa in pipelines} == {"playground/lvlm"}
