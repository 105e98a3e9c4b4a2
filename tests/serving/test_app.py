"""The app: its core against re-embedding, its cards, and the page's wiring through its own API."""

from __future__ import annotations

import copy
import html
import importlib.util
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drum_hf import DemoRetriever, Query, TripletTable
from drum_hf.cli import main
from drum_hf.errors import DependencyError, EndpointError, RowError, TooFewDemonstrationsError
from drum_hf.playground import make_world
from drum_hf.serving.app import Comparer, RetrieverView, build_app, launch, similarity
from drum_hf.serving.app.cards import answer_card, error_card, outcome_cards, thumbnail
from drum_hf.serving.app.compare import retrieve_weighted

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs the extra 'app'")


class Echo:
    """An LVLM that repeats the response of the demonstration nearest the query, and drafts "red" without any."""

    fingerprint = "echo"

    def __init__(self) -> None:
        self.requests = []
        self.error = None

    def generate(self, requests, *, max_new_tokens=32):
        if self.error is not None:
            raise self.error
        self.requests += requests
        return [r.demonstrations[-1].response if r.demonstrations else "red" for r in requests]

    def score(self, requests):
        raise AssertionError("the app scores nothing")


@pytest.fixture(scope="module")
def world():
    return make_world(31, difficulty="easy")


@pytest.fixture(scope="module")
def retriever(world):
    table = world.support.select(world.support.ids[:40])
    return DemoRetriever.from_encoder("playground/clip", support=table, device="cpu")


@pytest.fixture
def query(world):
    return Query(next(iter(world.queries)).image, "what colour is the object?")


# The core


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 2, 0), (0, 0, 1), (1, 1, 0), (0.2, 0.5, 0.3), (0.7, 0, 0.1)])
def test_other_weights_rank_and_score_as_an_encoder_that_has_them(retriever, query, weights):
    drafted = Query(query.image, query.prompt, "red")
    given = dict(zip(("image", "prompt", "response"), weights, strict=True))
    other = DemoRetriever(copy.deepcopy(retriever.encoder), retriever.support)
    other.encoder[0].weights = given
    wanted = other(drafted, k=len(other))
    found, parts = retrieve_weighted(retriever, drafted, len(other), given)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-5)
    by_id = dict(zip(wanted.ids, wanted.scores, strict=True))
    np.testing.assert_allclose([by_id[id] for id in found.ids], found.scores, atol=2e-5)
    np.testing.assert_allclose([sum(part.values()) for part in parts], found.scores, atol=1e-6)
    assert all(part[name] == 0 for part in parts for name, weight in given.items() if not weight)


def test_a_query_without_draft_is_weighed_by_what_it_has(retriever, query):
    found, _ = retrieve_weighted(retriever, query, 5, retriever.weights)
    wanted = retriever(Query(query.image, query.prompt, ""), k=5)
    assert found.ids == wanted.ids
    np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-5)


def test_weights_that_can_not_be_used_are_refused(retriever, query):
    for wrong in ({"image": 0.0}, {"image": -1.0, "prompt": 2.0}, {"image": float("nan")}, {"size": 1.0}):
        with pytest.raises(ValueError, match="expected weights of image, prompt, response"):
            retrieve_weighted(retriever, query, 1, wrong)
    with pytest.raises(RowError, match="expected a query with response"):
        retrieve_weighted(retriever, query, 1, {"response": 1.0})
    narrow = DemoRetriever.from_encoder("playground/clip", support=retriever.support, strategy="si", device="cpu")
    with pytest.raises(ValueError, match="expected weight on image only, got prompt too"):
        retrieve_weighted(narrow, query, 1, {"image": 1.0, "prompt": 1.0})


def test_a_comparison_is_what_its_parts_say(retriever, query):
    lvlm = Echo()
    compare = Comparer(lvlm, [RetrieverView(retriever, "all"), similarity(retriever, "st")])
    result = compare(query, 3)
    assert result.zero_shot == "red" == result.query.draft
    assert [outcome.name for outcome in result.outcomes] == ["all", "ST"]
    for outcome, weights in zip(result.outcomes, (retriever.weights, {"prompt": 1.0}), strict=True):
        wanted, _ = retrieve_weighted(retriever, result.query, 3, weights)
        assert outcome.retrieval.ids == wanted.ids
        assert outcome.answer == wanted.demonstrations[0].response  # the most useful one stands last, by the query
    assert [len(request.demonstrations) for request in lvlm.requests] == [0, 3, 3]

    asked = len(lvlm.requests)
    assert compare(query, 3) == result and len(lvlm.requests) == asked  # nothing is asked of the LVLM twice
    moved = compare(query, 3, [{"image": 1.0}, None])
    assert moved.outcomes[1] == result.outcomes[1] and moved.outcomes[0].weights["image"] == 1.0


