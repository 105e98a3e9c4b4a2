"""Encoders from folders: what may be in them, in which precision they are trained, and LoRA by any peft."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import picture, tiny_clip, tiny_siglip

from drum_hf.encoders import build_encoder, encode_items, load_encoder, prepare_training
from drum_hf.encoders.adapters import active_adapter, inject, lora_config, merge_adapter
from drum_hf.encoders.loading import add_adapter, plain_copy
from drum_hf.errors import ModelError, SavedFileError

ITEMS = [{"image": picture(0), "text": ["what is it", "red"]}, {"image": picture(1), "text": ["how many", None]}]


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory):
    return tiny_siglip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def saved(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "encoder"
    build_encoder(clip, device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def saved_adapter(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    build_encoder(clip, lora=True, device="cpu").save(str(folder))
    return folder


def change(path, **new):
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


# ---- untrusted files ----

PARTS = ("sentence_bert_config.json", "config.json", "processor_config.json", "tokenizer_config.json")
HOSTILE = [
    *[
        (file, {key: value}, "has no such|is '|expected")
        for file in PARTS[:1]
        for key, value in {
            "model_kwargs": {"weights_only": False},
            "model_args": {"weights_only": False},
            "processor_kwargs": {"use_fast": False},
            "config_kwargs": {"a": 1},
            "tokenizer_name_or_path": "stranger/repo",
            "backend": "onnx",
            "max_seq_length": 9,
            "log_weights": {"a": 1},
            "learn_weights": "yes",
        }.items()
    ],
    ("config.json", {"auto_map": {"AutoModel": "stranger/repo--m.Model"}}, "'auto_map' is"),
    ("config.json", {"quantization_config": {"quant_method": "torchao"}}, "'quantization_config' is 'torchao'"),
    ("config.json", {"attn_implementation": "stranger/kernel"}, "'attn_implementation' is 'stranger/kernel'"),
    ("config.json", {"_attn_implementation": {"text_config": "stranger/kernel"}}, "'_attn_implementation' is"),
    ("config.json", {"transformers_weights": "pytorch_model.bin"}, "'transformers_weights' is"),
    ("config.json", {"backbone": "stranger/net"}, "'backbone' is 'stranger/net'"),
    ("config.json", {"dtype": "load"}, "'dtype' is 'load'"),
    ("config.json", {"projection_dim": 2**30}, "far beyond what any encoder has"),
    ("config.json", {"projection_dim": 2**20}, "it describes a model of"),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "m.P"}}, "'auto_map' is"),
    ("processor_config.json", {"image_processor": {"size": {"height": 2**20, "width": 1}}}, "far beyond"),
    ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}, "'tokenizer_file' is"),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.9.json"]}, "'fast_tokenizer_files' is"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["m.T", None]}}, "'auto_map' is"),
]


@pytest.mark.parametrize(("file", "new", "message"), HOSTILE)
def test_settings_that_lead_elsewhere(saved, tmp_path, file, new, message):
    folder = shutil.copytree(saved, tmp_path / "encoder")
    change(folder / file, **new)
    for load in (load_encoder, build_encoder):
        with pytest.raises(SavedFileError, match=message):
            load(folder, device="cpu")


def test_the_folder_itself_loads(saved, clip):
    expected = encode_items(build_encoder(clip, device="cpu"), ITEMS)
    for load in (load_encoder, build_encoder):
        assert np.array_equal(encode_items(load(saved, device="cpu"), ITEMS), expected)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "indexed"])
@pytest.mark.parametrize("load", [load_encoder, build_encoder])
def test_pickled_weights_are_never_read(saved, tmp_path, name, load):
    folder = shutil.copytree(saved, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = "weights.txt" if name == "indexed" else name
    torch.save({**weights, "zz": Evil(tmp_path / "mark")}, folder / file)
    if name == "indexed":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SavedFileError, match=r"expected weights in model\.safetensors"):
        load(folder, device="cpu")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "shard",
    ["../../elsewhere/secret.safetensors", "model.bin", "model-00001-of-00001.safetensors", "/tmp/x.safetensors"],
)
def test_shards_are_files_of_the_folder(saved, tmp_path, shard):
    folder = shutil.copytree(saved, tmp_path / "a" / "encoder")
    (tmp_path / "elsewhere").mkdir()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere" / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SavedFileError, match="expected files of the folder"):
        load_encoder(folder, device="cpu")


def test_shards_in_the_folder_load(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "encoder")
    expected = encode_items(load_encoder(folder, device="cpu"), ITEMS)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {}
    for number, part in enumerate((names[:40], names[40:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert np.array_equal(encode_items(load_encoder(folder, device="cpu"), ITEMS), expected)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("kind", ["link", "dead link", "pipe"])
def test_links_and_pipes(saved, tmp_path, name, kind):
    folder = shutil.copytree(saved, tmp_path / "encoder")
    (folder / name).rename(tmp_path / name)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / name if kind == "link" else folder / "nothing")
    with pytest.raises((SavedFileError, ModelError), match=r"leads out of the folder|a pipe, a device|no config"):
        load_encoder(folder, device="cpu")


_SEEN: list | None = None


def _watch(event, args):
    if _SEEN is not None and (event.startswith(("socket.connect", "subprocess")) or event == "os.system"):
        _SEEN.append((event, args))
    if _SEEN is not None and event == "open" and "elsewhere" in str(args[0]):
        _SEEN.append((event, args))


sys.addaudithook(_watch)


def test_nothing_outside_is_opened(saved, tmp_path):
    """Where a file's settings are changed to lead elsewhere, nothing there is looked at before the refusal."""
    global _SEEN
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    hostile = {
        "tokenizer_name_or_path": str(elsewhere),
        "model_kwargs": {"device_map": {"": "disk"}, "offload_folder": str(elsewhere / "written")},
        "processor_kwargs": {"cache_dir": str(elsewhere)},
    }
    for key, value in hostile.items():
        folder = shutil.copytree(saved, tmp_path / key)
        change(folder / "sentence_bert_config.json", **{key: value})
        _SEEN = []
        try:
            with pytest.raises(SavedFileError, match=key):
                load_encoder(folder, device="cpu")
            assert _SEEN == []
        finally:
            _SEEN = None
    assert list(elsewhere.iterdir()) == []


