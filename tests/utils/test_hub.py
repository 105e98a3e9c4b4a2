"""Retrievers and scores on a Hub: pushed, fetched, refused, and used again without a connection."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import LocalHub, used_here
from tiny_encoders import picture, tiny_clip

from drum_hf.cli import main
from drum_hf.data import TripletTable
from drum_hf.encoders.joint import JointEncoder
from drum_hf.errors import HubError, ImageError, SavedFileError
from drum_hf.retriever.retriever import DemoRetriever
from drum_hf.scores.store import RequestParts, ScoreStore
from drum_hf.types import Query

ME = {"token": "hf_me"}
WORDS = ("red", "seven", "square", "blue")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        (folder / "train").mkdir(exist_ok=True)
        picture(i).save(folder / "train" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def table(pictures):
    return TripletTable.from_dataset(
        [
            {"id": f"d{i}", "image": f"train/{i}.png", "prompt": f"what is {i}", "response": WORDS[i % 4]}
            for i in range(8)
        ],
        image_root=pictures,
    )


@pytest.fixture
def base(hub, clip):
    """The base model as a repository of the Hub, at a known commit."""
    from huggingface_hub import HfApi

    api = HfApi(token="hf_me")
    api.create_repo("me/clip")
    api.upload_folder(repo_id="me/clip", folder_path=clip)
    return "me/clip"


def nudge(retriever: DemoRetriever, seed: int = 1) -> DemoRetriever:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in retriever.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    retriever.mark_stale()
    return retriever


def full(clip, table, seed=1) -> DemoRetriever:
    return nudge(DemoRetriever.from_encoder(clip, table, device="cpu"), seed)


def lora(base, table, seed=1) -> DemoRetriever:
    return nudge(DemoRetriever.from_encoder(base, table, lora=True, device="cpu"), seed)


def load(name, **kwargs) -> DemoRetriever:
    return DemoRetriever.from_pretrained(name, device="cpu", **kwargs)


QUERIES = [Query(picture(100 + i), f"what is {i}", draft=WORDS[i]) for i in range(4)]


def same(one: DemoRetriever, other: DemoRetriever, atol: float = 1e-6) -> bool:
    (ids, scores), (others, theirs) = one.retrieve_ids(QUERIES, 8), other.retrieve_ids(QUERIES, 8)
    return ids == others and bool(np.allclose(scores, theirs, rtol=0, atol=atol))


# ---- there and back ----


def test_an_adapter_is_fetched_with_its_base_at_the_commit_it_was_trained_on(hub, base, clip, table, tmp_path):
    from huggingface_hub import HfApi

    retriever = lora(base, table)
    commit = hub.repo("me/clip").refs["main"]
    assert retriever.base_revision == commit
    url = retriever.push_to_hub("drum", **ME, commit_message="first")
    assert url.startswith(f"{hub.endpoint}/me/drum/commit/")
    names = set(hub.files("me/drum"))
    assert "encoder/adapter_model.safetensors" in names and "encoder/model.safetensors" not in names
    assert hub.asked("PUT /lfs-storage") and hub.repo("me/drum").at("main").message == "first"
    (tmp_path / "config.json").write_text(json.dumps(json.loads((clip / "config.json").read_text()) | {"junk": 1}))
    HfApi(token="hf_me").upload_file(
        path_or_fileobj=tmp_path / "config.json", path_in_repo="config.json", repo_id="me/clip"
    )
    assert hub.repo("me/clip").refs["main"] != commit
    found = load("me/drum", cache_dir=tmp_path / "other")
    assert same(found, retriever) and found.base_revision == commit and found.active_adapter == "default"
    found.mark_stale()
    assert same(found, retriever)  # embedded anew, with the adapter


@pytest.mark.parametrize(
    ("images", "include_support", "include_index"),
    [
        ("embedded", True, True),
        ("embedded", True, False),
        ("embedded", False, True),
        ("embedded", False, False),
        ("reference", True, True),
    ],
)
def test_each_form_comes_back(hub, clip, table, pictures, images, include_support, include_index):
    retriever = full(clip, table)
    retriever.push_to_hub("me/drum", **ME, include_index=include_index, include_support=include_support, images=images)
    files = hub.files("me/drum")
    assert ("support.parquet" in files) == include_support and ("index/index.json" in files) == include_index
    assert "encoder/model.safetensors" in files
    card = files["README.md"].decode()
    if not include_support:
        with pytest.raises(SavedFileError, match="pass them with support="):
            load("me/drum")
        found = load("me/drum", support=table)
        assert 'support="your_table.parquet"' in card
    elif images == "reference":
        assert b"PNG" not in files["support.parquet"] and str(pictures).encode() not in files["support.parquet"]
        with pytest.raises(SavedFileError, match=r"such as '0\.png', and not in it; pass image_root="):
            load("me/drum")
        found = load("me/drum", image_root=pictures / "train")
        assert "without their images: pass `image_root=`" in card
    else:
        found = load("me/drum")
    with pytest.MonkeyPatch.context() as patch:
        if include_index:
            patch.setattr(DemoRetriever, "encode_support", lambda *a: pytest.fail("embedded again"))
        assert same(found, retriever)
    assert found.support["d3"].image.tobytes() == picture(3).tobytes()


def test_an_adapter_merged_for_the_hub_needs_no_base(hub, base, table):
    retriever = lora(base, table)
    retriever.push_to_hub("me/drum", **ME, form="full")
    assert retriever.active_adapter == "default"  # a copy was merged
    assert "encoder/model.safetensors" in hub.files("me/drum")
    before = hub.asked("me/clip")
    found = load("me/drum")
    assert hub.asked("me/clip") == before and found.adapters == [] and same(found, retriever, atol=1e-5)
    with pytest.raises(ValueError, match="expected an adapter in use to save as form='adapter', there is none"):
        found.push_to_hub("me/drum", **ME, form="adapter")
    with pytest.raises(ValueError, match="form 'adapter', 'full' or None"):
        found.push_to_hub("me/drum", **ME, form="whole")


def test_a_second_push_leaves_nothing_of_the_first(hub, base, clip, table):
    full(clip, table).push_to_hub("me/drum", **ME)
    lora(base, table).push_to_hub("me/drum", **ME, include_support=False, include_index=False)
    names = set(hub.files("me/drum"))
    assert "encoder/model.safetensors" not in names and "encoder/adapter_model.safetensors" in names
    assert not {name for name in names if name.startswith("index/")} and "support.parquet" not in names
    assert ".gitattributes" in names
    assert len(hub.repo("me/drum").commits) == 3  # the repository's first, and one for each push


def test_saved_and_pushed_at_once(hub, clip, table, tmp_path):
    retriever = full(clip, table)
    retriever.save_pretrained(tmp_path / "named", push_to_hub=True, include_support=False, private=True, **ME)
    repo = hub.repo("me/named")
    assert repo.private and "support.parquet" not in hub.files("me/named")
    assert not (tmp_path / "named" / "support.parquet").exists()
    with pytest.raises(ValueError, match="private only count"):
        retriever.save_pretrained(tmp_path / "named", private=True)


# ---- revisions ----


def test_commits_branches_and_pull_requests(hub, clip, table):
    one, two, three = (full(clip, table, seed) for seed in (1, 2, 3))
    first = one.push_to_hub("me/drum", **ME).rpartition("/")[2]
    two.push_to_hub("me/drum", **ME)
    three.push_to_hub("me/drum", **ME, revision="trial")
    assert same(load("me/drum", revision=first), one) and same(load("me/drum", revision=first[:40]), one)
    assert same(load("me/drum"), two) and same(load("me/drum", revision="main"), two)
    assert same(load("me/drum", revision="trial"), three)
    url = one.push_to_hub("me/drum", token="hf_you", create_pr=True)
    assert url == f"{hub.endpoint}/me/drum/discussions/1"
    assert same(load("me/drum", revision="refs/pr/1"), one) and same(load("me/drum"), two)
    three.push_to_hub("me/drum", **ME, revision="refs/pr/1")
    assert same(load("me/drum", revision="refs/pr/1"), three)
    with pytest.raises(HubError, match=r"no branch, tag or commit 'v9'; check revision=") as caught:
        load("me/drum", revision="v9")
    assert caught.value.status == 404


# ---- refusals ----


def test_private_repositories_and_tokens(hub, clip, table, tmp_path):
    retriever = full(clip, table)
    with pytest.raises(HubError, match=r"can't be made on the Hub.*`hf auth login`, or pass token=") as caught:
        retriever.push_to_hub("me/drum")
    assert caught.value.status == 401
    retriever.push_to_hub("me/drum", **ME, private=True)
    assert same(load("me/drum", token="hf_me_read"), retriever)
    for token, status in ((None, 401), ("hf_you", 404), ("hf_nobody", 401)):
        with pytest.raises(HubError, match=r"can't be fetched.*to see a private repository") as caught:
            load("me/drum", token=token, cache_dir=tmp_path / f"{token}")
        assert caught.value.status == status and "hf_" not in str(caught.value)
    with pytest.raises(HubError, match="lacks the right to do that: pass token=") as caught:
        retriever.push_to_hub("me/drum", token="hf_me_read")
    assert caught.value.status == 403
    with pytest.raises(HubError, match=r"can't be made.*lacks the right"):
        retriever.push_to_hub("me/another", token="hf_you")


def test_what_is_not_there_is_said(hub, clip, table):
    with pytest.raises(
        HubError, match=r"'me/nothing' is no folder here, and can't be fetched from the Hub.*check its name"
    ) as caught:
        load("me/nothing", **ME)
    assert caught.value.status == 404
    with pytest.raises(HubError, match=r"expected a folder that is there, or a name such as 'owner/name'"):
        load("no/such/folder")
    from huggingface_hub import HfApi

    HfApi(token="hf_me").create_repo("me/empty")
    with pytest.raises(SavedFileError, match=r"got 'me/empty', a repository without drum_config\.json; "):
        load("me/empty", **ME)


def test_a_hub_that_asks_for_patience_is_asked_again(hub, clip, table, monkeypatch):
    waits = []
    monkeypatch.setattr("drum_hf.utils.hub.time", SimpleNamespace(sleep=waits.append))
    retriever = full(clip, table)
    hub.refuse("POST /api/repos/create", 429, times=2, Retry_After="7")
    hub.refuse("POST /api/models/me/drum/commit", 429, Retry_After="3")
    retriever.push_to_hub("me/drum", **ME)
    assert waits == [7, 7, 3] and len(hub.repo("me/drum").commits) == 2
    waits.clear()
    hub.refuse("GET /api/models/me/drum", 429, RateLimit='"api";r=0;t=21')
    assert same(load("me/drum"), retriever) and waits == [21]
    waits.clear()
    hub.refuse("GET /api/models/me/other", 429, times=99, Retry_After="2")
    with pytest.raises(HubError, match="asks for 2 seconds of patience") as caught:
        load("me/other")
    assert caught.value.status == 429 and waits == [2, 2, 2, 2]
    waits.clear()
    hub.refuse("GET /api/models/me/far", 429, times=99, Retry_After="3600")
    with pytest.raises(HubError, match="asks for 3600 seconds"):
        load("me/far")
    assert waits == []


def test_a_hub_that_is_down(clip, table, tmp_path):
    retriever = full(clip, table)
    gone = LocalHub(endpoint="http://127.0.0.1:9")
    with used_here(gone, tmp_path):
        with pytest.raises(HubError, match="check the connection") as caught:
            retriever.push_to_hub("me/drum", **ME)
        assert caught.value.status is None
        with pytest.raises(HubError, match="check the connection"):
            load("me/drum")


# ---- the cache ----


def test_the_cache_is_used_without_a_request(hub, base, table, tmp_path):
    retriever = lora(base, table)
    retriever.push_to_hub("me/drum", **ME)
    cache = tmp_path / "fresh"
    with pytest.raises(HubError, match="it isn't in the cache, and no request may be made: fetch it once"):
        load("me/drum", cache_dir=cache, local_files_only=True)
    assert same(load("me/drum", cache_dir=cache), retriever)
    hub.requests.clear()
    assert same(load("me/drum", cache_dir=cache, local_files_only=True), retriever)
    with used_here(hub, cache, offline=True):
        assert same(load("me/drum"), retriever)
        with pytest.raises(HubError, match="no request may be made"):
            load("me/drum", revision="another")
        with pytest.raises(HubError, match="no request may be made"):
            retriever.push_to_hub("me/drum", **ME)
    assert hub.requests == []


def test_a_download_can_be_forced(hub, clip, table):
    retriever = full(clip, table)
    retriever.push_to_hub("me/drum", **ME)
    load("me/drum")
    hub.requests.clear()
    load("me/drum")
    assert hub.asked("GET .*/resolve/|GET /lfs-storage") == 0
    load("me/drum", force_download=True)
    assert hub.asked("GET /lfs-storage/") >= 3 and hub.asked("GET .*/resolve/.*/drum_config.json") == 1


def test_a_forced_download_takes_the_base_model_along(hub, base, table):
    lora(base, table).push_to_hub("me/drum", **ME)
    load("me/drum")
    weights = hashlib.sha256(hub.files("me/clip")["model.safetensors"]).hexdigest()
    for load_it in (
        lambda **how: load("me/drum", **how),
        lambda **how: DemoRetriever.from_encoder(base, table, **{"device": "cpu", **how}),
    ):
        hub.requests.clear()
        load_it()
        assert hub.asked("GET .*/resolve/|GET /lfs-storage") == 0
        load_it(force_download=True)
        assert hub.asked(f"GET /lfs-storage/.*{weights}") == 1
        assert hub.asked("GET /me/clip/resolve/.*/config.json") >= 1


# ---- other processes ----

SCRIPT = """
import json, sys
from tiny_encoders import picture
items = [{"image": picture(i), "text": [f"what is {i}", "red"]} for i in range(3)]
out = {}
for name in sys.argv[1:]:
    from sentence_transformers import SentenceTransformer
    out[name] = SentenceTransformer(name, trust_remote_code=True, device="cpu").encode(items).tolist()
