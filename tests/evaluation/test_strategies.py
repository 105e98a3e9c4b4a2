"""Strategies by name: what they choose, what they may not, and what they refuse to be asked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_encoders import tiny_clip
from tiny_training import COLOURS, StubLVLM, coloured_rows, coloured_table, forbidden

from drum_hf.cli import main
from drum_hf.data import TripletTable
from drum_hf.errors import RowError
from drum_hf.evaluation.evaluator import ICLEvaluator
from drum_hf.evaluation.registry import STRATEGIES, Comparison, check_names, make_strategy, takes_selector
from drum_hf.evaluation.strategies import MMICES
from drum_hf.evaluation.untrained import UntrainedRetrievers
from drum_hf.experiments.demo import evaluate_strategies
from drum_hf.retriever.retriever import PART_WEIGHTS, DemoRetriever
from drum_hf.scores.feedback import Feedback
from drum_hf.training.methods import METHODS


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return str(tiny_clip(tmp_path_factory.mktemp("encoders")))


@pytest.fixture(scope="session")
def comparison(clip):
    return compare(clip, coloured_table(24))


def compare(clip, support, queries=None, task="vqa", drafted=True):
    """Over its own rows where there are no queries: then each has rows that may not demonstrate it."""
    queries = support if queries is None else queries
    drafts = dict(zip(queries.ids, [*COLOURS] * len(queries), strict=False)) if drafted else {}
    return Comparison(support, queries, Feedback(StubLVLM(), support, queries), clip, task, drafts)


def asked(comparison):
    return [comparison.queries.query(i, draft=comparison.drafts.get(i)) for i in comparison.queries.ids]


def trained(comparison, name):
    """A retriever that compares what this method's does; whether it was trained is no matter to the interface."""
    return comparison.untrained(METHODS[name].query) if name in METHODS else None


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_never_shows_the_query_its_group_or_too_much_and_repeats_itself(comparison, name):
    queries, retriever = asked(comparison), trained(comparison, name)
    strategy = make_strategy(name, comparison, seed=1, retriever=retriever)
    assert strategy.name == name
    for k in (1, 4, 30):
        chosen = strategy.select(queries, k)
        assert len(chosen) == len(queries)
        for query, ids in zip(queries, chosen, strict=True):
            assert len(ids) == len(set(ids)) <= k
            assert not set(ids) & forbidden(comparison.support, query.id)
    again = make_strategy(name, comparison, seed=1, retriever=retriever)
    four = strategy.select(queries, 4)
    assert again.select(queries, 4) == four
    other = make_strategy(name, comparison, seed=2, retriever=retriever).select(queries, 4)
    assert (other != four) == STRATEGIES[name].seeded


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_said_of_a_strategy_is_so(comparison, name):
    info, retriever = STRATEGIES[name], trained(comparison, name)
    assert info.trained == (name in METHODS) and info.label and info.about

    def choose(drafts=None, gold=False):
        table = comparison.queries
        if gold:  # another gold answer for every row that is asked
            words = dict(zip(COLOURS, [*COLOURS][1:] + [*COLOURS][:1], strict=True))
            rows = coloured_rows(24)
            table = TripletTable.from_dataset([row | {"response": words[row["response"]]} for row in rows])
        feedback = Feedback(StubLVLM(), comparison.support, table)
        there = Comparison(comparison.support, table, feedback, comparison.encoder, "vqa", comparison.drafts)
        strategy = make_strategy(name, there, retriever=retriever)
        return strategy.select([table.query(i, draft=drafts[i] if drafts else None) for i in table.ids], 6)

    turned = dict(zip(comparison.drafts, [*[*comparison.drafts.values()][1:], "bako"], strict=True))
    assert (choose(comparison.drafts) != choose(turned)) == info.needs_draft
    assert (choose(comparison.drafts) != choose(comparison.drafts, gold=True)) == info.looks_at_gold


