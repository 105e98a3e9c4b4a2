"""The price before the bill, against LVLMs whose clock is simulated; and as a user asks for it."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_table, worded_table

from drum_hf.cli import main
from drum_hf.playground import make_world
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.store import ScoreStore
from drum_hf.training import DrumTrainer, DrumTrainingArguments, pricing
from drum_hf.training.pricing import Rates, _solve, plan_scores, plan_training, price

TABLE = coloured_table(48)


def mined(queries, support, count, seed=0):
    """`count` demonstrations for each query, at random."""
    rng = np.random.default_rng(seed)
    pairs = []
    for query_id in queries.ids:
        others = [d for d in support.ids if d != query_id]
        pairs += [(query_id, (others[i],)) for i in rng.permutation(len(others))[:count]]
    return pairs


class Clocked(StubLVLM):
    """Spends simulated seconds as an engine does: on images not seen yet, prefixes and suffixes."""

    def __init__(self, *, image=1.0, prefix=0.15, suffix=0.12, remembers=True):
        super().__init__()
        self.image, self.prefix, self.suffix, self.remembers = image, prefix, suffix, remembers
        self.now, self.seen = 0.0, set()

    def score(self, requests):
        if not self.scored:
            self.now += 60.0  # whatever it must do once
        for request in requests:
            shown = {id(part.image) for part in (request.query, *request.demonstrations) if part.image is not None}
            self.now += self.image * len(shown - self.seen) + self.suffix
            if self.remembers:
                self.seen |= shown
        self.now += self.prefix * len({d.id for r in requests for d in r.demonstrations})
        return super().score(requests)

    def generate(self, requests, *, max_new_tokens=32):
        self.now += 0.5 * len(requests)
        return super().generate(requests, max_new_tokens=max_new_tokens)

    def count_tokens(self, requests):
        return [64 * (1 + len(r.demonstrations)) + 10 for r in requests]


@pytest.fixture
def clock(monkeypatch):
    """Lets `pricing` read an LVLM's clock."""

    def follow(lvlm):
        monkeypatch.setattr(pricing, "time", SimpleNamespace(perf_counter=lambda: lvlm.now))
        return lvlm

    return follow


@given(
    image=st.floats(0, 5),
    pair=st.floats(0.01, 5),
    pairs=st.integers(2, 40),
    bare=st.integers(1, 40),
    groups=st.integers(1, 39),
)
def test_two_timings_give_both_rates(image, pair, pairs, bare, groups):
    groups = min(groups, pairs - 1)
    found = _solve(bare * (image + pair), bare, groups * image + pairs * pair, pairs, groups)
    assert found == (pytest.approx(pair, rel=1e-6, abs=1e-6), pytest.approx(image, rel=1e-6, abs=1e-6))


@settings(max_examples=200, deadline=None)
@given(bare=st.floats(0, 9), seconds=st.floats(0, 9), count=st.integers(0, 9), groups=st.integers(1, 9))
def test_rates_are_never_negative_and_add_up(bare, seconds, count, groups):
    pair, image = _solve(bare, count, seconds, 9, groups)
    assert pair >= 0 and image >= 0
    assert groups * image + 9 * pair == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(
    "costs",
    [{}, {"image": 0.0}, {"image": 0.05, "suffix": 1.0}, {"remembers": False}, {"prefix": 0.0}],
    ids=["engine", "no images", "large decoder", "plain way", "no prefix"],
)
@pytest.mark.parametrize("count", [6, 20])
def test_the_price_is_what_the_rest_then_costs(clock, costs, count):
    lvlm = clock(Clocked(**costs))
    feedback = Feedback(lvlm, TABLE, TABLE)
    pairs = mined(TABLE, TABLE, count)
    plan = price(feedback, pairs)
    assert (plan.new, plan.known, plan.images) == (48 * count, 0, 48) and 24 < plan.paid <= 32
    assert plan.tokens == (2 * 64 + 10) * plan.new
    began = lvlm.now
    plan.run()
    assert plan.seconds == pytest.approx(lvlm.now - began, rel=0.25)
    scored = [pair for pair in lvlm.scored if pair[1]]
    assert sorted(scored) == sorted(pairs)  # the calibration's pairs are of the plan, and paid for once


def test_what_is_known_costs_nothing(clock):
    lvlm = clock(Clocked())
    feedback = Feedback(lvlm, TABLE, TABLE)
    pairs = mined(TABLE, TABLE, 4)
    feedback.score(pairs)
    paid = len(lvlm.scored)
    plan = price(feedback, [*pairs, *pairs])
    assert (plan.new, plan.known, plan.seconds, plan.tokens, plan.images, plan.paid) == (0, 192, 0.0, 0, 0, 0)
    assert len(lvlm.scored) == paid
    assert plan.describe() == "0 new pairs, 192 already in the store; 0 distinct images"


def test_few_pairs_are_counted_only(clock):
    lvlm = clock(Clocked())
    plan = price(Feedback(lvlm, TABLE, TABLE), mined(TABLE, TABLE, 2), worth=97)
    assert (plan.new, plan.paid, plan.rates, lvlm.scored) == (96, 0, None, [])
    assert math.isnan(plan.seconds) and plan.describe() == "96 new pairs, 0 already in the store; 48 distinct images"


