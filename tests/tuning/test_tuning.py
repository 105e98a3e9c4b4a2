"""ICL tuning: labels token by token in every family, the loss, what is trained, resuming, what comes out."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plain import plain_logprobs
from tiny import FAMILIES, load_lvlm, tiny_idefics3

from drum_hf.cli import main
from drum_hf.errors import (
    ChatTemplateError,
    ColumnError,
    ContextOverflowError,
    EmptySupportError,
    LeakError,
    RowError,
    SavedFileError,
)
from drum_hf.lvlm.local.model import TransformersLVLM
from drum_hf.tuning import (
    ConversationCollator,
    ConversationFormat,
    ICLTuner,
    ICLTuningArguments,
    LengthSampler,
    average_weights,
)
from drum_hf.tuning.collator import MASKED
from drum_hf.tuning.config import TuningConfig
from drum_hf.tuning.episodes import Conversation, Curriculum, Mix, MixSource, Stage, Turn, to_dataset
from drum_hf.tuning.modules import add_lora, freeze_vision, lora_targets, part_of
from drum_hf.types import Demonstration, ICLRequest, Query

NOISE = np.random.default_rng(0)
COPIED = ("red", "green", "blue", "wug", "seven", "dax", "round", "square")


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8))


def talk(*turns: tuple[Image.Image | None, str, str], **more: Any) -> Conversation:
    return Conversation(tuple(Turn(*turn) for turn in turns), "colour", "", "open", **more)


def copies(count: int, seed: int, turns: int = 4) -> list[Conversation]:
    """Conversations, each about one of eight words: the first answer is a guess, the others copies of it."""
    rng = np.random.default_rng(seed)
    words = [COPIED[int(rng.integers(len(COPIED)))] for _ in range(count)]
    noise = rng.integers(0, 256, (count, turns, 32, 32, 3), dtype=np.uint8)  # the same ones whenever it is called
    return [
        talk(*((Image.fromarray(one), "which word?", word) for one in shown), source="copies")
        for word, shown in zip(words, noise, strict=True)
    ]


SQUARE, WIDE, TALL, SMALL = picture(32, 32), picture(90, 30), picture(40, 64), picture(9, 7)
#: Images of all shapes, and none; answers that merge with what stands before them and that don't, in any script.
TALKS = [
    talk((WIDE, "what colour is this?", "red wug"), (None, "which word?", "seven"), (TALL, "", "größe 紅色 🙂 naïve")),
    talk((SQUARE, "what?", "a"), (SMALL, "what shape is in this picture?", "a round shape ?!")),
    talk((None, "which word is the word?", "blick blick dax"), (None, "which?", "dax")),
    talk((TALL, "", "seven")),
    talk(*((picture(20 + 7 * k, 30), "what is the word?", "red" if k % 2 else "dax") for k in range(5))),
]


# ---- labels ----


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersLVLM:
    return load_lvlm(request.param, Path(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def batch(lvlm: TransformersLVLM) -> dict[str, torch.Tensor]:
    """All conversations at once, those without images beside the others."""
    return collated(lvlm, TALKS)


def collated(lvlm: TransformersLVLM, talks: list[Conversation], **kwargs: Any) -> dict[str, torch.Tensor]:
    collate = ConversationCollator(ConversationFormat(lvlm.format, **kwargs))
    return collate([(f"conversation {n}", t) for n, t in enumerate(talks)])


def runs(labels: torch.Tensor) -> list[list[int]]:
    """The labelled tokens, a list for each stretch of them."""
    found: list[list[int]] = [[]]
    for label in labels.tolist():
        if label != MASKED:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_the_loss_falls_on_every_answer_and_its_end_and_on_nothing_else(lvlm, batch):
    tokenizer = lvlm.tokenizer
    ends_turns = any(token in lvlm.format.end_of_turn for token in ("<", "|"))  # LLaVA 1.5's template doesn't
    for talked, ids, mask, labels in zip(
        TALKS, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        assert torch.equal(ids[labels != MASKED], labels[labels != MASKED])
        assert (labels[mask == 0] == MASKED).all()
        found = runs(labels)
        assert len(found) == len(talked.turns)
        for number, (run, turn) in enumerate(zip(found, talked.turns, strict=True)):
            said = run
            if ends_turns or number == len(found) - 1:
                *said, end = run
                assert end in lvlm._stop_ids or tokenizer.convert_ids_to_tokens(end) in lvlm.format.end_of_turn
            assert not set(said) & set(lvlm.format.special_ids - {tokenizer.unk_token_id})
            # WordPiece knows no other script and no capitals
            answer = squeezed(tokenizer.decode(tokenizer(turn.answer, add_special_tokens=False)["input_ids"]))
            text = squeezed(tokenizer.decode(said))
            assert text.endswith(answer) and text.removesuffix(answer) in ("", ":", "]"), (text, answer)
            # the first token is needed: the template's own whitespace, or what the answer begins in
            first, rest = tokenizer.decode(said[:1]), squeezed(tokenizer.decode(said[1:]))
            assert not rest.endswith(answer) or first[-1:].isspace()
            # and nothing but the prompt stands before it
        assert squeezed(tokenizer.decode(ids[(labels == MASKED) & (mask == 1)])).count("blick") == 0


def test_labelled_tokens_are_those_that_a_conversation_asked_turn_by_turn_scores(lvlm):
    appended = not any(token in lvlm.format.end_of_turn for token in ("<", "|"))
    is_onevision = "onevision" in lvlm.name  # which shows a lone image in another way, and begins earlier turns so
    for talked in TALKS:
        inputs = collated(lvlm, [talked])
        labels = inputs.pop("labels")[0]
        with torch.inference_mode():
            logprobs = lvlm.model(**inputs, use_cache=False).logits[0].double().log_softmax(-1)
        at = (labels != MASKED).nonzero().flatten()
        mine = logprobs[at - 1, labels[at]].numpy()
        sizes = [len(run) for run in runs(labels)]
        messages = talked.messages()
        for number, turn in enumerate(talked.turns):
            own, mine = mine[: sizes[number]], mine[sizes[number] :]
            shown = sum(turn.image is not None for turn in talked.turns[: number + 1])
            if is_onevision and (shown == 1 < len(talked.images) or number < len(talked.turns) - 1):
                continue
            asked = messages[: 2 * number + 1]
            expected = plain_logprobs(lvlm.model, lvlm.processor, asked, turn.answer, end_of_turn=not appended)
            own = own[:-1] if appended and number == len(talked.turns) - 1 else own
            np.testing.assert_allclose(own, expected, atol=1e-4, rtol=0)


def test_a_batch_is_its_rows(lvlm, batch):
    """Padding and neighbours, with images or without, change no row."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.inference_mode():
        logits = lvlm.model(**inputs, use_cache=False).logits
    for number, talked in enumerate(TALKS):
        alone = collated(lvlm, [talked])
        labels = alone.pop("labels")
        length = labels.shape[1]
        assert torch.equal(batch["labels"][number, :length], labels[0])
        with torch.inference_mode():
            expected = lvlm.model(**alone, use_cache=False).logits[0]
        torch.testing.assert_close(logits[number, :length], expected, atol=2e-4, rtol=0)