from drum_hf import DemoRetriever
found = DemoRetriever.from_pretrained("me/drum", device="cpu")
rows = [{"image": item["image"], "prompt": item["text"][0], "draft": "red"} for item in items]
out["ids"] = found.retrieve_ids(rows, 5)[0]
print(json.dumps(out))
"""


def test_another_process_and_then_one_without_a_connection(hub, base, table, tmp_path):
    """Also `SentenceTransformer` of the repository and of a folder: the encoder's own embeddings."""
    retriever = lora(base, table)
    retriever.push_to_hub("me/drum", **ME)
    folder = tmp_path / "folder"
    retriever.save_pretrained(folder, form="full")
    tests = Path(__file__).parents[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(**more: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, "me/drum", str(folder)],
            cwd=tmp_path,
            env=env | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    items = [{"image": picture(i), "text": [f"what is {i}", "red"]} for i in range(3)]
    expected = retriever.encoder.encode(items)
    rows = [{"image": item["image"], "prompt": item["text"][0], "draft": "red"} for item in items]
    hub.requests.clear()
    online = run()
    assert hub.requests
    assert np.allclose(online["me/drum"], expected, rtol=0, atol=1e-6)
    assert np.allclose(online[str(folder)], expected, rtol=0, atol=1e-5)
    assert online["ids"] == retriever.retrieve_ids(rows, 5)[0]
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == online
    assert hub.requests == []


# ---- adapters ----


def test_adapters_are_swapped_and_merged(hub, base, table, tmp_path):
    one, two = lora(base, table, 1), lora(base, table, 2)
    two.encoder[0].weights = (1, 0, 1)
    one.teacher, two.teacher = {"name": "me/one"}, {"name": "me/two"}
    one.save_pretrained(tmp_path / "one")
    two.push_to_hub("me/two", **ME)
    plain = DemoRetriever.from_encoder(base, table, device="cpu")

    swapped = load(tmp_path / "one")
    swapped.load_adapter("me/two", "two")
    assert swapped.adapters == ["default", "two"] and swapped.active_adapter == "default"
    assert same(swapped, one) and swapped.teacher == {"name": "me/one"}  # nothing changed yet
    swapped.set_adapter("two")
    assert same(swapped, two) and swapped.teacher == {"name": "me/two"} and swapped.weights == two.weights
    swapped.save_pretrained(tmp_path / "again")  # the one in use
    assert same(load(tmp_path / "again"), two)
    swapped.set_adapter("default")
    assert same(swapped, one) and swapped.strategy == "sit+draft"
    swapped.set_adapter(None)
    assert swapped.active_adapter is None and same(swapped, plain) and swapped.teacher is None
    swapped.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "encoder" / "model.safetensors").is_file()
    assert same(load(tmp_path / "plain"), plain)
    swapped.set_adapter("two")
    assert same(swapped, two)
    vectors = swapped.index.vectors()
    swapped.merge_adapters()
    assert swapped.adapters == [] and swapped.active_adapter is None
    assert np.abs(swapped.encode_support() - vectors).max() < 1e-5
    swapped.save_pretrained(tmp_path / "merged")
    assert same(load(tmp_path / "merged"), two, atol=1e-5)

    bare = DemoRetriever.from_encoder(base, table, device="cpu")  # a first adapter on a plain encoder
    bare.load_adapter(tmp_path / "one", "one")
    assert bare.active_adapter is None and same(bare, plain)
    bare.set_adapter("one")
    assert same(bare, one)


