"""`OpenAILVLM` against a local endpoint: faults, spending, what is resumed, and scores checked in closed form."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import numpy as np
import pytest
from fault_server import FaultServer, Reply, TinyChat, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from drum_hf.errors import (
    BudgetExceededError,
    ContextOverflowError,
    DrumError,
    EndpointError,
    NonFiniteScoreError,
    ScoringUnsupportedError,
)
from drum_hf.lvlm.endpoint import model as openai
from drum_hf.lvlm.endpoint.model import EndpointCapabilities, OpenAILVLM, Spending
from drum_hf.scores.cached import CachedLVLM
from drum_hf.scores.store import ScoreStore
from drum_hf.types import LVLM, Demonstration, ICLRequest, Query

KEY = "sk-very-secret-0123456789"
STYLES = ("turns", "spaced", "merging", "thinking")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with serve() as running:
        yield running


def picture(seed: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def connect(server: FaultServer, **options) -> OpenAILVLM:
    """An LVLM that notes its pauses instead of sleeping; each is the longest that chance allows."""
    lvlm = OpenAILVLM("tiny", base_url=server.url, **({"api_key": KEY} | options))
    lvlm.pauses = []
    lvlm._client.sleep = lambda seconds, stop: lvlm.pauses.append(seconds)
    lvlm._client.uniform = lambda low, high: high
    return lvlm


def ask(number: int | str, **parts) -> ICLRequest:
    return ICLRequest(Query(None, f"question {number}", id=f"q{number}"), **parts)


def shown(responses=(), choices=(), weights=(), prompt="what city?", system_image=True) -> ICLRequest:
    demonstrations = (
        Demonstration("a", picture(1), "which place?", "Oslo"),
        Demonstration("b", None, "how many", "five"),
    )
    return ICLRequest(
        Query(picture(2, (4, 9)), prompt, id="q"), demonstrations, tuple(responses), tuple(weights), tuple(choices)
    )


# What is sent


def test_a_request_is_sent_as_chat_messages(server):
    lvlm = connect(server, system="Be brief.", image_position="last", image_detail="low", seed=3)
    (answer,) = lvlm.generate([shown()], max_new_tokens=7)
    (body,) = server.bodies
    assert answer.startswith("answer ") and answer == answer.strip()
    assert {key: body[key] for key in ("model", "temperature", "max_tokens", "seed")} == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 7,
        "seed": 3,
    }
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in body["messages"] if isinstance(m["content"], str)] == [
        "Be brief.",
        "Oslo",
        "how many",
        "five",
    ]
    text, image = body["messages"][-1]["content"]
    assert text == {"type": "text", "text": "what city?"}
    assert image["type"] == "image_url" and image["image_url"]["detail"] == "low"
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.asarray(sent), np.asarray(picture(2, (4, 9))))
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}" and server.paths == ["/v1/chat/completions"]


def test_images_of_any_mode_are_sent_as_rgb_and_encoded_once(server, monkeypatch):
    saved = []
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, *a, **k: saved.append(self.mode) or save(self, *a, **k))
    lvlm = connect(server, image_format="jpeg", max_concurrency=1)
    shades = picture(1).convert("L")
    requests = [ICLRequest(Query(shades.copy(), f"p{i}")) for i in range(3)]
    lvlm.generate([*requests, ICLRequest(Query(picture(1).convert("RGBA"), "p"))])
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert saved == ["RGB", "RGB"] and len(set(urls)) == 2
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)


def test_the_kept_images_are_bounded(server, monkeypatch):
    monkeypatch.setattr("drum_hf.lvlm.endpoint.chat_api._KEPT_IMAGES", 1000)
    lvlm = connect(server)
    lvlm.generate([ICLRequest(Query(picture(i), "p")) for i in range(12)])
    assert 0 < sum(map(len, lvlm._chat._encoded.values())) == lvlm._chat._encoded_size <= 1000


def test_extra_fields_come_in_and_ours_go_out(server):
    lvlm = connect(
        server, seed=1, extra_body={"temperature": None, "chat_template_kwargs": {"enable_thinking": False}}
    )
    lvlm.generate([ask(1)])
    assert "temperature" not in server.bodies[0] and server.bodies[0]["seed"] == 1
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_newer_name_of_the_length_limit_is_learned(server):
    fault = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    server.rule = lambda body: Reply(400, {"error": {"message": fault}}) if "max_tokens" in body else None
    lvlm = connect(server, max_concurrency=1)
    assert len(lvlm.generate([ask(1), ask(2)], max_new_tokens=9)) == 2
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, 9, 9]


@pytest.mark.parametrize(
    ("environment", "given", "header"),
    [(None, None, None), ("from-env", None, "Bearer from-env"), ("from-env", "own", "Bearer own"), ("x", "", None)],
)
def test_where_the_key_comes_from(server, monkeypatch, tmp_path, environment, given, header):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    if environment:
        monkeypatch.setenv("OPENAI_API_KEY", environment)
    connect(server, api_key=given).generate([ask(1)])
    assert server.headers[0].get("Authorization") == header


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/chat/completions?v=2", "/v1/chat/completions?v=2"),
    ],
)
def test_spellings_of_the_address(server, given, path):
    lvlm = OpenAILVLM("tiny", base_url=server.url + given)
    lvlm.generate([ask(1)])
    assert server.paths == [path] and lvlm.base_url == server.url


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url to be an address"),
        ({"base_url": "http://me:secret@host/v1"}, "no user name or password"),
        ({"api_key": "line\nbreak-secret"}, "printable ASCII"),
        ({"max_concurrency": 0}, "max_concurrency=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_requests": -1}, "max_requests=-1"),
        ({"image_format": "gif"}, "'gif'"),
        ({"image_position": "middle"}, "'middle'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        OpenAILVLM("tiny", **({"base_url": "http://host/v1"} | options))
    assert "secret" not in str(caught.value)


# Many at once


@pytest.mark.parametrize("width", [1, 3])
def test_so_many_requests_at_once_and_never_more(server, width):
    server.barrier = threading.Barrier(width)  # no one is answered until so many are there
    requests = [ask(i) for i in range(9)]
    answers = connect(server, max_concurrency=width).generate(requests)
    assert server.most == width
    server.barrier = None
    assert answers == [connect(server).generate([request])[0] for request in requests]


def test_it_works_inside_a_running_event_loop(server):
    async def cell() -> list[str]:
        return connect(server).generate([ask(1), ask(2)])

    assert len(asyncio.run(cell())) == 2


def test_nothing_to_do_sends_nothing(server):
    lvlm = connect(server)
    assert lvlm.generate([]) == [] and lvlm.score([]).shape == (0,) and lvlm.spent == Spending()
    with pytest.raises(ValueError, match="max_new_tokens"):
        lvlm.generate([ask(1)], max_new_tokens=0)


# Faults that pass


def test_back_off_grows_with_full_jitter(server):
    lvlm = connect(server)
    server.script = [Reply(500, {"error": {"message": "overloaded"}}) for _ in range(6)]
    assert len(lvlm.generate([ask(1)])) == 1
    assert lvlm.pauses == [1, 2, 4, 8, 16, 30]
    lvlm._client.uniform = lambda low, high: low
    server.script = [Reply(503, "not JSON at all")]
    lvlm.generate([ask(1)])
    assert lvlm.pauses[6:] == [0]
    assert lvlm.spent.requests == 9 and lvlm.spent.retries == 7


def test_retry_after_is_honoured(server):
    lvlm = connect(server)
    lvlm._client.now = lambda: 1_000_000.0
    waits = ["7", "0.5", formatdate(1_000_042, usegmt=True), formatdate(999_000, usegmt=True), "soon"]
    server.script = [Reply(429, {"error": "slow down"}, {"Retry-After": value}) for value in waits]
    lvlm.generate([ask(1)])
    assert lvlm.pauses == [8, 1.5, 43, 1, 16]  # a second of jitter each; what can't be read is backed off from


def test_a_pause_of_hours_is_not_waited_for(server):
    server.script = [Reply(429, {"error": "daily limit"}, {"Retry-After": "40000"})]
    lvlm = connect(server)
    with pytest.raises(EndpointError, match="pause of 40000 s"):
        lvlm.generate([ask(1)])
    assert lvlm.pauses == []


@pytest.mark.parametrize(
    "fault",
    [
        Reply(408, {"error": "timeout"}),
        Reply(429, {"error": {"message": "rate", "code": "rate_limit_exceeded"}}),
        Reply(502, "<html>bad gateway</html>"),
        Reply(200, '{"choices": [{"mess'),
        Reply(200, {"error": {"message": "upstream is down", "code": 502}}),
        Reply(drop="before"),
        Reply(drop="middle"),
    ],
    ids=["408", "429", "502", "malformed", "error under 200", "dropped", "cut off"],
)
def test_faults_that_pass_are_tried_again(server, fault):
    server.script = [fault, fault]
    lvlm = connect(server)
    answers = lvlm.generate([ask(1)])
    assert answers == connect(server).generate([ask(1)])
    assert lvlm.pauses == [1, 2] and lvlm.spent.requests == 3
    server.script = [fault] * 3
    impatient = connect(server, max_retries=2)
    with pytest.raises(EndpointError, match="gave up after 3 attempts"):
        impatient.generate([ask(1)])


def test_timeouts_are_tried_again(server):
    release = threading.Event()
    server.script = [Reply(hold=release)]
    lvlm = connect(server, timeout=0.2)
    try:
        assert len(lvlm.generate([ask(1)])) == 1
    finally:
        release.set()
    assert lvlm.pauses == [1] and lvlm.spent.retries == 1
    release.clear()
    server.script = [Reply(hold=release)]
    try:
        with pytest.raises(EndpointError, match=r"did not answer within 0.2 s; gave up after 1 attempts"):
            connect(server, timeout=0.2, max_retries=0).generate([ask(1)])
    finally:
        release.set()


def test_nobody_at_the_address():
    with serve() as gone:
        pass
    lvlm = connect(gone, max_retries=2)
    with pytest.raises(EndpointError, match=r"the connection failed.*Is the endpoint up"):
        lvlm.generate([ask(1)])
    assert lvlm.pauses == [1, 2]


# Faults that last


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Reply(401, {"error": {"message": f"Incorrect API key: {KEY}"}}), EndpointError, "set OPENAI_API_KEY"),
        (Reply(403, {"error": "no access"}), EndpointError, "no access; check that the API key"),
        (Reply(404, {"detail": "Not Found"}), EndpointError, "Not Found.*ends in \"/v1\""),
        (Reply(400, {"object": "error", "message": "bad image"}), EndpointError, "answered 400: bad image"),
        (Reply(422, {"detail": [{"loc": ["body"], "msg": "nope"}]}), EndpointError, '"msg": "nope"'),
        (Reply(413, "too large"), EndpointError, 'image_format="jpeg"'),
        (Reply(307, "", {"Location": "https://other/v1"}), EndpointError, "is base_url 'https://other/v1'"),
        (Reply(429, {"error": {"message": "pay", "code": "insufficient_quota"}}), EndpointError, "quota is used up"),
        (Reply(200, {"choices": []}), EndpointError, "choices.*is it a chat endpoint"),
        (Reply(200, {"choices": [{"message": None}]}), EndpointError, "is it a chat endpoint"),
        (Reply(200, "[1]"), EndpointError, "JSON object"),
        (
            Reply(400, {"error": {"message": "This model's maximum context length is 4096 tokens. However, …"}}),
            ContextOverflowError,
            "use fewer shots",
        ),
        (Reply(400, {"error": {"message": "No.", "code": "context_length_exceeded"}}), ContextOverflowError, "No."),
        (
            Reply(400, {"message": "The decoder prompt is longer than the maximum model length of 4096."}),
            ContextOverflowError,
            "longer than the maximum",
        ),
        (
            Reply(422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096"}),
            ContextOverflowError,
            "must be <= 4096",
        ),
    ],
)  # fmt: skip
def test_refusals_raise_at_once_with_the_endpoints_message(server, fault, error, message):
    server.script = [fault]
    lvlm = connect(server)
    with pytest.raises(error, match=message) as caught:
        lvlm.generate([ask(1)])
    assert lvlm.pauses == [] and isinstance(caught.value, DrumError)
    assert KEY not in str(caught.value) and KEY not in repr(caught.value)
    if isinstance(caught.value, EndpointError) and fault.status != 200:
        assert caught.value.status == fault.status


def test_the_key_is_shown_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="drum_hf")  # whatever a command line has set it to
    lvlm = connect(server)
    server.script = [Reply(500, {"error": f"failed for {KEY}"}), Reply(403, f"your {KEY} is bad")]
    with pytest.raises(EndpointError) as caught:
        lvlm.generate([ask(1)])
    everything = [repr(lvlm), repr(lvlm._client), str(lvlm.identity), caplog.text]
    error: BaseException | None = caught.value
    while error is not None:
        everything += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    assert "[API key]" in caplog.text and not any(KEY in text for text in everything)


def test_answers_of_odd_shapes(server):
    def reply(message, **more):
        return Reply(200, {"choices": [{"message": message, **more}], "usage": {"prompt_tokens": 1}})

    server.script = [
        reply({"content": [{"type": "text", "text": " two "}, {"type": "text", "text": "parts "}]}),
        reply({"content": None, "refusal": "I can't say."}),
        reply({"content": None}, finish_reason="content_filter"),
        reply({"content": ""}, finish_reason="length"),
    ]
    answers = connect(server, max_concurrency=1).generate([ask(i) for i in range(4)])
    assert answers == ["two parts", "I can't say.", "", ""]
    server.script = [reply({"content": None, "reasoning_content": "Let me see"}, finish_reason="length")]
    with pytest.raises(EndpointError, match=r"asked for 32 tokens on query 'q1': .* spent on reasoning"):
        connect(server).generate([ask(1)])


# One fails, the others are kept


def test_one_refusal_stops_the_rest_and_keeps_what_is_answered(server):
    server.rule = lambda body: Reply(400, {"error": "no"}) if "question 4" in str(body["messages"]) else None
    lvlm = connect(server, max_concurrency=1)
    with pytest.raises(EndpointError) as caught:
        lvlm.generate([ask(i) for i in range(20)])
    assert set(caught.value.partial) == {0, 1, 2, 3} and len(server.bodies) == 5
    expected = connect(server).generate([ask(i) for i in range(4)])
    assert [caught.value.partial[i] for i in range(4)] == expected


def test_what_is_under_way_is_waited_for_and_kept(server):
    """Two requests are there; one is refused, and the other is answered only when that is known."""
    refused = threading.Event()
    server.barrier = threading.Barrier(2)
    server.rule = lambda body: (
        Reply(400, {"error": "no"}) if "question 0" in str(body["messages"]) else Reply(hold=refused)
    )
    lvlm = connect(server, max_concurrency=2)
    send = lvlm._client._send

    def watched(data, stop):
        try:
            return send(data, stop)
        except EndpointError:
            refused.set()
            raise

    lvlm._client._send = watched
    with pytest.raises(EndpointError) as caught:
        lvlm.generate([ask(i) for i in range(2)])
    assert set(caught.value.partial) == {1}


def test_a_pause_ends_when_another_request_fails_for_good(server):
    """The first is told to wait for five minutes; the second is refused: nobody waits."""
    server.barrier = threading.Barrier(2)
    server.rule = lambda body: (
        Reply(400, {"error": "no"})
        if "question 1" in str(body["messages"])
        else Reply(429, "", {"Retry-After": "300"})
    )
    lvlm = OpenAILVLM("tiny", base_url=server.url, max_concurrency=2)
    began = time.monotonic()
    with pytest.raises(EndpointError, match="answered 400"):
        lvlm.generate([ask(0), ask(1)])
    assert time.monotonic() - began < 60 and len(server.bodies) == 2


def test_an_interrupt_keeps_what_is_answered(server, monkeypatch):
    lvlm = connect(server, max_concurrency=1)
    read = openai.answer_text

    def interrupted(answer, markers):
        if len(server.bodies) == 3:
            raise KeyboardInterrupt
        return read(answer, markers)

    monkeypatch.setattr(openai, "answer_text", interrupted)
    with ScoreStore() as store:
        with pytest.raises(KeyboardInterrupt):
            CachedLVLM(lvlm, store).generate([ask(i) for i in range(9)])
        assert store.stats()["texts"] == 2


def test_a_second_run_sends_only_what_is_missing(server, tmp_path):
    requests = [ask(i) for i in range(10)]
    server.rule = lambda body: Reply(401, {"error": "expired"}) if "question 6" in str(body["messages"]) else None
    with ScoreStore(tmp_path / "s.sqlite") as store:
        with pytest.raises(EndpointError, match="expired"):
            CachedLVLM(connect(server, max_concurrency=1), store).generate(requests)
        kept = store.stats()["texts"]
    assert kept == 6
    server.rule = lambda body: None
    server.bodies.clear()
    with ScoreStore(tmp_path / "s.sqlite") as store:
        cached = CachedLVLM(connect(server), store)
        answers = cached.generate(requests)
        assert cached.calls == len(server.bodies) == 10 - kept
        assert cached.generate(requests) == answers and len(server.bodies) == 10 - kept
    assert answers == connect(server).generate(requests)


# The cap


def test_the_cap_in_requests_is_never_exceeded(server, tmp_path):
    server.script = [Reply(500, "x")] * 4
    requests = [ask(i) for i in range(30)]
    with ScoreStore(tmp_path / "s.sqlite") as store:
        lvlm = connect(server, max_requests=12)
        cached = CachedLVLM(lvlm, store)
        with pytest.raises(BudgetExceededError, match=r"max_requests=12 .*: 12 requests \(.*raise max_requests"):
            cached.generate(requests)
        assert len(server.bodies) == 12 == lvlm.spent.requests and store.stats()["texts"] == 8
        with pytest.raises(BudgetExceededError):
            cached.generate(requests)
        assert len(server.bodies) == 12
        assert len(CachedLVLM(connect(server, max_requests=22), store).generate(requests)) == 30
        assert len(server.bodies) == 12 + 22


def test_the_cap_in_tokens(server):
    one = connect(server)
    one.generate([ask(0)])
    price = one.spent.tokens
    assert price == one.spent.prompt_tokens + 5
    lvlm = connect(server, max_tokens=3 * price - 1, max_concurrency=1)
    with pytest.raises(BudgetExceededError, match="max_tokens=") as caught:
        lvlm.generate([ask(i) for i in range(9)])
    assert lvlm.spent.requests == 3 and len(caught.value.partial) == 3
    with pytest.raises(BudgetExceededError):
        connect(server, max_tokens=0).generate([ask(1)])


def test_a_cap_in_tokens_needs_an_endpoint_that_reports_them(server):
    server.rule = lambda body: Reply(200, {"choices": [{"message": {"content": "hm"}}]})
    assert connect(server).generate([ask(1), ask(2)]) == ["hm", "hm"]
    lvlm = connect(server, max_tokens=1000, max_concurrency=1)
    with pytest.raises(EndpointError, match="cap the spending with max_requests"):
        lvlm.generate([ask(1), ask(2)])
    assert lvlm.spent.requests == 1


# Identity


def test_fingerprint():
    def of(model="m", base_url="http://host/v1", **options):
        lvlm = OpenAILVLM(model, base_url=base_url, **options)
        assert len(lvlm.fingerprint) == 32 and isinstance(lvlm, LVLM)
        return lvlm.fingerprint

    same = [of(), of(base_url="http://HOST/v1/"), of(timeout=3, max_concurrency=2, api_key="k", max_requests=9)]
    assert len(set(same)) == 1
    others = [
        of("n"), of(base_url="http://other/v1"), of(base_url="https://host/v1"), of(system="s"), of(seed=1),
        of(image_position="last"), of(image_format="jpeg"), of(image_detail="low"), of(extra_body={"a": 1}),
        of(revision="r"), of(revision="r2"), of(name="n2"),
    ]  # fmt: skip
    assert len({same[0], *others}) == 1 + len(others)
    assert of(revision="r") == of(base_url="http://other/v1", revision="r")
    assert of("served-name", name="m") == of(base_url="http://other/v1", name="m")
    lvlm = OpenAILVLM("m", base_url="http://host/v1", extra_body={"b": 1, "a": 2}, seed=4)
    assert lvlm.identity["endpoint"] == "http://host/v1" and lvlm.identity["extra_body"] == '{"a": 2, "b": 1}'
    assert all(isinstance(value, (str, bool, type(None))) for value in lvlm.identity.values())
    assert (lvlm.name, lvlm.revision) == ("m", None)


def test_scores_of_one_fingerprint_stay_what_they_are():
    assert OpenAILVLM("m", base_url="http://host/v1").fingerprint == "9b96f913c987f2592105d0cf4d4bf389"


# Scores from prompt_logprobs


def oracle(chat: TinyChat, lvlm: OpenAILVLM, request: ICLRequest) -> float:
    """The score by its definition, from the model's own numbers."""
    messages = lvlm._messages(request)
    own = {a: chat.answer_logprobs(messages, a.strip()) for a in (*request.responses, *request.choices)}
    if request.choices:
        total = np.log(sum(np.exp(sum(own[c])) for c in request.choices))
        values = [sum(own[r]) - total for r in request.responses]
    else:
        values = [np.mean(own[r]) for r in request.responses]
    weights = np.array(request.weights or [1] * len(values))
    return float(np.log(np.sum(weights / weights.sum() * np.exp(values))))


