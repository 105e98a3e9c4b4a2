"""Chat messages and the chat template's self-check."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import WORDS, tiny_idefics3, tiny_llava

from drum_hf.errors import ChatTemplateError, RowError
from drum_hf.lvlm.prompts import ChatFormat, build_messages
from drum_hf.types import Demonstration, ICLRequest, Query


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade, 90, 200))


@pytest.fixture(scope="module")
def request_() -> ICLRequest:
    shots = (
        Demonstration("a", picture(1), "what colour is this?", "red wug"),
        Demonstration("b", None, "which word?", "dax"),
        Demonstration("c", picture(3), "", "a round shape"),
    )
    return ICLRequest(Query(picture(4), "what shape?", draft="SECRET DRAFT", id="q"), shots, ("GOLD",))


def load_processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_idefics3(Path(tmp_path_factory.getbasetemp())))


@pytest.fixture
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(tmp_path_factory)


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat(load_processor(tmp_path_factory))


def test_demonstrations_are_earlier_turns(request_: ICLRequest) -> None:
    messages = build_messages(request_)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
    kinds = [[part["type"] for part in m["content"]] for m in messages]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"], ["image"], ["text"], ["image", "text"]]
    assert messages[0]["content"][0]["image"] is request_.demonstrations[0].image
    assert messages[5]["content"][0]["text"] == "a round shape"


@pytest.mark.parametrize("secret", ["SECRET DRAFT", "GOLD"])
def test_neither_draft_nor_gold_response_is_shown(request_: ICLRequest, secret: str) -> None:
    assert secret not in str(build_messages(request_))


def test_image_last_and_system(request_: ICLRequest) -> None:
    messages = build_messages(request_, image_position="last", system="be brief")
    assert messages[0] == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    assert [part["type"] for part in messages[1]["content"]] == ["text", "image"]


def test_empty_turns_and_unknown_positions_raise() -> None:
    with pytest.raises(ValueError, match="demonstration 'd' has neither"):
        build_messages(ICLRequest(Query(None, "what?"), (Demonstration("d", None, "", "red"),)))
    with pytest.raises(ValueError, match="query 'q' has neither"):
        build_messages(ICLRequest(Query(None, "", id="q")))
    with pytest.raises(ValueError, match="got 'middle'"):
        build_messages(ICLRequest(Query(None, "what?")), image_position="middle")  # type: ignore[arg-type]


@pytest.mark.parametrize("position", ["first", "last"])
def test_frames_and_prompts_are_what_the_template_writes(processor, request_: ICLRequest, position) -> None:
    form = ChatFormat(processor, image_position=position)
    messages = build_messages(request_, image_position=position)
    assert form.prompts([request_]) == [processor.apply_chat_template(messages, add_generation_prompt=True)]
    ((before, after),) = form.frames([request_])
    answer = {"role": "assistant", "content": [{"type": "text", "text": "blick"}]}
    assert before + "blick" + after == processor.apply_chat_template([*messages, answer])
    assert after == form.end_of_turn == "<end_of_utterance>\n"
    assert form.image_token == "<image>"


def test_answers_that_share_tokens_share_a_row(processor) -> None:
    form = ChatFormat(processor)
    request = ICLRequest(Query(picture(5), "which word?"))
    answers = ["seven wug", "seven dax", "seven", "red wug", "seven wug red"]
    rows, (placed,) = form.answer_rows([request], [answers])
    decode = processor.tokenizer.decode
    assert [decode(answer.ids).strip() for answer in placed] == answers
    assert [decode(row.ids).rpartition("Assistant:")[2].strip() for row in rows] == ["seven wug", "red"]
    assert [(answer.row, answer.back) for answer in placed] == [(0, 1), (0, 1), (1, 1), (1, 0), (0, 0)]


@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=12))
def test_rows_hold_every_answer_and_none_is_run_twice(form: ChatFormat, answers: list[str]) -> None:
    request = ICLRequest(Query(None, "which word?"))
    rows, (placed,) = form.answer_rows([request], [answers])
    prompt = form.tokenize(form.prompts([request]))["input_ids"][0]
    for text, answer in zip(answers, placed, strict=True):
        row = rows[answer.row].ids
        assert [*prompt, *answer.ids[:-1]] == row[: len(row) - answer.back]
        assert form.tokenizer.decode(answer.ids).strip() == text
    for one, other in itertools.permutations(rows, 2):
        assert one.ids != other.ids[: len(one.ids)]


def test_a_placeholder_in_a_text_is_refused(processor) -> None:
    request = ICLRequest(Query(picture(1), "what is <image>?", id="odd"))
    with pytest.raises(RowError, match=r"'<image>'.*1 images.*'odd'.*2 times"):
        ChatFormat(processor).prompt_rows([request])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has none"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "last response 0 times"),
        (
            "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
            r"placeholders appear \{'<image>': 0\} times",
        ),
        ("{% for m in messages %}{{ m['role'] }}<image>{% endfor %}", "lost the text 'probe question one'"),
        ("{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}", "fails: "),
        ("{{ raise_exception('no way') }}", "no way"),
        (
            "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{{ p['text'] }}"
            "{{ '<image>' if p['type'] == 'image' }}{% endfor %}{% endfor %}",
            "2 times instead of once",
        ),
    ],
)
def test_templates_that_lose_something_are_refused(processor, template: str | None, message: str) -> None:
    processor.chat_template = template
    with pytest.raises(ChatTemplateError, match=message):
        ChatFormat(processor)


def test_a_system_text_that_the_template_drops_is_refused(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_llava(tmp_path))
    assert ChatFormat(processor, system="be brief").prompts([ICLRequest(Query(None, "hm"))])[0].startswith("SYSTEM")
    processor.chat_template = "{% set messages = messages[-3:] %}" + processor.chat_template
    with pytest.raises(ChatTemplateError, match=r"lost the text 'be brief'.*system"):
        ChatFormat(processor, system="be brief")