def test_adapters_that_do_not_fit(hub, base, clip, table, tmp_path):
    retriever = lora(base, table)
    retriever.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="'default' is taken"):
        retriever.load_adapter(tmp_path / "one", "default")
    with pytest.raises(ValueError, match="expected one of the adapters default, got 'two'"):
        retriever.set_adapter("two")
    lora(clip, table).save_pretrained(tmp_path / "local")
    with pytest.raises(SavedFileError, match=r"the adapter is for .*clip', the encoder is 'me/clip' at "):
        retriever.load_adapter(tmp_path / "local", "two")
    retriever.save_pretrained(tmp_path / "whole", form="full")
    with pytest.raises(SavedFileError, match="expected a LoRA adapter"):
        retriever.load_adapter(tmp_path / "whole", "two")
    weights = tmp_path / "one" / "encoder" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SavedFileError, match="altered"):
        retriever.load_adapter(tmp_path / "one", "two")
    assert retriever.adapters == ["default"]


def test_an_adapter_beside_another_is_loaded_without_a_word(base, table, tmp_path):
    lora(base, table, 1).save_pretrained(tmp_path / "one")
    lora(base, table, 2).save_pretrained(tmp_path / "two")
    told: list[logging.LogRecord] = []
    listening = logging.Handler()
    listening.emit = told.append
    logging.getLogger("transformers").addHandler(listening)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            retriever = load(tmp_path / "one")
            retriever.load_adapter(tmp_path / "two", "two")
    finally:
        logging.getLogger("transformers").removeHandler(listening)
    assert told == [] and retriever.adapters == ["default", "two"]
    assert logging.getLogger("transformers.integrations.peft").filters == []


