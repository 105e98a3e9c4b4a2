"""Evaluations while a retriever is trained: what is measured, what is kept, when it stops; and the training log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_table, forbidden
from transformers import EarlyStoppingCallback

from drum_hf.errors import SavedFileError
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.training import DrumTrainer, DrumTrainingArguments, LVLMLoss

ROWS = 24


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def support():
    return coloured_table(ROWS)


@pytest.fixture(scope="session")
def asked():
    return coloured_table(6, seed=9, prefix="u")


@pytest.fixture
def make(clip, support, tmp_path):
    def make(lvlm=None, *, strategy="sit", out="out", retriever=None, trainer=None, **arguments):
        retriever = retriever or DemoRetriever.from_encoder(clip, support=support, strategy=strategy, device="cpu")
        settings = {
            "rounds": 2,
            "epochs_per_round": 2,
            "candidates_per_round": 5,
            "set_level_rounds": 0,
            "list_size": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-4,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            "eval_candidates": 8,
        }
        args = DrumTrainingArguments(str(tmp_path / out), **settings | arguments)
        return DrumTrainer(retriever, lvlm=lvlm or StubLVLM(), args=args, **trainer or {})

    return make


def by_hand(trainer, asked):
    """NDCG and the first one's probability, from the definition."""
    retriever, table = trainer.retriever, trainer.held_out.table
    ndcg, first = [], []
    for query_id in asked.ids:
        pool = table.candidates(query_id)
        vector = retriever.encode_queries([asked.query(query_id)])[0]
        similarity = {c: float(retriever.index.reconstruct(c) @ vector) for c in pool}
        ranked = [pool[c] for c in sorted(pool, key=lambda c: -similarity[c])]
        gain = sum(math.exp(s) / math.log2(place + 2) for place, s in enumerate(ranked))
        most = sum(math.exp(s) / math.log2(place + 2) for place, s in enumerate(sorted(ranked, reverse=True)))
        ndcg.append(gain / most)
        first.append(math.exp(ranked[0]))
    return {"eval_ndcg": np.mean(ndcg), "eval_gold_probability": np.mean(first)}


def evaluations(trainer):
    return [line for line in trainer.state.log_history if any(key.startswith("eval_") for key in line)]


def test_held_out_queries_are_scored_once_and_ranked_each_epoch(make, support, asked):
    lvlm = StubLVLM()
    trainer = make(lvlm, eval_strategy="epoch", trainer={"eval_dataset": asked})
    before = trainer.evaluate()
    trainer.train()
    bought = [pair for pair in lvlm.scored if pair[0] in asked]
    assert len(bought) == len(set(bought)) == 6 * 8
    assert len(lvlm.scored) - len(bought) == len(trainer.table) == ROWS * 10
    lines = evaluations(trainer)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert 1 - lines[-1]["eval_ndcg"] < (1 - before["eval_ndcg"]) / 2  # it learns
    again, expected = trainer.evaluate(), by_hand(trainer, asked)
    for name, value in expected.items():
        assert again[name] == pytest.approx(value, rel=1e-5) == lines[-1][name], name
    assert len(lvlm.scored) == 6 * 8 + ROWS * 10


