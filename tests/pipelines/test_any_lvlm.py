"""The pipelines over LVLMs that are none of transformers': an endpoint, a cache, any object of the protocol."""

from __future__ import annotations

import base64
import io
import json
import logging
from typing import Any

import datasets
import numpy as np
import pytest
from fault_server import TinyChat, serve
from PIL import Image

import drum_hf
from drum_hf import DemoRetriever, OpenAILVLM, Query, ScoreStore, TripletTable
from drum_hf.errors import ScoringUnsupportedError
from drum_hf.pipelines.pipelines import ICLImageClassificationPipeline, ICLVQAPipeline
from drum_hf.playground.building.pretraining import build_clip
from drum_hf.scores.cached import CachedLVLM
from drum_hf.types import ICLRequest


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for part in build_clip(0):
        part.save_pretrained(folder)
    rows = [
        {"id": f"d{i}", "image": picture(i), "prompt": "which?", "response": "ABC"[i % 3], "label": "ABC"[i % 3]}
        for i in range(9)
    ]
    return DemoRetriever.from_encoder(folder, support=TripletTable.from_dataset(rows), strategy="sit+draft")


class Echo:
    """Answers with the prompt and the number of demonstrations; scores by the length of the response."""

    fingerprint = "e" * 32

    def __init__(self, scores: bool = True, says: str | None = None) -> None:
        self.scores, self.says, self.asked = scores, says, []  # type: ignore[var-annotated]

    def generate(self, requests: Any, *, max_new_tokens: int = 32) -> list[str]:
        self.asked.append(list(requests))
        return [self.says or f"{r.query.prompt} {len(r.demonstrations)}" for r in requests]

    def score(self, requests: Any) -> np.ndarray:
        if not self.scores:
            raise ScoringUnsupportedError("no log-probabilities here")
        self.asked.append(list(requests))
        values = [{c: -float(i + 1) for i, c in enumerate(r.choices)} for r in requests]
        totals = [np.logaddexp.reduce(list(value.values())) for value in values]
        return np.array([v[r.responses[0]] - t for r, v, t in zip(requests, values, totals, strict=True)])


def test_any_object_that_fulfils_the_protocol_answers(retriever):
    lvlm = Echo()
    vqa = drum_hf.pipeline("icl-vqa", model=lvlm, retriever=retriever, num_shots=2)
    assert isinstance(vqa, ICLVQAPipeline) and vqa.lvlm is lvlm
    (result,) = vqa(image=picture(50), question="what?")
    asked = Query(picture(50), "what?", draft="what? 0")
    found = retriever(asked, k=2)
    assert result["answer"] == "what? 2"
    assert [d["id"] for d in result["demonstrations"]] == found.ids[::-1]
    assert lvlm.asked[-1][0].demonstrations == found.demonstrations[::-1]
    several = [{"image": picture(50 + i), "question": f"q{i}"} for i in range(40)]
    lvlm.asked.clear()
    assert [r[0]["answer"] for r in vqa(several)] == [f"q{i} 2" for i in range(40)]
    assert [len(batch) for batch in lvlm.asked[1::2]] == [16, 16, 8]  # together, for an LVLM that answers so
    dataset = datasets.Dataset.from_list([{"question": "a"}, {"question": "b"}])
    assert [r[0]["answer"] for r in vqa(dataset, num_shots=0)] == ["a 0", "b 0"]
    assert [r[0]["answer"] for r in vqa({"question": q} for q in "xy")] == ["x 2", "y 2"]
    captions = drum_hf.pipeline("icl-image-captioning", model=Echo(), retriever=retriever, num_shots=1)
    assert captions(picture(50))[0]["generated_text"] == "which? 1"
    with pytest.raises(ValueError, match="whose weights are elsewhere"):
        vqa.save_pretrained("nowhere")
    assert "ICLVQAPipeline" in repr(vqa)


def test_labels_are_scored_where_the_lvlm_scores(retriever):
    lvlm = Echo()
    classify = drum_hf.pipeline("icl-image-classification", model=lvlm, retriever=retriever, num_shots=2)
    results = classify([picture(50), picture(51)], top_k=2)
    total = sum(np.exp(-i) for i in (1, 2, 3))
    for result in results:
        assert [entry["label"] for entry in result] == ["A", "B"]
        np.testing.assert_allclose([entry["score"] for entry in result], np.exp([-1, -2]) / total)
    assert all(request.choices == ("A", "B", "C") for request in lvlm.asked[-1]) and len(lvlm.asked[-1]) == 6