def test_an_adapter_that_lacks_a_weight_is_refused(base, table, tmp_path):
    from safetensors.torch import load_file, save_file

    lora(base, table).save_pretrained(tmp_path)
    file = tmp_path / "encoder" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, file)
    with pytest.raises(SavedFileError, match=r"lora_B\.default\.weight' is missing"):
        JointEncoder.from_pretrained(tmp_path / "encoder")


# ---- images by reference ----


def test_images_that_are_referred_to(table, pictures, clip, tmp_path):
    table.save(tmp_path / "t.parquet", images="reference", image_root=pictures)
    loaded = TripletTable.load(tmp_path / "t.parquet", image_root=pictures)
    assert loaded.fingerprint == table.fingerprint and loaded["d2"].image.tobytes() == picture(2).tobytes()
    copy = tmp_path / "copy"
    (copy / "train").mkdir(parents=True)
    for i in range(8):
        picture(i + (i == 5)).save(copy / "train" / f"{i}.png")
    moved = TripletTable.load(tmp_path / "t.parquet", image_root=copy)
    assert moved["d4"].image.tobytes() == picture(4).tobytes()
    for some in (moved, moved.select(["d5"]), moved.without(["d5"]).concat(moved.select(["d5"]))):
        with pytest.raises(ImageError, match="shows another picture"):
            some["d5"]
    (copy / "train" / "3.png").unlink()
    with pytest.raises(SavedFileError, match=r"'train/3\.png', and there is no such file"):
        TripletTable.load(tmp_path / "t.parquet", image_root=copy)
    with pytest.raises(ImageError, match="is not in image_root"):
        table.save(tmp_path / "t.parquet", images="reference", image_root=copy)
    held = TripletTable.from_dataset([{"image": picture(1), "prompt": "a", "response": "b"}])
    with pytest.raises(ImageError, match="expected an image file to refer to"):
        held.save(tmp_path / "t.parquet", images="reference")


