"""LVLMs of random weights at the shapes of well-known ones: a benchmark needs their sizes, not what they know."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from ...types import Demonstration, ICLRequest, Query

if TYPE_CHECKING:
    import torch

__all__ = ["SHAPES", "Shape", "all_pairs", "build", "decoder_flops", "vision_flops"]

_WORDS = 600


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a vision-language model, as its configuration on the Hub states them.

    Attributes:
        family: "idefics3" or "qwen2-vl".
        image: side of an image in pixels; it is one tile, `image_tokens` tokens long.
        vision, text: what the configuration says of the tower and of the decoder.
        scale: patches along a side that are joined into one token.
        layers: decoder layers and vision layers of the real model, where those built are fewer.
    """

    family: str
    image: int
    patch: int
    scale: int
    vision: dict[str, int]
    text: dict[str, int]
    vocabulary: int
    layers: tuple[int, int] | None = None

    @property
    def image_tokens(self) -> int:
        return (self.image // (self.patch * self.scale)) ** 2


def _siglip(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _decoder(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {**_siglip(hidden, inner, layers, heads), "num_key_value_heads": kv_heads}


#: smolvlm-*: 512-pixel images as one tile (no splitting). qwen2-vl-*: one layer's worth of tower, decoder and
#: vocabulary, since their tower has about as many layers as their decoder; 448-pixel images.
SHAPES = {
    "smolvlm-256m": Shape("idefics3", 512, 16, 4, _siglip(768, 3072, 12, 12), _decoder(576, 1536, 30, 9, 3), 49_280),
    "smolvlm-500m": Shape("idefics3", 512, 16, 4, _siglip(768, 3072, 12, 12), _decoder(960, 2560, 32, 15, 5), 49_280),
    "qwen2-vl-2b": Shape(
        "qwen2-vl", 448, 14, 2, _siglip(1280, 5120, 1, 16), _decoder(1536, 8960, 1, 12, 2), 151_936 // 28, (28, 32)
    ),
    "qwen2-vl-7b": Shape(
        "qwen2-vl", 448, 14, 2, _siglip(1280, 5120, 1, 16), _decoder(3584, 18_944, 1, 28, 4), 152_064 // 28, (28, 32)
    ),
    "tiny": Shape("idefics3", 32, 8, 2, _siglip(32, 48, 2, 4), _decoder(32, 48, 2, 4, 2), 1_024),
}

_IDEFICS3 = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance> {% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def _tokenizer(extra: list[str]) -> Any:
    """Whole words: what is benchmarked is the number of tokens, not which ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<s>", "</s>", *extra, "User", "Assistant", "user", "assistant", ":"]
    words += [f"w{i}" for i in range(_WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=extra, **special)


def build(name: str, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, Any]:
    """(model, processor) of random weights, the same ones each time.

    Raises:
        ValueError: no shape of that name.
    """
    import torch

    if name not in SHAPES:
        raise ValueError(f"expected one of the shapes {', '.join(SHAPES)}, got {name!r}")
    shape = SHAPES[name]
    config, processor = (_idefics3 if shape.family == "idefics3" else _qwen2_vl)(shape)
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            from transformers import AutoModelForImageTextToText

            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        finally:
            torch.set_default_dtype(before)
    return model.to(device).eval(), processor


def _text_settings(shape: Shape, tokenizer: Any) -> dict[str, Any]:
    return {
        **shape.text,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _idefics3(shape: Shape) -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = _tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"])
    side = {"longest_edge": shape.image}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=shape.image_tokens, chat_template=_IDEFICS3)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=shape.scale,
        vision_config={**shape.vision, "image_size": shape.image, "patch_size": shape.patch},
        text_config={"model_type": "llama", **_text_settings(shape, tokenizer)},
    )
    return config, processor


def _qwen2_vl(shape: Shape) -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    from ...lvlm.local.processors import image_only

    extra = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(extra)
    pixels = shape.image**2
    images = Qwen2VLImageProcessorPil(
        patch_size=shape.patch, merge_size=shape.scale, min_pixels=pixels, max_pixels=pixels
    )
    processor = image_only(Qwen2VLProcessor)(images, tokenizer, None, chat_template=_QWEN)
    width = shape.text["hidden_size"] // shape.text["num_attention_heads"]
    first = width // 8  # rotary frequencies for time; the rest are shared by height and width
    second = (width // 2 - first) // 2
    sections = [first, second, width // 2 - first - second]
    config = Qwen2VLConfig(
        text_config={
            **_text_settings(shape, tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        },
        vision_config={
            "depth": shape.vision["num_hidden_layers"],
            "embed_dim": shape.vision["hidden_size"],
            "hidden_size": shape.text["hidden_size"],
            "num_heads": shape.vision["num_attention_heads"],
            "mlp_ratio": shape.vision["intermediate_size"] // shape.vision["hidden_size"],
            "patch_size": shape.patch,
            "spatial_merge_size": shape.scale,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return config, processor


def all_pairs(shape: Shape, rows: int, seed: int = 0) -> list[ICLRequest]:
    """`rows` made-up rows, each scored after each of the others: rows * (rows - 1) requests, query by query.

    A row is an image of smooth noise, a question of 8 to 16 words and an answer of 1 to 4.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    table = []
    for row in range(rows):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((shape.image, shape.image), Image.Resampling.BILINEAR)
        words = [f"w{i}" for i in rng.integers(0, _WORDS, 20)]
        question, answer = " ".join(words[: rng.integers(8, 17)]), " ".join(words[16 : 16 + rng.integers(1, 5)])
        table.append(Demonstration(str(row), image, question, answer))
    return [
        ICLRequest(Query(query.image, query.prompt, id=query.id), (shown,), (query.response,))
        for query in table
        for shown in table
        if shown is not query
    ]


def decoder_flops(shape: Shape, tokens: int, seen: float, heads: int) -> float:
    """FLOPs (two a multiply-add) of the decoder, by count.

    Args:
        tokens: that are run.
        seen: mean number of tokens that each of them attends to.
        heads: positions whose logits are made.
    """
    text = shape.text
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    narrow = hidden * text["num_key_value_heads"] / text["num_attention_heads"]
    linear = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
    layer = 2 * linear * tokens + 4 * hidden * seen * tokens
    return text["num_hidden_layers"] * layer + 2.0 * hidden * shape.vocabulary * heads


def vision_flops(shape: Shape) -> float:
    """FLOPs of one image: tower, and what joins it to the decoder, by count."""
    vision, patches = shape.vision, (shape.image // shape.patch) ** 2
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    frames = 2 if shape.family == "qwen2-vl" else 1  # an image is a film of two frames there
    embedding = hidden * 3 * shape.patch**2 * frames
    layer = 4 * hidden * hidden + 2 * hidden * inner
    joined = hidden * shape.scale**2
    project = joined * shape.text["hidden_size"] + (joined * joined if shape.family == "qwen2-vl" else 0)
    linear = 2.0 * patches * (embedding + vision["num_hidden_layers"] * layer) + 2.0 * shape.image_tokens * project
    return linear + 4.0 * hidden * patches * patches * vision["num_hidden_layers"]
