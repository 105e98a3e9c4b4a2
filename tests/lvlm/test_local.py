"""TransformersLVLM against plain, unbatched, uncached forwards of the same model."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain import plain_logprobs
from tiny import tiny_idefics3, tiny_llava, tiny_qwen2_vl

from drum_hf.errors import ChatTemplateError, ContextOverflowError, NonFiniteScoreError
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.lvlm.local.runner import Capabilities
from drum_hf.lvlm.prompts import build_messages
from drum_hf.types import LVLM, Demonstration, ICLRequest, Query

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "idefics3": tiny_idefics3,
    "idefics3-lfm2": lambda tmp: tiny_idefics3(tmp, "lfm2"),
    "idefics3-splitting": lambda tmp: tiny_idefics3(tmp, splitting=True),
    "llava": tiny_llava,
    "qwen2-vl": tiny_qwen2_vl,
}
NOISE = np.random.default_rng(0)
IMAGES = [
    Image.fromarray(NOISE.integers(0, 256, (*size, 3), dtype=np.uint8))
    for size in ((32, 32), (48, 64), (64, 40), (33, 47))
]
SHOTS = (
    Demonstration("a", IMAGES[1], "what colour is this?", "red wug"),
    Demonstration("b", None, "which word?", "dax"),
    Demonstration("c", IMAGES[2], "", "a round shape"),
)
QUERY = Query(IMAGES[0], "what shape is in this picture?", id="q")


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersLVLM:
    folder = FAMILIES[request.param](Path(tmp_path_factory.getbasetemp()))
    return TransformersLVLM.from_pretrained(folder, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_idefics3(Path(tmp_path_factory.getbasetemp()))


@pytest.fixture
def small(folder: Path) -> TransformersLVLM:
    return TransformersLVLM.from_pretrained(folder)


def apply(lvlm: TransformersLVLM, messages: list[dict[str, Any]], **kwargs: Any) -> Any:
    return lvlm.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def oracle(lvlm: TransformersLVLM, request: ICLRequest, response: str, end_of_turn: bool = False) -> np.ndarray:
    return plain_logprobs(lvlm.model, lvlm.processor, request, response, end_of_turn=end_of_turn)


def test_is_an_lvlm(lvlm: TransformersLVLM) -> None:
    assert isinstance(lvlm, LVLM)
    assert lvlm.context_length == 512


def test_images_are_kept_where_that_gives_the_same(lvlm: TransformersLVLM) -> None:
    lvlm.score([ICLRequest(QUERY, SHOTS[:1], ("red",))])
    assert lvlm.capabilities.image_features and lvlm._runner.keeps_images


@pytest.mark.parametrize("answers", [("red wug",), ("seven", "blick blick dax", "größe 紅色 🙂 naïve")])
def test_batched_equals_one_at_a_time(lvlm: TransformersLVLM, answers: tuple[str, ...]) -> None:
    queries = [QUERY, Query(IMAGES[3], "which word?"), Query(None, "which word is this?"), Query(IMAGES[1])]
    requests = [
        ICLRequest(query, SHOTS[:shots], (answer,))
        for answer, query, shots in itertools.product(answers, queries, (0, 1, 3))
    ]
    expected = [oracle(lvlm, request, request.responses[0]) for request in requests]
    tokens = lvlm.score_tokens(requests)
    assert [len(t) for t in tokens] == [len(e) for e in expected]
    np.testing.assert_allclose(np.concatenate(tokens), np.concatenate(expected), atol=1e-4, rtol=0)
    scores = lvlm.score(requests)
    assert scores.dtype == np.float64 and scores.shape == (len(requests),)
    np.testing.assert_allclose(scores, [e.mean() for e in expected], atol=1e-4, rtol=0)
    order = np.random.default_rng(1).permutation(len(requests))
    np.testing.assert_allclose(lvlm.score([requests[i] for i in order]), scores[order], atol=1e-4, rtol=0)


def test_several_responses_are_a_weighted_log_sum_exp(lvlm: TransformersLVLM) -> None:
    responses, weights = ("red", "red wug", "a round shape"), (3.0, 1.0, 6.0)
    means = np.array([oracle(lvlm, ICLRequest(QUERY, SHOTS), r).mean() for r in responses])
    got = lvlm.score([ICLRequest(QUERY, SHOTS, responses, weights), ICLRequest(QUERY, SHOTS, responses)])
    expected = [np.log((np.array(w) / sum(w) * np.exp(means)).sum()) for w in (weights, (1.0, 1.0, 1.0))]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_choices_are_normalised_over_summed_log_probabilities(lvlm: TransformersLVLM) -> None:
    choices = ("seven blick", "seven", "red", "seven wug", "red wug dax", "größe")
    sums = np.array([oracle(lvlm, ICLRequest(QUERY, SHOTS[:2]), choice, end_of_turn=True).sum() for choice in choices])
    expected = sums - np.log(np.exp(sums).sum())
    labels = lvlm.label_scores(ICLRequest(QUERY, SHOTS[:2], choices=choices))
    np.testing.assert_allclose(labels, expected, atol=1e-4, rtol=0)
    assert np.exp(labels).sum() == pytest.approx(1)
    scores = lvlm.score([ICLRequest(QUERY, SHOTS[:2], (choice,), choices=choices) for choice in choices])
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    both = lvlm.score([ICLRequest(QUERY, SHOTS[:2], ("red", "seven"), (1.0, 3.0), choices)])
    assert both[0] == pytest.approx(np.log(0.25 * np.exp(expected[2]) + 0.75 * np.exp(expected[1])), abs=1e-4)


def test_generate_equals_plain_unbatched_generate(lvlm: TransformersLVLM) -> None:
    requests = [
        ICLRequest(QUERY, SHOTS),
        ICLRequest(Query(IMAGES[1], "which word?")),
        ICLRequest(Query(None, "which?")),
        ICLRequest(Query(IMAGES[2]), SHOTS[2:]),
    ]
    expected = []
    for request in requests:
        inputs = apply(lvlm, build_messages(request), add_generation_prompt=True)
        out = lvlm.model.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=lvlm._stop_ids,
            pad_token_id=lvlm.tokenizer.pad_token_id,
        )[0, inputs["input_ids"].shape[1] :]
        expected.append(lvlm.tokenizer.decode(out, skip_special_tokens=True).strip())
    assert lvlm.generate(requests, max_new_tokens=24) == expected
    assert len(set(expected)) > 1


def test_an_answer_ends_with_its_turn(small: TransformersLVLM) -> None:
    turn = small.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert turn in small._stop_ids
    passes = []

    def end(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        passes.append(len(logits))
        return logits.index_fill(-1, torch.tensor(turn), 1e4)

    assert small._runner.keeps_images  # tried out before the passes are counted
    small.model.lm_head.register_forward_hook(end)
    assert small.generate([ICLRequest(QUERY), ICLRequest(QUERY, SHOTS)], max_new_tokens=9) == ["", ""]
    assert passes == [2]


def test_count_tokens_is_the_prompts_length(lvlm: TransformersLVLM) -> None:
    requests = [ICLRequest(QUERY, SHOTS), ICLRequest(Query(None, "which?")), ICLRequest(Query(IMAGES[1]), SHOTS[:1])]
    lengths = [apply(lvlm, build_messages(r), add_generation_prompt=True)["input_ids"].shape[1] for r in requests]
    assert lvlm.count_tokens(requests) == lengths


def test_kept_images_are_the_same_whatever_the_cache_holds(lvlm: TransformersLVLM) -> None:
    requests = [ICLRequest(Query(im, "what?"), SHOTS, ("red wug",)) for im in IMAGES]
    expected = lvlm.score(requests)
    bare = TransformersLVLM(lvlm.model, lvlm.processor, batch_size=2, max_batch_tokens=100, image_cache_bytes=0)
    np.testing.assert_allclose(bare.score(requests), expected, atol=1e-4, rtol=0)
    assert not bare._runner.images.kept and bare._runner.images.kept_bytes == 0
    plain = TransformersLVLM(lvlm.model, lvlm.processor)
    plain._runner.capabilities = Capabilities(False, False, False)  # type: ignore[misc]
    np.testing.assert_allclose(plain.score(requests), expected, atol=1e-4, rtol=0)


def test_each_image_passes_the_vision_tower_once(small: TransformersLVLM) -> None:
    assert small._runner.keeps_images
    seen = []
    small.model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    shots = tuple(Demonstration(str(i), im.copy(), "what?", "red") for i, im in enumerate(IMAGES[:3]))
    small.score([ICLRequest(Query(im, "what?"), shots, ("red", "blue")) for im in IMAGES] * 5)
    assert sum(seen) <= len(IMAGES)


def test_images_that_memory_has_no_room_for_are_read_from_disk(folder: Path, tmp_path: Path) -> None:
    requests = [ICLRequest(QUERY, SHOTS[:k], ("red wug",)) for k in range(4)]
    expected = TransformersLVLM.from_pretrained(folder).score(requests)

    def lvlm() -> TransformersLVLM:
        return TransformersLVLM.from_pretrained(folder, image_cache_bytes=600, image_cache_dir=tmp_path)

    first = lvlm()
    np.testing.assert_allclose(first.score(requests), expected, atol=1e-5)
    encoded = first._runner.images.encoded
    np.testing.assert_allclose(first.score(requests), expected, atol=1e-5)
    assert first._runner.images.encoded == encoded and first._runner.images.kept_bytes <= 600
    (own,) = tmp_path.iterdir()
    files = sorted(own.glob("*.safetensors"))
    assert own.name == first.fingerprint and len(files) >= 2 and not list(own.glob("*.part"))

    again = lvlm()
    np.testing.assert_allclose(again.score(requests), expected, atol=1e-5)
    assert again._runner.images.encoded < encoded  # what another run has left
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[1].write_bytes(b"no tensors at all")
    np.testing.assert_allclose(lvlm().score(requests), expected, atol=1e-5)


def test_limits_are_found_or_given(folder: Path) -> None:
    found = TransformersLVLM.from_pretrained(folder)
    assert 512 <= found.max_batch_tokens <= 4096 and found.batch_size == 64
    given = TransformersLVLM.from_pretrained(folder, batch_size=2, max_batch_tokens=50)
    assert (given.batch_size, given.max_batch_tokens) == (2, 50)
    requests = [ICLRequest(QUERY, SHOTS[:k], (r,)) for k in range(3) for r in ("red", "blue wug")]
    np.testing.assert_allclose(given.score(requests), found.score(requests), atol=1e-5)


def test_a_demonstration_passes_the_decoder_once(small: TransformersLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text_model, shapes = small.model.model.text_model, []
    forward = text_model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        shapes.append(kwargs["inputs_embeds"].shape[:2])
        return forward(*args, **kwargs)

    requests = [ICLRequest(Query(None, f"which {word}?"), SHOTS[:2], ("red",)) for word in ("wug", "dax", "word", "a")]
    small.score(requests)
    monkeypatch.setattr(text_model, "forward", counting)
    small.score(requests)
    (prefix, leaves) = shapes
    assert prefix[0] == 1 and leaves[0] == len(requests) and prefix[1] > 2 * leaves[1]


def test_the_end_of_the_turn_counts_only_on_demand(folder: Path, small: TransformersLVLM) -> None:
    ending = TransformersLVLM.from_pretrained(folder, score_end_of_turn=True)
    request = ICLRequest(QUERY, SHOTS, ("red wug",))
    expected = oracle(small, request, "red wug", end_of_turn=True)
    np.testing.assert_allclose(ending.score_tokens([request])[0], expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(small.score_tokens([request])[0], expected[:-1], atol=1e-4, rtol=0)


def test_long_work_is_done_in_parts_with_progress(
    small: TransformersLVLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [ICLRequest(QUERY, SHOTS[:k], ("red", "blue wug")[: 1 + k % 2]) for k in (0, 1, 2, 3, 1)]
    expected = small.score(requests)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("drum_hf.lvlm.local.runner._ANSWERS_AT_ONCE", 3)
    np.testing.assert_allclose(small.score(requests, progress=True), expected, atol=1e-4, rtol=0)
    assert "scoring: 100%" in capsys.readouterr().err


def test_nothing_asked_nothing_done(small: TransformersLVLM) -> None:
    assert small.score([]).shape == (0,)
    assert small.score_tokens([]) == small.generate([]) == small.count_tokens([]) == []


def test_users_faults_are_named(small: TransformersLVLM) -> None:
    for responses, choices, message in [
        ((), (), "'q' has none"),
        ((" ",), (), "response with text, query 'q'"),
        (("red",), ("blue", "green"), r"query 'q' has \['red'\]"),
        (("red",), ("red", "red "), "distinct choices"),
        (("red",), ("red", ""), "choice with text"),
    ]:
        with pytest.raises(ValueError, match=message):
            small.score([ICLRequest(QUERY, (), responses, choices=choices)])
    with pytest.raises(ValueError, match="positive weights"):
        small.score([ICLRequest(QUERY, (), ("red", "blue"), (1.0, 0.0))])
    with pytest.raises(ValueError, match="has none"):
        small.score_tokens([ICLRequest(QUERY)])
    with pytest.raises(ValueError, match="has none"):
        small.label_scores(ICLRequest(QUERY))
    with pytest.raises(ValueError, match="max_new_tokens"):
        small.generate([ICLRequest(QUERY)], max_new_tokens=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        TransformersLVLM(small.model, small.processor, batch_size=0)


def test_a_conversation_too_long_is_an_error_never_cut(small: TransformersLVLM) -> None:
    small.tokenizer.model_max_length = 60
    fits, long = ICLRequest(QUERY, (), ("red",)), ICLRequest(QUERY, SHOTS, ("red",))
    assert small.count_tokens([fits])[0] < 60 < small.count_tokens([long])[0]
    small.score([fits])
    with pytest.raises(ContextOverflowError, match=r"at most 60 tokens.*query 'q' with 3 demonstrations.*fewer shots"):
        small.score([fits, long])
    with pytest.raises(ContextOverflowError, match="and 50 to generate"):
        small.generate([fits], max_new_tokens=50)


def test_non_finite_logits_are_an_error(small: TransformersLVLM) -> None:
    with torch.no_grad():
        small.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteScoreError, match=r"'red'.*query 'q'"):
        small.score([ICLRequest(QUERY, (), ("red",))])


def test_no_chat_template_is_an_error(small: TransformersLVLM) -> None:
    small.processor.chat_template = None
    with pytest.raises(ChatTemplateError, match=r"set processor\.chat_template"):
        TransformersLVLM(small.model, small.processor)


def test_out_of_memory_halves_the_batch(small: TransformersLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ICLRequest(QUERY, SHOTS[:k], (r,)) for k in range(3) for r in ("red", "blue wug")]
    expected, answers = small.score(requests), small.generate(requests, max_new_tokens=4)
    text_model, sizes, before = small.model.model.text_model, [], small.max_batch_tokens
    forward = text_model.forward

    def greedy(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["inputs_embeds"]))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError
        return forward(*args, **kwargs)

    monkeypatch.setattr(text_model, "forward", greedy)
    room = 2
    np.testing.assert_allclose(small.score(requests), expected, atol=1e-4, rtol=0)
    assert small.generate(requests, max_new_tokens=4) == answers
    assert max(sizes) > 2 and small.max_batch_tokens < before
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        small.score(requests)


def test_same_folder_same_fingerprint_whatever_ran(folder: Path, small: TransformersLVLM) -> None:
    small.score([ICLRequest(QUERY, SHOTS, ("red",))])
    small.generate([ICLRequest(QUERY)], max_new_tokens=2)
    assert small.fingerprint == TransformersLVLM.from_pretrained(folder, batch_size=2).fingerprint
    assert len(small.fingerprint) == 32 and int(small.fingerprint, 16)


def test_fingerprint_changes_with_whatever_scores_depend_on(folder: Path, tmp_path: Path) -> None:
    def changed_file(name: str, old: str, new: str) -> str:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
        return TransformersLVLM.from_pretrained(copy).fingerprint

    load = TransformersLVLM.from_pretrained
    nudged = load(folder)
    with torch.no_grad():
        next(nudged.model.parameters()).view(-1)[0] += 1e-3
    sharper = json.loads((folder / "processor_config.json").read_text())["image_processor"]["resample"]
    prints = [
        load(folder).fingerprint,
        nudged.fingerprint,
        load(folder, dtype=torch.bfloat16).fingerprint,
        load(folder, image_position="last").fingerprint,
        load(folder, system="be brief").fingerprint,
        load(folder, score_end_of_turn=True).fingerprint,
        load(folder, score_end_of_turn=False).fingerprint,
        load(folder, image_budget={"size": {"longest_edge": 16}}).fingerprint,
        load(folder, query_image_budget={"size": {"longest_edge": 16}}).fingerprint,
        load(folder, reasoning_markers=[("(", ")")]).fingerprint,
        TransformersLVLM(nudged.model, nudged.processor, name="me/model", revision="a" * 40).fingerprint,
        TransformersLVLM(nudged.model, nudged.processor, name="me/model", revision="b" * 40).fingerprint,
        changed_file("chat_template.jinja", "Assistant:", "Answer:"),
        changed_file("processor_config.json", f'"resample": {sharper}', f'"resample": {(sharper + 1) % 4}'),
        changed_file("config.json", '"rope_theta": 10000.0', '"rope_theta": 500.0'),
    ]
    assert len(set(prints)) == len(prints)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    assert load(elsewhere).fingerprint == prints[0]


def test_an_adapter_is_merged_and_changes_scores(folder: Path, tmp_path: Path, small: TransformersLVLM) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        TransformersLVLM.from_pretrained(folder).model,
        LoraConfig(r=2, target_modules=r".*text_model.*q_proj", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    lvlm = TransformersLVLM.from_pretrained(folder, adapter=str(tmp_path / "adapter"))
    request = ICLRequest(QUERY, SHOTS, ("red wug",))
    lvlm_oracle = TransformersLVLM(adapted.merge_and_unload(), small.processor)
    assert lvlm.score([request]) == pytest.approx(lvlm_oracle.score([request]), abs=1e-4)
    assert lvlm.score([request]) != pytest.approx(small.score([request]), abs=1e-4)
    assert lvlm.fingerprint != small.fingerprint


def test_greyscale_and_transparent_images_are_shown_as_rgb(small: TransformersLVLM) -> None:
    grey = IMAGES[0].convert("L")
    requests = [
        ICLRequest(Query(im, "what?"), (), ("red",)) for im in (grey, grey.convert("RGB"), grey.convert("RGBA"))
    ]
    scores = small.score(requests)
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


def test_half_precision_stays_near(folder: Path, small: TransformersLVLM) -> None:
    request = ICLRequest(QUERY, SHOTS, ("red wug",))
    half = TransformersLVLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.score([request])[0] == pytest.approx(small.score([request])[0], abs=0.5)