REQUESTS = [
    shown(["Rome"]),
    shown(["the fish"]),
    shown([" gold \n"]),
    shown(["goldfish", "Oslo", "five"], weights=(3, 1, 1)),
    shown(["yes"], choices=["no", "yes", "gold fish"]),
    shown(["naïve café", "日本 🐟"]),
    ask(1, responses=("om",)),
    ask("<user>", responses=("five five five",)),
]


@pytest.mark.parametrize("style", STYLES)
def test_scores_are_the_closed_form(style):
    chat = TinyChat(style)
    with serve(chat, logprobs="vllm") as server:
        lvlm = connect(server, system="Name it.")
        scores = lvlm.score(REQUESTS)
        assert scores.dtype == np.float64 and scores.shape == (len(REQUESTS),)
        expected = [oracle(chat, lvlm, request) for request in REQUESTS]
        assert np.allclose(scores, expected, atol=1e-12)
        assert lvlm.score([REQUESTS[3]])[0] == scores[3]
        assert lvlm.capabilities.prompt_logprobs and lvlm.capabilities.generate
        spent = lvlm.spent.requests
        lvlm.score([shown(["fish"])])
        assert lvlm.spent.requests == spent + 1  # the boundary was learned by the probe: one request an answer


def test_an_answer_that_merges_with_the_colon_before_it_costs_a_second_request():
    chat = TinyChat("merging")
    with serve(chat, logprobs="vllm") as server:
        lvlm = connect(server)
        lvlm.score([shown(["fish"])])
        spent = lvlm.spent.requests
        (score,) = lvlm.score([shown(["Rome"])])
        assert lvlm.spent.requests == spent + 2
        tokens = chat.tokenize(chat.render(server.bodies[-2]["messages"], generate=False, open_end=True))
        assert [token.text for token in tokens[-3:]] == [":R", "om", "e"]
        assert np.isclose(score, oracle(chat, lvlm, shown(["Rome"])), atol=1e-12)