@pytest.mark.parametrize(
    ("says", "label"),
    [("B", "B"), (" b. ", "B"), ("It is C!", "C"), ("A or B", None), ("a cab", "A"), ("nothing", None)],
)
def test_labels_are_read_from_answers_where_it_does_not(retriever, says, label, caplog):
    caplog.set_level(logging.WARNING, logger="drum_hf")
    lvlm = Echo(scores=False, says=says)
    classify = drum_hf.pipeline("icl-image-classification", model=lvlm, retriever=retriever, num_shots=2)
    for _ in range(2):
        (result,) = classify(picture(50))
        assert result == {"label": label, "score": 1.0}
    assert caplog.text.count("no log-probabilities here") == 1
    (request,) = lvlm.asked[-1]
    assert request.query.prompt == "which?\nAnswer with one of: A, B, C." and len(request.demonstrations) == 2


def test_an_endpoint_by_name_and_as_an_object(retriever, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve() as server:
        vqa = drum_hf.pipeline("icl-vqa", model="tiny", endpoint=server.url, retriever=retriever, num_shots=2)
        (result,) = vqa(image=picture(50), question="what?")
        assert server.bodies[-1]["model"] == "tiny" and len(server.bodies[-1]["messages"]) == 5
        lvlm = OpenAILVLM("tiny", base_url=server.url, max_concurrency=3)
        with ScoreStore() as store:
            cached = drum_hf.pipeline("icl-vqa", model=CachedLVLM(lvlm, store), retriever=retriever, num_shots=2)
            for _ in range(2):
                assert cached(image=picture(50), question="what?") == [result]
            assert lvlm.spent.requests == 2  # the draft and the answer, once
        with pytest.raises(ValueError, match="the model's name at"):
            drum_hf.pipeline("icl-vqa", endpoint=server.url, retriever=retriever)


def test_an_endpoint_classifies_by_its_scores_at_one_request_an_image(retriever):
    chat = TinyChat("turns", boost={"A": 19, "B": 18, "C": 19.5})
    with serve(chat, logprobs="openai") as server:
        lvlm = OpenAILVLM("tiny", base_url=server.url, api_key="")
        classify = drum_hf.pipeline(
            "icl-image-classification", model=lvlm, retriever=retriever, num_shots=2, draft=False
        )
        assert isinstance(classify, ICLImageClassificationPipeline)
        results = classify([picture(50), picture(51), picture(52)])
        assert len(server.bodies) == 2 + 3  # two probes
        for i, result in enumerate(results):
            query = Query(picture(50 + i), "which?", draft="")
            request = ICLRequest(query, retriever(query, k=2).demonstrations[::-1])
            own = {label: sum(chat.answer_logprobs(lvlm._messages(request), label)) for label in "ABC"}
            total = np.logaddexp.reduce(list(own.values()))
            assert [entry["label"] for entry in result] == sorted(own, key=own.get, reverse=True)
            for entry in result:
                assert np.isclose(entry["score"], np.exp(own[entry["label"]] - total))


def test_messages_for_any_client(retriever):
    query = Query(picture(50), "what?", draft="")
    found = retriever(query, k=2)
    messages = found.to_messages(query, system="Be brief.", image_position="last")
    lvlm = OpenAILVLM("m", base_url="http://host/v1", system="Be brief.", image_position="last")
    assert messages == lvlm._messages(ICLRequest(query, found.demonstrations[::-1]))
    assert json.loads(json.dumps(messages)) == messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    data = messages[-1]["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.asarray(sent), np.asarray(picture(50)))
    first = found.to_messages(query, order="best_first")
    assert [m["content"] for m in first[1::2]] == [d.response for d in found.demonstrations]
    for wrong in ({"order": "x"}, {"image_format": "gif"}, {"image_position": "middle"}):
        with pytest.raises(ValueError, match="expected"):
            found.to_messages(query, **wrong)
