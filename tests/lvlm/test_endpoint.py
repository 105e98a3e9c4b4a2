"""`OpenAILVLM` against a local endpoint: faults, spending, what is resumed, and scores checked in closed form."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import io
import json
import logging
import resource
import signal
import threading
import time
import zlib
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
    ImageError,
    NonFiniteScoreError,
    ScoringUnsupportedError,
)
from drum_hf.lvlm.endpoint import model as openai
from drum_hf.lvlm.endpoint.model import EndpointCapabilities, OpenAILVLM, Spending
from drum_hf.lvlm.endpoint.scores import first_alternatives, prompt_tokens
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


# Answers that nobody may trust


def complete(message: dict | None = None, **more) -> dict:
    """A chat completion; `more` replaces its parts."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "ok"} | (message or {}), "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}} | more


def start(handler, **headers: str) -> None:
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.flush()


def bomb(handler) -> None:
    """Four GiB of blanks in 4 MiB of gzip."""
    start(handler, Content_Encoding="gzip")
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    for _ in range(4096):
        handler.wfile.write(deflate.compress(b" " * (1 << 20)))
    handler.wfile.write(deflate.flush())


def endless(handler) -> None:
    start(handler, Transfer_Encoding="chunked")
    while True:
        handler.wfile.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")


def trickle(handler) -> None:
    """A byte now and then: no read ever waits for long."""
    start(handler, Content_Length="100000")
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def trickled_headers(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-More: 1\r\n")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("write", [bomb, endless])
def test_an_answer_has_a_bound_in_bytes(server, write):
    server.script = [Reply(write=write)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EndpointError, match="at most 32 MiB"):
        connect(server).generate([ask(1)])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB
    server.script = [Reply(400, "x" * (5 << 20))]
    with pytest.raises(EndpointError, match="answered 400: xxx") as caught:
        connect(server).generate([ask(1)])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("write", [trickle, trickled_headers])
def test_a_request_has_one_limit_of_time(server, write):
    server.script = [Reply(write=write)]
    began = time.monotonic()
    with pytest.raises(EndpointError, match=r"did not answer within 0\.5 s"):
        connect(server, timeout=0.5, max_retries=0).generate([ask(1)])
    assert 0.4 < time.monotonic() - began < 3


def test_compressed_answers_are_read_and_broken_ones_asked_again(server):
    def compressed(data: bytes, encoding: str = "gzip"):
        def write(handler):
            start(handler, Content_Encoding=encoding, Content_Length=str(len(data)))
            handler.wfile.write(data)

        return Reply(write=write)

    whole = gzip.compress(json.dumps(complete()).encode())
    server.script = [compressed(whole)]
    assert connect(server).generate([ask(1)]) == ["ok"]
    for broken in (whole[:-20], b"no gzip at all"):
        server.script = [compressed(broken), compressed(whole)]
        lvlm = connect(server)
        assert lvlm.generate([ask(1)]) == ["ok"] and lvlm.spent.retries == 1
    server.script = [compressed(b"?", "br")]
    with pytest.raises(EndpointError, match="in gzip or plain, got 'br'"):
        connect(server).generate([ask(1)])
    assert server.headers[-1]["Accept-Encoding"] == "gzip"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[" * 200_000 + "]" * 200_000, "not JSON.*gave up"),
        ('{"choices": ' + "1" * 6000 + "}", "not JSON.*gave up"),
        (complete(choices=[complete()["choices"][0]] * 2), "one answer"),
        (complete({"content": None}), "got none.*'stop'"),
        (complete({"content": {"text": "x"}}), "one answer"),
        (complete({"content": 5}), "one answer"),
        (complete({"content": [{"type": "text", "text": [1]}]}), "one answer"),
        (complete(choices=["x"]), "one answer"),
        (complete(choices={"0": 1}), "one answer"),
        (complete({"content": None, "tool_calls": [1]}), "without tools"),
    ],
)
def test_odd_answers_end_in_a_named_error(server, body, message):
    server.rule = lambda _: Reply(200, body)
    with pytest.raises(EndpointError, match=f"(?s){message}") as caught:
        connect(server, max_retries=1).generate([ask(1)])
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "usage",
    [
        [1], "many", None, {"prompt_tokens": -(10**6), "completion_tokens": -5}, {"prompt_tokens": True},
        {"prompt_tokens": 1e308, "completion_tokens": "x"}, {"prompt_tokens": 10**30}, {"prompt_tokens": [1]},
        {"prompt_tokens": 3, "completion_tokens": -4}, {"prompt_tokens": float("nan"), "completion_tokens": 1},
    ],
)  # fmt: skip
def test_a_lie_about_usage_never_lowers_what_is_spent(server, usage):
    server.script = [Reply(200, complete()), Reply(200, complete(usage=usage)), Reply(200, complete())]
    lvlm = connect(server, max_concurrency=1)
    assert lvlm.generate([ask(i) for i in range(3)]) == ["ok"] * 3
    assert 10 <= lvlm.spent.tokens <= 13 and lvlm.spent.requests == 3
    server.script = [Reply(200, complete(usage=usage))]
    lvlm = connect(server, max_tokens=1000, max_concurrency=1)
    with pytest.raises(EndpointError, match="cap the spending with max_requests") as caught:
        lvlm.generate([ask(i) for i in range(3)])
    assert caught.value.partial == {0: "ok"} and lvlm.spent.requests == 1


