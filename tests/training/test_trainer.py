"""DrumTrainer with a stub LVLM and a tiny CLIP: it learns, pays once, and resumes as if nothing had happened."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from safetensors.torch import load_file
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_rows, coloured_table, forbidden
from transformers import HfArgumentParser, TrainerCallback

from drum_hf.data import TripletTable
from drum_hf.errors import ContextOverflowError, SavedFileError, TooFewDemonstrationsError
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.store import ScoreStore
from drum_hf.training import ContrastiveLVLMLoss, DrumTrainer, DrumTrainingArguments, ListwiseLVLMLoss
from drum_hf.training.lists import Preprocessed

ROWS = 24


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def support():
    return coloured_table(ROWS)


@pytest.fixture
def make(clip, support, tmp_path):
    """A trainer over a fresh retriever; every argument can be replaced."""

    def make(lvlm=None, *, strategy="sit", lora=False, out="out", trainer=None, **arguments):
        retriever = DemoRetriever.from_encoder(clip, support=support, strategy=strategy, lora=lora, device="cpu")
        settings = {
            "rounds": 2,
            "epochs_per_round": 2,
            "candidates_per_round": 5,
            "list_size": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-4,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        args = DrumTrainingArguments(str(tmp_path / out), **settings | arguments)
        return DrumTrainer(retriever, lvlm=lvlm or StubLVLM(), args=args, **trainer or {})

    return make


def share_of_favourites(retriever, k=5):
    """How many of each row's k nearest the stub likes, on average."""
    support = retriever.support
    answers = dict(zip(support.ids, support.responses, strict=True))
    queries = [support.query(i, draft="unsure") for i in support.ids]
    found, _ = retriever.retrieve_ids(queries, k)
    return float(np.mean([answers[d] == answers[i] for i, ids in zip(support.ids, found, strict=True) for d in ids]))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"loss": "contrastive"}, {"weighting": "rank", "mini_batch_size": 8}, {"lora": True}],
    ids=["listwise", "contrastive", "rank-cached", "lora"],
)
def test_training_brings_the_lvlms_favourites_up(make, arguments):
    rate = {"learning_rate": 5e-3} if arguments.get("lora") else {}
    ended = []
    trainer = make(
        epochs_per_round=4, trainer={"on_round_end": lambda t, n: ended.append((n, len(t.table)))}, **rate, **arguments
    )
    contrastive = arguments.get("loss") == "contrastive"
    assert isinstance(trainer.loss, ContrastiveLVLMLoss if contrastive else ListwiseLVLMLoss)
    before = share_of_favourites(trainer.retriever)
    output = trainer.train()
    assert output.training_loss > 0
    assert share_of_favourites(trainer.retriever) > before + 0.1
    assert [n for n, _ in ended] == [1, 2]
    assert trainer.retriever.teacher == {"name": "stub", "revision": None, "fingerprint": "stub-1"}
    recorded = trainer.retriever.card_data["training"]
    assert (recorded["rounds"], recorded["queries"]) == (2, ROWS)
    assert recorded["scored_pairs"] == ended[-1][1] == len(trainer.table)
    assert trainer.retriever.card_data["rounds"] == trainer.table.summary()


def test_only_new_pairs_are_scored_and_a_store_pays_for_all(make, support, tmp_path):
    store = str(tmp_path / "shared.sqlite")
    lvlm, again = StubLVLM(), StubLVLM()
    trainer = make(lvlm, score_store=store, set_level_rounds=0)
    trainer.train()
    assert len(lvlm.scored) == len(set(lvlm.scored)) == len(trainer.table) == ROWS * 10
    for query_id, candidate, score, _, round_, set_level in trainer.table.rows():
        assert set_level is None
        assert candidate not in forbidden(support, query_id)
        assert score == StubLVLM.taste(trainer.feedback.request(query_id, [candidate]))
        assert round_ in (0, 1)
    for query_id in support.ids:
        rounds = [r for q, _, _, _, r, _ in trainer.table.rows() if q == query_id]
        assert rounds == [0] * 5 + [1] * 5
    second = make(again, score_store=store, out="again", set_level_rounds=0)
    second.train()
    assert again.scored == []
    assert list(second.table.rows()) == list(trainer.table.rows())


