"""The pipelines against what they are made of: the retriever's own lists, the LVLM's own answers."""

import base64
import gc
import io
import json
import logging
import math
import weakref
from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import tiny_idefics3, tiny_qwen2_vl

import drum_hf
from drum_hf import DemoRetriever, Query, TransformersLVLM, TripletTable
from drum_hf.errors import (
    ColumnError,
    ContextOverflowError,
    DrumError,
    ImageError,
    RowError,
    TooFewDemonstrationsError,
)
from drum_hf.pipelines.pipelines import DEFAULT_LVLM, ICLVQAPipeline
from drum_hf.playground.building.pretraining import build_clip
from drum_hf.selection import MMR, TokenBudget
from drum_hf.types import ICLRequest

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def picture(colour: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.array(COLOURS[colour]) * rng.uniform(0.3, 1.0) + rng.integers(-60, 61, (32, 32, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def same(got, wanted) -> bool:
    """Equal, but for the rounding that scores owe to the batch they were computed in."""
    if isinstance(wanted, float):
        return math.isclose(got, wanted, rel_tol=1e-4, abs_tol=5e-6)
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(same(got[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    return got == wanted


def rows(labelled: bool = True) -> list[dict]:
    names = list(COLOURS)
    return [
        {
            "id": f"d{i}",
            "image": picture(names[i % 3], i),
            "prompt": "which colour?" if i < 6 else "what shape?",
            "response": names[i % 3],
            "group": f"g{i // 2}",
        }
        | ({"label": names[i % 3]} if labelled else {})
        for i in range(9)
    ]


@pytest.fixture(scope="module")
def lvlm_dir(tmp_path_factory):
    return tiny_idefics3(tmp_path_factory.mktemp("lvlm"))


@pytest.fixture(scope="module")
def lvlm(lvlm_dir):
    return TransformersLVLM.from_pretrained(lvlm_dir, device="cpu")


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for part in build_clip(0):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table():
    return TripletTable.from_dataset(rows())


@pytest.fixture(scope="module")
def retriever(clip_dir, table, lvlm_dir):
    teacher = {"name": str(lvlm_dir), "revision": None}
    return DemoRetriever.from_encoder(clip_dir, support=table, strategy="sit+draft", teacher=teacher)


@pytest.fixture(scope="module")
def plain(clip_dir, table):
    """Retrieves by image and prompt alone, and records no teacher."""
    return DemoRetriever.from_encoder(clip_dir, support=table, strategy="sit")


@pytest.fixture(scope="module")
def vqa(lvlm_dir, retriever):
    return transformers.pipeline("icl-vqa", model=str(lvlm_dir), retriever=retriever, num_shots=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def classify(lvlm_dir, plain):
    return transformers.pipeline("icl-image-classification", model=str(lvlm_dir), retriever=plain, num_shots=2)


@pytest.fixture
def inputs():
    return [{"image": picture(c, 50 + i), "question": "which colour?"} for i, c in enumerate(["red", "blue", "green"])]


def expected(lvlm, retriever, query, *, k=2, drafted=True, order=-1, max_new_tokens=4):
    """What a pipeline does, spelt out for one query with the parts' own methods."""
    if drafted:
        (draft,) = lvlm.generate([ICLRequest(query)], max_new_tokens=max_new_tokens)
        asked = Query(query.image, query.prompt, draft, query.id, query.group)
    else:
        asked = query
    found = retriever(asked, k=k)
    (answer,) = lvlm.generate([ICLRequest(query, found.demonstrations[::order])], max_new_tokens=max_new_tokens)
    return [{"answer": answer, "demonstrations": found.to_dict()["demonstrations"][::order]}]


def expected_of(lvlm, retriever, row, **kwargs):
    return expected(lvlm, retriever, Query(row["image"], row["question"]), **kwargs)


# ---- visual question answering ----


def test_answer_is_the_lvlms_after_draft_and_retrieval(vqa, lvlm, retriever, inputs):
    for row in inputs:
        result = vqa(image=row["image"], question=row["question"])
        assert same(result, expected_of(lvlm, retriever, row))
        assert json.loads(json.dumps(result)) == result
        assert set(result[0]["demonstrations"][0]) == {"id", "prompt", "response", "score"}


def test_most_useful_stands_last_unless_told(vqa, lvlm, retriever, inputs):
    row = inputs[0]
    scores = [d["score"] for d in vqa(row)[0]["demonstrations"]]
    assert scores == sorted(scores)
    first = vqa(row, order="best_first")
    assert same(first, expected_of(lvlm, retriever, row, order=1))
    assert [d["score"] for d in first[0]["demonstrations"]] == scores[::-1]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_kind_of_input_gives_the_same(vqa, inputs, batch_size):
    one_by_one = [vqa(row) for row in inputs]
    features = datasets.Features(image=datasets.Image(), question=datasets.Value("string"))
    dataset = datasets.Dataset.from_list(inputs, features=features)
    several = {
        "list": inputs,
        "tuple": tuple(inputs),
        "queries": [Query(row["image"], row["question"]) for row in inputs],
        "generator": (row for row in inputs),
        "iterator": iter(inputs),
        "dataset": dataset,
        "stream": dataset.to_iterable_dataset(),
    }
    for kind, given in several.items():
        out = vqa(given, batch_size=batch_size)
        assert isinstance(out, list) == (kind in ("list", "tuple", "queries")), kind
        assert same(list(out), one_by_one), kind
    asked = vqa(image=[row["image"] for row in inputs], question="which colour?", batch_size=batch_size)
    assert same(asked, one_by_one)
    asked = vqa([row["image"] for row in inputs], ["which colour?"] * 3, batch_size=batch_size)
    assert same(asked, one_by_one)


def test_batches_may_hold_inputs_with_and_without_image(vqa, inputs):
    mixed = [inputs[0], {"question": "which colour?"}, inputs[1]]
    assert same(vqa(mixed, batch_size=3), [vqa(row) for row in mixed])
    assert vqa(question="which colour?") == vqa(mixed[1])


def test_one_image_with_several_questions(vqa, inputs):
    image = inputs[0]["image"]
    questions = ["which colour?", "what shape?"]
    assert same(vqa(image, questions), [vqa(image, question) for question in questions])


def test_a_generator_is_read_as_results_are_asked_for(vqa, inputs):
    read = 0

    def rows() -> Iterator[dict]:
        nonlocal read
        for row in inputs:
            read += 1
            yield row

    results = vqa(rows())
    assert read <= 1  # transformers looks at the first
    next(iter(results))
    assert read < len(inputs)


def test_no_input_gives_no_result(vqa):
    assert vqa([]) == []
    assert list(vqa(row for row in [])) == []


def test_paths_and_files(vqa, inputs, tmp_path):
    file = tmp_path / "red.png"
    inputs[0]["image"].save(file)
    from_memory = vqa(inputs[0])
    assert vqa(str(file), "which colour?") == from_memory
    assert vqa(image=file, question="which colour?") == from_memory


@pytest.mark.parametrize("num_shots", [0, 1, 3])
def test_shots_of_a_call(vqa, lvlm, retriever, inputs, num_shots):
    row = inputs[0]
    (result,) = vqa(row, num_shots=num_shots)
    assert len(result["demonstrations"]) == num_shots
    if num_shots:
        assert same([result], expected_of(lvlm, retriever, row, k=num_shots))
    assert len(vqa(row)[0]["demonstrations"]) == 2  # what it was built with is untouched


def test_a_row_and_its_group_never_demonstrate_themselves(vqa, table):
    results = list(vqa(table, num_shots=4, batch_size=4))
    assert len(results) == len(table)
    for demonstration, (result,) in zip(table, results, strict=True):
        groups = {table[d["id"]].group for d in result["demonstrations"]}
        assert demonstration.group not in groups
    named = {"image": table["d3"].image, "question": "which colour?", "id": "d3"}
    assert "d3" not in {d["id"] for d in vqa(named, num_shots=8)[0]["demonstrations"]}


# ---- the draft ----


class Counted(TransformersLVLM):
    """Notes how many requests each call of `generate` had, and how many of them were zero-shot."""

    def generate(self, requests, **kwargs):
        self.__dict__.setdefault("calls", []).append((len(requests), sum(not r.demonstrations for r in requests)))
        return super().generate(requests, **kwargs)


@pytest.fixture
def counted(lvlm):
    return Counted(lvlm.model, lvlm.processor)


def test_draft_only_where_the_retriever_reads_it(counted, retriever, plain, inputs):
    drum_hf.pipeline("icl-vqa", counted, retriever=retriever, num_shots=2)(inputs, batch_size=3)
    assert counted.calls == [(3, 3), (3, 0)]
    counted.calls.clear()
    drum_hf.pipeline("icl-vqa", counted, retriever=plain, num_shots=2)(inputs, batch_size=3)
    assert counted.calls == [(3, 0)]


def test_draft_as_told(counted, lvlm, retriever, plain, inputs):
    answer = drum_hf.pipeline("icl-vqa", counted, retriever=retriever, num_shots=2, max_new_tokens=4)
    assert same(answer(inputs[0], draft=False), expected_of(lvlm, retriever, inputs[0], drafted=False))
    assert counted.calls == [(1, 0)]
    counted.calls.clear()
    drum_hf.pipeline("icl-vqa", counted, retriever=plain, num_shots=2, draft=True)(inputs[0])
    assert counted.calls == [(1, 1), (1, 0)]


def test_a_draft_is_not_asked_of_the_retrievers_lvlm(counted, lvlm, clip_dir, table, inputs):
    own = Counted(lvlm.model, lvlm.processor)
    drafting = DemoRetriever.from_encoder(clip_dir, support=table, strategy="sit+draft", draft_lvlm=own)
    answer = drum_hf.pipeline("icl-vqa", counted, retriever=drafting, num_shots=2)
    answer(inputs[0], draft=False)
    answer(inputs[0])
    assert counted.calls == [(1, 0), (1, 1), (1, 0)]
    assert "calls" not in vars(own)


def test_a_draft_that_is_given_is_used(counted, retriever, inputs):
    answer = drum_hf.pipeline("icl-vqa", counted, retriever=retriever, num_shots=3)
    given = [inputs[0] | {"draft": "blue"}, inputs[1]]
    first, _ = answer(given, batch_size=2)
    assert counted.calls == [(1, 1), (2, 0)]  # a first pass for the other alone
    found = retriever(Query(inputs[0]["image"], "which colour?", "blue"), k=3)
    assert [d["id"] for d in first[0]["demonstrations"]] == found.ids[::-1]


@pytest.mark.parametrize("selector", ["mmr", MMR(0.0)])
def test_a_selector_chooses_among_what_was_found(lvlm, plain, inputs, selector):
    answer = drum_hf.pipeline("icl-vqa", lvlm, retriever=plain, num_shots=3, max_new_tokens=4)
    for row in inputs:
        found = plain(Query(row["image"], row["question"]), k=3, selector=selector)
        (result,) = answer(row, selector=selector)
        assert same(result["demonstrations"], found.to_dict()["demonstrations"][::-1])
        request = ICLRequest(Query(row["image"], row["question"]), found.demonstrations[::-1])
        assert [result["answer"]] == lvlm.generate([request], max_new_tokens=4)
    (without,) = answer(inputs[0])  # a call's selector is that call's
    assert [d["id"] for d in without["demonstrations"]] == plain(Query(inputs[0]["image"], "which colour?"), k=3).ids[
        ::-1
    ]


def test_a_budget_shows_what_fits_the_context_where_plain_shots_overflow(lvlm, plain, inputs, monkeypatch):
    query = Query(inputs[0]["image"], "which colour?")
    ranked = plain(query, k=9).demonstrations
    (room,) = lvlm.count_tokens([ICLRequest(query, ranked[:3])])
    monkeypatch.setattr(lvlm.model.config.get_text_config(), "max_position_embeddings", room + 4)
    assert lvlm.context_length == room + 4
    answer = drum_hf.pipeline("icl-vqa", lvlm, retriever=plain, num_shots=8, max_new_tokens=4)
    with pytest.raises(ContextOverflowError):
        answer(inputs[0])
    (result,) = answer(inputs[0], selector="budget")
    shown = [d["id"] for d in result["demonstrations"]][::-1]
    budget = TokenBudget(lvlm, reserve=4)
    assert shown == plain(query, k=8, selector=budget).ids
    assert (
        len(shown) >= 3
        and lvlm.count_tokens([ICLRequest(query, tuple(plain.support.demonstrations(shown)))])[0] <= room
    )


def test_an_unknown_selector_is_refused_when_the_pipeline_is_made(lvlm, plain):
    with pytest.raises(ValueError, match="got 'nearest'"):
        drum_hf.pipeline("icl-vqa", lvlm, retriever=plain, selector="nearest")
    with pytest.raises(ValueError, match="calibration="):
        drum_hf.pipeline("icl-vqa", lvlm, retriever=plain, selector="adaptive")


# ---- classification ----


def test_scores_of_all_labels_sum_to_one(classify, lvlm, plain, inputs):
    images = [row["image"] for row in inputs]
    for image, result in zip(images, classify(images, batch_size=2), strict=True):
        assert same(result, classify(image))
        assert [set(entry) for entry in result] == [{"label", "score"}] * 3
        scores = [entry["score"] for entry in result]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-9)
        query = Query(image, "which colour?")  # the support set's most common prompt
        found = plain(query, k=2).demonstrations[::-1]
        logs = lvlm.label_scores(ICLRequest(query, found, choices=tuple(COLOURS)))
        alone = dict(zip(COLOURS, np.exp(logs).tolist(), strict=True))
        assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(alone, abs=1e-4)


def test_candidate_labels_top_k_and_demonstrations(classify, inputs):
    image = inputs[0]["image"]
    labels = ["wug", "dax", "blick seven", "round"]
    full = classify(image, candidate_labels=labels)
    assert {entry["label"] for entry in full} == set(labels)
    assert sum(entry["score"] for entry in full) == pytest.approx(1, abs=1e-9)
    assert classify(image, candidate_labels=labels, top_k=2) == full[:2]
    assert len(classify(image, candidate_labels=list("abcdefg"))) == 5
    assert len(classify(image, candidate_labels=list("abcdefg"), top_k=99)) == 7
    shown = classify(image, return_demonstrations=True)
    assert [entry.pop("demonstrations")[1]["id"] for entry in shown] and shown == classify(image)


def test_a_prompt_of_ones_own(classify, inputs):
    image = inputs[0]["image"]
    asked = classify(image, prompt="what shape?")
    assert asked == classify({"image": image, "prompt": "what shape?"})
    assert asked != classify(image)
    assert classify(image=image, prompt="which colour?") == classify(image)


def test_zero_shot_classification(lvlm, inputs):
    image = inputs[0]["image"]
    bare = drum_hf.pipeline("icl-image-classification", lvlm, candidate_labels=list(COLOURS), top_k=1)
    logs = lvlm.label_scores(ICLRequest(Query(image, bare.fallback_prompt), choices=tuple(COLOURS)))
    assert bare(image) == [{"label": list(COLOURS)[logs.argmax()], "score": pytest.approx(np.exp(logs.max()))}]


@pytest.mark.parametrize("labels", ["red", [], ["red", " red"], ["red", ""], ["red", 3]])
def test_labels_that_are_none(classify, inputs, labels):
    with pytest.raises(ValueError, match="candidate_labels"):
        classify(inputs[0]["image"], candidate_labels=labels)


def test_without_labels_it_says_what_to_pass(lvlm, clip_dir, inputs):
    unlabelled = DemoRetriever.from_encoder(clip_dir, support=rows(labelled=False), strategy="sit")
    for retriever, reason in ((unlabelled, "the support set has no labels"), (None, "there is no retriever")):
        with pytest.raises(ValueError, match=f"expected candidate_labels=, since {reason}"):
            drum_hf.pipeline("icl-image-classification", lvlm, retriever=retriever)(inputs[0]["image"])


# ---- captions ----


def test_captions(lvlm_dir, lvlm, retriever, inputs):
    caption = transformers.pipeline("icl-image-captioning", model=str(lvlm_dir), retriever=retriever, num_shots=2)
    images = [row["image"] for row in inputs]
    results = caption(images, batch_size=2, max_new_tokens=4)
    for row, result in zip(inputs, results, strict=True):
        (plain,) = expected_of(lvlm, retriever, row)
        assert same(result, [{"generated_text": plain["answer"], "demonstrations": plain["demonstrations"]}])
    (bare,) = caption(images[0], max_new_tokens=4, return_demonstrations=False)
    assert set(bare) == {"generated_text"}
    assert caption.default_max_new_tokens == 64


def test_the_common_prompt_follows_the_support_set(lvlm, clip_dir, retriever, table):
    caption = drum_hf.pipeline("icl-image-captioning", lvlm, retriever=retriever)
    assert caption._default_prompt() == "which colour?"
    shapes = table.without([f"d{i}" for i in range(5)])
    caption.retriever = DemoRetriever.from_encoder(clip_dir, support=shapes)
    assert caption._default_prompt() == "what shape?"
    caption.retriever = None
    assert caption._default_prompt() == caption.fallback_prompt != ""


# ---- which LVLM, which retriever ----


def test_drum_hf_pipeline_takes_the_teacher(vqa, retriever, lvlm_dir, inputs):
    ours = drum_hf.pipeline("icl-vqa", retriever=retriever, num_shots=2, max_new_tokens=4)
    assert isinstance(ours, ICLVQAPipeline)
    assert ours.lvlm.name == str(lvlm_dir)
    assert same(ours(inputs), vqa(inputs))


def test_transformers_pipeline_takes_the_teacher_without_loading_another(
    vqa, retriever, lvlm_dir, inputs, monkeypatch
):
    def refuse(name, *args, **kwargs):
        raise AssertionError(f"transformers loads {name}")

    hub = []
    monkeypatch.setattr("transformers.pipelines.load_model", refuse)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args, **kwargs: hub.append(args))
    theirs = transformers.pipeline(
        "icl-vqa", retriever=retriever, num_shots=2, max_new_tokens=4, dtype=torch.float64, device="cpu"
    )
    assert theirs.model.name_or_path == str(lvlm_dir)
    assert theirs.model.dtype == torch.float64
    assert not hub
    answers = [[{"answer": r["answer"]} for r in result] for result in theirs(inputs)]
    assert answers == [[{"answer": r["answer"]} for r in result] for result in vqa(inputs)]


def test_without_a_teacher_the_default_is_asked_for_at_its_commit(plain, lvlm, monkeypatch):
    asked = []

    def load(name, **kwargs):
        asked.append((name, kwargs["revision"]))
        return lvlm

    monkeypatch.setattr(TransformersLVLM, "from_pretrained", load)
    for retriever in (plain, None):
        transformers.pipeline("icl-vqa", retriever=retriever)
    assert asked == [DEFAULT_LVLM, DEFAULT_LVLM]
    assert len(DEFAULT_LVLM[1]) == 40


def test_no_model_and_no_teacher(plain):
    for retriever, came in ((None, "no retriever"), (plain, "a retriever that records no teacher")):
        with pytest.raises(ValueError, match=rf"expected model=.* got {came}; pass model="):
            drum_hf.pipeline("icl-vqa", retriever=retriever)


def test_a_teacher_that_is_gone_is_named(clip_dir, table, tmp_path):
    orphan = DemoRetriever.from_encoder(clip_dir, support=table, teacher={"name": str(tmp_path / "gone")})
    for pipeline in (drum_hf.pipeline, transformers.pipeline):
        with pytest.raises(OSError, match=r"gone', the LVLM that the retriever learned from.*pass model="):
            pipeline("icl-vqa", retriever=orphan)


def test_another_lvlm_than_the_teacher_is_noted(lvlm, retriever, caplog):
    with caplog.at_level(logging.INFO, "drum_hf"):
        drum_hf.pipeline("icl-vqa", lvlm, retriever=retriever)
        assert not caplog.records
        other = TransformersLVLM(lvlm.model, lvlm.processor, name="another")
        drum_hf.pipeline("icl-vqa", other, retriever=retriever)
    assert "another answers" in caplog.text


def test_a_loaded_lvlm_keeps_its_settings(lvlm, plain, inputs):
    strict = TransformersLVLM(lvlm.model, lvlm.processor, image_position="last")
    answer = drum_hf.pipeline("icl-vqa", strict, retriever=plain, num_shots=2, max_new_tokens=4)
    assert answer.lvlm is strict
    assert same(answer(inputs[0]), expected_of(strict, plain, inputs[0], drafted=False))


def test_a_loaded_model_without_its_processor(vqa, lvlm_dir, retriever, inputs):
    model = transformers.AutoModelForImageTextToText.from_pretrained(lvlm_dir)
    theirs = transformers.pipeline("icl-vqa", model=model, retriever=retriever, num_shots=2, max_new_tokens=4)
    assert theirs(inputs[0]) == vqa(inputs[0])
    model.name_or_path = ""
    with pytest.raises(ValueError, match="expected processor="):
        transformers.pipeline("icl-vqa", model=model)


def test_a_processor_that_wants_torchvision_for_videos(tmp_path, inputs):
    folder = tiny_qwen2_vl(tmp_path)
    theirs = transformers.pipeline("icl-vqa", model=str(folder), max_new_tokens=4)
    ours = TransformersLVLM.from_pretrained(folder, device="cpu")
    queries = [ICLRequest(Query(row["image"], row["question"])) for row in inputs]
    assert [result[0]["answer"] for result in theirs(inputs, batch_size=3)] == ours.generate(queries, max_new_tokens=4)


def test_zero_shot_without_a_retriever(lvlm, inputs):
    answer = drum_hf.pipeline("icl-vqa", lvlm, max_new_tokens=4)
    queries = [ICLRequest(Query(row["image"], row["question"])) for row in inputs]
    wanted = [[{"answer": text, "demonstrations": []}] for text in lvlm.generate(queries, max_new_tokens=4)]
    assert answer(inputs) == wanted


def test_saved_and_loaded_again(vqa, inputs, tmp_path):
    vqa.save_pretrained(tmp_path / "saved")
    again = transformers.pipeline(
        "icl-vqa",
        model=str(tmp_path / "saved"),
        retriever=tmp_path / "saved" / "retriever",
        num_shots=2,
        max_new_tokens=4,
    )
    assert same(again(inputs), vqa(inputs))
    assert not list((tmp_path / "saved").glob("*.py"))  # none of our source beside the weights
    assert not getattr(again.model.config, "custom_pipelines", None)


def test_pushing_leaves_the_retriever_to_itself(vqa, monkeypatch):
    pushed = []
    for part in (vqa.model, vqa.processor):
        monkeypatch.setattr(
            part, "push_to_hub", lambda *args, part=part, **kwargs: pushed.append((part, args, kwargs))
        )
    monkeypatch.setattr(vqa, "retriever", None)  # has no part in it
    vqa.push_to_hub("me/lvlm", private=True)
    assert pushed == [(part, ("me/lvlm",), {"private": True}) for part in (vqa.model, vqa.processor)]


def test_a_pipeline_leaves_nothing_behind(lvlm, plain, inputs):
    answer = drum_hf.pipeline("icl-vqa", lvlm, retriever=plain, num_shots=1, max_new_tokens=1)
    answer(inputs[0])
    gone = weakref.ref(answer)
    del answer
    gc.collect()
    assert gone() is None


# ---- errors ----


def test_more_shots_than_demonstrations(vqa, inputs, table):
    with pytest.raises(TooFewDemonstrationsError):
        vqa(inputs[0], num_shots=len(table) + 1)


def test_unknown_retriever(lvlm, tmp_path):
    with pytest.raises((OSError, DrumError), match="nowhere"):
        drum_hf.pipeline("icl-vqa", lvlm, retriever=tmp_path / "nowhere", local_files_only=True)
    with pytest.raises(TypeError, match=r"got TripletTable; DemoRetriever\.from_encoder"):
        drum_hf.pipeline("icl-vqa", lvlm, retriever=TripletTable.from_dataset(rows()[:1]))


def test_unknown_task(lvlm):
    with pytest.raises(ValueError, match=r"expected one of the tasks icl-vqa, .* got 'vqa'"):
        drum_hf.pipeline("vqa", lvlm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shots": -1}, "num_shots to be 0 or more"),
        ({"num_shots": 2.0}, "num_shots to be 0 or more"),
        ({"num_shots": 1}, "nothing to retrieve them from"),
        ({"order": "last"}, "best_last"),
        ({"draft": "yes"}, "draft"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_arguments_out_of_range(lvlm, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        drum_hf.pipeline("icl-vqa", lvlm, **arguments)
    with pytest.raises(ValueError, match=message):
        drum_hf.pipeline("icl-vqa", lvlm)(inputs[0], **arguments)


def test_sampling_arguments_are_refused_rather_than_ignored(lvlm, inputs):
    with pytest.raises(TypeError, match="temperature"):
        drum_hf.pipeline("icl-vqa", lvlm)(inputs[0], temperature=0.5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"image": None, "question": ""}, RowError, "both are empty"),
        ({"picture": 1}, ColumnError, "unknown key 'picture'"),
        ({"image": "no/such.png", "question": "q", "id": "row7"}, ImageError, "query 'row7'.*no/such.png"),
        ({"image": 3, "question": "q"}, ImageError, "got int"),
        ({"image": None, "question": 3}, RowError, "got int"),
        ({"image": None, "question": "q", "draft": 3}, RowError, "'draft': expected a text, got int"),
        ({"image": None}, RowError, "expected a question"),
    ],
)
def test_inputs_that_cannot_be_used(vqa, given, error, message):
    with pytest.raises(error, match=message):
        vqa(given)


def test_a_broken_base64_image_is_not_repeated_in_full(vqa):
    with pytest.raises(ImageError) as caught:
        vqa(image="data:image/png;base64," + "A" * 5000, question="q")
    assert len(str(caught.value)) < 400


def test_calls_that_make_no_sense(vqa, inputs):
    with pytest.raises(ValueError, match="got nothing"):
        vqa()
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        vqa([inputs[0]["image"]], ["a", "b"])
    with pytest.raises(TypeError, match="prompt as text"):
        vqa(inputs[0]["image"], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shot": 1}, "unknown argument 'num_shot'; did you mean 'num_shots'"),
        ({"imge": "x.png"}, "unknown argument 'imge'; did you mean 'image'"),
        ({"temperature": 0.5}, "unknown argument 'temperature'; known are num_shots"),
    ],
)
def test_misspelt_arguments_are_named(lvlm, inputs, arguments, message):
    vqa = drum_hf.pipeline("icl-vqa", lvlm)
    with pytest.raises(TypeError, match=message):
        vqa(inputs[0], **arguments)
    with pytest.raises(TypeError, match=message):
        vqa(**arguments)
    if "imge" not in arguments:
        with pytest.raises(TypeError, match=message):
            drum_hf.pipeline("icl-vqa", lvlm, **arguments)


def test_one_image_in_every_form_gives_one_answer(vqa, inputs, tmp_path):
    image, question = inputs[0]["image"], inputs[0]["question"]
    image.save(tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    expected = vqa(image, question)
    forms = [tmp_path / "p.png", str(tmp_path / "p.png"), data, base64.b64encode(data).decode(), np.asarray(image)]
    for form in (*forms, io.BytesIO(data), {"bytes": data, "path": None}):
        assert vqa(form, question) == expected, type(form)
    with pytest.raises(ImageError, match="urls=True"):
        vqa("https://example.com/a.png", question)
