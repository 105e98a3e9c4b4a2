"""JointEncoder against direct calls of the CLIP or SigLIP inside it."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_encoders import picture, tiny_clip, tiny_siglip
from transformers import AutoModel, AutoProcessor

from drum_hf.encoders.joint import PARTS, JointEncoder, encode_items
from drum_hf.encoders.loading import build_encoder, load_encoder
from drum_hf.errors import NonFiniteEmbeddingError

IMAGES = [picture(seed) for seed in range(3)]
TEXTS = ["what colour is the circle", "red", "a large blue square on green", "how many stars", "seven"]
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory):
    return tiny_siglip(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session", params=["clip", "siglip"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def encoder(checkpoint):
    return build_encoder(checkpoint, weights=WEIGHTS, device="cpu")


@pytest.fixture
def fresh(clip):
    return build_encoder(clip, weights=WEIGHTS, device="cpu")


@torch.no_grad()
def towers(checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings of IMAGES and TEXTS, each in a forward of its own, as the model's own documentation says."""
    model, processor = AutoModel.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    images, texts = [], []
    for image in IMAGES:
        images.append(model.get_image_features(**processor.image_processor(image, return_tensors="pt")).pooler_output)
    for text in TEXTS:
        if model.config.model_type == "siglip":
            ids = processor.tokenizer(text, padding="max_length", max_length=16, return_tensors="pt").input_ids
            texts.append(model.get_text_features(input_ids=ids).pooler_output)
        else:
            texts.append(model.get_text_features(**processor.tokenizer(text, return_tensors="pt")).pooler_output)
    unit = [torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy() for rows in (images, texts)]
    return unit[0], unit[1]


@pytest.fixture(scope="session")
def oracle(checkpoint):
    return towers(checkpoint)


def item(parts):
    image, prompt, response = parts
    texts = [None if text is None else TEXTS[text] for text in (prompt, response)]
    return {"image": None if image is None else IMAGES[image], "text": texts}


def parts_of(parts, oracle):
    return [None if part is None else oracle[0 if kind == 0 else 1][part] for kind, part in enumerate(parts)]


# The law


def test_dot_product_is_the_weighted_mean_of_the_parts_cosines(encoder, oracle):
    left, right = (0, 0, 1), (1, 3, 4)
    a, b = encode_items(encoder, [item(left), item(right)])
    cosines = [x @ y for x, y in zip(parts_of(left, oracle), parts_of(right, oracle), strict=True)]
    assert a @ b == pytest.approx(np.dot(WEIGHTS, cosines), abs=1e-5)
    assert np.linalg.norm([a, b], axis=1) == pytest.approx(1, abs=1e-6)


optional = st.tuples(
    st.one_of(st.none(), st.integers(0, 2)), *[st.one_of(st.none(), st.integers(0, 4)) for _ in range(2)]
)
present = optional.filter(lambda parts: any(part is not None for part in parts))


@settings(max_examples=25, deadline=None)
@given(left=present, right=present)
def test_an_absent_part_leaves_its_weight_to_the_others(encoder, oracle, left, right):
    found = encode_items(encoder, [item(left), item(right)])
    expected = 0.0
    shares = []
    for parts in (left, right):
        kept = np.array([0.0 if part is None else w for part, w in zip(parts, WEIGHTS, strict=True)])
        shares.append(np.sqrt(kept / kept.sum()))
    for i, (x, y) in enumerate(zip(parts_of(left, oracle), parts_of(right, oracle), strict=True)):
        if x is not None and y is not None:
            expected += shares[0][i] * shares[1][i] * (x @ y)
    assert found[0] @ found[1] == pytest.approx(expected, abs=1e-5)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    width = found.shape[1] // 3
    for row, parts in zip(found, (left, right), strict=True):
        for i, part in enumerate(parts):
            assert bool(row[i * width : (i + 1) * width].any()) == (part is not None)