@pytest.fixture(scope="module")
def styles():
    """An LVLM over a model of each style."""
    with contextlib.ExitStack() as stack:
        chats = [TinyChat(style) for style in STYLES]
        yield [(chat, connect(stack.enter_context(serve(chat, logprobs="vllm")))) for chat in chats]


words = st.text(alphabet="aeRom: \nfish日é🐟", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=words, answer=words, style=st.integers(0, len(STYLES) - 1))
def test_any_answer_is_scored_exactly_or_not_at_all(styles, prompt, answer, style):
    chat, lvlm = styles[style]
    request = ICLRequest(Query(None, prompt), (), (answer,))
    try:
        (score,) = lvlm.score([request])
    except ScoringUnsupportedError as error:
        # Where a merged token hides what follows it, pieces of characters can't be told from one another.
        assert "where they begin can't be told" in str(error) and chat.style == "merging" and not answer.isascii()
    else:
        assert np.isclose(score, oracle(chat, lvlm, request), atol=1e-12)


def test_a_template_that_ends_the_answer_is_refused():
    with serve(TinyChat("closing"), logprobs="vllm") as server:
        lvlm = connect(server)
        with pytest.raises(ScoringUnsupportedError, match="don't end with those of a given answer"):
            lvlm.score([shown(["Rome"])])
        assert lvlm.capabilities == EndpointCapabilities(generate=True, prompt_logprobs=False, top_logprobs=True)