def test_a_row_of_the_support_set_is_not_its_own_demonstration(retriever):
    id = retriever.support.ids[0]
    row = retriever.support[id]
    outcome = Comparer(Echo(), [RetrieverView(retriever)])(retriever.support.query(id), 16).outcomes[0]
    assert id not in outcome.retrieval.ids
    assert row.group not in {demonstration.group for demonstration in outcome.retrieval.demonstrations}


def test_what_is_missing_is_said(retriever, query):
    compare = Comparer(Echo(), [RetrieverView(retriever)])
    with pytest.raises(RowError, match="expected an image"):
        compare(Query(None, "what colour?"), 1)
    with pytest.raises(RowError, match="expected a question"):
        compare(Query(query.image, "  "), 1)
    with pytest.raises(TooFewDemonstrationsError):
        compare(query, 41)
    with pytest.raises(ValueError, match="at least one strategy"):
        Comparer(Echo(), [])


def test_captions_need_no_question(retriever):
    rows = [{"id": d.id, "image": d.image, "prompt": "", "response": d.response} for d in list(retriever.support)[:4]]
    captions = DemoRetriever.from_encoder("playground/clip", support=rows, device="cpu")
    assert Comparer(Echo(), [RetrieverView(captions)])(Query(rows[0]["image"]), 2).outcomes[0].answer


def test_the_untrained_strategy_shares_vectors_only_with_an_untrained_retriever(retriever):
    assert similarity(retriever, "si").retriever is retriever
    trained = DemoRetriever(retriever.encoder, retriever.support, teacher={"name": "some/lvlm"})
    base = similarity(trained, "si")
    assert base.retriever is not trained and base.retriever.teacher is None
    assert base.start == {"image": 1.0, "prompt": 0.0, "response": 0.0} and all(base.retriever.weights.values())
    with pytest.raises(ValueError, match="expected one of the strategies"):
        similarity(retriever, "drum")


# The cards


def test_cards_show_what_was_found_and_let_no_markup_through(query):
    rows = [
        {"id": f"<{i}>", "image": image, "prompt": "<script>p</script>", "response": f"<b>{i}</b>"}
        for i, image in enumerate([query.image, Image.new("RGB", (640, 480), "red"), None])
    ]
    retriever = DemoRetriever.from_encoder("playground/clip", support=rows, device="cpu")
    comparison = Comparer(Echo(), [RetrieverView(retriever, "<i>name</i>")])(query, 3)
    (outcome,) = comparison.outcomes
    text = outcome_cards(outcome, ["x"])
    assert text.count("<li>") == 3 and text.count("data:image/png") == 1 == text.count("data:image/jpeg")
    assert "no image" in text and "✓" not in text
    assert not re.search(r"<script|<b>\d|<i>name|<\d>", text)
    scores = re.findall(r"score (-?[\d.]+)</span>", text)
    assert scores == [f"{score:.3f}" for score in outcome.retrieval.scores]
    assert "✓" in outcome_cards(outcome, [outcome.answer.upper()])
    assert "Gold response: a / &lt;b&gt;" in answer_card(comparison, ["a", "<b>"])
    assert error_card("<script>") == '<div class="drum-error" role="alert">&lt;script&gt;</div>'


def test_thumbnails_are_small_or_sharp():
    large = thumbnail(Image.new("RGBA", (2000, 1000)))
    assert large.size == (256, 128) and large.mode == "RGB"
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 64, 3), dtype=np.uint8))
    enlarged = thumbnail(tiny)
    assert enlarged.size == (256, 80)
    assert np.array_equal(np.asarray(enlarged)[::4, ::4], np.asarray(tiny))


# The page


@pytest.fixture(scope="module")
def page(retriever):
    """A page that is served, as (client of its API, its LVLM)."""
    from gradio_client import Client

    lvlm = Echo()
    app = build_app(retriever, lvlm, second=similarity(retriever, "si"))
    yield Client(launch(app, block=False), verbose=False), lvlm
    app.close()


def ask(client, image, question, shots=2, weights=(1, 1, 1, 1, 0, 0)):
    return client.predict(image, question, shots, *weights, api_name="/ask")


@pytest.fixture
def picture(query, tmp_path):
    from gradio_client import handle_file

    path = tmp_path / "picture.png"
    query.image.save(path)
    return handle_file(path)