def test_an_embedding_does_not_depend_on_the_batch(encoder):
    rows = [(0, 0, 1), (None, 2, None), (1, None, None), (2, 3, None), (None, None, 4), (0, 2, 2)]
    items = [item(parts) for parts in rows]
    together = encode_items(encoder, items)
    alone = np.concatenate([encode_items(encoder, [one]) for one in items])
    backwards = encode_items(encoder, items[::-1], batch_size=2)[::-1]
    assert np.abs(together - alone).max() < 1e-6
    assert np.abs(together - backwards).max() < 1e-6


def test_the_forms_of_an_item(encoder):
    forms = [
        TEXTS[0],
        {"text": TEXTS[0]},
        {"image": None, "text": [TEXTS[0], ""]},
        {"text": (TEXTS[0],)},
        {"text": [TEXTS[0], "  "]},
    ]
    vectors = encode_items(encoder, forms)
    assert np.abs(vectors - vectors[0]).max() < 1e-6
    images = encode_items(encoder, [IMAGES[0], {"image": IMAGES[0]}, {"image": IMAGES[0], "text": None}])
    assert np.abs(images - images[0]).max() < 1e-6
    assert encoder.encode(TEXTS[0]).shape == (encoder.get_embedding_dimension(),)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (40, 1), (40, 3), (3, 40)])
def test_pictures_of_odd_shapes_and_modes(encoder, size):
    rgb = picture(5, size)
    vectors = encode_items(encoder, [rgb, rgb.convert("RGBA"), rgb.convert("P").convert("RGB"), rgb.convert("CMYK")])
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6
    white = Image.new("RGB", size, "white")
    assert np.abs(encode_items(encoder, [white])[0] - encode_items(encoder, [white.convert("L")])[0]).max() < 1e-6


# Weights


def test_weights_are_scaled_and_can_be_set(fresh):
    assert list(fresh[0].weights) == list(PARTS)
    assert list(fresh[0].weights.values()) == pytest.approx(WEIGHTS)
    fresh[0].weights = {"image": 3, "prompt": 1}
    assert fresh[0].weights == pytest.approx({"image": 0.75, "prompt": 0.25, "response": 0.0})
    fresh[0].weights = (1, 1, 1)
    assert encode_items(fresh, [{"text": ["", "red"]}]).any()  # the response is looked at again


@pytest.mark.parametrize("weights", [(1, 1), (0, 0, 0), (-1, 1, 1), (math.nan, 1, 1), (math.inf, 1, 1), {"draft": 1}])
def test_weights_that_make_no_sense(clip, fresh, weights):
    with pytest.raises(ValueError, match="weights are"):
        JointEncoder.from_pretrained(clip, weights=weights)
    with pytest.raises(ValueError, match="weights are"):
        fresh[0].weights = weights


