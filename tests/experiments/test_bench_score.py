"""`drum-hf bench score` at a tiny size: what it counts and compares, not how fast this machine is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drum_hf.cli import main
from drum_hf.experiments.bench import score as module
from drum_hf.experiments.bench.machine import Measured
from drum_hf.experiments.bench.shapes import SHAPES, all_pairs, build, decoder_flops, vision_flops
from drum_hf.lvlm.local.model import TransformersLVLM


@pytest.fixture
def here(monkeypatch):
    """Every way in this process: a test needs its results, not its memory."""
    monkeypatch.setattr(module, "measure_memory", lambda way, *args, device: Measured(way(*args), 1.0))
    monkeypatch.setattr(module, "measure_gemm", lambda *args: 1e9)


def test_the_json_a_user_gets(here, tmp_path, capsys):
    path = tmp_path / "score.json"
    assert main(["-q", "bench", "score", "--shape", "tiny", "--rows", "5", "--sample", "9", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["shape"] == "tiny" and result["pairs"] == 20
    for name, pairs in (("plain", 9), ("plain_batched", 9), ("engine", 20)):
        assert result[name]["pairs_per_s"] > 0 and result[name]["peak_mb"] == 1 and result[name]["pairs"] == pairs
    speed = {name: result[name]["pairs_per_s"] for name in ("plain", "plain_batched", "engine")}
    assert result["ratio_plain"] == pytest.approx(speed["engine"] / speed["plain"], rel=0.01)
    assert result["ratio_batched"] == pytest.approx(speed["engine"] / speed["plain_batched"], rel=0.01)
    assert result["ratio_count"] > 1 and result["floor_share"] > 0 and 0 < result["rerun_share"] < 1
    assert result["largest_difference"] < 1e-5
    assert result["machine"]["cores"] and result["machine"]["gpu"] is None
    said = capsys.readouterr().out
    assert "timed on 9 of them" in said and "by count" in said


def test_batched_and_plain_say_the_same(here):
    case = module._Case("tiny", 4, "float32", "cpu", None, None)
    plain, batched = module._plain(case, 12), module._batched(case, 12)
    assert list(plain["scores"]) == list(batched["scores"]) == list(range(12))
    np.testing.assert_allclose(list(plain["scores"].values()), list(batched["scores"].values()), atol=1e-5)


def test_no_shape_of_that_name(capsys):
    assert main(["-q", "bench", "score", "--shape", "gpt-9"]) == 2
    assert "smolvlm-256m" in capsys.readouterr().err


def test_pairs_are_all_pairs():
    requests = all_pairs(SHAPES["tiny"], 5)
    pairs = {(r.query.id, r.demonstrations[0].id) for r in requests}
    assert len(requests) == len(pairs) == 20 and all(a != b for a, b in pairs)
    assert all(1 <= len(r.responses[0].split()) <= 4 for r in requests)


@pytest.mark.parametrize("name", ["tiny", "qwen2-vl-2b"])
def test_flops_by_count_are_those_of_the_model(name):
    """torch counts matrix products, convolutions and attention of one conversation run whole."""
    shape = SHAPES[name]
    model, processor = build(name, torch.float32, "cpu")
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    lvlm = TransformersLVLM(model, processor)
    request = all_pairs(shape, 2)[0]
    (row,) = lvlm.format.prompt_rows([request])
    ids, extra = lvlm._runner.images.expand([row])
    inputs = lvlm._runner.images.pad(ids, extra)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    tokens = len(ids[0])
    # The counter sees attention as a full square, whatever the mask leaves of it.
    counted = 2 * vision_flops(shape) + decoder_flops(shape, tokens, tokens, tokens)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_shapes_are_those_of_the_models_they_are_named_after():
    assert [SHAPES[name].image_tokens for name in ("smolvlm-256m", "smolvlm-500m")] == [64, 64]
    assert SHAPES["qwen2-vl-7b"].image_tokens == 256
    with torch.device("meta"):
        from transformers import AutoModelForImageTextToText

        from drum_hf.experiments.bench.shapes import _idefics3

        config, _ = _idefics3(SHAPES["smolvlm-256m"])
        sizes = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    assert 220e6 < sizes < 290e6