@pytest.mark.parametrize("strategy", PART_WEIGHTS)
@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
def test_shared_embeddings_are_those_of_a_retriever_of_its_own(clip, comparison, strategy, gaps):
    support = comparison.support
    if gaps:  # some rows without picture, some without prompt
        rows = coloured_rows(12)
        support = TripletTable.from_dataset(
            [
                row | {"image": None if n % 3 == 0 else row["image"], "prompt": "" if n % 3 == 1 else row["prompt"]}
                for n, row in enumerate(rows)
            ]
        )
    shared = UntrainedRetrievers(clip, support)
    if gaps and strategy in ("si", "st"):
        with pytest.raises(RowError, match="demonstration 'r"):
            shared(strategy)
        return
    own = DemoRetriever.from_encoder(clip, support, strategy=strategy, device="cpu")
    retriever = shared(strategy)
    assert retriever.strategy == strategy and retriever is shared(strategy)
    np.testing.assert_allclose(retriever.index.vectors(), own.index.vectors(), atol=1e-6)
    np.testing.assert_array_equal(retriever.encode_queries(asked(comparison)), own.encode_queries(asked(comparison)))


def test_towers_are_loaded_once_and_weights_are_each_ones_own(comparison):
    retrievers = [comparison.untrained(name) for name in PART_WEIGHTS]
    assert len({id(r.encoder[0].model) for r in retrievers}) == 1
    assert [r.strategy for r in retrievers] == [*PART_WEIGHTS]
    with pytest.raises(ValueError, match="si, st"):
        comparison.untrained("psychic")


@pytest.mark.parametrize("pool", [1, 5, 200])
def test_mmices_is_the_brute_force_two_steps(clip, comparison, pool):
    """Of the nearest images the nearest prompts, and among equal prompts the nearer image."""
    rng = np.random.default_rng(0)
    prompts = ["what colour is it?", "how many are there?", "where does it stand?", "is it big?"]
    rows = [row | {"prompt": prompts[rng.integers(4)]} for row in coloured_rows(30)]
    there = compare(clip, TripletTable.from_dataset(rows))
    images, texts = (DemoRetriever.from_encoder(clip, there.support, strategy=s, device="cpu") for s in ("si", "st"))
    queries = asked(there)
    by_image = images.encode_queries(queries) @ images.encode_support().T
    by_text = texts.encode_queries(queries) @ texts.encode_support().T
    chosen = MMICES(there.untrained("si"), there.untrained("st"), pool=pool).select(queries, 4)
    for row, (query, ids) in enumerate(zip(queries, chosen, strict=True)):
        left_out = forbidden(there.support, query.id)
        eligible = [n for n, id in enumerate(there.support.ids) if id not in left_out]
        nearest = sorted(eligible, key=lambda n: -by_image[row, n])[: max(pool, 4)]
        wanted = sorted(nearest, key=lambda n: -round(float(by_text[row, n]), 4))[:4]
        assert ids == [there.support.ids[n] for n in wanted]


def test_mmices_refuses_two_support_sets(clip, comparison):
    with pytest.raises(ValueError, match="one support set"):
        MMICES(comparison.untrained("si"), UntrainedRetrievers(clip, coloured_table(5))("st"))
    with pytest.raises(ValueError, match="at least 1"):
        MMICES(comparison.untrained("si"), comparison.untrained("st"), pool=0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("drum-no-draft", "response"),
        ("drum-no-image", "image"),
        ("drum-no-prompt", "prompt"),
        ("udr", "response"),
        ("msier", "prompt"),
        ("msier", "response"),
    ],
)
def test_a_part_that_is_left_out_is_left_out_on_both_sides(clip, comparison, name, part):
    other = {"image": Image.new("RGB", (32, 32), "white"), "prompt": "how many?", "response": "seven"}
    rows = coloured_rows(24)
    changed = TripletTable.from_dataset(
        [row | {part: other[part]} if n % 2 else row for n, row in enumerate(rows)], group="group"
    )

    def choose(strategy, support, queries):
        retriever = UntrainedRetrievers(clip, support)(strategy)
        drafts = ["seven" if n % 2 and part == "response" and queries is changed else "bako" for n in range(24)]
        return retriever.retrieve_ids([queries.query(i, draft=d) for i, d in zip(queries.ids, drafts, strict=True)], 8)

    before = choose(METHODS[name].query, comparison.support, comparison.support)[0]
    assert choose(METHODS[name].query, changed, comparison.support)[0] == before
    assert choose(METHODS[name].query, comparison.support, changed)[0] == before
    assert choose("sit+draft", changed, changed)[0] != choose("sit+draft", comparison.support, comparison.support)[0]


