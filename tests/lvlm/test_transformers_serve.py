"""`OpenAILVLM` against a real `transformers serve`, and its scores against those of the same model run here."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_server import serve
from PIL import Image
from transformers.utils.import_utils import is_serve_available

from drum_hf.errors import EndpointError, ScoringUnsupportedError
from drum_hf.lvlm.endpoint.model import EndpointCapabilities, OpenAILVLM
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.playground import make_world
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.store import ScoreStore
from drum_hf.types import Demonstration, ICLRequest, Query
from drum_hf.utils.optional import resolve_name

FOLDER = resolve_name("playground/lvlm")
STARTED_WITHIN = 180  # seconds, on a machine with other work


@pytest.fixture(scope="module")
def local() -> TransformersLVLM:
    return TransformersLVLM.from_pretrained(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def requests() -> list[ICLRequest]:
    """Conversations of a playground world, of 0 to 3 demonstrations."""
    world = make_world(0, difficulty="easy")
    rows = world.support.demonstrations(world.support.ids[:24])
    return [
        ICLRequest(world.queries.query(q), tuple(rows[3 * i : 3 * i + i % 4]), (world.queries[q].response,))
        for i, q in enumerate(world.queries.ids[:8])
    ]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address of a `transformers serve` process."""
    if not is_serve_available():
        pytest.skip('transformers serve is not installed: pip install "transformers[serving]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", FOLDER]
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + STARTED_WITHIN
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_generates_what_the_model_generates_here(served, local, requests):
    lvlm = OpenAILVLM(FOLDER, base_url=served, max_concurrency=3)
    expected = local.generate(requests, max_new_tokens=6)
    with ScoreStore() as store:
        cached = CachedLVLM(lvlm, store)
        assert cached.generate(requests, max_new_tokens=6) == expected
        assert len(set(expected)) > 2
        sent = lvlm.spent
        assert sent.requests == len(requests) and sent.retries == 0
        assert sent.prompt_tokens == sum(local.count_tokens(requests))
        assert cached.generate(requests, max_new_tokens=6) == expected and lvlm.spent == sent


def test_it_is_noticed_that_log_probabilities_are_ignored_or_refused(served, requests):
    lvlm = OpenAILVLM(FOLDER, base_url=served)
    with pytest.raises(ScoringUnsupportedError, match=r"answered 422: Unexpected fields.*Score with TransformersLVLM"):
        lvlm.score(requests[:1])
    labels = dataclasses.replace(requests[0], responses=("blue",), choices=("blue", "red"))
    with pytest.raises(ScoringUnsupportedError, match="top_logprobs: it ignores the field"):
        lvlm.score([labels])
    assert lvlm.capabilities == EndpointCapabilities(generate=True, prompt_logprobs=False, top_logprobs=False)
    with pytest.raises(EndpointError, match="answered 400: Server is pinned"):
        OpenAILVLM("another", base_url=served).generate(requests[:1])


class TransformersChat:
    """Prompt log-probabilities of a real model in vLLM's format, by one plain forward over the whole prompt."""

    def __init__(self, lvlm: TransformersLVLM) -> None:
        self.model, self.processor = lvlm.model, lvlm.processor

    def reply(self, body: dict[str, Any], logprobs: str) -> dict[str, Any]:
        messages = [
            {"role": message["role"], "content": [self.part(part) for part in self.parts(message["content"])]}
            for message in body["messages"]
        ]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=body["add_generation_prompt"],
            continue_final_message=body["continue_final_message"],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        (ids,) = inputs["input_ids"].tolist()
        with torch.inference_mode():
            logits = self.model(**inputs).logits[0].float().log_softmax(-1)
        entries = [
            {str(ids[i]): {"logprob": logits[i - 1, ids[i]].item(), "decoded_token": self.processor.decode([ids[i]])}}
            for i in range(1, len(ids))
        ]
        return {"choices": [{"message": {"content": ""}}], "prompt_logprobs": [None, *entries]}

    @staticmethod
    def parts(content: Any) -> list[dict[str, Any]]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @staticmethod
    def part(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        return {"type": "image", "image": Image.open(io.BytesIO(data))}


@pytest.mark.parametrize("family", ["idefics3", "llava", "qwen2-vl", "gemma3"])
def test_scores_are_those_of_the_same_model_run_here(family, tmp_path_factory):
    """What is read from prompt log-probabilities is what `TransformersLVLM` scores, chat template and all."""
    from tiny import load_lvlm

    own = load_lvlm(
        family, Path(tmp_path_factory.getbasetemp()), system="Look at the picture.", score_end_of_turn=False
    )
    noise = np.random.default_rng(0)
    wide, tall = (Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((24, 40), (40, 24)))
    shots = (
        Demonstration("a", wide, "what colour is the shape?", "red wug"),
        Demonstration("b", None, "which word is this?", "dax"),
        Demonstration("c", tall, "what shape is in this picture?", "seven red"),
    )
    asked = [
        ICLRequest(Query(tall, "which colour?"), (), ("red",)),
        ICLRequest(Query(wide, "what shape is in the picture?"), shots[:1], ("round wug",)),
        ICLRequest(Query(None, "which word"), shots, ("größe 紅色 🙂 naïve",)),
        ICLRequest(Query(wide, "which"), shots[1:], ("blick", "the green dax", "X"), weights=(3, 1, 1)),
        ICLRequest(Query(tall, "what is this?"), shots[:2], ("seven",), choices=("seven", "square", "seven wug")),
    ]
    with serve(TransformersChat(own), logprobs="vllm") as server:
        lvlm = OpenAILVLM("tiny", base_url=server.url, max_concurrency=2, system="Look at the picture.")
        scores = lvlm.score(asked)
        # Four probes; a second request where the first token merges with the line break that the template writes.
        assert len(server.bodies) == 4 + 9 + (3 if family in ("qwen2-vl", "gemma3") else 0)
    assert np.allclose(scores, own.score(asked), atol=1e-4)
    assert len({round(score, 3) for score in scores}) == len(asked)