def test_no_probability_is_no_score():
    with serve(TinyChat(), logprobs="vllm") as server:
        lvlm = connect(server)
        reply = server.chat.reply

        def clamped(body, logprobs):
            answer = reply(body, logprobs)
            next(iter(answer["prompt_logprobs"][-1].values()))["logprob"] = -9999.0
            return answer

        assert lvlm.capabilities.prompt_logprobs
        server.chat.reply = clamped
        with pytest.raises(NonFiniteScoreError, match=r"-9999.0.*'Rome' of query 'q'"):
            lvlm.score([shown(["Rome"])])


def test_prompt_logprobs_of_another_shape_are_refused():
    with serve(TinyChat(), logprobs="vllm") as server:
        reply = server.chat.reply

        def more(body, logprobs):
            answer = reply(body, logprobs)
            answer["prompt_logprobs"][1]["7"] = {"logprob": -1.0}
            return answer

        server.chat.reply = more
        with pytest.raises(ScoringUnsupportedError, match=r"the prompt's own token at each position.*position 1"):
            connect(server).score([shown(["Rome"])])


def test_wrong_requests_are_named_before_anything_is_sent(server):
    lvlm = connect(server)
    for request, message in [
        (ask(1), "at least one response"),
        (ask(1, responses=(" ",)), "a response with text"),
        (ask(1, responses=("a",), choices=("b",)), "responses among the choices"),
        (ask(1, responses=("a",), choices=("a", " a")), "distinct choices"),
        (ask(1, responses=("a", "b"), weights=(1, 0)), "positive weights"),
    ]:
        with pytest.raises(ValueError, match=message):
            lvlm.score([request])
    assert server.bodies == []