def test_the_last_round_scores_in_next_to_the_best(make, support):
    lvlm = StubLVLM()
    trainer = make(lvlm)
    trainer.train()
    rows = list(trainer.table.rows())
    assert len(lvlm.scored) == len(trainer.table) == len(rows) + ROWS * 4  # of five candidates, all but the companion
    for query_id in support.ids:
        own = {c: (score, set_level) for q, c, score, _, _, set_level in rows if q == query_id}
        companion = max(own, key=lambda c: own[c][0])
        assert trainer.table.companion(query_id) == companion and own[companion][1] is None
        for candidate in own.keys() - {companion}:
            shown = trainer.feedback.request(query_id, [candidate, companion])
            assert own[candidate][1] == StubLVLM.taste(shown)
    assert trainer.retriever.card_data["training"]["set_level_rounds"] == 1


def test_two_that_do_not_fit_say_how_to_score_alone(make):
    class Narrow(StubLVLM):
        def score(self, requests, **options):
            if any(len(request.demonstrations) > 1 for request in requests):
                raise ContextOverflowError("too long")
            return super().score(requests, **options)

    with pytest.raises(ContextOverflowError, match=r"too long; or, .*set_level_rounds=0"):
        make(Narrow()).train()


def test_a_single_round_scores_alone_whatever_company_is_asked_for(make):
    trainer = make(rounds=1, set_level_rounds=3)
    trainer.train()
    assert {set_level for *_, set_level in trainer.table.rows()} == {None}


def test_drafts_are_asked_for_only_where_they_are_used(make, support):
    lvlm = StubLVLM()
    trainer = make(lvlm, rounds=1, epochs_per_round=1)
    trainer.train()
    assert lvlm.asked == []
    assert trainer.query("r0").draft is None


def test_drafts_are_the_lvlms_own_answers_and_stand_where_responses_do(make, support):
    lvlm = StubLVLM()
    trainer = make(lvlm, strategy="sit+draft", rounds=1, epochs_per_round=1)
    batches = []

    class Spy:
        valid_label_columns = ()
        collate = trainer.data_collator

        def __call__(self, rows):
            batches.append((rows, self.collate(rows)))
            return dict(batches[-1][1])

    trainer.data_collator = Spy()
    trainer.train()
    assert sorted(r.query.id for r in lvlm.asked) == sorted(support.ids)  # once each
    assert all(r.demonstrations == () and r.responses == () for r in lvlm.asked)
    rows, batch = batches[0]
    ids = [row["query"] for row in rows]
    encoder = trainer.retriever.encoder
    expected = encoder.preprocess([{"image": support[i].image, "text": [support[i].prompt, "unsure"]} for i in ids])
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(batch[f"query_{name}"], tensor), name


@pytest.mark.parametrize("strategy", ["si", "st"])
def test_strategies_of_one_tower_train_too(make, strategy):
    trainer = make(strategy=strategy, rounds=1, epochs_per_round=1)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_a_batch_holds_each_demonstration_once_and_what_is_known_of_it(make, support):
    trainer = make(rounds=1, candidates_per_round=12, list_size=6)
    trainer.mine()
    rows = [trainer.train_dataset[i] for i in range(8)]
    batch = trainer.data_collator(rows)
    label = batch["label"]
    column = list(dict.fromkeys(c for row in rows for c in row["candidates"]))
    shown = trainer.retriever.support.demonstrations(column)
    expected = trainer.retriever.encoder.preprocess(
        [{"image": d.image, "text": [d.prompt, d.response]} for d in shown]
    )
    for name in ("pixel_values", "input_ids", "text_mask"):
        assert torch.equal(batch[f"demonstrations_{name}"], expected[name])
    assert label["index"].shape == label["scores"].shape == (8, 6)
    for b, row in enumerate(rows):
        assert [column[i] for i in label["index"][b].tolist()] == row["candidates"]
        np.testing.assert_allclose(label["scores"][b], row["scores"], rtol=1e-6)
        assert label["mask"][b].all()
        banned, known = forbidden(support, row["query"]), trainer.table.candidates(row["query"])
        assert [c in banned for c in column] == label["blocked"][b].tolist()
        np.testing.assert_allclose(label["known"][b], [known.get(c, np.nan) for c in column], rtol=1e-6)
    assert label["blocked"].any()  # the groups of three pairs meet in the first eight rows


