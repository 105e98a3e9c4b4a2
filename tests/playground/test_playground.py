"""Worlds are what they say, and the shipped models use their context as promised, on worlds they never saw."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drum_hf.data import check_leaks
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.playground import encoder_path, lvlm_path, make_world, resolve
from drum_hf.playground.language import private_words, vocabulary
from drum_hf.playground.scenes import ATTRIBUTES, FRAMES, digit_images, render_digit, render_scene
from drum_hf.playground.worlds import DIFFICULTIES
from drum_hf.types import TASKS, ICLRequest

# Development seeds; the figures in docs/benchmarks.md come from others.
SEEDS = (11, 12)


@pytest.fixture(scope="session")
def lvlm() -> TransformersLVLM:
    return TransformersLVLM.from_pretrained(lvlm_path(), batch_size=32)


def test_values_name_their_attribute_and_no_private_word_is_a_public_one():
    values = [v for options in ATTRIBUTES.values() for v in options]
    assert len(values) == len(set(values))
    words = private_words()
    assert len(set(words)) == len(words) == 480
    assert not set(words) & set(values)
    assert set(words) <= set(vocabulary())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20))
def test_a_picture_is_a_function_of_its_generator(seed):
    shown = {name: options[seed % len(options)] for name, options in ATTRIBUTES.items()}
    frame = sorted(FRAMES)[seed % len(FRAMES)]
    first, second = (render_scene(shown, frame, np.random.default_rng(seed)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"
    other = render_digit(seed % len(digit_images()[1]), "red", "snow", frame, np.random.default_rng(seed))
    assert other.tobytes() != first.tobytes()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("difficulty", sorted(DIFFICULTIES))
def test_a_world_is_its_seed_and_every_answer_can_be_taught(task, difficulty):
    world, again, other = (make_world(seed, task=task, difficulty=difficulty) for seed in (5, 5, 6))
    assert world.support.fingerprint == again.support.fingerprint
    assert world.queries.fingerprint == again.queries.fingerprint
    assert world.support.fingerprint != other.support.fingerprint
    assert set(world.support.responses) != set(other.support.responses)
    level = DIFFICULTIES[difficulty]
    asked = level.queries // 2 if task == "captioning" else level.queries
    support = min(level.support, 600) if task == "classification" else level.support
    assert (len(world.support), len(world.queries)) == (support, asked)
    assert check_leaks(world.support, world.queries, on_leak="ignore") == []
    if task != "captioning":
        assert set(world.queries.responses) <= set(world.support.responses)
    if task == "vqa":
        groups = list(world.support.groups)
        assert len(set(groups)) == len(groups) / 2
    words = {w for r in world.support.responses for w in r.split()} & set(private_words())
    assert len(words) >= 8 * level.sites


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="vqa"):
        make_world(0, task="poetry")
    with pytest.raises(ValueError, match="standard"):
        make_world(0, difficulty="impossible")
    assert resolve("playground/clip") == encoder_path()
    assert resolve("someone/else") == "someone/else"


def test_models_are_small_stock_and_safe():
    from pathlib import Path

    shipped = {
        encoder_path(): "clip",
        lvlm_path(): "idefics3",
        resolve("playground/lvlm-base"): "idefics3",
        resolve("playground/internvl"): "internvl",
    }
    for folder, kind in shipped.items():
        assert json.loads((Path(folder) / "config.json").read_text())["model_type"] == kind
    files = [f for folder in shipped for f in Path(folder).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".jinja"}


def _with_same_answer(world, shots, rng):
    by_answer: dict[str, list[str]] = {}
    for i, response in zip(world.support.ids, world.support.responses, strict=True):
        by_answer.setdefault(response, []).append(i)
    requests, gold = [], []
    for i, response in zip(world.queries.ids, world.queries.responses, strict=True):
        same = [by_answer[response][j % len(by_answer[response])] for j in range(shots)]
        requests.append(ICLRequest(world.queries.query(i), tuple(world.support[s] for s in rng.permutation(same))))
        gold.append(response)
    return requests, gold


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_the_lvlm_binds_private_words_in_context_on_unseen_worlds(lvlm, shots):
    right, asked = 0, 0
    for seed in SEEDS:
        requests, gold = _with_same_answer(make_world(seed), shots, np.random.default_rng(seed))
        requests, gold = requests[:120], gold[:120]
        right += sum(a == g for a, g in zip(lvlm.generate(requests, max_new_tokens=6), gold, strict=True))
        asked += len(gold)
    assert right / asked >= 0.90


@pytest.fixture(scope="session")
def other_lvlm() -> TransformersLVLM:
    return TransformersLVLM.from_pretrained(resolve("playground/internvl"), batch_size=32)


def test_the_other_lvlm_uses_demonstrations_too(other_lvlm):
    world = make_world(SEEDS[0])
    right = {}
    for shots in (0, 1, 4):
        requests, gold = _with_same_answer(world, shots, np.random.default_rng(0))
        answers = other_lvlm.generate(requests[:120], max_new_tokens=6)
        right[shots] = np.mean([a == g for a, g in zip(answers, gold[:120], strict=True)])
    assert right[0] <= 0.03 and right[1] >= 0.8 and right[4] >= 0.8


def test_a_picture_takes_four_tokens_of_either_lvlm(lvlm, other_lvlm):
    world = make_world(SEEDS[0])
    shown = world.queries.query(world.queries.ids[0])
    bare = ICLRequest(dataclasses.replace(shown, image=None))
    # the four, and what stands around them
    assert lvlm.count_tokens([ICLRequest(shown)])[0] - lvlm.count_tokens([bare])[0] == 7
    assert other_lvlm.count_tokens([ICLRequest(shown)])[0] - other_lvlm.count_tokens([bare])[0] == 6


def test_without_demonstrations_private_words_stay_at_chance_and_values_are_seen(lvlm):
    world = make_world(SEEDS[0])
    requests = [ICLRequest(world.queries.query(i)) for i in world.queries.ids[:120]]
    answers = lvlm.generate(requests, max_new_tokens=6)
    gold = world.queries.responses[:120]
    assert sum(a == g for a, g in zip(answers, gold, strict=True)) <= 3
    assert sum(a.split()[:1] == g.split()[:1] for a, g in zip(answers, gold, strict=True)) >= 96


def test_a_demonstration_from_another_site_misleads(lvlm):
    world = make_world(SEEDS[1])
    support, queries = world.support, world.queries
    requests = []
    for i, gold in zip(queries.ids, queries.responses, strict=True):
        value = gold.split()[0]
        right = next(s for s, r in zip(support.ids, support.responses, strict=True) if r == gold)
        wrong = [s for s, r in zip(support.ids, support.responses, strict=True) if r.split()[0] == value and r != gold]
        if wrong:
            for shown in (right, wrong[0]):
                requests.append(ICLRequest(queries.query(i), (support[shown],), (gold,)))
    scores = lvlm.score(requests[:160]).reshape(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).mean() >= 0.95


def test_build_runs_every_stage_and_resumes(tmp_path):
    from drum_hf.playground.building.build import QUICK, build

    steps = QUICK
    first = build(tmp_path / "a", tmp_path / "work", seed=3, steps=steps)
    again = build(tmp_path / "b", tmp_path / "work", seed=3, steps=steps)
    assert set(first) >= {"vision", "clip", "induction", "bare pairs", "tower", "chat", "last chat"}
    assert again["chat"]["loss"] == first["chat"]["loss"]  # read from the checkpoint, not trained again
    for name in ("clip", "lvlm-base", "lvlm"):
        weights = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in "ab"]
        assert weights[0] == weights[1]


def test_the_other_lvlm_is_built_of_another_architecture(tmp_path):
    from drum_hf.playground.building.build import OTHER_STEPS, QUICK, build_other

    steps = dict.fromkeys(OTHER_STEPS, 3)
    facts = build_other(tmp_path / "out", tmp_path / "work", steps=steps, pictures=QUICK)
    assert set(facts) >= {"tower", "induction", "bare pairs", "chat", "last chat"}
    lvlm = TransformersLVLM.from_pretrained(tmp_path / "out" / "internvl")
    assert lvlm.model.config.model_type == "internvl"
    assert lvlm.model.config.text_config.model_type == "qwen2"
    assert lvlm.capabilities.shared_prefix