def test_scores_are_kept_when_one_fails():
    with serve(TinyChat(), logprobs="vllm") as server:
        lvlm = connect(server, max_concurrency=1)
        requests = [ask(i, responses=("yes", "no")) for i in range(8)]
        whole = lvlm.score(requests)
        fault = Reply(400, {"error": {"code": "context_length_exceeded", "message": "long"}})
        server.rule = lambda body: (
            fault if "question 5" in str(body["messages"]) and body["messages"][-1]["content"] == "no" else None
        )
        with ScoreStore() as store:
            with pytest.raises(ContextOverflowError) as caught:
                CachedLVLM(lvlm, store).score(requests)
            assert list(caught.value.partial) == list(range(5)) and len(store) == 5
            server.rule = lambda body: None
            server.bodies.clear()
            assert np.array_equal(CachedLVLM(lvlm, store).score(requests), whole)
            assert len(server.bodies) == 2 * 3


# Scores from top_logprobs


def test_labels_of_one_token_are_scored_over_the_choices():
    chat = TinyChat("turns", boost={"A": 9, "B": 8, "C": 9.5})
    with serve(chat, logprobs="openai") as server:
        lvlm = connect(server)
        requests = [shown([answer], choices="ABC") for answer in "CAB"]
        requests.append(shown(["A", "B"], choices="ABC", weights=(1, 3)))
        scores = lvlm.score(requests)
        assert np.allclose(scores, [oracle(chat, lvlm, request) for request in requests], atol=1e-12)
        assert np.isclose(np.exp(scores[:3]).sum(), 1)
        assert len(server.bodies) == 2 + 1  # two probes, then one request: all ask for the same conversation and labels
        lvlm.score([shown(["A"], choices="ABC", prompt="which city?"), shown(["A"], choices="AB", prompt="which city?")])
        assert len(server.bodies) == 3 + 2
        assert lvlm.capabilities == EndpointCapabilities(generate=True, prompt_logprobs=False, top_logprobs=True)
        with pytest.raises(ScoringUnsupportedError, match=r"prompt_logprobs: it ignores the field.*TransformersLVLM"):
            lvlm.score([shown(["A"])])