def test_lists_are_drawn_anew_each_epoch_and_the_same_again_for_the_same_epoch(make):
    trainer = make(rounds=1, candidates_per_round=12)
    trainer.mine()
    first = trainer.train_dataset[0]["candidates"]
    assert trainer.train_dataset[0]["candidates"] == first
    others = []
    for epoch in range(1, 5):
        trainer.lists.epoch = epoch
        others.append(trainer.train_dataset[0]["candidates"])
    assert any(ids != first for ids in others)


def test_rows_are_hashed_and_copied_without_the_trainer(make):
    shown = [make(out=out).train_dataset.format["format_kwargs"]["transform"] for out in ("a", "b")]
    assert all(len(pickle.dumps(lists)) < 500 for lists in shown)
    assert len({Hasher.hash(lists) for lists in shown}) == 2
    assert copy.deepcopy(shown[0]) is shown[0]


def test_lists_follow_the_data_seed_where_there_is_one_even_0(make):
    drawn = {}
    for name, seeds in {"3": {}, "0": {"data_seed": 0}, "3 too": {"data_seed": 3}, "5": {"data_seed": 5}}.items():
        trainer = make(rounds=1, candidates_per_round=12, out=name, **seeds)
        trainer.mine()
        drawn[name] = [trainer.train_dataset[i]["candidates"] for i in range(ROWS)]
    assert drawn["3"] == drawn["3 too"]
    assert len({str(lists) for lists in drawn.values()}) == 3


# Queries without demonstration


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_batch_without_any_candidate_changes_nothing(make, mini_batch_size):
    trainer = make(rounds=1, mini_batch_size=mini_batch_size)
    trainer.table.extend({"r0": [("r5", 0), ("r6", 1)]}, [-1.0, -2.0])
    rows = [trainer.train_dataset[i] for i in range(1, 5)]
    assert all(row["candidates"] == [] for row in rows)
    batch = trainer.data_collator(rows)
    features, labels = trainer.collect_features(dict(batch))
    loss = trainer.loss(features, labels)
    assert loss.item() == 0.0
    loss.backward()
    grads = {n: p.grad for n, p in trainer.loss.named_parameters() if p.grad is not None}
    assert "log_temperature" in grads and len(grads) > 2
    assert all(float(grad.abs().max()) == 0.0 for grad in grads.values())
    # beside one that has candidates, they do not change what it teaches but for the mean
    mixed = trainer.data_collator([trainer.train_dataset[0], *rows])
    alone = trainer.data_collator([trainer.train_dataset[0]])
    values = [trainer.loss(*trainer.collect_features(dict(b))).item() for b in (mixed, alone)]
    assert values[0] == pytest.approx(values[1] / 5, rel=1e-5) and values[1] > 0


