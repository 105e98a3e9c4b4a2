"""Training methods by name: each trains, and differs from DRUM in what it says and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_encoders import tiny_clip
from tiny_training import StubLVLM, coloured_table

from drum_hf.encoders.joint import build_encoder
from drum_hf.errors import DimensionMismatchError, SavedFileError
from drum_hf.retriever.retriever import PART_WEIGHTS, DemoRetriever
from drum_hf.training import DrumTrainer, DrumTrainingArguments
from drum_hf.training.losses import known_losses
from drum_hf.training.methods import METHODS
from drum_hf.training.mining import CandidateTable

ROWS = 12


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def support():
    return coloured_table(ROWS)


@pytest.fixture
def make(clip, support, tmp_path):
    """A trainer of a method over a fresh retriever."""

    def make(name, *, lora=False, on_round_end=None, out="out", **arguments):
        method = METHODS[name]
        retriever = DemoRetriever.from_encoder(clip, support, strategy=method.query, lora=lora, device="cpu")
        settings = {
            "rounds": 2,
            "epochs_per_round": 1,
            "candidates_per_round": 4,
            "list_size": 4,
            "per_device_train_batch_size": 6,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = DrumTrainingArguments(str(tmp_path / out), **settings | arguments | dict(method.training))
        return DrumTrainer(retriever, lvlm=StubLVLM(), args=args, on_round_end=on_round_end)

    return make


def weights(encoder):
    return {name: value.detach().clone() for name, value in encoder.named_parameters()}


def queries(support):
    return [support.query(i, draft="unsure") for i in support.ids]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("msier", "drum-no-mining")])  # below
def test_every_method_trains_with_as_many_pairs(make, name):
    trainer = make(name, rounds=3, candidates_per_round=2)
    before = weights(trainer.retriever.encoder)
    trainer.train()
    assert trainer.table.bought == [ROWS * 2, ROWS * 4, ROWS * 6]
    at_set_level = sum(row[-1] is not None for row in trainer.table.rows())
    assert at_set_level == (0 if METHODS[name].training.get("set_level_rounds") == 0 else ROWS * 2)
    assert trainer.args.num_train_epochs == 3
    after = weights(trainer.retriever.encoder)
    assert any(not torch.equal(before[key], value) for key, value in after.items())
    assert trainer.retriever.strategy == METHODS[name].query
    assert METHODS[name].label and METHODS[name].about


def test_a_method_names_arguments_that_there_are_and_ablations_change_one_thing():
    fields = {field.name for field in dataclasses.fields(DrumTrainingArguments)}
    drum = METHODS["drum"]
    for name, method in METHODS.items():
        assert set(method.training) <= fields, name
        assert method.training["loss"] in known_losses(), name
        assert method.query in PART_WEIGHTS, name
        if name.startswith("drum-") and name != "drum-rank":  # which is the paper's
            changed = {k for k, v in method.training.items() if drum.training.get(k) != v}
            assert len(changed) + (method.query != drum.query) == 1, name
            assert set(drum.training) <= set(method.training), name
    assert len({method.label for method in METHODS.values()}) == len(METHODS)


def test_defaults_are_those_of_their_sources():
    """UDR (ACL 2023): three rounds, lists of 8, lambda 0.8, the top and bottom 5; ours: docs/benchmarks.md's table."""
    args = {f.name: f.default for f in dataclasses.fields(DrumTrainingArguments)}
    udr = {"rounds": 3, "list_size": 8, "rank_weight": 0.8, "pool_ends": 5}
    ours = {
        "loss": "listwise",
        "weighting": "utility",
        "in_batch": "soft",
        "set_level_rounds": 1,
        "set_level_weight": 0.25,
        "candidates_per_round": 10,
        "epochs_per_round": 3,
        "random_share": 0.5,
        "temperature": 0.05,
        "hard_candidates": True,
        "ends_once": False,
        "hard_negatives": None,
        "gather_negatives": True,
    }
    assert {name: args[name] for name in udr | ours} == udr | ours


def test_ancestors_are_trained_as_their_sources_say():
    ancestors = {"in_batch": "best", "set_level_rounds": 0}
    contrastive = ancestors | {"loss": "contrastive"}
    assert METHODS["drum-rank"].training == ancestors | {"loss": "listwise", "weighting": "rank"}
    assert METHODS["udr"].training == ancestors | {
        "loss": "listwise", "weighting": "rank", "ends_once": True, "hard_candidates": False, "random_share": 0.0
    }  # fmt: skip
    assert METHODS["epr"].training == contrastive  # its negatives are as many as a list of DRUM has
    assert METHODS["epr-1"].training == contrastive | {"hard_negatives": 1}
    assert METHODS["msier"].training == contrastive | {"hard_negatives": 1, "frozen_candidates": True}


# Frozen candidates


