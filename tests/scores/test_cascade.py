"""A cascade against the feedback that it saves, and the cheaper LVLM that it goes by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import load_lvlm
from tiny_training import StubLVLM

from drum_hf.data import TripletTable
from drum_hf.scores.cascade import Cascade
from drum_hf.scores.feedback import Feedback
from drum_hf.scores.store import ScoreStore
from drum_hf.types import ICLRequest


class Guessing(StubLVLM):
    """The stub's taste with some noise, for a fraction of the price."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    @property
    def fingerprint(self) -> str:
        return f"guessing-{self.noise}"

    def score(self, requests: list[ICLRequest]) -> np.ndarray:  # type: ignore[override]
        rng = np.random.default_rng(len(self.scored))
        return 0.5 * super().score(requests) - 1 + self.noise * rng.standard_normal(len(requests))


@pytest.fixture(scope="module")
def table() -> TripletTable:
    rows = [{"image": None, "prompt": f"which {i}?", "response": "ab"[i % 2]} for i in range(24)]
    return TripletTable.from_dataset([{**row, "id": str(i)} for i, row in enumerate(rows)])


def build(table: TripletTable, keep: float, noise: float) -> tuple[Cascade, StubLVLM, list, np.ndarray]:
    lvlm = StubLVLM()
    full, cheap = Feedback(lvlm, table, table), Feedback(Guessing(noise), table, table)
    pairs = [(q, (d,)) for q in table.ids for d in table.ids if d != q]
    truth = Feedback(StubLVLM(), table, table).score(pairs)
    return Cascade(full, cheap, keep=keep), lvlm, pairs, truth


def test_all_kept_is_the_full_feedback(table):
    cascade, lvlm, pairs, truth = build(table, 1.0, 1.0)
    np.testing.assert_array_equal(cascade.score(pairs), truth)
    assert len(lvlm.scored) == len(pairs) and cascade.report.full == len(pairs)


def test_the_best_are_scored_and_the_rest_estimated(table):
    cascade, lvlm, pairs, truth = build(table, 0.5, 0.0)
    scores = cascade.score(pairs)
    bought = {(q, d) for q, (d,) in pairs} & {(q, ds[0]) for q, ds in lvlm.scored}
    assert len(bought) == len(lvlm.scored) == cascade.report.full < 0.6 * len(pairs)
    exact = np.array([(q, d) in bought for q, (d,) in pairs])
    np.testing.assert_array_equal(scores[exact], truth[exact])
    # the cheaper scores are a line of the true ones, so the estimates are true, or capped
    assert (np.abs(scores - truth)[~exact] < 1e-9).mean() > 0.9
    for query in table.ids:
        rows = [i for i, (q, _) in enumerate(pairs) if q == query]
        assert np.argmax(scores[rows]) == np.argmax(truth[rows])
    assert cascade.report.correlation == pytest.approx(1.0) and cascade.report.missed == 0.0


def test_the_report_tells_a_bad_guide_from_a_good_one(table):
    good, *_, pairs, _ = build(table, 0.3, 0.05)
    bad, *_ = build(table, 0.3, 50.0)
    good.score(pairs)
    scores = bad.score(pairs)
    assert np.isfinite(scores).all()
    assert good.report.correlation > 0.6 > abs(bad.report.correlation) + 0.2
    assert good.report.missed <= bad.report.missed
    assert "rank correlation" in good.report.describe()


def test_estimates_are_never_stored_and_a_second_call_is_free(table):
    lvlm, guide, store = StubLVLM(), Guessing(0.1), ScoreStore()
    cascade = Cascade(Feedback(lvlm, table, table, store=store), Feedback(guide, table, table, store=store), keep=0.4)
    pairs = [(q, (d,)) for q in table.ids[:8] for d in table.ids if d != q]
    first = cascade.score(pairs)
    assert len(store) == len(lvlm.scored) + len(guide.scored) and len(guide.scored) == len(pairs)
    paid = len(lvlm.scored), len(guide.scored)
    np.testing.assert_array_equal(cascade.score(pairs), first)
    assert (len(lvlm.scored), len(guide.scored)) == paid


def test_few_pairs_are_all_scored_and_none_is_nothing(table):
    cascade, lvlm, pairs, truth = build(table, 0.2, 1.0)
    np.testing.assert_array_equal(cascade.score(pairs[:4]), truth[:4])
    assert len(lvlm.scored) == 4
    assert cascade.score([]).shape == (0,)
    with pytest.raises(ValueError, match="keep above 0"):
        Cascade(cascade.full, cascade.cheap, keep=0.0)


def test_fewer_image_tokens(tmp_path_factory):
    from family_requests import GRID, REQUESTS

    lvlm = load_lvlm("idefics3", Path(tmp_path_factory.getbasetemp()), batch_size=4)
    less = lvlm.with_fewer_image_tokens(4)
    requests = REQUESTS + GRID[:6]
    counts = np.array(lvlm.count_tokens(requests)) - np.array(less.count_tokens(requests))
    images = [sum(t.image is not None for t in (*r.demonstrations, r.query)) for r in requests]
    assert counts.tolist() == [3 * n for n in images]  # four tokens an image became one
    shown = [bool(n) for n in images]
    before = lvlm._runner.images.encoded
    theirs, ours = less.score(requests), lvlm.score(requests)
    assert lvlm._runner.images.encoded - before <= 4  # both go by the same features
    assert (theirs[shown] != ours[shown]).all() and np.allclose(theirs[~np.array(shown)], ours[~np.array(shown)])
    assert less.fingerprint != lvlm.fingerprint and less.fingerprint == lvlm.with_fewer_image_tokens(4).fingerprint
    assert less.identity["image_tokens_divided_by"] == "4" and "image_tokens_divided_by" not in lvlm.identity
    with pytest.raises(ValueError, match="at least 2"):
        lvlm.with_fewer_image_tokens(1)
    with pytest.raises(ValueError, match="smaller LVLM"):
        load_lvlm("qwen2-vl", Path(tmp_path_factory.getbasetemp())).with_fewer_image_tokens(4)


def test_training_with_a_cascade(tmp_path, table):
    from drum_hf.training import DrumTrainingArguments

    with pytest.raises(ValueError, match="cascade_keep above 0"):
        DrumTrainingArguments(output_dir=str(tmp_path), cascade_keep=0.0)


def test_training_goes_by_the_cascade(tmp_path, tmp_path_factory):
    from tiny_encoders import tiny_clip
    from tiny_training import coloured_table

    from drum_hf.retriever.retriever import DemoRetriever
    from drum_hf.training import DrumTrainer, DrumTrainingArguments

    def trainer(**more):
        clip = tiny_clip(tmp_path_factory.mktemp("encoders"))
        retriever = DemoRetriever.from_encoder(clip, support=coloured_table(24), strategy="sit", device="cpu")
        settings = {"rounds": 1, "epochs_per_round": 1, "candidates_per_round": 6, "per_device_train_batch_size": 8}
        plain = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        args = DrumTrainingArguments(str(tmp_path / "out"), cascade_keep=0.5, **settings, **plain)
        return DrumTrainer(retriever, lvlm=StubLVLM(), args=args, **more)

    trained = trainer(cheap_lvlm=Guessing(0.1))
    trained.train()
    bought = trained.feedback.lvlm.lvlm.scored
    assert trained.cascade.report.full == len(bought) < len(trained.table) == 24 * 6
    with pytest.raises(ValueError, match="expected a cheap_lvlm"):
        trainer()