def test_queries_without_demonstration_are_counted_and_left_alone(clip, tmp_path, caplog):
    rows = [row | {"group": "crowd"} for row in coloured_rows(6)]
    support = TripletTable.from_dataset(rows[:3])
    queries = TripletTable.from_dataset([rows[3] | {"group": "other"}, *rows[4:]])
    retriever = DemoRetriever.from_encoder(clip, support=support, strategy="sit", device="cpu")
    args = DrumTrainingArguments(
        str(tmp_path), rounds=1, per_device_train_batch_size=1, save_strategy="no", use_cpu=True, report_to=[]
    )
    trainer = DrumTrainer(retriever, lvlm=StubLVLM(), args=args, train_dataset=queries)
    trainer.train()  # in batches of one, two of which have nothing to learn from
    assert {(q, c) for q, c, *_ in trainer.table.rows()} == {("r3", c) for c in ("r0", "r1", "r2")}
    assert "2 of 3 training queries have no demonstration" in caplog.text and "'r4'" in caplog.text


def test_a_support_set_of_one_group_is_refused(clip, tmp_path):
    rows = TripletTable.from_dataset([row | {"group": "one"} for row in coloured_rows(6)])
    retriever = DemoRetriever.from_encoder(clip, support=rows, strategy="sit", device="cpu")
    args = DrumTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(TooFewDemonstrationsError, match=r"6 training queries.*'group'"):
        DrumTrainer(retriever, lvlm=StubLVLM(), args=args).train()


# What was preprocessed


class Counted:
    """Makes a row of 4 bytes of each item, and counts the items it was given."""

    def __init__(self):
        self.made = []

    def preprocess(self, items):
        self.made += items
        return {"row": torch.tensor([[float(item)] for item in items])}


def test_rows_seen_lately_are_kept_and_the_oldest_go_first():
    encoder = Counted()
    rows = Preprocessed(encoder, limit=12)  # three rows

    def read(*ids):
        return rows("query", ids, int)["row"].flatten().tolist()

    assert read("1", "2", "3") == [1, 2, 3] and encoder.made == [1, 2, 3]
    assert read("3", "1", "1") == [3, 1, 1] and encoder.made == [1, 2, 3]
    assert read("4") == [4] and encoder.made == [1, 2, 3, 4]  # 2 was seen the longest ago, and goes
    assert [i for _, i in rows.rows] == ["3", "1", "4"] and rows.bytes == 12
    assert read("1", "3", "4") == [1, 3, 4] and encoder.made == [1, 2, 3, 4]
    assert read("2") == [2] and encoder.made == [1, 2, 3, 4, 2]
    assert rows("demonstration", ["2"], lambda i: 20 + int(i))["row"].item() == 22  # the other side's is another row
    assert read(*"56789") == [5, 6, 7, 8, 9] and rows.bytes == 12  # more than there is room for


# Stops and starts


class Checkpoints(TrainerCallback):
    """Saves after some steps; may then be struck down."""

    def __init__(self, *steps, die_at=None):
        self.steps, self.die_at = steps, die_at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.die_at:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or state.global_step in self.steps


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.loss.named_parameters()}


@pytest.mark.parametrize(("lora", "set_level"), [(False, 0), (True, 0), (False, 1)], ids=["full", "lora", "set_level"])
def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path, lora, set_level):
    """24 rows in batches of 8: an epoch has three steps, a round six. Step 5 is within an epoch and a round."""
    settings = {"lora": lora, "strategy": "sit+draft", "set_level_rounds": set_level}
    whole = make(out="whole", **settings)
    whole.train()
    struck = make(out="run", trainer={"callbacks": [Checkpoints(5, 6, 8, die_at=9)]}, **settings)
    with pytest.raises(KeyboardInterrupt):
        struck.train()
    for step, rounds_left in ((5, 1), (6, 1), (8, 0)):
        lvlm = StubLVLM()
        # a store of its own, so that what is scored again would show
        resumed = make(lvlm, out="run", score_store=str(tmp_path / f"again{step}.sqlite"), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert len(lvlm.scored) == rounds_left * ROWS * (4 if set_level else 5), step
        assert list(resumed.table.rows()) == list(whole.table.rows()), step
        assert resumed.table.rounds == 2
        assert resumed.loss.temperature.item() == pytest.approx(whole.loss.temperature.item(), abs=1e-7)
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(resumed)[name], value, atol=1e-6, rtol=0, msg=f"{step}: {name}")


