"""The playground's LVLMs before their training: two stock architectures, and where the build finds their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..language import chat_words
from .pretraining import PATCH, PIXELS, WIDTH, build_tokenizer

__all__ = ["BLUEPRINTS", "IDEFICS_IMAGE", "ImageSlot", "TinyLVLM", "build_idefics", "build_internvl"]

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<end_of_utterance>"
IMAGE_TOKENS = 4
_GRID = PIXELS // PATCH


class ImageSlot(NamedTuple):
    """The tokens that stand for a picture."""

    before: tuple[str, ...]
    token: str
    after: tuple[str, ...]

    @property
    def tokens(self) -> list[str]:
        """All of them, in order."""
        return [*self.before, *[self.token] * IMAGE_TOKENS, *self.after]


IDEFICS_IMAGE = ImageSlot(("<fake_token_around_image>", "<global-img>"), "<image>", ("<fake_token_around_image>",))
INTERNVL_IMAGE = ImageSlot(("<img>",), "<IMG_CONTEXT>", ("</img>",))


@dataclasses.dataclass(frozen=True)
class TinyLVLM:
    """A tiny LVLM, and its parts, which every architecture names otherwise.

    Attributes:
        model, processor: as transformers has them.
        slot: what stands for a picture in a prompt.
        tower: vision tower, `decoder`: of text, `norm`: its last one.
        see: pixels (N, 3, 32, 32) -> what the tower makes of their patches, (N, 16, width).
        connect: such states -> what the decoder reads in the place of the picture's tokens, (N, 4, width).
        videos: class of the family's video processor, if it has one.
    """

    model: Any
    processor: Any
    slot: ImageSlot
    tower: nn.Module
    decoder: nn.Module
    norm: nn.Module
    see: Callable[[torch.Tensor], torch.Tensor]
    connect: Callable[[torch.Tensor], torch.Tensor]
    videos: str | None = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.config.text_config.vocab_size)

    @property
    def depth(self) -> int:
        """Layers of the decoder."""
        return int(self.model.config.text_config.num_hidden_layers)


def _chat_template(image: str) -> str:
    """Text first, then the picture."""
    return (
        "{% for message in messages %}"
        "{{ '<|user|>' if message['role'] != 'assistant' else '<|assistant|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '"
        + image
        + "' }}{% endif %}{% endfor %}"
        "{% endif %}{{ '<end_of_utterance>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


def _tokenizer(extra: tuple[str, ...], **kwargs: Any) -> Any:
    return build_tokenizer(
        {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": END},
        (USER, ASSISTANT, *extra),
        chat_words(),
        model_max_length=1024,
        padding_side="left",
        **kwargs,
    )


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }


def _ready(model: Any, tokenizer: Any) -> Any:
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    return model


def build_idefics(seed: int) -> TinyLVLM:
    """An untrained tiny Idefics3 with an Lfm2 decoder: four pairs of a short convolution and an attention layer."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = _tokenizer((*IDEFICS_IMAGE.before, IDEFICS_IMAGE.token))
    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]  # its __post_init__ takes it
        scale_factor=2,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        },
        text_config=_text_config(tokenizer)
        | {
            "model_type": "lfm2",
            "intermediate_size": 3 * WIDTH,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 8,
            "layer_types": ["conv", "full_attention"] * 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": PIXELS},
        max_image_size={"longest_edge": PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=_chat_template("<image>")
    )
    model = _ready(Idefics3ForConditionalGeneration(config), tokenizer)
    parts = model.model
    whole = torch.ones(1, _GRID, _GRID, dtype=torch.bool)

    def see(pixels: torch.Tensor) -> torch.Tensor:
        mask = whole.expand(len(pixels), -1, -1)
        return parts.vision_model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state

    decoder = parts.text_model
    return TinyLVLM(
        model, processor, IDEFICS_IMAGE, parts.vision_model, decoder, decoder.embedding_norm, see, parts.connector
    )


def build_internvl(seed: int) -> TinyLVLM:
    """An untrained tiny InternVL with a Qwen2 decoder of six attention layers.

    Attention alone finds copying with biases, wide initial weights and a small base of the rotary positions; with the
    defaults it did not in thousands of steps.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from ...lvlm.local.processors import image_only

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(tuple(named.values()), extra_special_tokens=named)
    torch.manual_seed(seed)
    config = InternVLConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": [PIXELS, PIXELS],
            "patch_size": [PATCH, PATCH],
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "use_mean_pooling": False,  # so that there is a last norm
        },
        text_config=_text_config(tokenizer)
        | {
            "model_type": "qwen2",
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 6,
            "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS},
        max_patches=1,  # its processor asks for tiles, whatever stands here
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    processor = image_only(InternVLProcessor)(
        images, tokenizer, None, image_seq_length=IMAGE_TOKENS, chat_template=_chat_template("<IMG_CONTEXT>")
    )
    model = _ready(InternVLForConditionalGeneration(config), tokenizer)
    parts = model.model

    def see(pixels: torch.Tensor) -> torch.Tensor:
        return parts.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]

    def connect(states: torch.Tensor) -> torch.Tensor:
        shuffled = parts.pixel_shuffle(states.unflatten(1, (_GRID, _GRID)))
        return parts.multi_modal_projector(shuffled.flatten(1, 2))

    decoder = parts.language_model
    return TinyLVLM(
        model,
        processor,
        INTERNVL_IMAGE,
        parts.vision_tower,
        decoder,
        decoder.norm,
        see,
        connect,
        videos="InternVLVideoProcessor",
    )


#: Architecture -> how its untrained LVLM is made.
BLUEPRINTS: dict[str, Callable[[int], TinyLVLM]] = {"idefics": build_idefics, "internvl": build_internvl}
