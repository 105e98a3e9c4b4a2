"""What goes to the Hub says nothing of this machine's folders, and is of use to others all the same."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import LocalHub, used_here
from PIL import Image
from tiny import tiny_idefics3
from tiny_encoders import picture, tiny_clip

from drum_hf import DemoRetriever, DrumTrainer, DrumTrainingArguments, Query, TransformersLVLM, load_table
from drum_hf.errors import SavedFileError
from drum_hf.scores.store import ScoreStore
from drum_hf.scores.transfer import push_scores
from drum_hf.tuning import ICLTuner, ICLTuningArguments
from drum_hf.tuning.episodes import Conversation, Turn
from drum_hf.types import ICLRequest
from drum_hf.utils.optional import public_name

ME = {"token": "hf_me"}
WORDS = ("red", "seven", "square", "blue")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder of this machine with an encoder, an LVLM and data in it."""
    folder = tmp_path_factory.mktemp("somebodys-home")
    rows = ["image,prompt,response"]
    (folder / "data").mkdir()
    for i in range(8):
        picture(i).save(folder / "data" / f"{i}.png")
        rows.append(f"{i}.png,which word is {i}?,{WORDS[i % 4]}")
    (folder / "data" / "table.csv").write_text("\n".join(rows))
    tiny_clip(folder)
    tiny_idefics3(folder)
    return folder


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory) -> tuple[DemoRetriever, Path]:
    """A LoRA retriever that learned from the LVLM, and the store of what was paid for."""
    out = tmp_path_factory.mktemp("out")
    lvlm = TransformersLVLM.from_pretrained(home / "idefics3-llama", device="cpu")
    retriever = DemoRetriever.from_encoder(home / "clip", load_table(home / "data"), lora=True, device="cpu")
    more = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "report_to": []}
    args = DrumTrainingArguments(str(out), rounds=1, candidates_per_round=2, num_train_epochs=1, **more)
    DrumTrainer(retriever, lvlm=lvlm, args=args).train()
    return retriever, out / "scores.sqlite"


def told(hub: LocalHub, repo: str, kind: str = "model") -> str:
    """Every text of a repository, those inside parquet files too."""
    texts = []
    for name, data in hub.files(repo, kind=kind).items():
        texts += [name, data.decode("utf-8", "replace")]
        if name.endswith(".parquet"):
            file = pq.ParquetFile(BytesIO(data))
            texts += [str(file.schema_arrow.metadata), str(file.read().to_pylist())]
    return "\n".join(texts)


def test_a_retriever_tells_no_folder(hub, home, trained):
    retriever, _ = trained
    retriever.push_to_hub("me/drum", **ME)
    assert str(home) not in told(hub, "me/drum") and home.name not in told(hub, "me/drum")
    config = json.loads(hub.files("me/drum")["drum_config.json"])
    assert config["teacher"]["name"] == "idefics3-llama" and config["base_model"] == "clip"
    assert json.loads(hub.files("me/drum")["manifest.json"])["lvlm"]["name"] == "idefics3-llama"
    card = hub.files("me/drum")["README.md"].decode()
    assert "- **Model**: a local model (idefics3-llama)" in card and "a local model (clip)" in card
    assert retriever.teacher["name"] == str(home / "idefics3-llama") and retriever.base_model == str(home / "clip")


def test_an_adapter_on_a_local_base_is_merged_unless_asked_for(hub, home, trained):
    retriever, _ = trained
    retriever.push_to_hub("me/drum", **ME)
    queries = [Query(picture(50 + i), f"which word is {i}?", draft=WORDS[i]) for i in range(4)]
    whole = DemoRetriever.from_pretrained("me/drum", device="cpu")  # by whoever has no such folder
    assert not json.loads(hub.files("me/drum")["drum_config.json"])["adapter"] and whole.adapters == []
    ids, scores = retriever.retrieve_ids(queries, 8)
    found = whole.retrieve_ids(queries, 8)
    assert found[0] == ids
    np.testing.assert_allclose(found[1], scores, atol=1e-5)
    retriever.push_to_hub("me/drum", form="adapter", **ME)
    assert home.name not in told(hub, "me/drum")
    assert 'base_model="folder/of/its/base/model"' in hub.files("me/drum")["README.md"].decode()
    with pytest.raises(SavedFileError, match=r"(?s)needs its base model 'clip'.*pass base_model="):
        DemoRetriever.from_pretrained("me/drum", device="cpu")
    loaded = DemoRetriever.from_pretrained("me/drum", base_model=home / "clip", device="cpu")
    assert loaded.retrieve_ids(queries, 8)[0] == ids