@needs_gradio
def test_names_of_a_retriever_are_shown_as_text(retriever):
    """What a retriever's files say of its models is neither Markdown nor HTML: no picture is fetched."""
    evil = "x ![t](http://evil.example/t.png) <img src=http://evil.example/u.png onerror=x()> [in](//evil.example)"
    renamed = copy.copy(retriever)
    renamed.teacher, renamed.base_model = {"name": evil, "task": "icl-vqa"}, f"{evil} base"
    app = build_app(RetrieverView(renamed, name=f"{evil} view"), Echo(), title=f"{evil} title")
    shown = [block for block in app.config["components"] if "evil.example" in str(block["props"].get("value"))]
    app.close()
    assert [block["type"] for block in shown] == ["html", "html"]
    for block, names in zip(shown, (["title"], ["view", "base"]), strict=True):
        tags = re.findall(r"<[^>]*>", block["props"]["value"])
        assert set(tags) <= {"<h1>", "</h1>", "<h2>", "</h2>", "<p>", "</p>"}
        assert all(f"{html.escape(evil)} {name}" in block["props"]["value"] for name in names)


@needs_gradio
def test_the_page_answers(page, picture, query, retriever):
    client, _ = page
    error, zero_shot, first, second = ask(client, picture, query.prompt)
    assert error == "" and "red" in zero_shot and "Gold" not in zero_shot
    expected = Comparer(Echo(), [RetrieverView(retriever), similarity(retriever, "si")])(query, 2)
    assert (first, second) == tuple(map(outcome_cards, expected.outcomes))
    more = ask(client, picture, query.prompt, shots=5, weights=(0, 1, 0, 0, 0, 1))
    assert more[2].count("<li>") == 5 and "ST: answer with 5" in more[2] and "draft: answer with 5" in more[3]


@needs_gradio
def test_the_page_says_what_is_wrong(page, picture, tmp_path):
    from gradio_client import handle_file

    client, _ = page
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for given, words in (
        ((handle_file(broken), "what?"), "expected an image, got broken.png"),
        ((None, "what?"), "expected an image"),
        ((picture, " "), "expected a question"),
        ((picture, "what?", 2, (0, 0, 0, 1, 0, 0)), "expected weights of"),
    ):
        error, *others = ask(client, *given)
        assert words in error and 'role="alert"' in error and others == [""] * 3
        assert "Traceback" not in error


@needs_gradio
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (EndpointError("expected an answer of http://x, got none"), "expected an answer of http://x, got none"),
        (KeyError("<logits>"), "KeyError: &#x27;&lt;logits&gt;&#x27;"),  # what nobody foresaw
    ],
)
def test_the_page_survives_an_lvlm_that_fails(page, picture, monkeypatch, wrong, words):
    client, lvlm = page
    monkeypatch.setattr(lvlm, "error", wrong)
    error, *others = ask(client, picture, "a question that has no answer yet")
    assert words in error and others == [""] * 3


@needs_gradio
def test_nobody_is_told_that_a_page_was_opened(retriever, monkeypatch):
    called = []
    lookup = socket.getaddrinfo

    def watch(host, *args, **kwargs):
        if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1", b"localhost"):
            called.append(host)
            raise OSError("no network in this test")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", watch)
    app = build_app(retriever, Echo())
    try:
        url = launch(app, block=False)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with pytest.raises(ValueError, match="expected to listen"):
            launch(build_app(retriever, Echo()), port=int(url.rstrip("/").rpartition(":")[2]), block=False)
    finally:
        app.close()
    assert called == []


def test_columns_are_told_apart_by_their_heads(retriever):
    app = build_app(retriever, Echo(), second=similarity(retriever, "si"))
    texts = [str(part["props"].get("value", "")) for part in app.config["components"] if part["type"] == "html"]
    heads = [text.partition("<p>")[0] for text in texts if text.startswith("<h2>")]
    assert heads == ["<h2>A: SIT + draft, untrained</h2>", "<h2>B: SI, untrained</h2>"]


def test_without_gradio_the_command_says_which_line_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert 'pip install "drum-hf[app]"' in capsys.readouterr().err
    with pytest.raises(DependencyError):
        launch(None)


def test_the_space_names_this_package_and_a_card():
    import yaml

    folder = Path(__file__).parents[2] / "examples" / "space"
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert card["sdk"] == "gradio" and (folder / card["app_file"]).is_file()
    assert "drum-hf" in (folder / "requirements.txt").read_text(encoding="utf-8")
    tested = (folder.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={card['sdk_version']}" in tested


def test_examples_are_pictures_that_differ(retriever):
    from drum_hf.serving.app.page import _spread

    rows = _spread(retriever.support)
    keys = [retriever.support.image_keys[retriever.support.row(row.id)] for row in rows]
    assert len(set(keys)) == len(keys) == len(set(retriever.support.image_keys))  # fewer than the gallery holds
    many = _spread(make_world(31, difficulty="easy").support)
    assert len(many) == 24
    blank = TripletTable.from_dataset([{"image": None, "prompt": "what?", "response": "that"}])
    assert _spread(blank) == []