def test_a_part_without_weight_is_not_computed(fresh, monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("this tower has no weight")

    full = item((0, 0, 1))
    fresh[0].weights = (1, 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(fresh[0].model, "get_text_features", refuse)
        image_only = encode_items(fresh, [full, item((0, 3, 4))])
    assert np.abs(image_only[0] - image_only[1]).max() < 1e-6
    fresh[0].weights = (0, 1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(fresh[0].model, "get_image_features", refuse)
        prompts = encode_items(fresh, [full, item((1, 0, 3))])
    assert np.abs(prompts[0] - prompts[1]).max() < 1e-6


def test_images_are_only_encoded_where_there_are_any(fresh, monkeypatch):
    seen = []
    original = fresh[0].model.get_image_features
    monkeypatch.setattr(
        fresh[0].model,
        "get_image_features",
        lambda pixel_values: seen.append(len(pixel_values)) or original(pixel_values),
    )
    encode_items(fresh, [item((0, 0, 1)), item((None, 0, 1)), item((1, None, None))])
    encode_items(fresh, [item((None, 0, 1))])
    assert seen == [2]


# Training


def test_rows_of_one_image_key_encode_it_once(encoder):
    module = encoder[0]
    shown = [0, None, 1, 0, 1, 0]
    items = [{"image": None if i is None else IMAGES[i], "text": ["red", str(row)]} for row, i in enumerate(shown)]
    features = module.preprocess(items)
    keys = torch.tensor([7 if i is None else 9 - i for i in shown])
    seen = []
    handle = module.model.vision_model.register_forward_pre_hook(
        lambda tower, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    plain = module(dict(features))["sentence_embedding"]
    once = module(features | {"image_key": keys})["sentence_embedding"]
    handle.remove()
    assert seen == [5, 2]
    torch.testing.assert_close(once, plain, atol=1e-6, rtol=0)
    ours, theirs = (
        torch.autograd.grad(vectors.square()[:, :7].sum(), module.model.visual_projection.weight)[0]
        if module.config.model_type == "clip"
        else torch.zeros(1)
        for vectors in (once, plain)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_gradients_reach_weights_and_both_towers(fresh):
    module = fresh[0]
    module.learn_weights = True
    features = module.preprocess([item((0, 0, 1)), item((1, None, 4)), item((None, 3, None))])
    vectors = module(features)["sentence_embedding"]
    (vectors[0] @ vectors[1] + vectors[1] @ vectors[2] + vectors[0] @ vectors[2]).backward()
    assert torch.isfinite(module.log_weights.grad).all() and module.log_weights.grad.abs().sum() > 0
    for name in ("vision_model", "text_model"):
        grads = [p.grad for p in getattr(module.model, name).parameters() if p.grad is not None]
        assert grads and all(torch.isfinite(g).all() for g in grads) and sum(g.abs().sum() for g in grads) > 0
    assert not module.model.logit_scale.requires_grad


def test_the_weights_gradient_is_that_of_the_closed_form(clip, oracle_clip):
    module = build_encoder(clip, weights=WEIGHTS, learn_weights=True, device="cpu")[0]
    left, right = (0, 0, 1), (1, 3, 4)
    vectors = module(module.preprocess([item(left), item(right)]))["sentence_embedding"]
    (vectors[0] @ vectors[1]).backward()
    cosines = np.array([x @ y for x, y in zip(parts_of(left, oracle_clip), parts_of(right, oracle_clip), strict=True)])
    # d/dl_i of sum softmax(l)_j c_j = w_i (c_i - sum_j w_j c_j)
    expected = np.array(WEIGHTS) * (cosines - np.dot(WEIGHTS, cosines))
    assert module.log_weights.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="session")
def oracle_clip(clip):
    return towers(clip)


def test_a_part_without_weight_stays_out_in_training(fresh):
    module = fresh[0]
    module.weights, module.learn_weights = (1, 1, 0), True
    optimizer = torch.optim.AdamW([module.log_weights], lr=0.1)
    for _ in range(3):
        vectors = module(module.preprocess([item((0, 0, 1)), item((1, 3, 4))]))["sentence_embedding"]
        optimizer.zero_grad()
        (vectors[0] @ vectors[1]).backward()
        optimizer.step()
    weights = module.weights
    assert weights["response"] == 0 and weights["image"] != pytest.approx(0.5)
    assert sum(weights.values()) == pytest.approx(1)


def test_features_can_be_cut_and_merged_by_row(encoder):
    from sentence_transformers.base.losses.gradcache import _create_minibatch
    from sentence_transformers.base.losses.merged_forward import merge_feature_batches

    rows = [(0, 0, 1), (None, 2, None), (1, None, None), (2, 3, 4)]
    columns = [encoder.preprocess([item(parts) for parts in rows[i : i + 2]]) for i in (0, 2)]
    expected = encode_items(encoder, [item(parts) for parts in rows])
    merged = merge_feature_batches(columns)
    assert merged is not None  # texts of other lengths have the same shape
    with torch.no_grad():
        cut = [encoder(_create_minibatch(merged, i, i + 1))["sentence_embedding"] for i in range(4)]
    assert np.abs(torch.cat(cut).numpy() - expected).max() < 1e-6


def test_columns_come_out_of_the_trainer_one_each(encoder):
    from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer

    batch = {
        f"{column}_{key}": value
        for column in ("query", "demo_0")
        for key, value in encoder.preprocess([item((0, 0, 1))]).items()
    }
    features, _ = SentenceTransformerTrainer.collect_features(None, batch)
    assert [sorted(column) for column in features] == [["input_ids", "pixel_values", "present", "text_mask"]] * 2


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_of_sentence_transformers_own_trainer(clip, tmp_path, lora):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    encoder = build_encoder(clip, lora=lora, learn_weights=True, device="cpu")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    part = {"image": ImageFeature(), "text": List(Value("string"))}
    rows = {
        "query": [item((0, 0, None)), item((1, 2, None)), item((None, 3, None)), item((2, 0, 1))],
        "demo": [item((1, 0, 1)), item((None, 2, 4)), item((0, 3, 1)), item((2, 0, 1))],
        "label": [0.1, 0.7, 0.4, 1.0],
    }
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer(model):
        data = Dataset.from_dict(rows, features=Features({"query": part, "demo": part, "label": Value("float32")}))
        return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=CoSENTLoss(model))

    trainer(encoder).train()
    moved = {
        name.split(".")[1] for name, value in encoder.state_dict().items() if not torch.equal(before[name], value)
    }
    assert moved == {"model", "log_weights"}
    if not lora:  # the module class is found again without a flag, and the weights come with it
        resumed = build_encoder(clip, learn_weights=True, device="cpu")
        trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        for name, value in encoder.state_dict().items():
            assert torch.allclose(value, resumed.state_dict()[name], atol=1e-5), name


# Files


def nudge(encoder: SentenceTransformer) -> None:
    """Stand in for training: every trainable number moves, LoRA's zeros included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("lora", [False, True])
def test_saved_and_loaded_embeddings_are_equal(checkpoint, tmp_path, lora):
    encoder = build_encoder(checkpoint, weights=WEIGHTS, learn_weights=True, lora=lora, device="cpu")
    items = [item(parts) for parts in ((0, 0, 1), (None, 3, 4), (2, None, None))]
    plain = encode_items(encoder, items)
    nudge(encoder)
    before = encode_items(encoder, items)
    assert np.abs(plain - before).max() > 1e-3
    encoder.save(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists() == (not lora)
    loaded = load_encoder(tmp_path / "saved", device="cpu")
    assert np.array_equal(encode_items(loaded, items), before)
    assert loaded[0].weights == encoder[0].weights and loaded[0].learn_weights
    module = JointEncoder.load(str(tmp_path / "saved"))
    assert np.array_equal(encode_items(SentenceTransformer(modules=[module], device="cpu"), items), before)
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert bool(loaded[0].has_adapter) == lora
    # Saved once more from what was loaded.
    loaded.save(str(tmp_path / "again"))
    assert np.array_equal(encode_items(load_encoder(tmp_path / "again", device="cpu"), items), before)


def test_a_zero_weight_survives_saving(clip, tmp_path):
    encoder = build_encoder(clip, weights=(2, 1, 0), device="cpu")
    encoder.save(str(tmp_path))
    assert load_encoder(tmp_path, device="cpu")[0].weights == encoder[0].weights
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["log_weights"][2] is None
    assert JointEncoder.from_pretrained(tmp_path, weights=(0, 1, 1)).weights["image"] == 0


def test_the_adapter_names_its_base_as_it_was_given(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(clip.parent)
    encoder = build_encoder("clip", lora=True, device="cpu")
    encoder.save(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "clip"
    assert config["r"] == 16
    assert load_encoder(tmp_path, device="cpu")[0].base_model == "clip"
    touched = {name.split(".")[2] for name, p in encoder.named_parameters() if p.requires_grad}
    assert touched == {"vision_model", "text_model"}


def test_a_lora_config_of_ones_own(clip):
    from peft import LoraConfig

    encoder = build_encoder(clip, lora=LoraConfig(r=2, target_modules=["q_proj"]), device="cpu")
    ranks = {p.shape[0] for name, p in encoder.named_parameters() if "lora_A" in name}
    assert ranks == {2}


# What goes wrong


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (7, "got int"),
        ({"picture": IMAGES[0]}, "a dict with 'picture'"),
        ({"image": "bus.jpg"}, "'image' of type str"),
        ({"text": ["a", "b", "c"]}, "got 'text'"),
        ({"text": [1]}, "got 'text'"),
        ({"image": None, "text": ["", None]}, "has none"),
        ("   ", "has none"),
    ],
)
def test_items_that_cannot_be_used(encoder, bad, match):
    with pytest.raises(ValueError, match=match):
        encode_items(encoder, [bad])


def test_an_item_whose_parts_have_no_weight(fresh):
    fresh[0].weights = (1, 0, 0)
    with pytest.raises(ValueError, match="item 1 has prompt"):
        fresh.preprocess([IMAGES[0], "what colour"])


def test_another_family_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    from drum_hf.playground.building.pretraining import build_tokenizer

    tokenizer = build_tokenizer({"pad_token": "<pad>", "unk_token": "<unk>"})
    small = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(small).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'bert'"):
        build_encoder(tmp_path)


def test_long_texts_are_cut_with_one_warning(encoder, caplog):
    module = encoder[0]
    module._warned_of_cut = False
    limit = module.max_seq_length
    assert limit == module.config.text_config.max_position_embeddings
    full = next(n for n in range(limit, 0, -1) if len(module.tokenizer("red " * n, verbose=False).input_ids) == limit)
    with caplog.at_level(logging.WARNING, logger="drum_hf.encoders.joint"):
        encode_items(encoder, ["red " * full])
        assert not caplog.records  # as long as may be is not cut
        vectors = encode_items(encoder, ["red " * (full + 20), "red " * (full + 40), "red"])
        encode_items(encoder, ["blue " * (full + 40)])
    longest = len(module.tokenizer("red " * (full + 40), verbose=False).input_ids)
    (record,) = caplog.records
    said = record.getMessage()
    assert f"2 of 3 texts are longer than the {limit} tokens" in said and f"the longest has {longest}" in said
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6


def test_nan_is_reported_by_position(fresh):
    with torch.no_grad():
        fresh[0].model.vision_model.post_layernorm.weight[0] = torch.nan
    with pytest.raises(NonFiniteEmbeddingError, match="items 1"):
        encode_items(fresh, ["red", IMAGES[0], "blue"])


def test_items_are_drawn_as_they_are_needed_and_the_mode_is_kept(fresh, monkeypatch):
    monkeypatch.setattr("drum_hf.encoders.joint._CHUNK", 2)
    drawn, at_encode = [], []
    original = fresh.encode
    monkeypatch.setattr(fresh, "encode", lambda *a, **k: at_encode.append(len(drawn)) or original(*a, **k))

    def items():
        for n in range(10):
            drawn.append(n)
            yield TEXTS[n % 5]

    fresh.train()
    vectors = encode_items(fresh, items(), batch_size=2)
    assert fresh.training
    assert at_encode == [4, 8, 10] and vectors.shape == (10, 384)
    assert encode_items(fresh, []).shape == (0, 384)
    with pytest.raises(ValueError, match="batch_size"):
        encode_items(fresh, ["red"], batch_size=0)


def test_repr(fresh):
    assert repr(fresh[0]) == "JointEncoder(CLIPModel, dimension=384, image=0.5, prompt=0.3, response=0.2)"