# ---- the card ----


def test_the_card_is_what_the_hub_reads(hub, base, table):
    from huggingface_hub import ModelCard, metadata_load
    from PIL import Image

    retriever = lora(base, table)
    retriever.record_training(
        teacher={"name": "me/lvlm", "revision": "0123abc", "fingerprint": "f" * 32, "task": "icl-vqa"},
        training={"rounds": 2, "scored_pairs": 160, "seed": 3},
    )
    retriever.card_data |= {
        "license": "cc-by-4.0",
        "rounds": [{"round": 1, "accuracy": 0.4}, {"round": 2, "accuracy": 0.6}],
        "results": [{"strategy": "random", "accuracy": 0.3}, {"strategy": "drum", "accuracy": 0.6}],
        "model_index": [{"dataset": "birds", "metric": "exact_match", "value": 0.6}],
    }
    picture_of_results = BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture_of_results, "PNG")
    retriever.plot = picture_of_results.getvalue()
    retriever.push_to_hub("me/drum", **ME)
    found = load("me/drum")
    assert found.plot == retriever.plot and found.card_data == retriever.card_data
    files = hub.files("me/drum")
    assert files["plot.png"] == retriever.plot
    text = files["README.md"].decode()
    card = ModelCard(text)
    card.validate()  # by the Hub
    assert card.data.library_name == "drum-hf" and card.data.base_model == "me/clip"
    assert card.data.pipeline_tag == "visual-question-answering" and card.data.license == "cc-by-4.0"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("birds", "exact_match", 0.6)
    for told in ("me/lvlm", "0123abc", table.fingerprint, "| 2 | 0.6 |", "| random | 0.3 |", "![", "(plot.png)"):
        assert told in text
    for told in (
        "2412.07619",
        "2403.12736",
        "## Limits",
        "License of the data**: cc-by-4.0",
        hub.repo("me/clip").refs["main"],
    ):
        assert told in text
    manifest = json.loads(files["manifest.json"])
    assert manifest["seed"] == 3 and manifest["data"] == {"support": table.fingerprint}
    assert manifest["lvlm"]["fingerprint"] == "f" * 32 and "hf_me" not in json.dumps(manifest)
    folder = Path(hf_file("me/drum", "README.md"))
    assert metadata_load(folder)["model-index"][0]["results"][0]["task"]["type"] == "visual-question-answering"