def test_what_an_endpoint_says_is_escaped_and_short(server):
    server.script = [Reply(400, {"error": {"message": "\x1b]0;owned\x07\x1b[2J" + "All is well\r\n" * 999}})]
    with pytest.raises(EndpointError, match=r"\\x1b\]0;owned\\x07") as caught:
        connect(server).generate([ask(1)])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_answers_are_what_a_store_can_hold(server):
    server.script = [
        Reply(200, json.dumps(complete({"content": text}))) for text in ("a\ud800b", "a\x00b", "\U0001f41f")
    ]
    with ScoreStore() as store:
        answers = CachedLVLM(connect(server, max_concurrency=1), store).generate([ask(i) for i in range(3)])
    assert answers == ["a\ufffdb", "a\ufffdb", "\U0001f41f"]


@pytest.mark.parametrize("value", [float("nan"), "x", None, 3.0, [1], True])
def test_log_probabilities_that_are_none_are_refused(value):
    with serve(TinyChat(), logprobs="vllm") as server:
        lvlm = connect(server)
        assert lvlm.capabilities.prompt_logprobs
        reply = server.chat.reply

        def wrong(body, logprobs):
            answer = reply(body, logprobs)
            next(iter(answer["prompt_logprobs"][-1].values()))["logprob"] = value
            return answer

        server.chat.reply = wrong
        with pytest.raises((NonFiniteScoreError, ScoringUnsupportedError)):
            lvlm.score([shown(["Rome"])])
    for entries in (5, "text", {"a": 1}, [5], [[]]):
        with pytest.raises(ScoringUnsupportedError, match="position 0"):
            prompt_tokens({"prompt_logprobs": entries})
    for entries in (5, [5], [{"token": 1, "logprob": -1}], [{"token": "a", "logprob": value}]):
        found = first_alternatives({"choices": [{"logprobs": {"content": [{"top_logprobs": entries}]}}]})
        assert found is None or np.isnan(found[0][1])


def test_cookies_are_not_kept_and_redirects_not_followed(server):
    server.script = [Reply(200, complete(), {"Set-Cookie": "a=b; Path=/"}), Reply(307, "", {"Location": server.url})]
    lvlm = connect(server)
    lvlm.generate([ask(1)])
    with pytest.raises(EndpointError, match="redirects are not followed"):
        lvlm.generate([ask(2)])
    assert not any("Cookie" in headers for headers in server.headers) and len(server.bodies) == 2


# Secrets

SECRET = "TOP-secret-12345"