def test_in_captioning_the_oracle_is_the_lvlms_own_ranking(clip, comparison):
    there = compare(clip, comparison.support, task="captioning")
    own = make_strategy("oracle-score", there).select(asked(there), 3)
    assert make_strategy("oracle", there).select(asked(there), 3) == own


@pytest.mark.parametrize(
    ("name", "near"), [("sit-draft", "'sit+draft'"), ("dram", "'drum'"), ("xyzzy", "zero-shot, ")]
)
def test_an_unknown_name_is_told_the_nearest(comparison, name, near):
    with pytest.raises(ValueError, match=f"{name}.*") as caught:
        make_strategy(name, comparison)
    assert near in str(caught.value)
    check_names(STRATEGIES)


def test_what_does_not_fit_is_refused(clip, comparison):
    for name in METHODS:
        with pytest.raises(ValueError, match="--retriever"):
            make_strategy(name, comparison)
    retriever = comparison.untrained("sit+draft")
    with pytest.raises(ValueError, match="takes no retriever"):
        make_strategy("sit", comparison, retriever=retriever)
    with pytest.raises(ValueError, match="takes no selector"):
        make_strategy("random", comparison, selector="mmr")
    with pytest.raises(ValueError, match="expected a selector"):
        make_strategy("sit", comparison, selector="luck")
    with pytest.raises(ValueError, match="have none"):
        make_strategy("sit+draft", compare(clip, comparison.support, drafted=False))
    with pytest.raises(ValueError, match="such as 'z0'"):
        strange = UntrainedRetrievers(clip, coloured_table(4, prefix="z"))("sit")
        make_strategy("drum", comparison, retriever=strange)


def test_a_selector_chooses_among_what_a_retriever_found(comparison):
    plain, picked = (make_strategy("si", comparison, selector=s) for s in (None, "mmr"))
    assert picked.name == "si + mmr" and takes_selector("si") and not takes_selector("mmices")
    wanted = comparison.untrained("si").retrieve_ids(asked(comparison), 5, selector="mmr")[0]
    assert picked.select(asked(comparison), 5) == wanted != plain.select(asked(comparison), 5)


def test_strategies_orders_and_selectors_in_one_comparison(clip):
    support, queries = coloured_table(16), coloured_table(6, seed=7, prefix="u")
    common = {"shots": [2], "lvlm": StubLVLM(), "encoder": clip, "task": "vqa"}
    names = ["random", "si", "epr", "msier", "oracle", "oracle-score"]
    given = {"epr": UntrainedRetrievers(clip, support)("sit"), "msier": UntrainedRetrievers(clip, support)("si")}
    results = evaluate_strategies(support, queries, names=names, retriever=given, selector="mmr", **common)
    assert [*results["strategies"]] == ["random", "si + mmr", "epr + mmr", "msier + mmr", "oracle", "oracle-score"]
    assert results["strategies"]["si + mmr"]["metric"] == results["strategies"]["msier + mmr"]["metric"]
    with pytest.raises(ValueError, match="--retriever drum=FOLDER"):
        evaluate_strategies(support, queries, names=["si", "drum"], retriever=given, **common)


@pytest.mark.parametrize("order", ["best_last", "best_first", "shuffled"])
def test_the_order_shown_is_the_one_asked_for(comparison, order):
    queries = coloured_table(6, seed=7, prefix="u")
    evaluator = ICLEvaluator(StubLVLM(), comparison.support, queries, metric="exact_match", order=order)
    strategy = make_strategy("si", comparison)
    shown = evaluator.evaluate(strategy, 5).ids
    ranked = strategy.select(evaluator.asked, 5)
    assert [sorted(ids) for ids in shown] == [sorted(ids) for ids in ranked]
    places = {tuple(ids.index(i) for i in found) for ids, found in zip(shown, ranked, strict=True)}
    assert places == {"best_last": {(4, 3, 2, 1, 0)}, "best_first": {(0, 1, 2, 3, 4)}}.get(order, places)
    assert (len(places) > 1) == (order == "shuffled")  # each query has a shuffle of its own
    assert evaluator.evaluate(strategy, 5).ids == shown


def test_help_lists_every_name(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines break after hyphens, too
    words = {word.strip(",;:()") for word in said[said.index("zero-shot, random") :].split()}
    assert {*STRATEGIES} <= words