def hf_file(repo: str, name: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo, name)


# ---- the command line ----


def test_push_as_a_user_types_it(hub, base, table, tmp_path, capsys, monkeypatch):
    retriever = lora(base, table)
    retriever.save_pretrained(tmp_path / "r")
    assert main(["-q", "push", str(tmp_path / "r"), "drum"]) == 2
    assert "HubError: 'drum' can't be made on the Hub" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    words = ["--private", "--form", "full", "--no-index", "--license", "mit", "--commit-message", "typed"]
    assert main(["-q", "push", str(tmp_path / "r"), "drum", *words]) == 0
    assert f"uploaded: {hub.endpoint}/me/drum/commit/" in capsys.readouterr().out
    repo = hub.repo("me/drum")
    assert repo.private and repo.at("main").message == "typed" and b"license: mit" in hub.files("me/drum")["README.md"]
    assert same(load("me/drum"), retriever, atol=1e-5)
    assert main(["-q", "push", str(tmp_path / "r"), "drum", "--create-pr"]) == 0
    assert "/me/drum/discussions/1" in capsys.readouterr().out
    assert main(["-q", "push", str(tmp_path / "none"), "drum"]) == 2
    assert "there is no" in capsys.readouterr().err


LVLMS = {
    "f" * 32: {"name": "me/vlm", "revision": "0123456789", "dtype": "float32", "chat_template": "a" * 32},
    "e" * 32: {"name": "me/vlm", "revision": "0123456789", "dtype": "bfloat16", "chat_template": "b" * 32},
}