def test_a_key_in_the_address_is_sent_and_shown_nowhere(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.rule = lambda body: Reply(400, {"error": f"bad api-key {SECRET} {SECRET.upper()} Bearer {KEY.upper()}"})
    lvlm = OpenAILVLM("tiny", base_url=f"{server.url}?api-key={SECRET}&api-version=2024-02-01", api_key=KEY)
    with pytest.raises(EndpointError, match="bad api-key") as caught:
        lvlm.generate([ask(1)])
    assert server.paths[0].endswith(f"?api-key={SECRET}&api-version=2024-02-01")
    with pytest.raises(EndpointError) as unreachable:
        OpenAILVLM("m", base_url=f"http://127.0.0.1:9/v1?key={SECRET}", max_retries=0).generate([ask(1)])
    shown_texts = [repr(lvlm), str(lvlm.identity), caplog.text]
    shown_texts += [part for error in (caught.value, unreachable.value) for part in (str(error), repr(error))]
    shown_texts += [repr(unreachable.value.__cause__)]
    for text in shown_texts:
        assert SECRET.lower() not in text.lower() and KEY.lower() not in text.lower()
    assert "HTTP Request: POST" in caplog.text and "api-key=…" in caplog.text  # what httpx logs itself


@pytest.mark.parametrize(
    "address", ["ftp://me:hunter2@gw/v1", "https://me:hunter2@[::1/v1", "https://me:hunter2@gw/v1"]
)
def test_a_password_in_an_address_is_not_repeated(address):
    with pytest.raises(ValueError, match="base_url") as caught:
        OpenAILVLM("m", base_url=address)
    assert "hunter2" not in str(caught.value)


def test_secrets_in_extra_fields_are_sent_but_not_part_of_the_identity(server):
    extra = {"api_key": SECRET, "metadata": {"token": SECRET}, "top_k": 1, "stop_token": "</s>"}
    lvlm = connect(server, extra_body=extra)
    lvlm.generate([ask(1)])
    assert server.bodies[0]["api_key"] == server.bodies[0]["metadata"]["token"] == SECRET
    assert SECRET not in str(lvlm.identity)
    assert lvlm.fingerprint == connect(server, extra_body={**extra, "api_key": "other"}).fingerprint
    assert lvlm.fingerprint != connect(server, extra_body={**extra, "stop_token": "</t>"}).fingerprint
    server.rule = lambda body: Reply(400, {"error": f"no such key: {SECRET}"})
    with pytest.raises(EndpointError, match=r"no such key: \[API key\]"):
        lvlm.generate([ask(2)])


# Fields that a server refuses


def refusing(**reasons: str):
    """A rule that refuses requests with such fields."""

    def rule(body):
        found = next((reason for field, reason in reasons.items() if field in body), None)
        return None if found is None else Reply(400, {"error": {"message": found}})

    return rule


def test_a_refused_temperature_is_left_out_with_a_warning(server, caplog):
    server.rule = refusing(
        max_tokens="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        temperature="Unsupported value: 'temperature' does not support 0 with this model.",
    )
    lvlm = connect(server, max_concurrency=1)
    assert len(lvlm.generate([ask(i) for i in range(3)], max_new_tokens=9)) == 3
    assert "refuses temperature=0" in caplog.text and caplog.text.count("refuses temperature=0") == 1
    assert len(server.bodies) == 2 + 3
    assert [set(body) & {"max_tokens", "max_completion_tokens", "temperature"} for body in server.bodies[-2:]] == [
        {"max_completion_tokens"}
    ] * 2
    given = connect(server, extra_body={"temperature": 0.5, "max_tokens": None})
    with pytest.raises(EndpointError, match="does not support 0"):
        given.generate([ask(1)])  # what the user asks for is not dropped


def test_a_refusal_for_another_reason_teaches_nothing(server):
    bad = Reply(400, {"error": "invalid request {'temperature': 0, 'messages': …}"})
    server.rule = lambda body: bad if "question 1" in str(body) else None
    lvlm = connect(server)
    with pytest.raises(EndpointError, match="invalid request"):
        lvlm.generate([ask(1)])
    lvlm.generate([ask(2)])
    assert server.bodies[-1]["temperature"] == 0


@pytest.mark.parametrize("most", [5, 2])
def test_fewer_top_logprobs_are_enough_where_the_labels_are_among_them(most):
    chat = TinyChat("turns", boost={"A": 19, "B": 18, "C": -20})

    def rule(body):
        if body.get("top_logprobs", 0) > most:
            return Reply(400, {"error": f"Requested sample logprobs of 20, which is greater than max allowed: {most}"})
        return None

    with serve(chat, logprobs="openai") as server:
        server.rule = rule
        lvlm = connect(server)
        request = shown(["A"], choices="AB")
        assert np.allclose(lvlm.score([request]), oracle(chat, lvlm, request), atol=1e-12)
        assert server.bodies[-1]["top_logprobs"] == most
        with pytest.raises(ScoringUnsupportedError, match=rf"among the {most} first tokens .* gave \['A', 'B'\]"):
            lvlm.score([shown(["A"], choices="ABC")])


def test_extra_fields_win_over_ours():
    with serve(TinyChat("turns", boost={"A": 19, "B": 18}), logprobs="openai") as server:
        extra = {"max_tokens": 500, "temperature": 0.7, "top_logprobs": 4}
        lvlm = connect(server, extra_body=extra, chat_template_kwargs={"enable_thinking": False})
        lvlm.generate([ask(1)], max_new_tokens=9)
        body = server.bodies[-1]
        assert (body["max_tokens"], body["temperature"]) == (500, 0.7) and "top_logprobs" not in body
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        lvlm.score([shown(["A"], choices="AB")])
        body = server.bodies[-1]
        assert (body["top_logprobs"], body["logprobs"], body["max_tokens"]) == (4, True, 1)
        connect(server, extra_body={"max_completion_tokens": 70}).generate([ask(1)])
        assert server.bodies[-1]["max_completion_tokens"] == 70 and "max_tokens" not in server.bodies[-1]
        same = connect(server, extra_body={**extra, "chat_template_kwargs": {"enable_thinking": False}})
        assert same.fingerprint == lvlm.fingerprint


# Reasoning, and what is cut


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ({"content": "<think>\nIt is red, so\n</think>\n\nred"}, "red"),
        ({"content": "It is red.\n</think>\n\nred"}, "red"),  # the template opened it
        ({"content": "red", "reasoning_content": "It is red."}, "red"),
        ({"content": "red", "reasoning": "It is red."}, "red"),
    ],
)
def test_reasoning_is_no_part_of_an_answer(server, message, answer):
    server.rule = lambda body: Reply(200, complete(message))
    assert connect(server).generate([ask(1)]) == [answer]


