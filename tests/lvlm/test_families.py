"""Every LVLM family against plain, unbatched, uncached forwards of the same model."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_requests import GRID, REQUESTS, SQUARE, WIDE, WUG
from PIL import Image
from plain import conversation, inputs, plain_generate, plain_logprobs, plain_score
from tiny import FAMILIES, load_lvlm

from drum_hf.lvlm.local.model import TransformersLVLM


class Family:
    """A tiny LVLM and what it should say, computed once."""

    def __init__(self, name: str, lvlm: TransformersLVLM) -> None:
        self.name, self.lvlm = name, lvlm
        self.score = functools.cache(lambda i: plain_score(lvlm.model, lvlm.processor, (REQUESTS + GRID)[i]))

    def scores(self) -> np.ndarray:
        return np.array([self.score(i) for i in range(len(REQUESTS + GRID))])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    tmp = Path(tmp_path_factory.getbasetemp())
    return Family(request.param, load_lvlm(request.param, tmp, batch_size=4))


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_the_models_see_their_images(family: Family) -> None:
    shown, other = REQUESTS[6], SQUARE.transpose(Image.Transpose.ROTATE_90)
    mirrored = dataclasses.replace(WUG, image=WIDE.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    wrong = [
        dataclasses.replace(shown, query=dataclasses.replace(shown.query, image=other)),
        dataclasses.replace(shown, demonstrations=(mirrored, *shown.demonstrations[1:])),
    ]
    for request in wrong:
        score = plain_score(family.lvlm.model, family.lvlm.processor, request)
        assert abs(score - family.score(6)) > 1e-3, "an image mistaken for another would pass unnoticed"


def test_scores_are_the_plain_forwards(family: Family) -> None:
    close(family.lvlm.score(REQUESTS + GRID), family.scores())


def test_scores_do_not_depend_on_what_ran_before_or_beside(family: Family) -> None:
    requests, expected = REQUESTS + GRID, family.scores()
    order = np.random.default_rng(2).permutation(len(requests))
    family.lvlm.generate(REQUESTS[6:8], max_new_tokens=2)
    close(family.lvlm.score([requests[i] for i in order]), expected[order])
    close(family.lvlm.score(REQUESTS), family.lvlm.score(REQUESTS))
    few = TransformersLVLM(
        family.lvlm.model, family.lvlm.processor, batch_size=3, max_batch_tokens=150, image_cache_bytes=0
    )
    close(few.score(requests[::3]), expected[::3])
    close([few.score([request])[0] for request in REQUESTS[3:7]], expected[3:7])


def test_every_token_is_the_plain_forwards(family: Family) -> None:
    requests = REQUESTS[2:10]
    expected = [plain_logprobs(family.lvlm.model, family.lvlm.processor, r, r.responses[0]) for r in requests]
    tokens = family.lvlm.score_tokens(requests)
    assert [len(t) for t in tokens] == [len(e) for e in expected]
    close(np.concatenate(tokens), np.concatenate(expected))
    assert all((e < 0).all() and len(set(e.round(6))) > len(e) // 2 for e in expected)


def test_the_end_of_the_turn_counts_on_demand(family: Family) -> None:
    model, processor = family.lvlm.model, family.lvlm.processor
    ending = TransformersLVLM(model, processor, batch_size=4, score_end_of_turn=True)
    requests = [REQUESTS[0], REQUESTS[6]]
    for request, tokens in zip(requests, ending.score_tokens(requests), strict=True):
        close(tokens, plain_logprobs(model, processor, request, request.responses[0], end_of_turn=True))


def test_generate_is_the_models_own(family: Family) -> None:
    requests = [REQUESTS[i] for i in (0, 1, 4, 5, 6, 9)]
    answers = family.lvlm.generate(requests, max_new_tokens=12)
    assert answers == [plain_generate(family.lvlm, request, 12) for request in requests]
    assert len(set(answers)) > 3


def test_capabilities_are_what_the_architecture_allows(family: Family) -> None:
    found = family.lvlm.capabilities
    assert found.image_features and found.shared_prefix
    # Neighbours in a sequence are no neighbours of a branch: windows and convolutions would mix answers.
    assert found.packed_answers == (not family.name.startswith(("gemma3", "lfm2", "idefics3-lfm2")))


def test_tokens_are_counted_as_the_processor_makes_them(family: Family) -> None:
    prompts = [inputs(family.lvlm.processor, conversation(request), generate=True) for request in REQUESTS]
    assert family.lvlm.count_tokens(REQUESTS) == [prompt["input_ids"].shape[1] for prompt in prompts]


def test_a_responses_tokens_merge_with_what_stands_before_them(family: Family) -> None:
    processor, messages = family.lvlm.processor, conversation(REQUESTS[0])
    prompt = inputs(processor, messages, generate=True)["input_ids"][0].tolist()
    said = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    full = inputs(processor, [*messages, said])["input_ids"][0].tolist()
    splits_at_punctuation = family.name == "idefics3-lfm2"
    assert (full[: len(prompt)] == prompt) == splits_at_punctuation


def test_the_short_window_is_shorter_than_the_conversations(tmp_path_factory: pytest.TempPathFactory) -> None:
    lvlm = load_lvlm("gemma3-short-window", Path(tmp_path_factory.getbasetemp()))
    window = lvlm.model.config.get_text_config().sliding_window
    assert min(lvlm.count_tokens(GRID)) > window


@pytest.mark.parametrize("name", ["smolvlm", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"])
def test_processors_load_without_their_part_for_videos(
    name: str, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    with caplog.at_level(logging.INFO, "drum_hf"):
        lvlm = load_lvlm(name, Path(tmp_path_factory.getbasetemp()))
    lines = [record.getMessage() for record in caplog.records if "torchvision" in record.getMessage()]
    wanted = f"torchvision is not installed: {type(lvlm.processor).__name__} loads without its video processor"
    assert lines == [wanted]
    assert getattr(lvlm.processor, "video_processor", None) is None


def test_a_processor_loaded_for_images_only_saves_and_loads_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build: Callable[[Path], Path] = FAMILIES["smolvlm"]
    folder = build(Path(tmp_path_factory.getbasetemp()))
    lvlm = TransformersLVLM.from_pretrained(folder)
    lvlm.model.save_pretrained(tmp_path)
    lvlm.processor.save_pretrained(tmp_path)
    again = TransformersLVLM.from_pretrained(tmp_path)
    assert again.fingerprint == lvlm.fingerprint
    close(again.score(REQUESTS[6:7]), lvlm.score(REQUESTS[6:7]))