@pytest.mark.parametrize("pairs", [1, 2, 3, 7])
def test_any_number_of_pairs_can_be_priced(clock, pairs):
    lvlm = clock(Clocked())
    plan = price(Feedback(lvlm, TABLE, TABLE), mined(TABLE, TABLE, 3)[:pairs])
    assert plan.new == pairs and 0 < plan.paid <= pairs and math.isfinite(plan.seconds)


def test_texts_have_no_images(clock):
    table = worded_table(20)
    lvlm = clock(Clocked())
    plan = price(Feedback(lvlm, table, table), mined(table, table, 6))
    assert plan.images == 0
    began = lvlm.now
    plan.run()
    assert plan.seconds == pytest.approx(lvlm.now - began, rel=0.25)


def test_earlier_rates_are_used_again(clock):
    lvlm = clock(Clocked())
    feedback = Feedback(lvlm, TABLE, TABLE)
    plan = price(feedback, mined(TABLE, TABLE, 3), rates=[Rates(2.0, 10.0, tokens=5.0)])
    assert (plan.seconds, plan.tokens, lvlm.scored) == (144 * 2.0 + 48 * 10.0, 720, [])


def test_the_slowest_process_is_what_counts():
    shares = [(10, 4), (12, 4), (0, 0)]
    seconds, tokens, requests = pricing._bill(shares, 22, [Rates(1.0, 2.0, 7.0), Rates(2.0, 2.0, 9.0), None])
    assert (seconds, tokens, requests) == (12 * 2.0 + 4 * 2.0, 22 * 8, 0)


class Endpoint(StubLVLM):
    """Counts requests and tokens, two requests a score."""

    def __init__(self):
        super().__init__()
        self.spent = SimpleNamespace(requests=0, prompt_tokens=0, completion_tokens=0)

    def score(self, requests):
        self.spent.requests += 2 * len(requests)
        self.spent.prompt_tokens += 300 * len(requests)
        self.spent.completion_tokens += len(requests)
        return super().score(requests)


def test_an_endpoint_is_priced_in_requests_and_tokens():
    lvlm = Endpoint()
    pairs = mined(TABLE, TABLE, 4)
    plan = price(Feedback(lvlm, TABLE, TABLE), pairs, calibrate=8)
    assert plan.paid == len(lvlm.scored) and set(lvlm.scored) <= set(pairs)  # nothing that the plan would not send
    assert (plan.tokens, plan.requests) == (192 * 301, 2 * (192 - plan.paid))
    assert math.isnan(plan.seconds)
    assert "57,792 tokens" in plan.describe() and f"{plan.requests:,} requests to the endpoint" in plan.describe()
    assert " h " not in plan.describe()


# Plans


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


def test_a_plan_counts_what_a_first_round_would_buy(tmp_path, clip):
    support = coloured_table(16)
    lvlm = StubLVLM()
    retriever = DemoRetriever.from_encoder(clip, support=support, strategy="sit", device="cpu")
    store = ScoreStore(tmp_path / "scores.sqlite")
    plan = plan_scores(retriever, lvlm, queries=None, store=store, candidates=4, calibrate=8)
    assert len(plan.pairs) == plan.new == 16 * 4
    assert (plan.known, plan.images, plan.paid) == (0, 16, 8)
    assert plan.seconds > 0
    assert len([pair for pair in lvlm.scored if pair[1]]) == 8  # the calibration, which is paid for
    assert "64 new pairs" in plan.describe() and "8 of the pairs were scored" in plan.describe()
    assert len(plan.run()) == 64
    assert len(set(lvlm.scored)) == len(lvlm.scored)
    paid = len(lvlm.scored)
    after = plan_scores(retriever, lvlm, queries=None, store=store, candidates=4)
    assert (after.new, after.known, after.seconds) == (0, 64, 0)
    assert len(lvlm.scored) == paid


def test_a_dry_plan_prices_drafts_rather_than_writing_them(tmp_path, clip, clock):
    support = coloured_table(40)
    lvlm = clock(Clocked())
    retriever = DemoRetriever.from_encoder(clip, support=support, strategy="sit+draft", device="cpu")
    with ScoreStore(tmp_path / "scores.sqlite") as store:
        plan = plan_scores(retriever, lvlm, queries=None, store=store, candidates=4, write_drafts=False)
        assert len(lvlm.asked) == 9  # the first to warm up
        assert (plan.new, plan.drafts, plan.draft_seconds) == (160, 40, pytest.approx(0.5 * 31))
        assert "40 drafts to be written first (about 16 s)" in plan.describe()
        real = plan_scores(retriever, lvlm, queries=None, store=store, candidates=4)
        assert (len(lvlm.asked), real.drafts) == (40, 0)