@pytest.mark.parametrize(
    ("message", "ending", "error"),
    [
        ({"content": "<think>It is red, so the ans"}, "length", "cut off; raise max_new_tokens"),
        ({"content": "<think>It is red</think>"}, "length", "all tokens were spent on reasoning"),
        ({"content": None, "reasoning_content": "It is"}, "length", "all tokens were spent on reasoning"),
        ({"content": None}, "length", "all tokens were spent on reasoning"),
        ({"content": None, "reasoning_content": "It is"}, "stop", "got none.*after reasoning"),
    ],
)
def test_reasoning_that_was_cut_off_is_an_error(server, message, ending, error):
    answer = complete(message)
    answer["choices"][0]["finish_reason"] = ending
    server.rule = lambda body: Reply(200, answer)
    with pytest.raises(EndpointError, match=f"(?s)query 'q1': .*{error}"):
        connect(server).generate([ask(1)])


def test_markers_of_reasoning_can_be_set(server):
    server.rule = lambda body: Reply(200, complete({"content": "<|channel>red?<channel|>red <think>"}))
    assert connect(server, reasoning_markers=[("<|channel>", "<channel|>")]).generate([ask(1)]) == ["red <think>"]
    assert connect(server, reasoning_markers=()).generate([ask(1)]) == ["<|channel>red?<channel|>red <think>"]
    assert connect(server).fingerprint != connect(server, reasoning_markers=()).fingerprint
    with pytest.raises(ValueError, match="pairs of texts"):
        connect(server, reasoning_markers=[("", "x")])


