"""Families that are unlike the rest, templates with switches and dates, and what the trial does with a wrong way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_requests import GRID, REQUESTS, SQUARE, WIDE, WUG, picture
from plain import conversation, inputs, plain_generate, plain_logprobs, plain_score
from tiny import load_lvlm, tiny_gemma3, tiny_idefics3, tiny_qwen2_vl
from tiny.others import GLM_TEMPLATE, OTHERS

from drum_hf.errors import ChatTemplateError, DependencyError, ModelError, RowError, UnfinishedReasoningError
from drum_hf.lvlm.answers import without_reasoning
from drum_hf.lvlm.local.images import ImageInputs
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.lvlm.local.processors import default_budget, image_tokens, load_processor, with_budget
from drum_hf.lvlm.prompts import ChatFormat
from drum_hf.types import Demonstration, ICLRequest, Query

SOME = REQUESTS + GRID[:8]
ASKED = [REQUESTS[i] for i in (0, 1, 4, 5, 6, 9)]
#: What the template is given where the library gives it nothing, so that the oracle's day is ours.
DATE = {"date_string": "26 Jul 2024"}


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", params=OTHERS)
def lvlm(request: pytest.FixtureRequest, tmp: Path) -> TransformersLVLM:
    return TransformersLVLM.from_pretrained(OTHERS[request.param](tmp), dtype=torch.float32, batch_size=4)


def variables(lvlm: TransformersLVLM) -> dict[str, Any]:
    return {**lvlm.format.template_kwargs, **(DATE if lvlm.format.date else {})}


def counts(lvlm: TransformersLVLM, requests: list[ICLRequest]) -> list[int]:
    """Tokens of each prompt as the processor makes them."""
    prompts = [inputs(lvlm.processor, conversation(r), generate=True, template=variables(lvlm)) for r in requests]
    return [prompt["input_ids"].shape[1] for prompt in prompts]


# ---- families ----


def test_scores_are_the_plain_forwards(lvlm: TransformersLVLM) -> None:
    expected = np.array([plain_score(lvlm.model, lvlm.processor, r, variables(lvlm)) for r in SOME])
    close(lvlm.score(SOME), expected)
    order = np.random.default_rng(3).permutation(len(SOME))
    close(lvlm.score([SOME[i] for i in order]), expected[order])
    close([lvlm.score([request])[0] for request in SOME[:7]], expected[:7])


def test_answers_are_the_models_own(lvlm: TransformersLVLM) -> None:
    answers = lvlm.generate(ASKED, max_new_tokens=8)
    assert answers == [plain_generate(lvlm, request, 8, variables(lvlm)) for request in ASKED]
    assert len(set(answers)) > 3


def test_tokens_are_counted_as_the_processor_makes_them(lvlm: TransformersLVLM) -> None:
    assert lvlm.count_tokens(REQUESTS) == counts(lvlm, REQUESTS)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_the_first_call_is_as_the_later_ones(family: str, tmp: Path) -> None:
    folder = tiny_gemma3(tmp) if family == "gemma3" else OTHERS[family](tmp)
    fresh = [TransformersLVLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]
    assert fresh[0].count_tokens(ASKED) == counts(fresh[0], ASKED) == fresh[0].count_tokens(ASKED)
    first = fresh[1].generate(ASKED, max_new_tokens=4)
    assert first == [plain_generate(fresh[1], request, 4, variables(fresh[1])) for request in ASKED]
    assert first == fresh[1].generate(ASKED, max_new_tokens=4)


def test_capabilities_say_what_is_not_done_and_why(tmp: Path) -> None:
    found = TransformersLVLM.from_pretrained(OTHERS["mllama"](tmp), dtype=torch.float32).capabilities
    assert not found.image_features and found.batches and found.generation == "pixels"
    assert "no interface for features" in found.reasons["image_features"]
    assert "generation pixels" in found.describe()


# ---- the trial ----


def test_a_way_that_changes_results_is_not_taken(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that is seen: whatever runs beside others is wrong, and each conversation runs by itself."""
    pad = ImageInputs.pad

    def seen(self: ImageInputs, ids: list[list[int]], extra: dict[str, Any]) -> dict[str, Any]:
        made = pad(self, ids, extra)
        return {**made, "attention_mask": torch.ones_like(made["attention_mask"])}

    monkeypatch.setattr(ImageInputs, "pad", seen)
    monkeypatch.setattr(ImageInputs, "can_keep", False)
    lvlm = TransformersLVLM.from_pretrained(tiny_idefics3(tmp), dtype=torch.float32)
    close(lvlm.score(REQUESTS), [plain_score(lvlm.model, lvlm.processor, request) for request in REQUESTS])
    assert lvlm.generate(ASKED, max_new_tokens=6) == [plain_generate(lvlm, request, 6) for request in ASKED]
    found = lvlm.capabilities
    assert not found.batches and found.generation == "alone"
    assert "differ" in found.reasons["batches"] and "differ" in found.reasons["generation"]