@pytest.mark.parametrize(("lora", "mini_batch_size"), [(False, None), (True, 4)], ids=["full", "lora-cached"])
def test_msiers_candidates_stay_where_they_are(make, clip, support, tmp_path, lora, mini_batch_size):
    seen = []
    trainer = make(
        "msier",
        lora=lora,
        mini_batch_size=mini_batch_size,
        on_round_end=lambda t, _: seen.append(t.retriever.index.vectors()),
    )
    retriever = trainer.retriever
    frozen, moved = weights(retriever.support_encoder), retriever.encode_queries(queries(support))
    untrained = DemoRetriever.from_encoder(clip, support, strategy="si", device="cpu").encode_support()
    trainer.train()
    for name, parameter in retriever.support_encoder.named_parameters():
        assert torch.equal(frozen[name], parameter), name
        assert not parameter.requires_grad, name
    assert len(seen) == 2
    for vectors in (*seen, retriever.index.vectors(), retriever.encode_support()):
        np.testing.assert_allclose(vectors, untrained, atol=1e-6)
    assert np.abs(retriever.encode_queries(queries(support)) - moved).max() > 1e-3

    retriever.save_pretrained(tmp_path / "saved")
    loaded = DemoRetriever.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.retrieve_ids(queries(support), 5)[0] == retriever.retrieve_ids(queries(support), 5)[0]
    more = coloured_table(3, seed=9, prefix="new")
    loaded.add(more)  # embedded as the others are, and not as queries
    alone = DemoRetriever.from_encoder(clip, more, strategy="si", device="cpu").encode_support()
    np.testing.assert_allclose(loaded.index.vectors(more.ids), alone, atol=1e-6)
    loaded.mark_stale()
    np.testing.assert_array_equal(loaded.index.vectors(support.ids), retriever.index.vectors())


def test_gradient_caching_changes_nothing_where_candidates_are_frozen(make, support):
    trained = []
    for size in (None, 4):
        trainer = make("msier", mini_batch_size=size, out=f"out{size}")
        trainer.train()
        trained.append(trainer.retriever.encode_queries(queries(support)))
    np.testing.assert_allclose(*trained, atol=1e-4)


def test_training_on_goes_on_with_the_same_candidates(make, support, tmp_path):
    trainer = make("msier")
    trainer.train()
    stored = trainer.retriever.index.vectors()
    args = dataclasses.replace(trainer.args, frozen_candidates=False, output_dir=str(tmp_path / "more"))
    DrumTrainer(trainer.retriever, lvlm=StubLVLM(), args=args).train()
    np.testing.assert_array_equal(trainer.retriever.index.vectors(), stored)


def test_a_saved_support_encoder_is_needed(make, tmp_path):
    trainer = make("msier")
    trainer.retriever.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "support_encoder" / "model.safetensors").unlink()
    with pytest.raises(SavedFileError, match="support_encoder"):
        DemoRetriever.from_pretrained(tmp_path / "saved", device="cpu")
    trainer.retriever.save_pretrained(tmp_path / "saved")  # mended
    DemoRetriever.from_pretrained(tmp_path / "saved", device="cpu")


def test_encoders_of_unlike_width_are_refused(clip, support, tmp_path):
    from tiny_encoders import tiny_siglip

    with pytest.raises(DimensionMismatchError, match="384 for queries and 72 for demonstrations"):
        DemoRetriever(
            build_encoder(clip, device="cpu"),
            support,
            support_encoder=build_encoder(tiny_siglip(tmp_path), device="cpu"),
        )


# The other new arguments


def test_without_mining_all_pairs_are_bought_by_the_untrained_retriever(make, clip, support):
    trainer = make("drum-no-mining")
    mined = make("drum-alone", out="mined")
    trainer.train()
    mined.train()
    assert {round_ for *_, round_, _ in trainer.table.rows()} == {0}
    assert {round_ for *_, round_, _ in mined.table.rows()} == {0, 1}
    drawn = [sum(place == ROWS for *_, place, _, _ in t.table.rows()) for t in (trainer, mined)]
    assert drawn == [ROWS * 2, ROWS * 2]  # half of a round of four
    before = DemoRetriever.from_encoder(clip, support, strategy="sit+draft", device="cpu")
    ranked = before.retrieve_ids(queries(support), 6)[0]
    for query_id, best in zip(support.ids, ranked, strict=True):
        bought = [c for q, c, _, place, *_ in trainer.table.rows() if q == query_id and place < ROWS]
        assert bought == best
    args = trainer.args
    assert (args.rounds, args.epochs_per_round, args.candidates_per_round, args.random_share) == (1, 2, 8, 0.25)
    again = dataclasses.replace(args)
    assert (again.rounds, again.epochs_per_round, again.candidates_per_round) == (1, 2, 8)


def test_udrs_lists_hold_a_hard_candidate_by_chance_alone():
    table = CandidateTable(["q"])
    # c0 is liked best, c8 least; c1, liked and ranked low, is the one that they disagree on
    places = [4, 8, 0, 1, 2, 5, 6, 7, 3]
    table.extend({"q": [(f"c{n}", place) for n, place in enumerate(places)]}, [-float(n) for n in range(9)])

    def between(hard):
        rng = np.random.default_rng(0)
        lists = [table.sample("q", 3, rng, ends=1, hard=hard)[0] for _ in range(60)]
        assert all({"c0", "c8"} < set(ids) for ids in lists)
        return {(set(ids) - {"c0", "c8"}).pop() for ids in lists}

    assert between(True) == {"c1"}
    assert between(False) == {f"c{n}" for n in range(1, 8)}


def test_without_frozen_candidates_there_is_no_second_encoder(make, tmp_path):
    retriever = make("epr").retriever
    assert retriever.support_encoder is None
    retriever.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "support_encoder").exists()
    assert DemoRetriever.from_pretrained(tmp_path / "saved", device="cpu").support_encoder is None