def test_a_conversation_that_the_server_cuts_is_noticed(server):
    """As Ollama does: the first turns fall away, and `usage` counts what is left of 4,096 tokens."""

    def rule(body):
        tokens = min(4096, 20 + 700 * sum(isinstance(m["content"], list) for m in body["messages"]))
        return Reply(200, complete(usage={"prompt_tokens": tokens, "completion_tokens": 1}))

    server.rule = rule
    lvlm = connect(server)
    shots = tuple(Demonstration(f"d{i}", picture(i), "what?", "red") for i in range(8))
    query = Query(picture(9), "what?", id="q")
    assert lvlm.generate([ICLRequest(query, shots[:4])]) == ["ok"]  # 3,520 tokens fit
    lvlm.generate([ICLRequest(query)])  # what one image takes is known from here on
    assert lvlm.generate([ICLRequest(query, shots[:4])]) == ["ok"]
    with pytest.raises(ContextOverflowError, match=r"counts 4096 tokens where there are at least .*OLLAMA"):
        lvlm.generate([ICLRequest(query, shots * 2)])
    words = ICLRequest(Query(None, "many words " * 4000, id="long"))
    with pytest.raises(ContextOverflowError, match="query 'long'"):
        connect(server).generate([words])


def test_an_answer_cut_by_the_context_is_noticed(server):
    answer = complete(usage={"prompt_tokens": 9, "completion_tokens": 6})
    answer["choices"][0]["finish_reason"] = "length"
    server.rule = lambda body: Reply(200, answer)
    with pytest.raises(ContextOverflowError, match=r"up to 32 tokens .* ended after 6: its context is full"):
        connect(server).generate([ask(1)])
    assert connect(server).generate([ask(1)], max_new_tokens=6) == ["ok"]


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
        "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576).",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "the request exceeds the available context size, try increasing it",
    ],
)
def test_what_servers_call_a_full_context(server, message):
    server.rule = lambda body: Reply(400, {"error": {"message": message}})
    with pytest.raises(ContextOverflowError):
        connect(server).generate([ask(1)])


def test_an_image_may_be_a_path(server, tmp_path):
    picture(1).save(tmp_path / "path.png")
    shown = tmp_path / "path.png", picture(1)
    connect(server).generate([ICLRequest(Query(image, "what?")) for image in shown])
    sent = [body["messages"] for body in server.bodies]
    assert sent[0] == sent[1] and "data:image/png;base64," in str(sent[0])
    with pytest.raises(ImageError, match=r"missing\.png"):
        Query("missing.png")


# Broken off


def test_ctrl_c_breaks_off_what_is_under_way(server):
    """The main thread waits for four requests that are never answered; two others were answered before."""
    release = threading.Event()
    server.rule = lambda body: None if "question 0" in str(body) or "question 1" in str(body) else Reply(hold=release)
    lvlm = connect(server, max_concurrency=4, timeout=60)
    pressed = []

    def press() -> None:
        while server.now < 4:
            time.sleep(0.01)
        pressed.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            lvlm.generate([ask(i) for i in range(9)])
        assert time.monotonic() - pressed[0] < 1 and set(caught.value.partial) == {0, 1}
        assert not [thread for thread in threading.enumerate() if thread.name == "drum-hf-endpoint"]
    finally:
        release.set()


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
            assert "query 'q5'" in str(caught.value) and len(store) == 7  # all but the one that failed
            server.rule = lambda body: None
            server.bodies.clear()
            assert np.array_equal(CachedLVLM(lvlm, store).score(requests), whole)
            assert len(server.bodies) == 2


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
        assert (
            len(server.bodies) == 2 + 1
        )  # two probes, then one request: all ask for the same conversation and labels
        lvlm.score(
            [shown(["A"], choices="ABC", prompt="which city?"), shown(["A"], choices="AB", prompt="which city?")]
        )
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