def test_features_that_are_wrong_are_not_kept(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = ImageInputs.merged

    def turned(self: ImageInputs, images: Any) -> Any:
        return merged(self, images[::-1])

    monkeypatch.setattr(ImageInputs, "merged", turned)
    lvlm = TransformersLVLM.from_pretrained(tiny_idefics3(tmp), dtype=torch.float32)
    assert not lvlm.capabilities.image_features and lvlm.capabilities.generation == "pixels"
    close(lvlm.score(REQUESTS), [plain_score(lvlm.model, lvlm.processor, request) for request in REQUESTS])


# ---- templates ----


@pytest.mark.parametrize("thinking", [None, False, True])
def test_reasoning_is_off_unless_asked_for(tmp: Path, thinking: bool | None, caplog: Any) -> None:
    given = None if thinking is None else {"enable_thinking": thinking}
    with caplog.at_level(logging.INFO, "drum_hf"):
        lvlm = TransformersLVLM.from_pretrained(
            OTHERS["qwen3.5"](tmp), dtype=torch.float32, chat_template_kwargs=given
        )
    assert ("enable_thinking=False" in caplog.text) == (thinking is None)
    (prompt,) = lvlm.format.prompts([REQUESTS[1]])
    assert prompt.endswith("assistant\n<think>\n" if thinking else "assistant\n<think>\n\n</think>\n\n")
    template = {"enable_thinking": bool(thinking)}
    # The answer's own tokens, no newline of the block before it.
    for request in (REQUESTS[0], REQUESTS[6]):
        expected = plain_logprobs(lvlm.model, lvlm.processor, request, request.responses[0], template=template)
        close(lvlm.score_tokens([request])[0], expected)
        first = lvlm.tokenizer(request.responses[0], add_special_tokens=False)["input_ids"]
        assert len(expected) == len(first)


def test_variables_are_part_of_the_fingerprint_and_must_be_known(tmp: Path) -> None:
    folder = OTHERS["qwen3.5"](tmp)
    prints = [
        TransformersLVLM.from_pretrained(folder, chat_template_kwargs=given).fingerprint
        for given in (None, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(ChatTemplateError, match=r"Qwen3VLProcessor reads, got enable_thought.*enable_thinking"):
        TransformersLVLM.from_pretrained(folder, chat_template_kwargs={"enable_thought": True})


def test_the_date_stays(tmp: Path) -> None:
    folder = OTHERS["mllama"](tmp)
    lvlm = TransformersLVLM.from_pretrained(folder, system="be brief")
    (prompt,) = lvlm.format.prompts([REQUESTS[1]])
    assert "Today: 26 Jul 2024\nbe brief<|eot|>" in prompt
    assert lvlm.identity["date"] == "2024-07-26"
    other = TransformersLVLM.from_pretrained(
        folder, system="be brief", chat_template_kwargs={"date_string": "1 May 2026"}
    )
    assert "Today: 1 May 2026\n" in other.format.prompts([REQUESTS[1]])[0]
    assert other.identity["date"] is None and other.fingerprint != lvlm.fingerprint


def test_turns_that_are_printed_as_they_are_come_as_strings(tmp: Path) -> None:
    processor = load_lvlm("idefics3", tmp).processor
    processor.tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    processor.chat_template = GLM_TEMPLATE
    form = ChatFormat(processor, score_end_of_turn=True)
    assert form.prompts([ICLRequest(Query(SQUARE, "what?"), (WUG,))]) == [
        "[gMASK]<|user|>\n<image>what colour is this?<|assistant|>\nred wug<|user|>\n<image>what?<|assistant|>\n"
    ]
    # The beginning of the next turn is what ends one.
    assert form.end_of_turn == "" and form.stop == "<|user|>"
    _, ((answer,),) = form.answer_rows([ICLRequest(Query(None, "what?"))], [["red"]])
    assert form.tokenizer.convert_ids_to_tokens(answer.ids)[-1] == "<|user|>"


@pytest.mark.parametrize("writes_it", [True, False])
def test_a_conversation_begins_once(tmp: Path, writes_it: bool) -> None:
    from tokenizers import processors

    processor = load_lvlm("idefics3", tmp).processor
    bos = processor.tokenizer.bos_token_id
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    if not writes_it:
        processor.chat_template = processor.chat_template.removeprefix("<s>")
    rows = ChatFormat(processor).prompt_rows([REQUESTS[1], REQUESTS[0]])
    assert [row.ids.count(bos) for row in rows] == [1, 1] and all(row.ids[0] == bos for row in rows)


@pytest.mark.parametrize("position", ["first", "last"])
def test_an_images_place_in_its_turn(tmp: Path, position: Any) -> None:
    form = ChatFormat(load_lvlm("idefics3", tmp).processor, image_position=position)
    (prompt,) = form.prompts([ICLRequest(Query(SQUARE, "what?"), (WUG,))])
    shown = ["<image>what colour is this?", "<image>what?"]
    if position == "last":
        shown = ["what colour is this?<image>", "what?<image>"]
    assert all(text in prompt for text in shown)


# ---- answers ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.5),
        ("no_repeat_ngram_size", 1),
        ("min_new_tokens", 8),
        ("suppress_tokens", list(range(5, 200))),
        ("forced_eos_token_id", 3),
        ("return_dict_in_generate", True),
        ("num_return_sequences", 2),
        ("encoder_repetition_penalty", 1.5),
        ("guidance_scale", 1.5),
    ],
)
def test_answers_are_greedy_whatever_the_model_came_with(tmp: Path, name: str, value: Any) -> None:
    lvlm = load_lvlm("idefics3", tmp)
    expected = lvlm.generate(ASKED, max_new_tokens=6)
    setattr(lvlm.model.generation_config, name, value)
    assert lvlm.generate(ASKED, max_new_tokens=6) == expected
    assert getattr(lvlm.model.generation_config, name) == value  # and it keeps its own


def test_reasoning_is_no_part_of_an_answer(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = TransformersLVLM.from_pretrained(OTHERS["qwen3.5"](tmp), chat_template_kwargs={"enable_thinking": True})
    written = ["red or blue</think>\n\nred wug<|im_end|>", "red or"]

    def generate(rows: list[Any], max_new_tokens: int, bar: Any) -> list[list[int]]:
        return [lvlm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in written[: len(rows)]]

    monkeypatch.setattr(lvlm._runner, "generate", generate)
    assert lvlm.generate(REQUESTS[:1]) == ["red wug"]
    with pytest.raises(
        UnfinishedReasoningError, match=r"query 'text alone'.*32 tokens.*raise max_new_tokens"
    ) as error:
        lvlm.generate(REQUESTS[:2])
    assert error.value.partial == {0: "red wug"}


def test_reasoning_markers() -> None:
    assert without_reasoning("<think>a</think> red") == "red"
    assert without_reasoning("red, not </think>blue") == "red, not </think>blue"
    assert without_reasoning("a</think>red", begun=True) == "red"
    assert without_reasoning("a, still", begun=True) is None
    assert without_reasoning("<|channel>thought\na<channel|>red") == "red"
    assert without_reasoning("(a) red", [("(", ")")]) == "red"


# ---- images ----


def test_an_image_that_the_processor_refuses_is_named(tmp: Path) -> None:
    lvlm = TransformersLVLM.from_pretrained(tiny_qwen2_vl(tmp))
    thin = picture(2010, 10)
    with pytest.raises(RowError, match=r"that of the demonstration 'thin' \(2010 x 10 pixels\).*aspect ratio"):
        lvlm.score(
            [REQUESTS[0], ICLRequest(Query(SQUARE, "what?"), (Demonstration("thin", thin, "what?", "a"),), ("red",))]
        )
    with pytest.raises(RowError, match=r"that of the query 'q'"):
        lvlm.generate([ICLRequest(Query(thin, "what?", id="q"))])
    with pytest.raises(RowError, match=r"2010 x 10"):
        lvlm.image_tokens(thin)


@pytest.mark.parametrize(
    ("family", "budget", "tokens"),
    [
        ("idefics3-splitting", 8, 6),
        ("smolvlm", 8, 6),
        ("qwen2-vl", 5, 4),
        ("qwen3-vl", 9, 9),
        ("internvl", 16, 14),
    ],
)
def test_an_image_takes_no_more_than_its_budget(family: str, budget: int, tokens: int, tmp: Path) -> None:
    published = load_lvlm(family, tmp)
    lvlm = load_lvlm(family, tmp, image_budget=budget)
    sizes = [lvlm.image_tokens(image) for image in (SQUARE, WIDE, picture(640, 480))]
    assert max(sizes) <= tokens + 2 and max(sizes) < max(
        published.image_tokens(i) for i in (SQUARE, WIDE, picture(640, 480))
    )
    requests = REQUESTS[3:10]
    close(lvlm.score(requests), [plain_score(lvlm.model, lvlm.processor, request) for request in requests])
    assert lvlm.fingerprint != published.fingerprint
    if not family.startswith("qwen"):  # whose images become as small as one token
        with pytest.raises(ValueError, match="the least that"):
            load_lvlm(family, tmp, image_budget=1)


def test_queries_are_looked_at_otherwise_than_demonstrations(tmp: Path) -> None:
    lvlm = load_lvlm("qwen2-vl", tmp, image_budget={"max_pixels": 1024}, query_image_budget={"max_pixels": 4096})
    coarse, fine = lvlm.processor, lvlm._query_processor
    demonstration, query = picture(60, 60), picture(64, 64)
    shown = Demonstration("d", demonstration, "what?", "red wug")
    request = ICLRequest(Query(query, "which?", id="q"), (shown,), ("seven",))
    assert lvlm.image_tokens(query, query=True) == 16 and lvlm.image_tokens(query) == 4

    said = {"role": "assistant", "content": [{"type": "text", "text": "seven"}]}
    text = coarse.apply_chat_template([*conversation(request), said], tokenize=False)
    cut = text.rindex("<|im_start|>user")
    parts = [
        processor(text=[piece], images=[[image]], return_tensors="pt")
        for processor, piece, image in ((coarse, text[:cut], demonstration), (fine, text[cut:], query))
    ]
    joined = {key: torch.cat([p[key] for p in parts], 0 if "pixel" in key or "grid" in key else 1) for key in parts[0]}
    with torch.no_grad():
        logprobs = lvlm.model(**joined).logits[0].double().log_softmax(-1)
    ids = joined["input_ids"][0].tolist()
    end = len(ids) - 2  # <|im_end|> and a newline
    mine = range(end - len(lvlm.score_tokens([request])[0]), end)
    close(lvlm.score_tokens([request])[0], [logprobs[i - 1, ids[i]].item() for i in mine])
    assert lvlm.tokenizer.decode([ids[i] for i in mine]).strip() == "seven"
    assert lvlm.count_tokens([request])[0] < len(ids)
    same = load_lvlm("qwen2-vl", tmp, image_budget={"max_pixels": 1024}, query_image_budget={"max_pixels": 1024})
    close(same.score(REQUESTS[:8]), load_lvlm("qwen2-vl", tmp, image_budget={"max_pixels": 1024}).score(REQUESTS[:8]))
    assert len(lvlm.generate([request], max_new_tokens=3)) == 1


def test_a_family_whose_images_are_not_computed_apart_has_one_budget(tmp: Path) -> None:
    lvlm = TransformersLVLM.from_pretrained(OTHERS["mllama"](tmp), query_image_budget={"max_image_tiles": 1})
    with pytest.raises(ValueError, match="leave query_image_budget out"):
        lvlm.score(REQUESTS[:1])


def test_eight_shots_fit_by_default(tmp: Path, caplog: Any) -> None:
    splitting = load_lvlm("idefics3-splitting", tmp).processor
    each = max(image_tokens(splitting, picture(*size)) for size in ((480, 480), (640, 480)))
    assert default_budget(splitting, 9 * (each + 64)) == "published" == default_budget(splitting, None)
    assert default_budget(splitting, 9 * (each + 64) - 1) == {"do_image_splitting": False}
    native = with_budget(load_lvlm("qwen2-vl", tmp).processor, {"max_pixels": 10**6})
    assert default_budget(native, 9 * (100 + 64)) == {"max_pixels": 100 * 16 * 16}
    assert default_budget(native, 9 * (10**6 // 256 + 65)) == "published"
    assert default_budget(load_lvlm("llava", tmp).processor, 512) == "published"


def test_budgets_are_checked(tmp: Path) -> None:
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        load_lvlm("llava-next", tmp, image_budget={"image_grid_pinpoints": [[32, 32]]})
    with pytest.raises(ValueError, match="at least"):
        load_lvlm("llava-next", tmp, image_budget=4)
    for given in ("much", 0, {"max_pixel": 3}):
        with pytest.raises(ValueError, match="image_budget"):
            load_lvlm("qwen2-vl", tmp, image_budget=given)


# ---- loading ----


def test_families_that_the_auto_class_does_not_know_are_named(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match=r"AutoModelForImageTextToText knows.*OpenAILVLM"):
        TransformersLVLM.from_pretrained(tmp_path)


def test_a_package_that_a_processor_needs_is_named(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("PixtralImageProcessor requires the Torchvision library: torchvision")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(DependencyError, match="pip install torchvision"):
        load_processor(tiny_idefics3(tmp), load_lvlm("idefics3", tmp).model.config)


def test_quantization_needs_its_package(tmp: Path) -> None:
    with pytest.raises(ValueError, match="one of load_in_4bit and load_in_8bit"):
        TransformersLVLM.from_pretrained(tiny_idefics3(tmp), load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(DependencyError, match="pip install bitsandbytes"):
        TransformersLVLM.from_pretrained(tiny_idefics3(tmp), load_in_8bit=True)


def test_device_map_and_attention_go_to_the_model(tmp: Path) -> None:
    lvlm = TransformersLVLM.from_pretrained(
        tiny_idefics3(tmp), dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    assert lvlm.capabilities.attention == "eager"
    close(lvlm.score(REQUESTS[6:7]), plain_score(lvlm.model, lvlm.processor, REQUESTS[6]))
