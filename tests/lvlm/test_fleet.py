"""Several endpoints behind one `OpenAILVLM`: load, failures, caps and disagreement, against local servers."""

from __future__ import annotations

import argparse
import contextlib
import threading

import numpy as np
import pytest
from fault_server import FaultServer, Reply, TinyChat, serve

from drum_hf.cli.options import load_lvlm, model_options
from drum_hf.errors import BudgetExceededError, EndpointError
from drum_hf.lvlm.endpoint import fleet as _fleet
from drum_hf.lvlm.endpoint.model import OpenAILVLM
from drum_hf.types import ICLRequest, Query

DEAD = "http://127.0.0.1:9/v1"  # the discard port: nobody listens


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def servers():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serve(logprobs="vllm")) for _ in range(3)]


def connect(*urls: str, quick: bool = True, **options) -> OpenAILVLM:
    """A fleet whose endpoints are left alone for 20 ms rather than seconds."""
    lvlm = OpenAILVLM("tiny", base_url=list(urls), **({"revision": "r1"} | options))
    if quick:
        lvlm._client.uniform = lambda low, high: min(high, 0.02)
    return lvlm


def urls(servers: list[FaultServer]) -> list[str]:
    return [server.url for server in servers]


def asks(count: int, **parts) -> list[ICLRequest]:
    return [ICLRequest(Query(None, f"question {i}", id=f"q{i}"), **parts) for i in range(count)]


def alone(server: FaultServer, **options) -> OpenAILVLM:
    return OpenAILVLM("tiny", base_url=server.url, revision="r1", **options)


def ask_first(server: FaultServer, others: list[FaultServer], reply: Reply | None) -> None:
    """The others answer no question before this one has been asked, so that it is however threads run."""
    asked = threading.Event()

    def answer(body):
        if reply is not None or "question" in str(body):
            asked.set()
        return reply

    server.rule = answer
    for other in others:
        other.rule = lambda body: Reply(hold=asked) if "question" in str(body) else None


def test_a_fleet_answers_and_scores_as_one_endpoint_does_in_the_order_asked(servers):
    fleet, requests = connect(*urls(servers), max_concurrency=2), asks(30, responses=("five",))
    with serve(logprobs="vllm") as other:
        single = alone(other)
        assert fleet.generate(requests) == single.generate(requests)
        np.testing.assert_array_equal(fleet.score(requests), single.score(requests))
        assert fleet.fingerprint == single.fingerprint


def test_load_goes_where_slots_are_free(servers):
    held = threading.Event()
    servers[0].rule = lambda body: Reply(hold=held) if "question" in str(body) else None
    fleet = connect(*urls(servers), max_concurrency=2)
    threading.Timer(0.5, held.set).start()
    fleet.generate(asks(40))
    counts = [len([text for text in server.asked() if "question" in text]) for server in servers]
    assert sum(counts) == 40 and counts[0] <= 4  # both slots of the first were taken all the while
    assert min(counts[1:]) >= 5 and max(server.most for server in servers) <= 2


@pytest.mark.parametrize(
    "fault", [Reply(500), Reply(503), Reply(drop="before"), Reply(drop="middle"), Reply(body="?")]
)
def test_an_endpoint_that_fails_now_and_then_loses_nothing(servers, fault):
    counts = iter(range(10_000))
    servers[1].rule = lambda body: fault if next(counts) % 3 == 1 else None
    fleet = connect(*urls(servers), max_concurrency=2)
    with serve() as other:
        assert fleet.generate(asks(30)) == alone(other).generate(asks(30))
    assert fleet.spent.retries >= 1 and fleet._client.lost == {}
    assert fleet.spent.requests == sum(len(server.bodies) for server in servers)


def test_one_that_is_down_is_left_alone_and_taken_back_when_it_is_up(servers):
    ask_first(servers[2], servers[:2], Reply(503))
    fleet = connect(*urls(servers), max_concurrency=2)
    fleet._client.uniform = lambda low, high: high
    fleet._client.now = lambda: clock[0]
    clock = [0.0]
    fleet.generate(asks(20))
    assert len(servers[2].bodies) == 1  # asked once, and then left alone: the clock stands still
    ask_first(servers[2], servers[:2], None)
    clock[0] += 1.01
    fleet.generate(asks(20))
    assert any("question" in text for text in servers[2].asked())


def test_pauses_double_until_it_answers(servers):
    fleet, clock = connect(*urls(servers[:2])), [0.0]
    fleet._client.uniform = lambda low, high: high
    fleet._client.now = lambda: clock[0]
    member = fleet._client._members[1]
    pauses = []
    for _ in range(7):
        ask_first(servers[1], servers[:1], Reply(503))
        fleet.generate(asks(6))
        pauses.append(member.out_until - clock[0])
        clock[0] = member.out_until
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_retry_after_is_kept(servers):
    servers[0].script = [Reply(429, headers={"Retry-After": "7"})]
    fleet = connect(*urls(servers[:2]))
    fleet._client.uniform = lambda low, high: 0.0
    fleet._client.now = lambda: 100.0
    fleet.generate(asks(3))
    assert fleet._client._members[0].out_until == 107.0 and len(servers[0].bodies) == 1