def scored(path: Path, fingerprint: str, value: float = -1.0) -> Path:
    parts = [RequestParts(f"{i:032x}", ("0" * 32,), (str(i),)) for i in range(5)]
    keys = [part.key(fingerprint) for part in parts]
    with ScoreStore(path) as store:
        identity = LVLMS[fingerprint]
        store.put_scores(keys, [value] * 5, fingerprint=fingerprint, parts=parts, identity=identity)
    return path


def test_scores_are_pushed_and_pulled(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    mine, theirs = scored(tmp_path / "s.sqlite", "f" * 32), scored(tmp_path / "t.sqlite", "e" * 32)
    new = tmp_path / "new.sqlite"
    assert main(["-q", "scores", "push", str(mine), "scores", "--private"]) == 0
    assert f"5 scores and 0 generations in {hub.endpoint}/datasets/me/scores/commit/" in capsys.readouterr().out
    assert hub.repo("me/scores", "dataset").private
    card = hub.files("me/scores", kind="dataset")["README.md"].decode()
    assert "| me/vlm |" in card and "drum-hf scores pull me/scores" in card
    manifest = json.loads(hub.files("me/scores", kind="dataset")["manifest.json"])
    assert manifest["settings"] == {"fingerprints": ["f" * 32]}
    for said in ("5 new, 0 known before", "0 new, 5 known before"):
        assert main(["-q", "scores", "pull", "me/scores", str(new)]) == 0
        assert said in capsys.readouterr().out
    with ScoreStore(mine) as one, ScoreStore(new) as two:
        assert list(one.entries()) == list(two.entries()) and one.identities() == two.identities()
    assert main(["-q", "scores", "pull", "me/scores", str(theirs)]) == 2
    said = capsys.readouterr().err
    assert "dtype differs: bfloat16 here, float32 there; chat template differs: bbbbbbbb… here" in said
    assert main(["-q", "scores", "pull", "me/scores", str(theirs), "--any-lvlm"]) == 0
    first = hub.repo("me/scores", "dataset").refs["main"]
    assert main(["-q", "scores", "push", str(theirs), "scores", "--fingerprint", "e"]) == 0
    assert main(["-q", "scores", "pull", "me/scores", str(tmp_path / "a.sqlite"), "--revision", first]) == 0
    with ScoreStore(tmp_path / "a.sqlite") as store:
        assert list(store.identities()) == ["f" * 32]
    assert main(["-q", "scores", "pull", "me/none", str(new)]) == 2
    assert "HubError: 'me/none' can't be fetched from the Hub" in capsys.readouterr().err


# ---- older and newer formats ----


@pytest.mark.parametrize("version", [1, 3, 0, -1, None, "2", [], {}, 2.5, 10**30])
def test_another_format_version_is_named(clip, table, tmp_path, version):
    full(clip, table).save_pretrained(tmp_path)
    path = tmp_path / "drum_config.json"
    config = json.loads(path.read_text())
    assert config["format_version"] == 2
    path.write_text(json.dumps(config | {"format_version": version}))
    with pytest.raises(SavedFileError, match="expected format version 2, got"):
        load(tmp_path)
