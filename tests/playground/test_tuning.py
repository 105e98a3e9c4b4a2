"""The playground's LVLM before and after ICL tuning: what it is tuned on, and what that is worth on new values."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from drum_hf.errors import LeakError
from drum_hf.evaluation.benchmarks.benchmarks import concept_binding, join_benchmarks
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.playground import resolve
from drum_hf.playground.building.benchmarks import (
    compare_lvlms,
    format_comparison,
    make_benchmarks,
    ordinary_questions,
)
from drum_hf.playground.building.conversations import HELD_OUT, OPERATORS, Album, Chat, PlaygroundEpisodes, things_of
from drum_hf.playground.building.curriculum import Encoder
from drum_hf.playground.building.lvlms import IDEFICS_IMAGE, INTERNVL_IMAGE
from drum_hf.playground.building.pretraining import render_pool
from drum_hf.playground.building.tower import render_groups, render_pairs
from drum_hf.playground.building.tuning import RULES, VARIANTS, make_mix
from drum_hf.tuning.collator import ConversationFormat
from drum_hf.tuning.episodes import EpisodeSettings, check_disjoint

HELD = {value for values in HELD_OUT.values() for value in values}


@pytest.fixture(scope="module")
def album() -> Album:
    return Album([render_pool(5, 2_400, 900), render_pairs(5, 200), render_groups(5, 400)])


def talks(album: Album, rule: str, count: int = 40, **settings):
    drawn = PlaygroundEpisodes(album, rule, EpisodeSettings(**{"shots": (3, 6)} | settings), seed=2)
    return [drawn.draw(index, images=False) for index in range(count)]


@pytest.mark.parametrize("rule", RULES)
def test_an_episode_is_its_number_and_shows_no_held_out_value(album, rule):
    drawn = PlaygroundEpisodes(album, rule, seed=2)
    assert drawn.draw(7, images=False) == drawn.draw(7, images=False)
    assert drawn.draw(7, images=False).key != drawn.draw(8, images=False).key
    for talk in talks(album, rule):
        keys = [turn.image_key for turn in talk.turns]
        assert len(set(keys)) == len(keys)
        if rule != "operators":
            for turn in talk.turns:
                assert not HELD & set(album.values[album.row[turn.image_key]].values())
                assert not HELD & set(turn.answer.split()) - set("47")
    shown = drawn.draw(7)
    assert [image.size for image in shown.images] == [(32, 32)] * len(shown.turns)


@pytest.mark.parametrize("rule", RULES)
def test_contents_are_what_is_shown(album, rule):
    contents = PlaygroundEpisodes(album, rule).contents()
    for talk in talks(album, rule):
        assert {turn.image_key for turn in talk.turns} <= contents.images
        assert {(turn.concept, turn.value) for turn in talk.turns} <= contents.values


@pytest.mark.parametrize("rule", ["names", "letters"])
def test_a_value_keeps_its_word_within_a_conversation_and_another_has_another(album, rule):
    for talk in talks(album, rule):
        word = {}
        for turn in talk.turns:
            value, answer = turn.answer.split()
            assert value == turn.value == album.values[album.row[turn.image_key]][turn.concept]
            assert word.setdefault(value, answer) == answer
        assert len(set(word.values())) == len(word)


def test_sites_have_words_of_their_own(album):
    contradicted = 0
    for talk in talks(album, "sites", count=80, shots=(8, 10)):
        word, by_value = {}, defaultdict(set)
        for turn in talk.turns:
            value, answer = turn.answer.split()
            site = album.frames[album.row[turn.image_key]]
            assert word.setdefault((site, value), answer) == answer
            by_value[value].add(answer)
        contradicted += any(len(answers) > 1 for answers in by_value.values())
    assert contradicted > 10


def test_operators_and_counts_follow_one_rule(album):
    rules = set()
    for talk in talks(album, "operators"):
        (symbol,) = {turn.value for turn in talk.turns}
        rules.add(symbol)
        for turn in talk.turns:
            shown = album.values[album.row[turn.image_key]]
            assert turn.answer == str(OPERATORS[symbol](int(shown["left"]), int(shown["right"])))
    assert rules == set(OPERATORS)
    for talk in talks(album, "counts"):
        (rule,) = {turn.value for turn in talk.turns}
        for turn in talk.turns:
            name, value = turn.prompt.split(": ")
            things = things_of(album.values[album.row[turn.image_key]])
            having = sum(thing[name] == value for thing in things)
            assert int(turn.answer) == {"with": having, "all": len(things)}[rule]


def test_settings_say_how_episodes_are_drawn(album):
    assert all(len(talk.turns) == 5 for talk in talks(album, "names", shots=(4, 4)))
    told = [[turn.answer for turn in talk.turns] for talk in talks(album, "names", copied=1.0)]
    assert all(answers[-1] in answers[:-1] for answers in told)
    plain = talks(album, "sites", distractors=0.0)
    mixed = talks(album, "sites", distractors=1.0)
    several = [sum(len({turn.concept for turn in talk.turns}) > 1 for talk in drawn) for drawn in (plain, mixed)]
    assert several[0] == 0 and several[1] > 20
    easy = talks(album, "counts", difficulty=0.0)
    assert {talk.value for talk in easy} == {"with"}


def test_without_coherence_every_turn_has_a_rule_of_its_own(album):
    drawn = PlaygroundEpisodes(album, "names", EpisodeSettings(shots=(6, 6)), coherent=False, seed=2)
    torn = 0
    for rule in RULES:
        talk = PlaygroundEpisodes(album, rule, EpisodeSettings(shots=(6, 6)), coherent=False, seed=2).draw(0)
        assert len(talk.turns) == 7
    for index in range(30):
        word = defaultdict(set)
        for turn in drawn.draw(index, images=False).turns:
            value, answer = turn.answer.split()
            word[value].add(answer)
        torn += any(len(answers) > 1 for answers in word.values())
    assert torn > 5


def test_chat_is_right_and_shares_nothing(album):
    chat = Chat(album, turns=(6, 6), seed=1)
    asked = defaultdict(set)
    for index in range(60):
        for turn in chat.draw(index, images=False).turns:
            shown = album.values[album.row[turn.image_key]]
            asked[turn.prompt].add(turn.answer)
            if "left" in shown:
                left, right = int(shown["left"]), int(shown["right"])
                results = {"multiply": left * right, "add": left + right, "subtract": abs(left - right)}
                if (verb := turn.prompt.split()[0]) in results:
                    assert turn.answer == str(results[verb])
            elif "things" in turn.prompt:
                things = things_of(shown)
                named = [t for t in things if set(t.values()) & set(turn.prompt.split())]
                assert turn.answer == str(len(things if turn.prompt == "How many things are there?" else named))
            elif "position" in shown:
                assert set(turn.answer.split()) <= set(shown.values())
    assert all(len(asked[prompt]) > 1 for prompt in ("what shape is the object?", "add the digits."))


@pytest.mark.parametrize(
    ("name", "slot"), [("playground/lvlm", IDEFICS_IMAGE), ("playground/internvl", INTERNVL_IMAGE)]
)
def test_the_quick_tokens_are_the_tuners_tokens(album, name, slot):
    lvlm = TransformersLVLM.from_pretrained(name)
    form = ConversationFormat(lvlm.format, loss_on="all", max_length=None)
    encoder = Encoder(lvlm.processor.tokenizer, album, slot)
    for rule in ("captions", "letters", "operators"):
        for talk in talks(album, rule, count=3):
            found = form(talk, [(32, 32)] * len(talk.turns), "a conversation")
            batch = encoder.batch([talk])
            assert batch["input_ids"][0].tolist() == found.ids
            assert batch["labels"][0].tolist() == found.labels


def test_variants_differ_in_what_they_say(album):
    mixes = {name: make_mix(album, variant) for name, variant in VARIANTS.items()}
    assert [source.name for source in mixes["base"].sources] == ["chat"]
    assert mixes["tuned"].shares()["chat"] == pytest.approx(0.4)
    assert "chat" not in mixes["no-replay"].shares()
    assert mixes["no-curriculum"].curriculum.at(0.0) == mixes["tuned"].curriculum.at(1.0)
    assert mixes["tuned"].curriculum.at(0.0).difficulty == 0.0
    assert mixes["tuned"].report(200).counts["kind"]["replay"] == pytest.approx(80, abs=2)
    with pytest.raises(LeakError):
        check_disjoint(mixes["tuned"], mixes["base"])


def test_benchmarks_ask_about_held_out_values_and_give_nothing_away():
    benchmarks = {b.name: b for b in make_benchmarks(6, queries=10, shots=(1, 2))}
    assert set(benchmarks) == {"names", "letters", "operators", "counts"}
    for item in benchmarks["names"].items:
        assert item.gold.split()[0] in HELD
        options = [option.split() for option in item.options]
        assert len({o[0] for o in options}) == len({o[1] for o in options}) == 2 and len(options) == 4
    assert {item.gold.split()[1] for item in benchmarks["letters"].items} == {"A", "B"}
    by_episode = defaultdict(set)
    for item in benchmarks["letters"].items:
        by_episode[item.id, item.shots].add(item.gold.split()[1])
    assert all(letters == {"A", "B"} for letters in by_episode.values())
    gold = {item.gold for item in ordinary_questions(6, 300).items}
    assert gold & HELD and gold - HELD


def test_benchmarks_of_one_name_or_of_two_rules_are_not_joined():
    from PIL import Image

    pairs = [(Image.new("RGB", (4, 4), (n, 0, 0)), "ab"[n % 2]) for n in range(8)]
    first, second = (concept_binding(pairs, shots=1, queries=3, name=name) for name in ("x", "y"))
    joined = join_benchmarks("both", [first, second])
    assert [item.id for item in joined.items] == ["x/0", "x/1", "x/2", "y/0", "y/1", "y/2"]
    operators = [make_benchmarks(seed, queries=5, shots=1)[2] for seed in (6, 7)]
    operators[1].name = "other operators"
    assert len(join_benchmarks("both", operators)) == 10
    with pytest.raises(ValueError, match="different names"):
        join_benchmarks("both", [first, first])
    with pytest.raises(ValueError, match="judged alike"):
        join_benchmarks("both", [first, operators[0]])
    with pytest.raises(ValueError, match="answer_format"):
        concept_binding(pairs, shots=1, queries=3, answer_format="{name}")


def test_tuning_is_worth_what_the_paper_promises_and_forgets_nothing(tmp_path):
    names = {"base": "playground/lvlm-base", "tuned": "playground/lvlm"}
    lvlms = {key: TransformersLVLM.from_pretrained(name, batch_size=32) for key, name in names.items()}
    found = compare_lvlms(lvlms, seed=31, queries=30, questions=300)
    assert found["tuned_few_shot"] - found["base_few_shot"] >= 0.21
    assert found["tuned_few_shot"] - found["trivial_baseline"] >= 0.21
    assert found["base_zero_shot"] - found["tuned_zero_shot"] <= 0.03  # of 300 questions; docs/icl-tuning.md has more
    for name, by_shots in found["by_benchmark"].items():
        mean = {key: np.mean([row[key] for row in by_shots.values()]) for key in ("trivial", "tuned")}
        assert mean["tuned"] > mean["trivial"] + 0.1, name
    table = format_comparison(found)
    assert f"{100 * found['tuned_few_shot']:.1f}" in table and table.count("\n") == 4 * 4 + 3
    json.dumps(found)


@pytest.mark.parametrize("variant", ["base", "lora", "last-answer"])
def test_every_way_of_tuning_trains(album, tmp_path, variant):
    from drum_hf.playground.building.tuning import tune

    torch.manual_seed(0)
    tuner = tune("playground/lvlm-base", album, VARIANTS[variant], tmp_path, steps=2)
    assert tuner.state.global_step == 2 and np.isfinite(tuner.state.log_history[-1]["train_loss"])
    if VARIANTS[variant].full:  # the platform trains without a cache, which is no reason to save a model that has none
        tuner.save_pretrained(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("use_cache", True)
        assert tuner.lvlm().model.config.use_cache


def test_the_ablation_keeps_what_it_has(tmp_path, caplog):
    from drum_hf.playground.building.ablation import main

    args = ["--quick", "--steps", "2", "--queries", "5", "--variants", "base,tuned", "--work-dir", str(tmp_path)]
    args += ["--start", resolve("playground/lvlm-base")]
    main([*args, "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found) == {"base", "tuned"} and 0 <= found["tuned"]["tuned_few_shot"] <= 1
    main([*args, "--json", str(tmp_path / "b.json")])
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    for wrong in (["--variants", "nothing"], ["--work-dir", str(tmp_path / "none")]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_the_demo_sets_the_base_beside_the_tuned(tmp_path, monkeypatch, capsys):
    import drum_hf.playground.building.benchmarks as benchmarks
    from drum_hf.cli import main

    whole = benchmarks.compare_lvlms
    small = {"queries": 5, "questions": 30}
    monkeypatch.setattr(benchmarks, "compare_lvlms", lambda lvlms, **how: whole(lvlms, **how | small))
    main(["demo", "--icl-tuning", "--averaged", "0.5", "--out", str(tmp_path), "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["icl_tuning"]
    named = ("base_few_shot", "tuned_few_shot", "base_zero_shot", "tuned_zero_shot", "trivial_baseline")
    assert all(0 <= found[name] <= 1 for name in named)
    assert set(found["by_benchmark"]["names"]["8"]) >= {"base", "tuned", "averaged", "trivial"}
    assert found["lvlms"]["averaged"] == "0.5 of playground/lvlm and 0.5 of playground/lvlm-base"
    out = capsys.readouterr().out
    assert "ordinary questions" in out and "averaged, generated" in out
    assert main(["demo", "--averaged", "0.5"]) == 2
    assert main(["demo", "--icl-tuning", "--data", str(tmp_path)]) == 2