def test_a_blank_before_the_labels_is_read_where_the_model_writes_it():
    def alternatives(**logprobs):
        tokens = [{"token": text.replace("_", " "), "logprob": p} for text, p in logprobs.items()]
        return {"choices": [{"message": {}, "logprobs": {"content": [{"top_logprobs": tokens}]}}]}

    from drum_hf.lvlm.endpoint.scores import label_logprobs

    assert label_logprobs(alternatives(_A=-1.0, _B=-2.0, A=-4.0, B=-5.0, Axe=-0.1), "AB").tolist() == [-1, -2]
    assert label_logprobs(alternatives(_A=-9.0, _B=-9.0, A=-4.0, B=-5.0), "BA").tolist() == [-5, -4]
    assert label_logprobs(alternatives(_A=-1.0, A=-4.0, B=-5.0), "AB").tolist() == [-4, -5]
    for tokens in ({"A": -1.0, "_B": -1.0}, {"A": -1.0, "Bee": -2.0}, {}):
        with pytest.raises(ScoringUnsupportedError, match="one token each"):
            label_logprobs(alternatives(**tokens), "AB")
    with pytest.raises(NonFiniteScoreError):
        label_logprobs(alternatives(A=-1.0, B=-9999.0), "AB")


def test_a_label_of_several_tokens_is_never_scored_by_its_first():
    with serve(TinyChat("turns", boost={"gold": 9, "yes": 9}), logprobs="openai") as server:
        lvlm = connect(server)
        assert np.isfinite(lvlm.score([shown(["yes"], choices=["yes", "gold"])])).all()
        with pytest.raises(ScoringUnsupportedError, match=r"query 'q'.*\['yes', 'goldfish'\] it gave \['yes'\]"):
            lvlm.score([shown(["yes"], choices=["yes", "goldfish"])])