def test_a_checkpoint_holds_table_and_temperature(make, tmp_path):
    trainer = make(rounds=1, epochs_per_round=1, trainer={"callbacks": [Checkpoints(2, 3)]})
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-3"
    saved = load_file(folder / "loss.safetensors")
    assert saved["log_temperature"].item() == trainer.loss.log_temperature.item()
    (folder / "candidates.parquet").unlink()
    with pytest.raises(SavedFileError, match=r"candidates\.parquet"):
        make(rounds=1, epochs_per_round=1).train(resume_from_checkpoint=str(folder))
    folder = tmp_path / "out" / "checkpoint-2"
    (folder / "loss.safetensors").write_bytes(b"short")
    with pytest.raises(SavedFileError, match=r"loss\.safetensors"):
        make(rounds=1, epochs_per_round=1).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_of_other_queries_is_refused(make, support, tmp_path):
    make(rounds=1, epochs_per_round=1, trainer={"callbacks": [Checkpoints(2)]}).train()
    other = make(rounds=1, epochs_per_round=1, trainer={"train_dataset": support.select(support.ids[::-1])})
    with pytest.raises(SavedFileError, match="train_dataset"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_a_killed_run_leaves_its_scores_in_the_store(make, tmp_path):
    lvlm, second = StubLVLM(fail_after=64), StubLVLM()
    with pytest.raises(KeyboardInterrupt):
        make(lvlm, rounds=1, epochs_per_round=1).train()
    paid = len(lvlm.scored)
    assert 0 < paid < ROWS * 5
    with ScoreStore(tmp_path / "out" / "scores.sqlite") as store:
        assert len(store) == paid
    make(second, rounds=1, epochs_per_round=1).train()
    assert len(second.scored) == ROWS * 5 - paid
    assert not set(second.scored) & set(lvlm.scored)


def test_queries_apart_from_the_support_set(make, support):
    queries = coloured_table(6, seed=9, prefix="u")
    lvlm = StubLVLM()
    make(lvlm, rounds=1, epochs_per_round=1, trainer={"train_dataset": queries}).train()
    assert {q for q, _ in lvlm.scored} == set(queries.ids)
    assert {d for _, (d,) in lvlm.scored} <= set(support.ids)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers"),
        ({"rounds": 0}, "rounds"),
        ({"list_size": 1}, "list_size"),
        ({"random_share": 1.5}, "random_share"),
        ({"rank_weight": -0.1}, "rank_weight"),
        ({"hard_negatives": 0}, "hard_negatives"),
        ({"eval_candidates": 1}, "eval_candidates"),
        ({"loss": "listent"}, "expected a loss of listwise, contrastive.*'listent'; did you mean 'listnet'"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, fault, message):
    with pytest.raises(ValueError, match=message):
        DrumTrainingArguments(str(tmp_path), **fault)


def test_the_number_of_epochs_follows_from_the_rounds(tmp_path):
    assert DrumTrainingArguments(str(tmp_path), rounds=3, epochs_per_round=4, use_cpu=True).num_train_epochs == 12


def test_a_command_line_parser_of_the_platform_takes_all_arguments(tmp_path):
    given = ["--output_dir", str(tmp_path), "--loss", "lambda", "--loss_kwargs", '{"scheme": "lambdarank", "k": 3}']
    given += ["--weighting", "rank", "--hard_negatives", "1", "--ends_once", "--rounds", "2", "--use_cpu"]
    (args,) = HfArgumentParser(DrumTrainingArguments).parse_args_into_dataclasses(given)
    assert (args.loss, args.loss_kwargs) == ("lambda", {"scheme": "lambdarank", "k": 3})
    assert (args.weighting, args.hard_negatives, args.ends_once, args.num_train_epochs) == ("rank", 1, True, 6)
