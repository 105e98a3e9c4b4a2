"""Options of the LVLM, as they reach `TransformersLVLM` and `OpenAILVLM`."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from drum_hf.cli import options
from drum_hf.lvlm.endpoint.model import OpenAILVLM
from drum_hf.lvlm.local.model import TransformersLVLM


def parse(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.model_options(parser)
    return parser.parse_args(given)


def test_they_reach_a_local_lvlm(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(TransformersLVLM, "from_pretrained", lambda name, **kwargs: found.update(kwargs))
    options.load_lvlm(parse())
    defaults = {"image_budget": "auto", "query_image_budget": None, "chat_template_kwargs": None}
    defaults |= {"score_end_of_turn": None, "device_map": None, "attn_implementation": None}
    assert found.items() >= (defaults | {"load_in_4bit": False, "load_in_8bit": False}).items()
    options.load_lvlm(
        parse(
            *("--image-budget", "256", "--query-image-budget", '{"max_pixels": 1024}', "--no-score-end-of-turn"),
            *("--chat-template-kwargs", '{"enable_thinking": true}', "--device-map", "auto", "--load-in-4bit"),
        )
    )
    given = {"image_budget": 256, "query_image_budget": {"max_pixels": 1024}, "score_end_of_turn": False}
    given |= {"chat_template_kwargs": {"enable_thinking": True}, "device_map": "auto", "load_in_4bit": True}
    assert found.items() >= given.items()


def test_template_variables_reach_an_endpoint() -> None:
    lvlm = options.load_lvlm(
        parse("--endpoint", "http://localhost:1/v1", "--chat-template-kwargs", '{"enable_thinking": false}')
    )
    assert isinstance(lvlm, OpenAILVLM)
    assert lvlm.extra_body == {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("given", ["much", "[1]", "{", "-3"])
def test_budgets_that_are_none(given: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(f"--image-budget={given}")
    assert "expected a JSON object" in capsys.readouterr().err