# Endpoints without log-probabilities


def test_fields_that_are_ignored_are_noticed(server):
    lvlm = connect(server)
    with pytest.raises(ScoringUnsupportedError, match=r"(?s)prompt_logprobs: it ignores the field. Score with Trans"):
        lvlm.score([shown(["Rome"])])
    with pytest.raises(ScoringUnsupportedError, match="top_logprobs: it ignores the field"):
        lvlm.score([shown(["A"], choices="AB")])
    assert lvlm.capabilities == EndpointCapabilities(generate=True, prompt_logprobs=False, top_logprobs=False)
    assert len(server.bodies) == 2  # each was tried once


@pytest.mark.parametrize("status", [400, 422])
def test_fields_that_are_refused_are_noticed_with_the_message(server, status):
    server.rule = lambda body: Reply(status, {"detail": "Unexpected fields"}) if "prompt_logprobs" in body else None
    lvlm = connect(server)
    with pytest.raises(ScoringUnsupportedError, match=f"answered {status}: Unexpected fields"):
        lvlm.score([shown(["Rome"])])
    assert len(lvlm.generate([ask(1)])) == 1


@pytest.mark.parametrize("fault", [Reply(401, "bad key"), Reply(404, "no such model")])
def test_a_probe_that_learns_nothing_is_tried_again(server, fault):
    server.script = [fault]
    lvlm = connect(server)
    with pytest.raises(EndpointError):
        lvlm.score([shown(["Rome"])])
    with pytest.raises(ScoringUnsupportedError, match="ignores"):
        lvlm.score([shown(["Rome"])])