def test_a_saved_folder_keeps_the_paths_that_it_is_loaded_by(home, trained, tmp_path):
    retriever, _ = trained
    retriever.save_pretrained(tmp_path)
    loaded = DemoRetriever.from_pretrained(tmp_path, device="cpu")
    assert loaded.teacher == retriever.teacher and loaded.base_model == str(home / "clip")
    for name in ("README.md", "manifest.json"):
        assert home.name not in (tmp_path / name).read_text()


def test_scores_tell_no_folder(hub, home, trained):
    with ScoreStore(trained[1]) as store:
        _, done = push_scores(store, "me/scores", **ME)
        assert [identity["name"] for identity in store.identities().values()] == [str(home / "idefics3-llama")]
    assert done.scores and home.name not in told(hub, "me/scores", kind="dataset")
    assert "| idefics3-llama |" in hub.files("me/scores", kind="dataset")["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/birds/", "birds"),
        ("C:\\models\\birds", "birds"),
        ("/home/me/birds with image tokens / 4", "birds with image tokens / 4"),
        ("/home/me/birds tuned for 30 steps", "birds tuned for 30 steps"),
        ("me/birds", "me/birds"),
        ("playground/clip", "playground/clip"),
        ("gpt-4o", "gpt-4o"),
    ],
)
def test_the_name_of_a_model_as_others_read_it(name, shown):
    assert public_name(name) == shown


def test_a_folder_named_from_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "models" / "birds").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/birds") == public_name("./models/birds") == "birds"
    monkeypatch.chdir(tmp_path / "models" / "birds")
    assert public_name(".") == "birds"


# ---- a tuned LVLM ----


def test_a_tuned_lvlm_is_pushed_and_loaded_by_name(hub, home, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 2, 32, 32, 3), dtype=np.uint8)
    talks = [
        Conversation(
            tuple(Turn(Image.fromarray(each), "which word?", WORDS[i % 4]) for each in pair), "word", "", "open"
        )
        for i, pair in enumerate(noise)
    ]
    base = home / "idefics3-llama"
    asked = [ICLRequest(Query(picture(9), "which word?"), responses=("red",))]
    before = TransformersLVLM.from_pretrained(base, device="cpu").score(asked)
    for full, files in ((False, {"adapter_model.safetensors"}), (True, {"model.safetensors"})):
        name = f"me/tuned-{'whole' if full else 'adapter'}"
        args = ICLTuningArguments(
            str(tmp_path / name),
            full=full,
            max_steps=3,
            learning_rate=1e-2,
            hub_model_id=name,
            hub_token="hf_me",
            hub_private_repo=True,
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        tuned = ICLTuner(base, args, train_dataset=talks, dtype=torch.float32)
        tuned.train()
        assert f"/{name}/commit/" in tuned.push_to_hub("tuned").commit_url
        pushed = hub.files(name)
        assert files | {"processor_config.json", "README.md"} <= pushed.keys() and hub.repo(name).private
        assert not [file for file in pushed if file.endswith((".bin", ".pt", ".pkl"))]
        assert home.name not in told(hub, name) and hub.repo(name).at("main").message == "tuned"
        given = {"adapter": name} if not full else {}
        loaded = TransformersLVLM.from_pretrained(name if full else base, token="hf_me", device="cpu", **given)
        asked_of_the_hub = len(hub.requests)
        with used_here(hub, tmp_path / "cache", offline=True):
            TransformersLVLM.from_pretrained(name if full else base, device="cpu", **given)
        assert len(hub.requests) == asked_of_the_hub
        scores = loaded.score(asked)
        np.testing.assert_allclose(scores, tuned.lvlm().score(asked), atol=1e-5)
        assert abs(scores[0] - before[0]) > 1e-3
        text = pushed["README.md"].decode()
        loading = f'from_pretrained("idefics3-llama", adapter="{name}")' if not full else f'from_pretrained("{name}")'
        assert loading in text
        assert json.loads(pushed["manifest.json"])["lvlm"]["name"] == "idefics3-llama"
        if not full:
            first = hub.repo(name).refs["main"]
            assert tuned.push_to_hub("asked", merged=True, create_pr=True).endswith("/discussions/1")
            assert hub.repo(name).refs["main"] == first
            tuned.push_to_hub("merged", merged=True)
            pushed = hub.files(name)
            assert "model.safetensors" in pushed and not [file for file in pushed if file.startswith("adapter_")]
            assert home.name not in told(hub, name) and hub.repo(name).at("main").message == "merged"
            whole = TransformersLVLM.from_pretrained(name, token="hf_me", device="cpu")
            np.testing.assert_allclose(whole.score(asked), scores, atol=1e-5)
            earlier = {"adapter": name, "adapter_revision": first, "token": "hf_me"}
            loaded = TransformersLVLM.from_pretrained(base, device="cpu", **earlier)
            np.testing.assert_allclose(loaded.score(asked), scores, atol=1e-5)