TOKENIZERS = {
    "regex": ({"type": "Replace", "pattern": {"Regex": "(x+x+)+y|(a|aa)+$|(.*)*z"}, "content": ""}, "repeats a group"),
    "chain": ({"type": "Replace", "pattern": {"Regex": ".*.*.*z"}, "content": ""}, "more than 2 repetitions"),
    "ways": ({"type": "Replace", "pattern": {"Regex": "a?" * 40 + "a" * 40}, "content": ""}, "too many ways"),
    "grow": (
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaaaa"}] * 8,
        },
        r"1e\+08 times as long",
    ),
    "map": ({"type": "Precompiled", "precompiled_charsmap": "AAAAAGFh" + "YWFh" * 1_000}, "bytes of a character"),
    "panic": ({"type": "Precompiled", "precompiled_charsmap": "//////8A"}, "could not be loaded"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_takes_without_end(saved, tmp_path, kind):
    folder = shutil.copytree(saved, tmp_path / "encoder")
    normalizer, message = TOKENIZERS[kind]
    change(folder / "tokenizer.json", normalizer=normalizer)
    start = time.monotonic()
    with pytest.raises((SavedFileError, ModelError), match=message):
        load_encoder(folder, device="cpu")
    assert time.monotonic() - start < 10


ADAPTERS = [
    ({"peft_type": "IA3"}, "expected a LoRA adapter, got 'IA3'"),
    ({"arrow_config": {"a": 1}}, "'arrow_config' is not supported"),
    ({"unheard_of": "x"}, "'unheard_of' is not supported"),
    ({"r": "16"}, "expected 'r' to be int, got str"),
    ({"target_modules": {"a": 1}}, "expected 'target_modules' to be str or list"),
]


@pytest.mark.parametrize(("new", "message"), ADAPTERS)
def test_adapters_of_other_settings(saved_adapter, tmp_path, new, message):
    folder = shutil.copytree(saved_adapter, tmp_path / "adapter")
    change(folder / "adapter_config.json", **new)
    for load in (load_encoder, build_encoder):
        with pytest.raises(SavedFileError, match=message):
            load(folder, device="cpu")


def test_the_base_of_an_adapter_is_checked_as_any_model(saved_adapter, clip, tmp_path):
    base = shutil.copytree(clip, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({**weights, "zz": Evil(tmp_path / "mark")}, base / "pytorch_model.bin")
    with pytest.raises(SavedFileError, match=r"pytorch_model\.bin, a pickle"):
        load_encoder(saved_adapter, base_model=base, device="cpu")
    folder = shutil.copytree(saved_adapter, tmp_path / "adapter")
    change(folder / "adapter_config.json", base_model_name_or_path=str(folder))  # its own base
    with pytest.raises(SavedFileError, match="expected a whole model"):
        load_encoder(folder, device="cpu")
    assert not (tmp_path / "mark").exists()


# ---- precision ----


def half(checkpoint, tmp_path, dtype):
    folder = shutil.copytree(checkpoint, tmp_path / "half")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    change(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_is_as_saved_unless_told(clip, tmp_path, dtype):
    folder = half(clip, tmp_path, dtype)
    assert {p.dtype for p in build_encoder(folder, device="cpu")[0].model.parameters()} == {dtype}
    full = build_encoder(folder, dtype="float32", device="cpu")
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in build_encoder(clip, dtype=dtype, device="cpu")[0].model.parameters()} == {dtype}
    with pytest.raises(ValueError, match="expected one of the dtypes float32, bfloat16, float16"):
        build_encoder(folder, dtype="int8")
    expected = encode_items(full, ITEMS)
    found = encode_items(build_encoder(folder, device="cpu"), ITEMS)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 2e-2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_trained_weight_moves(clip, tmp_path, dtype, lora):
    """By steps of 1e-5, which a half-precision weight of ordinary size would not notice."""
    encoder = build_encoder(half(clip, tmp_path, dtype), lora=lora, device="cpu")
    prepare_training(encoder)
    module = encoder[0]
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    if lora:
        with torch.no_grad():  # LoRA's B begins at zero, where A's gradient is, too
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0.0)
    vectors = module(module.preprocess(ITEMS))["sentence_embedding"]
    (vectors[0] @ vectors[1] + vectors[:, ::7].sum()).backward()
    optimizer.step()
    for name, parameter in trained.items():
        if parameter.grad is None or "embedding" in name:  # a position or word that is in no item has no gradient
            continue
        moved = (parameter != before[name])[parameter.grad != 0]
        assert moved.float().mean() > 0.99, name
    assert sum(p.grad is not None for p in trained.values()) > 0.9 * len(trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_on_a_half_precision_base_is_saved_as_it_is(clip, tmp_path, dtype):
    encoder = build_encoder(half(clip, tmp_path, dtype), lora=True, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = encode_items(encoder, ITEMS)
    encoder.save(str(tmp_path / "saved"))
    weights = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert np.array_equal(encode_items(load_encoder(tmp_path / "saved", device="cpu"), ITEMS), expected)
    # Trained in float32, it is read so, too.
    prepare_training(encoder)
    wide = encode_items(encoder, ITEMS)
    assert not np.array_equal(wide, expected)
    encoder.save(str(tmp_path / "wide"))
    assert np.array_equal(encode_items(load_encoder(tmp_path / "wide", device="cpu"), ITEMS), wide)


# ---- LoRA ----


@pytest.mark.parametrize("checkpoint", ["clip", "siglip"])
def test_lora_is_on_all_four_projections_of_both_towers(request, checkpoint):
    model = build_encoder(request.getfixturevalue(checkpoint), lora=True, device="cpu")[0].model
    layers = {
        name.partition(".lora_A")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name
    }
    expected = {
        f"{tower}_model.encoder.layers.{layer}.self_attn.{projection}"
        for tower, config in (("text", model.config.text_config), ("vision", model.config.vision_config))
        for layer in range(config.num_hidden_layers)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert layers == expected
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_lora_asks_transformers_for_nothing(clip, tmp_path, monkeypatch):
    """transformers 5.24 refuses every peft there is in its own integration."""

    def refuse(*args, **kwargs):
        raise ValueError("The version of PEFT you have installed is not compatible")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    encoder = build_encoder(clip, lora=True, device="cpu")
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    expected = encode_items(encoder, ITEMS)
    encoder.save(str(tmp_path / "a"))
    loaded = load_encoder(tmp_path / "a", device="cpu")
    assert np.array_equal(encode_items(loaded, ITEMS), expected)
    add_adapter(loaded[0], tmp_path / "a", "other")
    assert active_adapter(loaded[0]) == "other"
    merged = plain_copy(loaded)
    assert np.abs(encode_items(merged, ITEMS) - expected).max() < 1e-5
    merged.save(str(tmp_path / "whole"))
    whole = load_encoder(tmp_path / "whole", device="cpu")
    assert not whole[0].has_adapter and np.array_equal(encode_items(whole, ITEMS), encode_items(merged, ITEMS))


def test_modules_trained_whole_beside_lora(clip, tmp_path):
    encoder = build_encoder(clip, device="cpu")
    config = lora_config()
    config.modules_to_save = ["visual_projection"]
    inject(encoder[0], config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    expected = encode_items(encoder, ITEMS)
    encoder.save(str(tmp_path / "saved"))
    loaded = load_encoder(tmp_path / "saved", device="cpu")
    assert np.array_equal(encode_items(loaded, ITEMS), expected)
    merge_adapter(loaded[0])
    assert np.abs(encode_items(loaded, ITEMS) - expected).max() < 1e-5
    assert not any("lora" in name or "modules_to_save" in name for name, _ in loaded.named_parameters())


# ---- texts and items ----


def test_max_length_cuts_the_tokens(clip):
    module = build_encoder(clip, device="cpu")[0]
    text = "what colour is the large circle"
    whole = module.tokenizer(text).input_ids
    features = module.preprocess([text], max_length=4)
    ids, mask = features["input_ids"][0, 0], features["text_mask"][0, 0]
    # truncation keeps the tokens at the beginning, and the last one, which the tower reads
    assert ids[mask.bool()].tolist() == [*whole[:3], whole[-1]]
    longest = module.preprocess([text], max_length=10_000)["text_mask"][0, 0].sum()
    assert int(longest) == len(whole)


def test_items_are_named_by_their_place_among_all(clip, monkeypatch):
    monkeypatch.setattr("drum_hf.encoders.joint._CHUNK", 1)
    encoder = build_encoder(clip, device="cpu")
    with pytest.raises(ValueError, match="item 5: expected"):
        encode_items(encoder, ["a long text that comes first", "b", "c", "d", "e", 7], batch_size=2)
    encoder[0].weights = (1, 0, 0)
    with pytest.raises(ValueError, match="item 3 has prompt"):
        encode_items(encoder, [picture(0), picture(1), picture(2), "text"], batch_size=2)
    with torch.no_grad():
        encoder[0].model.vision_model.post_layernorm.weight[0] = torch.nan
    from drum_hf.errors import NonFiniteEmbeddingError

    encoder[0].weights = (1, 1, 0)
    with pytest.raises(NonFiniteEmbeddingError, match="those of items 4;"):
        encode_items(encoder, ["a", "b", "c", "d", picture(0)], batch_size=2)