def test_evaluation_changes_nothing_of_the_training(make, asked):
    plain = make(out="plain")
    plain.train()
    watched = make(out="watched", eval_strategy="steps", eval_steps=1, trainer={"eval_dataset": asked})
    watched.train()
    assert len(evaluations(watched)) == 12
    assert list(watched.table.rows()) == list(plain.table.rows())
    for (name, one), other in zip(plain.loss.named_parameters(), watched.loss.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_rows_of_the_support_set_are_held_out_of_themselves(make, support):
    trainer = make(trainer={"eval_dataset": support.select(support.ids[:4])})
    trainer.evaluate()
    for query_id in support.ids[:4]:
        assert not set(trainer.held_out.table.candidates(query_id)) & forbidden(support, query_id)


def test_drafts_of_held_out_queries_are_the_lvlms_own(make, asked):
    lvlm = StubLVLM()
    trainer = make(lvlm, strategy="sit+draft", trainer={"eval_dataset": asked})
    trainer.evaluate()
    trainer.evaluate()
    assert sorted(request.query.id for request in lvlm.asked) == sorted(asked.ids)


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_retriever_is_loaded_at_the_end(make, save_only_model):
    values, seen = iter([0.2, 0.9, 0.5, 0.4]), []

    def evaluator(retriever):
        assert not retriever.encoder.training
        seen.append(retriever.index.vectors())
        return {"accuracy": next(values)}

    trainer = make(
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, save_total_limit=1,
        save_only_model=save_only_model, metric_for_best_model="accuracy", trainer={"evaluator": evaluator},
    )  # fmt: skip
    temperatures = []
    trainer.add_callback(Temperatures(trainer, temperatures))
    trainer.train()
    assert trainer.state.best_metric == 0.9 and trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    np.testing.assert_allclose(trainer.retriever.index.vectors(), seen[1], atol=1e-6)
    assert np.abs(seen[1] - seen[3]).max() > 1e-4
    assert trainer.loss.temperature.item() == temperatures[1] != temperatures[3]
    assert trainer.table.rounds == 2 and len(trainer.table) == ROWS * 10  # what was scored since stays
    checkpoint = trainer.state.best_model_checkpoint
    assert Path(checkpoint, "optimizer.pt").exists() != save_only_model


class Temperatures(EarlyStoppingCallback):
    def __init__(self, trainer, found):
        super().__init__()
        self.trainer, self.found = trainer, found

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_evaluate(self, *args, **kwargs):
        self.found.append(self.trainer.loss.temperature.item())


def test_early_stopping_stops_and_keeps_the_best(make):
    values = iter([0.3, 0.8, 0.8, 0.1])
    trainer = make(
        epochs_per_round=4, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="metric",
        trainer={"evaluator": lambda _: next(values), "callbacks": [EarlyStoppingCallback(2)]},
    )  # fmt: skip
    trainer.train()
    assert [line["eval_metric"] for line in evaluations(trainer)] == [0.3, 0.8, 0.8, 0.1]
    assert trainer.state.best_metric == 0.8 and trainer.state.global_step == 12
    assert trainer.table.rounds == 1  # the second round never began
    assert trainer.retriever.card_data["training"]["rounds"] == 1


def test_ndcg_chooses_the_best_by_default(make, asked):
    trainer = make(
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, trainer={"eval_dataset": asked}
    )
    trainer.train()
    assert trainer.args.metric_for_best_model == "ndcg" and trainer.args.greater_is_better
    assert trainer.state.best_metric == max(line["eval_ndcg"] for line in evaluations(trainer))
    assert trainer.evaluate()["eval_ndcg"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_evaluators_of_sentence_transformers_get_the_encoder(make):
    class Spread(BaseEvaluator):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            return {"width": float(model.get_embedding_dimension())}

    trainer = make(trainer={"evaluator": Spread()})
    assert trainer.evaluate()["eval_width"] == trainer.retriever.encoder.get_embedding_dimension()


def test_a_trainer_with_nothing_to_evaluate_by_says_so(make, asked):
    with pytest.raises(ValueError, match=r"eval_dataset=….*got neither"):
        make().evaluate()
    with pytest.raises(ValueError, match="eval_dataset"):
        make(eval_strategy="epoch")
    with pytest.raises(ValueError, match="another data set"):
        make(trainer={"eval_dataset": asked}).evaluate(asked)
    with pytest.raises(KeyError, match=r"eval_recall.*eval_ndcg"):
        make(
            eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="recall",
            trainer={"eval_dataset": asked},
        ).train()  # fmt: skip


def test_a_resumed_run_ranks_the_same_demonstrations(make, support, asked, tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "trainer": {"eval_dataset": asked}}
    whole = make(out="run", **settings)
    whole.train()
    lvlm = StubLVLM()
    resumed = make(lvlm, out="run", score_store=str(tmp_path / "again.sqlite"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert not [pair for pair in lvlm.scored if pair[0] in asked]
    assert list(resumed.held_out.table.rows()) == list(whole.held_out.table.rows())
    pairs = zip(evaluations(resumed), evaluations(whole), strict=True)
    for one, other in pairs:
        assert one["eval_ndcg"] == pytest.approx(other["eval_ndcg"], abs=1e-6)
    other = make(out="run", **settings | {"trainer": {"eval_dataset": coloured_table(5, seed=9, prefix="u")}})
    with pytest.raises(SavedFileError, match="5 queries of eval_dataset"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


# The log


def test_the_log_has_losses_and_accuracies_by_line_and_by_round(make):
    trainer = make(logging_strategy="steps", logging_steps=1, rounds=2, epochs_per_round=1)
    trainer.train()
    history = trainer.state.log_history
    lines, rounds = [line for line in history if "loss" in line], [line for line in history if "round" in line]
    assert len(lines) == 6 and all(0.0 <= line["accuracy"] <= 1.0 for line in lines)
    assert [line["round"] for line in rounds] == [1, 2]
    assert [line["scored_pairs"] for line in rounds] == [ROWS * 5, ROWS * 10]
    for number, line in enumerate(rounds):
        own = lines[3 * number : 3 * number + 3]
        assert line["round_loss"] == pytest.approx(np.mean([one["loss"] for one in own]), abs=2e-3)
        assert line["round_accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in own]), abs=1e-3)
        assert line["gold_probability"] == round(trainer.table.summary()[number]["gold probability"], 4)
    assert rounds[0]["epoch"] == 1 and rounds[1]["epoch"] == 2


def test_a_loss_of_ones_own_trains_by_its_name(make, monkeypatch):
    from drum_hf.training import losses

    class Hinge(LVLMLoss):
        sampling = "contrastive"

        def ranking(self, similarities, scores, mask):
            better = (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
            gaps = similarities[:, :, None] - similarities[:, None, :]
            return ((0.1 - gaps).clamp_min(0.0) * better).sum((1, 2))

    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))
    losses.register_loss("hinge", Hinge)
    trainer = make(loss="hinge", rounds=1, hard_negatives=1)
    trainer.train()
    assert type(trainer.loss) is Hinge
    assert {len(trainer.train_dataset[i]["candidates"]) for i in range(ROWS)} == {2}
    assert trainer.retriever.card_data["training"]["loss"] == "hinge"


@pytest.mark.parametrize("loss", ["listnet", "lambda", "ranknet", "listmle", "plistmle", "adr-mse", "margin-mse"])
def test_every_loss_trains_the_lvlms_favourites_up(make, asked, loss):
    trainer = make(loss=loss, epochs_per_round=4, trainer={"eval_dataset": asked})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert 1 - after["eval_ndcg"] < (1 - before["eval_ndcg"]) / 2


# What can't help


class Deaf(StubLVLM):
    """Answers alike whatever it is shown."""

    def __init__(self, score):
        super().__init__()
        self.value = score

    def score(self, requests):
        super().score(requests)
        return np.full(len(requests), self.value)


@pytest.mark.parametrize(("score", "reason"), [(-1.0, "hardly depend"), (-9.0, "nearly impossible")])
def test_a_run_that_cannot_help_says_so_in_log_and_card(make, caplog, score, reason):
    trainer = make(Deaf(score), rounds=2, epochs_per_round=1)
    trainer.train()
    told = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert len(told) == 1  # after the first round, once
    (sentence,) = trainer.retriever.card_data["limits"]
    assert reason in sentence


def test_a_run_that_can_help_has_no_such_line_and_clears_an_earlier_one(make, caplog):
    trainer = make(rounds=1, epochs_per_round=1)
    trainer.retriever.card_data["limits"] = ["an earlier run's"]
    trainer.train()
    assert trainer.retriever.card_data["limits"] == [] and "hardly depend" not in caplog.text


def test_labels_with_few_queries_are_told_where_there_are_labels(make, support, caplog):
    class Chooser(StubLVLM):
        pass

    few = support.select([i for i, r in zip(support.ids, support.responses, strict=True) if r != "bako"][:12])
    words = sorted(set(support.responses))
    make(Chooser(), rounds=1, epochs_per_round=1, trainer={"choices": words, "train_dataset": few}).train()
    assert "3 of 3 labels have fewer than 5 training queries (such as 'delu')" in caplog.text


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_in_half_precision_is_trained_in_float32(make, clip, support, dtype):
    retriever = DemoRetriever.from_encoder(clip, support=support, strategy="sit", device="cpu")
    retriever.encoder.to(dtype)
    trainer = make(retriever=retriever, rounds=1, epochs_per_round=1, learning_rate=1e-5)
    before = {name: p.detach().clone() for name, p in retriever.encoder.named_parameters() if p.requires_grad}
    assert {value.dtype for value in before.values()} == {torch.float32}
    trainer.train()
    moved = total = 0
    for name, parameter in retriever.encoder.named_parameters():
        if name in before:
            moved += int((parameter != before[name]).sum())
            total += parameter.numel()
    assert moved > 0.5 * total  # steps of 1e-5 are below half precision's last digit of most weights