def test_the_last_answer_only(lvlm, batch):
    last = collated(lvlm, TALKS, loss_on="last")["labels"]
    for one, every in zip(last, batch["labels"], strict=True):
        assert runs(one) == runs(every)[-1:]
        assert (one != MASKED).nonzero().max() == (every != MASKED).nonzero().max()


def test_decoder_and_projector_are_trained_and_the_vision_tower_is_frozen(lvlm, batch):
    parts = part_of(lvlm.model)
    decoder, tower = lvlm.model.get_decoder(), lvlm.model.get_encoder(modality="image")
    linear = {n for n, m in lvlm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {n for n, m in lvlm.model.named_modules() if m in set(decoder.modules())}
    seeing = {n for n, m in lvlm.model.named_modules() if m in set(tower.modules())}
    modules, parameters = lora_targets(lvlm.model)
    assert linear & inside <= set(modules) and "lm_head" not in modules
    projector = [n for n in modules if parts[n] == "projector"] + parameters
    assert projector and all("merger" in n for n in set(projector) & seeing)
    assert {parts[n] for n in linear & seeing} >= {"vision"}

    for full in (False, True):
        model = copy.deepcopy(lvlm.model).train()
        if full:
            freeze_vision(model)
        else:
            model = add_lora(model, rank=2, alpha=4, dropout=0.0, target_modules=None, base="me/base", revision=None)
            with torch.no_grad():  # where B is zero, A has no gradient
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(0.01)
        model(**batch).loss.backward()
        got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert got == {n for n, p in model.named_parameters() if p.requires_grad}
        names = {n.replace("base_model.model.", "", 1).partition(".lora_")[0] for n in got}  # of weights, or of layers
        layers = {n.rpartition(".")[0] for n in names} if full else names | {n.rpartition(".")[0] for n in parameters}
        assert layers >= {n for n in projector if n in modules} and len(parameters) == lvlm.name.count("gemma3")
        vision = [n for n in names if (parts.get(n) or parts.get(n.rpartition(".")[0])) == "vision"]
        assert not vision


# ---- before training ----


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_idefics3(Path(tmp_path_factory.getbasetemp()), merging=True)


def tuner(idefics: Path, tmp_path: Path, train: Any, evaluated: Any = None, **kwargs: Any) -> ICLTuner:
    more = {"max_steps": 6} if "conversations" not in kwargs else {}
    quiet: dict[str, Any] = {"disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    shapes: dict[str, Any] = {"per_device_train_batch_size": 4, "lora_rank": 4, "learning_rate": 1e-2}
    args = ICLTuningArguments(str(tmp_path / "out"), **{**more, **quiet, **shapes, **kwargs})
    return ICLTuner(idefics, args, train_dataset=train, eval_dataset=evaluated, dtype=torch.float32)


def test_what_cannot_be_trained_on_is_an_error_that_names_it_before_training(idefics, tmp_path):
    long = talk(*((picture(32, 32), "what is the word? " * 20, "red") for _ in range(9)), source="novels")
    with pytest.raises(ContextOverflowError, match=r"conversation 1 of source 'novels' about 'colour' \(8 shots.*512"):
        tuner(idefics, tmp_path, [TALKS[0], long]).train()
    tuned = tuner(idefics, tmp_path, TALKS[:1], [TALKS[3], long], on_leak="ignore")
    with pytest.raises(ContextOverflowError, match="conversation 1 of source 'novels'"):
        tuned.train()
    with pytest.raises(ContextOverflowError, match=r"conversation 0 .* has \d+ tokens, and 20 fit"):
        tuner(idefics, tmp_path, TALKS, max_length=20).train()
    with pytest.raises(LeakError, match="share 2 images"):
        tuner(idefics, tmp_path, TALKS, TALKS[:1]).train()
    with pytest.raises(LeakError, match="share 1 image"):
        tuner(idefics, tmp_path, TALKS[3:], {"fine": copies(1, 5), "leaky": TALKS[:1]}).train()
    with pytest.raises(EmptySupportError, match="got none"):
        tuner(idefics, tmp_path, [])
    with pytest.raises(TypeError, match="put Episodes into a Mix"):
        tuner(idefics, tmp_path, iter(TALKS))
    with pytest.raises(ValueError, match="set conversations= or max_steps="):
        tuner(idefics, tmp_path, Mix([MixSource("copies", copies(2, 1))]), max_steps=-1)
    rows = [{"messages": [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "red"}]}]
    with pytest.raises(RowError, match="1 slots for 0 images"):
        tuner(idefics, tmp_path, rows)
    assert not (tmp_path / "out" / "trainer_state.json").exists()


def test_a_template_that_loses_or_changes_answers_is_an_error(idefics):
    lvlm = TransformersLVLM.from_pretrained(idefics)
    form = ConversationFormat(lvlm.format)
    template = lvlm.processor.chat_template
    two = talk((None, "what?", "red"), (None, "which?", "Blue"))
    for change, fault in (
        ("messages[-2:]", "loses answer 1 of 2 of it"),
        ("messages | rejectattr('role', 'equalto', 'assistant')", "loses answer 1"),
        (None, "changes the answers of it"),
        ("messages + 1", "fails on it"),
    ):
        lvlm.processor.chat_template = (
            template.replace("in messages", f"in {change}")
            if change
            else template.replace("line['text']", "line['text'] | lower")
        )
        with pytest.raises(ChatTemplateError, match=fault):
            form(two, [], "it")
    lvlm.processor.chat_template = template.replace("line['text']", "line['text'] | trim")
    padded = talk((None, "what?", " red "), (None, "which?", "Blue\n"))
    assert form(padded, [], "it").ids == form(two, [], "it").ids
    lvlm.processor.chat_template = template
    with pytest.raises(RowError, match="once for each of 1 images, but it is rendered with 0"):
        form(two, [(8, 8)], "it")
    # Conversation refuses "<image>" in texts; other families' placeholders only their template knows
    lvlm.format.image_token = "blick"
    with pytest.raises(RowError, match="placeholder 'blick' once for each of 0 images, but it is rendered with 1"):
        form(talk((None, "what is a blick?", "red")), [], "it")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"lora_rank": 0}, "lora_rank of at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout from 0 to below 1"),
        ({"loss_on": "first"}, "loss_on one of"),
        ({"conversations": 5, "max_steps": 5}, "conversations or max_steps"),
        ({"train_sampling_strategy": "batch_rebalance"}, "use 'group_by_length'"),
    ],
)
def test_arguments_out_of_range(given, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        ICLTuningArguments(str(tmp_path), **given)
    assert ICLTuningArguments(str(tmp_path)).learning_rate == 2e-4
    assert ICLTuningArguments(str(tmp_path), full=True).learning_rate == 2e-5
    assert ICLTuningArguments(str(tmp_path), full=True, learning_rate=0.5).learning_rate == 0.5


@given(st.lists(st.integers(1, 99), min_size=1, max_size=80), st.integers(1, 5), st.booleans(), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_sampler_gives_each_once_in_batches_of_like_length(lengths, batch_size, shuffle, seed):
    sampler = LengthSampler(lengths, len(lengths), batch_size=batch_size, shuffle=shuffle, seed=seed, window=3)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and order == list(sampler)
    size = 3 * batch_size
    for start in range(0, len(order), size):
        stretch = order[start : start + size]
        if not shuffle:  # a curriculum's order holds but for a window
            assert sorted(stretch) == list(range(start, min(start + size, len(lengths))))
        batches = [stretch[at : at + batch_size] for at in range(0, len(stretch), batch_size)]
        full = sorted(
            (b for b in batches if len(b) == batch_size), key=lambda b: [lengths[i] for i in b], reverse=True
        )
        flat = [lengths[i] for b in full for i in b]
        assert flat == sorted(flat, reverse=True)  # no batch could be of liker length
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(order)


# ---- training ----


def test_the_loss_is_the_mean_over_answers_of_all_logits(idefics, tmp_path):
    tuned = tuner(idefics, tmp_path, TALKS)
    batch = tuned.data_collator([(str(n), t) for n, t in enumerate(TALKS)])
    tuned.model.eval()
    with torch.no_grad():
        found = tuned.compute_loss(tuned.model, batch)
        half = tuned.compute_loss(tuned.model, batch, num_items_in_batch=2 * (batch["labels"] != MASKED).sum())
        own = tuned.model(**batch).loss  # by the model's own code, from all its logits
    assert found.item() == pytest.approx(own.item(), abs=1e-5) and half.item() == pytest.approx(found.item() / 2)
    data = tuned.check()
    assert data.lengths == batch["attention_mask"].sum(1).tolist()
    assert data.answer_tokens == (batch["labels"] != MASKED).sum() and data.report.conversations == len(TALKS)
    assert "nothing is cut" in str(data) and json.loads(json.dumps(data.to_dict()))["tokens"] == data.tokens


def test_it_learns_to_copy_what_its_context_shows(idefics, tmp_path):
    steps = {"max_steps": 90, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    tuned = tuner(idefics, tmp_path, copies(256, 1), copies(32, 2), full=True, **steps)
    before = {n: p.clone() for n, p in tuned.model.named_parameters()}
    tuned.train()
    # An answer is a word and its end; who doesn't look into the context can't do better than guess one word of eight.
    assert tuned.evaluate()["eval_loss"] < 0.8 * np.log(8) / 2
    changed = {n for n, p in tuned.model.named_parameters() if not torch.equal(p, before[n])}
    assert not [n for n in changed if "vision_model" in n]
    assert {"lm_head.weight", "model.connector.modality_projection.proj.weight"} < changed

    tuned.save_pretrained(tmp_path / "whole")
    loaded = TransformersLVLM.from_pretrained(tmp_path / "whole", device="cpu")
    assert loaded.fingerprint == tuned.lvlm(name=str(tmp_path / "whole")).fingerprint
    said = {"query": Query(SQUARE, "which word?"), "responses": ("wug",), "choices": COPIED}
    shots = [(), (Demonstration("d", WIDE, "which word?", "wug"),) * 3]
    zero, few = loaded.score([ICLRequest(demonstrations=shown, **said) for shown in shots])
    assert few > zero + 0.5


def curriculum_mix() -> Mix:
    stages = (Stage(share=1, replay=0.2), Stage(share=1, replay=0.6))
    chat = [talk((None, "which word?", word), kind="replay") for word in COPIED]
    return Mix([MixSource("copies", copies(12, 3)), MixSource("chat", chat)], Curriculum(stages), seed=4)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_is_taken_up_again_ends_bit_for_bit_where_it_would_have(idefics, tmp_path, full):
    saving = {"save_strategy": "steps", "save_steps": 3, "full": full, "lora_dropout": 0.1, "learning_rate": 1e-3}
    whole = tuner(idefics, tmp_path, curriculum_mix(), **saving)
    frozen = {n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    assert frozen
    whole.train()
    again = tuner(idefics, tmp_path, curriculum_mix(), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 6
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        if name in frozen:
            assert torch.equal(one, frozen[name]), name
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_a_mix_is_drawn_by_its_curriculum_and_passed_once(idefics, tmp_path):
    tuned = tuner(idefics, tmp_path, curriculum_mix(), conversations=40)
    kinds = [tuned.train_dataset.talk(n, images=False).kind for n in range(40)]
    assert kinds[:20].count("replay") < kinds[20:].count("replay")
    assert tuned.check().report.counts["kind"]["replay"] == kinds.count("replay")
    assert tuned.train().global_step == 10
    order = list(tuned._get_train_sampler())
    assert max(abs(place - number) for place, number in enumerate(order)) < 8 * 4


def test_activation_checkpointing_changes_nothing(idefics, tmp_path):
    ends, fields = [], {field.name for field in dataclasses.fields(ICLTuningArguments)}  # it has two names
    for saving in (False, True):
        name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        tuned = tuner(idefics, tmp_path, TALKS, max_steps=2, **{name: saving})
        tuned.train()
        ends.append({n: p.detach() for n, p in tuned.model.named_parameters() if p.requires_grad})
    for name, parameter in ends[0].items():
        torch.testing.assert_close(parameter, ends[1][name], atol=1e-6, rtol=1e-4)


# ---- what comes out ----


class Killed(BaseException):
    """As a kill would, it ends a save between two of its steps."""


@pytest.mark.parametrize("merged", [False, True])
def test_a_killed_save_leaves_the_old_or_the_new(idefics, tmp_path, monkeypatch, merged):
    request = ICLRequest(Query(SQUARE, "which word?"), (Demonstration("d", SQUARE, "which word?", "dax"),), ("dax",))
    tuned = tuner(idefics, tmp_path, to_dataset(copies(4, 3)))
    folder = tmp_path / "saved"

    def weights(value):
        with torch.no_grad():
            for name, parameter in tuned.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(value)

    def score():
        place = {"adapter": str(folder)} if not merged else {}
        lvlm = TransformersLVLM.from_pretrained(idefics if not merged else folder, device="cpu", **place)
        return round(float(lvlm.score([request])[0]), 4)

    weights(0.02)
    tuned.save_pretrained(folder, merged=merged)
    old = score()
    weights(-0.02)
    tuned.save_pretrained(tmp_path / "other", merged=merged)
    (folder / "notes.txt").write_text("mine")
    real, left, found = os.link, [0], []
    for step in (0, 1, 3):

        def link(*places, step=step):
            left[0] += 1
            if left[0] > step:
                raise Killed
            return real(*places)

        left[0] = 0
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(Killed):
            tuned.save_pretrained(folder, merged=merged)
        monkeypatch.setattr(os, "link", real)
        found.append(score())
    assert found[0] == found[1] == found[2] != old
    tuned.save_pretrained(folder, merged=merged)
    assert score() == found[0] and not list(folder.glob(".sav*")) and (folder / "notes.txt").read_text() == "mine"


def test_an_adapter_loads_on_its_base(idefics, tmp_path, monkeypatch):
    rows = to_dataset(copies(8, 3))
    tuned = tuner(idefics, tmp_path, rows, copies(4, 4), eval_strategy="steps", eval_steps=6)
    tuned.base_revision = "0" * 40
    tuned.train()
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.save_pretrained(tmp_path / "merged", merged=True)
    requests = [
        ICLRequest(Query(image, "which word?"), (Demonstration("d", SQUARE, "which word?", "dax"),), ("dax",))
        for image in (SQUARE, SMALL)
    ]
    base = TransformersLVLM.from_pretrained(idefics, device="cpu")
    read = TransformersLVLM.from_pretrained(idefics, adapter=str(tmp_path / "adapter"), device="cpu")
    whole = TransformersLVLM.from_pretrained(tmp_path / "merged", device="cpu")
    scores = read.score(requests)
    assert np.abs(scores - base.score(requests)).min() > 0.1
    for same in (whole, tuned.lvlm()):
        np.testing.assert_allclose(same.score(requests), scores, atol=1e-5)
    assert len({base.fingerprint, read.fingerprint}) == 2 and tuned.model.active_adapters == ["default"]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(idefics)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "processor_config.json", "README.md"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}
    card = (tmp_path / "adapter" / "README.md").read_text()
    meta = yaml.safe_load(card.split("---")[1])
    assert meta["library_name"] == "peft" and "base_model" not in meta and str(idefics.parent) not in card
    assert "adapter=" in card and "| copies | 8 |" in card and "evaluation loss" in card
    assert "adapter=" not in (tmp_path / "merged" / "README.md").read_text()

    pushed: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **kwargs: Any) -> Any:
            return dataclasses.make_dataclass("Repo", ["repo_id"])(repo)

        def upload_folder(self, **kwargs: Any) -> str:
            pushed.update(kwargs, files={p.name for p in Path(kwargs["folder_path"]).iterdir()})
            return "done"

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    tuned.args.hub_model_id = "me/smol-icl"
    assert tuned.push_to_hub() == "done" and pushed["repo_id"] == "me/smol-icl"
    assert {"adapter_model.safetensors", "README.md"} <= pushed["files"] and "training_args.bin" not in pushed["files"]
    assert "# smol-icl" in (tmp_path / "out" / "README.md").read_text()


def test_averaged_weights_lie_between():
    base, tuned = (TransformersLVLM.from_pretrained(f"playground/{name}") for name in ("lvlm-base", "lvlm"))
    before = {lvlm.name: copy.deepcopy(lvlm.model.state_dict()) for lvlm in (base, tuned)}
    averaged = average_weights(base, tuned, share=0.25)
    first, second = before.values()
    tied = [n for n, w in first.items() if sum(w.data_ptr() == o.data_ptr() for o in first.values()) > 1]
    assert tied  # a weight that has two names is averaged once
    for name, weight in averaged.model.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * first[name] + 0.25 * second[name])
    for lvlm in (base, tuned):
        assert all(torch.equal(w, before[lvlm.name][n]) for n, w in lvlm.model.state_dict().items())
    assert len({lvlm.fingerprint for lvlm in (base, tuned, averaged)}) == 3
    request = ICLRequest(Query(Image.new("RGB", (48, 48), "red"), "which colour is it?"), (), ("red",))
    for share, whole in ((0.0, base), (1.0, tuned)):
        np.testing.assert_array_equal(
            average_weights(base, tuned, share=share).score([request]), whole.score([request])
        )


def test_averaging_asks_for_one_architecture_and_a_share(idefics):
    ours = TransformersLVLM.from_pretrained("playground/lvlm")
    with pytest.raises(ValueError, match=r"one architecture.*lvlm.* differ in"):
        average_weights(TransformersLVLM.from_pretrained(idefics), ours, share=0.5)
    with pytest.raises(ValueError, match="share between 0 and 1, got 80"):
        average_weights(ours, ours, share=80)


def test_a_model_that_is_given_as_such_needs_its_processor(idefics, tmp_path):
    lvlm = TransformersLVLM.from_pretrained(idefics)
    with pytest.raises(ValueError, match="pass processor="):
        ICLTuner(lvlm.model, train_dataset=TALKS)
    args = ICLTuningArguments(str(tmp_path), target_modules=["q_proj"], use_cpu=True)
    tuned = ICLTuner(lvlm.model, args, processor=lvlm.processor, train_dataset=TALKS)
    trained = {n for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert trained and all("q_proj.lora_" in n for n in trained)
    with pytest.raises(ValueError, match="name what to train with target_modules="):
        part_of(lvlm.model.model.text_model)


# ---- from YAML ----


@pytest.fixture
def written(tmp_path, idefics) -> Path:
    """Pictures in four classes, instruction data, and a configuration of both."""
    rng = np.random.default_rng(0)
    for word in ("red", "blue", "wug", "dax"):
        (tmp_path / "words" / word).mkdir(parents=True)
        for number in range(5):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "words" / word / f"{number}.png")
    turns = [{"from": "human", "value": "which word?"}, {"from": "gpt", "value": "seven"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": turns}]))
    config = {
        "model": str(idefics),
        "sources": [
            {"name": "words", "reader": "labels", "path": "words", "episodes": {"forms": ["open"], "shots": [0, 2]}},
            {"name": "chat", "reader": "llava", "path": "chat.json", "weight": 0.5},
        ],
        "curriculum": [{"shots": [1, 2], "replay": 0.2, "forms": "open"}, {"shots": [0, 3], "forms": ["open"]}],
        "evaluation": {"share": 0.4, "conversations": 6},
        "tuning": {"conversations": 16, "per_device_train_batch_size": 4, "lora_rank": 2, "learning_rate": "1e-2"},
        "seed": 3,
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_tune_from_the_command_line(written, idefics, capsys):
    command = ["-q", "tune", "--config", str(written / "mix.yaml"), "--out", str(written / "out"), "--device", "cpu"]
    assert main([*command, "--dry-run", "--json", str(written / "dry.json")]) == 0
    shown = capsys.readouterr().out
    assert "16 conversations" in shown and "nothing is cut" in shown and not (written / "out").exists()
    dry = json.loads((written / "dry.json").read_text())["data"]
    assert sum(dry["counts"]["source"].values()) == 16 and dry["counts"]["kind"].keys() == {"episode", "replay"}

    assert main([*command, "--json", str(written / "run.json")]) == 0
    result = json.loads((written / "run.json").read_text())
    assert result["data"] == dry and result["steps"] == 4
    assert result["loss"]["eval"] < result["loss"]["eval_before"]
    tuned = TransformersLVLM.from_pretrained(idefics, adapter=str(written / "out"), device="cpu")
    assert tuned.fingerprint != TransformersLVLM.from_pretrained(idefics, device="cpu").fingerprint


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"modle": "x"}, "the configuration: expected keys among model, .*; got 'modle'"),
        ({"model": None, "sources": []}, "'sources' as a list"),
        ({"sources": [{"name": "a", "reader": "labels"}]}, r"sources\[0\]: expected the keys 'path'"),
        ({"sources": [{"name": "a", "reader": "csv", "path": "p"}]}, "a reader among labels, .*; got 'csv'"),
        (
            {"sources": [{"name": "a", "reader": "llava", "path": "p", "options": {"imageroot": "x"}}]},
            r"sources\[0\].options: expected keys among image_root, .*; got 'imageroot'",
        ),
        (
            {"sources": [{"name": "a", "reader": "llava", "path": "p", "episodes": {"shots": 1}}]},
            "no 'episodes' with the reader 'llava'",
        ),
        (
            {"sources": [{"name": "a", "reader": "labels", "path": "p", "episodes": {"shot": 1}}]},
            r"sources\[0\].episodes: .*got 'shot'",
        ),
        ({"tuning": {"learning_rat": 1}}, "ICLTuningArguments, which has no 'learning_rat'"),
        ({"tuning": {"output_dir": "x"}}, "which has no 'output_dir'"),
        ({"tuning": {"learning_rate": "fast"}}, "learning_rate as a number, got 'fast'"),
        ({"curriculum": "steep"}, 'the word "default"'),
        ({"curriculum": [{"shot": 1}]}, "stage 0: expected keys among .*'shot'"),
        ({"evaluation": {"shares": 1}}, "evaluation: .*got 'shares'"),
    ],
)
def test_a_configuration_with_a_fault_is_told_where(written, change, fault):
    path = written / "mix.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ValueError, match=fault) as raised:
        TuningConfig.load(path)
    assert str(path) in str(raised.value)


def test_a_configuration_is_safe_yaml_with_sources_that_can_be_read(written, capsys):
    path = written / "mix.yaml"
    config = TuningConfig.load(path)
    assert config.arguments(written).learning_rate == 0.01 and config.arguments(written).seed == 3
    good = yaml.safe_load(path.read_text())
    for row in ("concepts", "messages"):
        messages = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]
        rows = [
            {
                "image": f"words/{w}/{n}.png",
                "images": [f"words/{w}/{n}.png"],
                "concepts": {"word": w},
                "messages": messages,
            }
            for w in ("red", "dax")
            for n in range(5)
        ]
        (written / f"{row}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = {"name": row, "reader": row, "path": f"{row}.jsonl"}
        path.write_text(yaml.safe_dump({"model": "x", "sources": [source]}))
        mix, held = TuningConfig.load(path).mixes()
        assert held is None and mix.draw(0).source == row
    leaky = {"name": "leaky", "reader": "messages", "path": "messages.jsonl"}
    path.write_text(yaml.safe_dump({**good, "curriculum": None, "sources": [*good["sources"], leaky]}))
    with pytest.raises(LeakError, match="images"):
        TuningConfig.load(path).mixes()
    path.write_text("model: !!python/object/apply:os.system ['true']\nsources: []")
    with pytest.raises(SavedFileError, match="expected a YAML file"):
        TuningConfig.load(path)
    assert main(["tune", "--config", str(written / "nowhere.yaml")]) == 2
    assert "nowhere.yaml: expected a YAML file" in capsys.readouterr().err
    one = {"name": "one", "reader": "concepts", "path": "one.json"}
    (written / "one.json").write_text(json.dumps([{"image": "words/red/0.png", "concepts": {"word": "red"}}]))
    path.write_text(yaml.safe_dump({"model": "x", "sources": [one]}))
    with pytest.raises(ColumnError, match="at least two values of concept 'word'"):
        TuningConfig.load(path).mixes()