def make_trainer(clip, lvlm, out, **arguments):
    retriever = DemoRetriever.from_encoder(clip, support=coloured_table(24), strategy="sit", device="cpu")
    args = DrumTrainingArguments(
        str(out), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, epochs_per_round=1, **arguments
    )
    return DrumTrainer(retriever, lvlm=lvlm, args=args)


def test_a_training_is_priced_over_all_its_rounds(tmp_path, clip, clock):
    lvlm = clock(Clocked())
    trainer = make_trainer(clip, lvlm, tmp_path, rounds=4, candidates_per_round=9, set_level_rounds=0)
    plan = trainer.plan()
    # 24 rows, 23 others each, less the one of its group: two rounds of 9, then what is left
    assert (plan.first.new, plan.later, plan.images) == (24 * 9, [24 * 9, 24 * 5, 0], 24)
    assert len(trainer.table) == 0 and trainer.drafts == {}
    assert plan.seconds > plan.first.seconds and plan.tokens == 138 * (24 * 9 * 2 + 24 * 5)
    lines = plan.describe().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["round 1", "round 2", "round 3", "round 4", "in all"]
    assert "at most 552 new pairs" in lines[-1]
    began = lvlm.now
    trainer.train()
    spent = lvlm.now - began
    assert len({pair for pair in lvlm.scored if pair[1]}) == len(trainer.table) <= plan.first.new + sum(plan.later)
    assert spent <= plan.seconds * 1.1  # later rounds see no image anew


def test_a_round_at_set_level_is_priced_as_pairs_half_as_long_again(tmp_path, clip, clock):
    lvlm = clock(Clocked())
    trainer = make_trainer(clip, lvlm, tmp_path, rounds=3, candidates_per_round=9)
    plan = trainer.plan()
    assert (plan.later, plan.set_level) == ([24 * 9, 24 * 9], 1)
    assert plan.tokens == 138 * (24 * 9 * 2 + 24 * 9 * 3 // 2)
    assert "round 3: at most 216 pairs at set level" in plan.describe()
    trainer.train()
    assert len(trainer.table) == plan.first.new + sum(plan.later)
    small = make_trainer(clip, lvlm, tmp_path / "small", rounds=4, candidates_per_round=4, set_level_rounds=3)
    assert small.plan().later == [24 * 3, 0, 0]  # a pool of four, one of them the companion


def test_a_plan_whose_first_round_is_known_says_that_it_can_not_tell_the_time(clock):
    lvlm = clock(Clocked())
    feedback = Feedback(lvlm, TABLE, TABLE)
    pairs = mined(TABLE, TABLE, 2)
    feedback.score(pairs)
    plan = plan_training(price(feedback, pairs), rounds=2, candidates=2)
    assert math.isnan(plan.seconds) and " h " not in plan.describe().splitlines()[-1]


def test_a_round_is_counted_before_it_is_scored_and_not_calibrated(tmp_path, clip, caplog, clock):
    lvlm = clock(Clocked())
    trainer = make_trainer(clip, lvlm, tmp_path, rounds=2, candidates_per_round=5, set_level_rounds=0)
    with caplog.at_level("INFO", logger="drum_hf"):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("round ")]
    assert len(said) == 2 and all("120 new pairs, 0 already in the store" in line for line in said)
    assert all("24 distinct images" in line and "were scored" not in line for line in said)
    assert len(lvlm.scored) == 240  # and no zero-shot score that only a calibration needs


def test_the_bar_says_new_and_known(capsys):
    feedback = Feedback(StubLVLM(), TABLE, TABLE)
    pairs = mined(TABLE, TABLE, 3)
    feedback.score(pairs[:20])
    capsys.readouterr()
    feedback.score(pairs, progress=True)
    bar = capsys.readouterr().err
    assert "LVLM score" in bar and "124/124" in bar and "new=124" in bar and "known=20" in bar
    assert re.search(r"pair/s|s/pair", bar)
    feedback.score(mined(TABLE, TABLE, 5, seed=1)[:100])
    assert "LVLM score" not in capsys.readouterr().err  # not worth its lines


# At the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import csv

    here = tmp_path_factory.mktemp("data")
    with open(here / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "question", "answer", "group"])
        for row in list(make_world(21, difficulty="easy").support)[:24]:
            row.image.save(here / f"{row.id}.png")
            writer.writerow([row.id, f"{row.id}.png", row.prompt, row.response, row.group])
    return here


def test_both_verbs_have_a_dry_run(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["-q", "train", "--data", str(folder), "--out", str(out), "--candidates", "3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "round 1: 72 new pairs, 0 already in the store" in said and "round 3: at most 72 pairs at set level" in said
    assert "in all: at most 216 new pairs" in said and "24 drafts to be written first" in said
    paid = int(re.search(r"(\d+) of the pairs were scored to find this out", said).group(1))
    assert not (out / "retriever").exists()
    store = out / "scores.sqlite"
    assert main(["-q", "score", "--data", str(folder), "--store", str(store), "--candidates", "3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    new, known = map(int, re.match(r"(\d+) new pairs, (\d+) already in the store", said).groups())
    # the first one's pairs were kept; the drafts that it wrote may have changed a few of them
    assert new + known == 72 and paid // 2 < known <= paid