def test_several_threads_share_one_probe():
    with serve(TinyChat(), logprobs="vllm") as server:
        lvlm = connect(server)
        with ThreadPoolExecutor(4) as pool:
            scores = list(pool.map(lambda i: lvlm.score([ask(i, responses=("yes",))])[0], range(8)))
        assert len(set(scores)) == 8 and len(server.bodies) == 4 + 8
        assert json.dumps(server.bodies[0]).count("prompt_logprobs") == 1


# The command line


def test_the_command_line_asks_an_endpoint_and_goes_on_after_a_cap(server, tmp_path, monkeypatch, capsys):
    from drum_hf.cli import main

    rows = []
    for i in range(12):
        picture(i, (16, 16)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": f"question {i}", "response": f"answer {i}"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["-q", "eval", "--data", str(tmp_path), "--strategies", "zero-shot,random", "--shots", "2"]
    command += ["--store", str(tmp_path / "s.sqlite"), "--lvlm", "tiny", "--endpoint", server.url]
    monkeypatch.setenv("MY_KEY", KEY)
    assert main([*command, "--api-key-env", "MY_KEY", "--max-requests", "3", "--concurrency", "2"]) == 2
    error = capsys.readouterr().err
    assert "BudgetExceededError" in error and "run the same again" in error and KEY not in error
    assert len(server.bodies) == 3 and server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert main(command) == 0
    assert "random" in capsys.readouterr().out
    answered = [json.dumps(body["messages"]) for body in server.bodies]
    assert len(answered) == len(set(answered)) > 3  # nothing was asked twice
    assert main(command) == 0 and len(server.bodies) == len(answered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-requests", "3"], "give its --endpoint URL"),
        (["--endpoint", "http://host/v1", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY, which is not set"),
    ],
)
def test_the_command_line_names_what_is_missing(options, message, capsys, tmp_path, monkeypatch):
    from drum_hf.cli.options import load_lvlm, model_options

    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    parser = argparse.ArgumentParser()
    model_options(parser)
    with pytest.raises(ValueError, match=message):
        load_lvlm(parser.parse_args(options))
    given = ["--endpoint", "http://host/v1", "--lvlm", "m", "--lvlm-revision", "r", "--max-tokens", "5"]
    lvlm = load_lvlm(parser.parse_args(given))
    assert (lvlm.name, lvlm.revision, lvlm.identity["endpoint"], lvlm._client.meter.max_tokens) == ("m", "r", None, 5)