def test_a_dead_address_does_not_stop_the_others(servers):
    fleet = connect(DEAD, servers[0].url, max_concurrency=2)
    assert len(fleet.generate(asks(8))) == 8 and fleet.spent.retries >= 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_one_that_refuses_key_or_model_is_out_for_good(servers, status, caplog):
    servers[0].rule = lambda body: Reply(status, {"error": {"message": "no"}})
    fleet = connect(*urls(servers))
    fleet.generate(asks(12))
    fleet.generate(asks(12))
    assert len(servers[0].bodies) == 1 and list(fleet._client.lost) == [servers[0].url]
    assert "nothing more is sent there" in caplog.text


def test_when_all_are_out_the_errors_are_shown_and_answers_kept(servers):
    for server in servers:
        server.rule = lambda body: Reply(401, {"error": "bad key"}) if "question 7" in str(body) else None
    fleet = connect(*urls(servers), max_concurrency=1)
    with pytest.raises(EndpointError, match=r"every endpoint is out.*401") as error:
        fleet.generate(asks(8))
    assert error.value.status == 401 and set(error.value.partial) >= {0, 1, 2}


def test_a_request_that_fails_everywhere_is_given_up(servers):
    for server in servers:
        server.rule = lambda body: Reply(500) if "question 1" in str(body) else None
    fleet = connect(*urls(servers), max_retries=1)
    with pytest.raises(EndpointError, match="gave up after 6 attempts at 3 endpoints"):
        fleet.generate(asks(2))


def test_what_is_wrong_with_a_request_is_raised_at_once(servers):
    for server in servers:
        server.rule = lambda body: Reply(400, {"error": "no such field"}) if "question" in str(body) else None
    fleet = connect(*urls(servers))
    with pytest.raises(EndpointError, match="no such field"):
        fleet.generate(asks(1))
    assert fleet._client.lost == {}


def test_the_cap_holds_for_all_together(servers):
    fleet = connect(*urls(servers), max_concurrency=4, max_requests=20)
    with pytest.raises(BudgetExceededError, match="max_requests=20 at 3 endpoints") as error:
        fleet.generate(asks(60))
    assert sum(len(server.bodies) for server in servers) == 20 == fleet.spent.requests
    assert len(error.value.partial) == 17  # each endpoint was greeted
    fleet = connect(*urls(servers), max_concurrency=1, max_tokens=600)
    with pytest.raises(BudgetExceededError, match="max_tokens=600"):
        fleet.generate(asks(200))
    assert 600 <= fleet.spent.tokens < 600 + 3 * 60


class Named(TinyChat):
    """A server that says what its model is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def reply(self, body, logprobs):
        return super().reply(body, logprobs) | {"model": self.name}


@pytest.mark.parametrize(
    ("other", "logprobs", "message"),
    [
        (TinyChat("spaced"), "vllm", "tokens.* for one and"),
        (TinyChat("spaced"), "none", "tokens.* for one and"),
        (TinyChat(boost={" five": 4.0}), "vllm", "the weights are not the same"),
        (Named("other"), "vllm", "calls its model .*'other'"),
        (TinyChat(), "none", "without log-probabilities"),
    ],
    ids=["template", "template unseen", "weights", "name", "fields"],
)
def test_endpoints_that_serve_something_else_are_refused(other, logprobs, message):
    kind = "vllm" if message.startswith("without") else logprobs
    with serve(logprobs=kind) as one, serve(other, logprobs=logprobs) as two:
        fleet = connect(one.url, two.url, max_concurrency=1)
        with pytest.raises(EndpointError, match=f"expected endpoints that serve the same model.*{message}"):
            fleet.generate(asks(20))
        asked = [any("question" in text for text in server.asked()) for server in (one, two)]
        assert not all(asked)  # at most the one that the other is compared with


def test_small_differences_of_hardware_are_none():
    with serve(TinyChat(boost={" five": 0.02}), logprobs="vllm") as one, serve(logprobs="vllm") as two:
        assert len(connect(one.url, two.url).generate(asks(8))) == 8


def test_a_fleet_needs_a_revision_and_different_addresses(servers):
    with pytest.raises(ValueError, match="revision="):
        OpenAILVLM("tiny", base_url=urls(servers))
    with pytest.raises(ValueError, match="each endpoint once"):
        connect(servers[0].url, servers[0].url + "/")
    with pytest.raises(ValueError, match="at least one address"):
        connect()


def test_the_command_line_takes_several_endpoints(servers):
    parser = argparse.ArgumentParser()
    model_options(parser)
    given = ["--lvlm", "tiny", "--lvlm-revision", "r1", "--endpoint", servers[0].url, servers[1].url]
    for more in ([], ["--endpoint", servers[2].url]):
        lvlm = load_lvlm(parser.parse_args([*given, *more]))
        assert isinstance(lvlm._client, _fleet.ChatFleet) and len(lvlm._client.base_urls) == 2 + bool(more)
    single = load_lvlm(parser.parse_args(["--lvlm", "tiny", "--endpoint", servers[0].url]))
    assert single.base_url == servers[0].url and single.identity["endpoint"] == servers[0].url
