"""Tiny random LVLMs with their processors, saved as any model on the Hub is. Built once for a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "what which colour shape word is the a of in this picture red green blue round square wug blick seven dax".split()  # noqa: SIM905
)
IDEFICS3_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(extra: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which a word's first token depends on the space before it."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=[*special.values(), *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([" ".join(WORDS), "User: Assistant: USER: ASSISTANT: user assistant"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=extra, model_max_length=512, **special, **kwargs
    )


def word_piece_tokenizer(extra: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """Lower-cased words, other ones spelt; as the playground's."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*special.values(), *extra, *WORDS, "user", "assistant", ":", "?", *letters, *(f"##{c}" for c in letters)]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([*special.values(), *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=extra, model_max_length=512, **special, **kwargs
    )


def _text_config(kind: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # large enough that tokens differ clearly
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "lfm2":
        config |= {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    return config


def _save(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_idefics3(tmp: Path, text: str = "llama", splitting: bool = False) -> Path:
    """Idefics3 over Llama (byte-level BPE) or Lfm2 (WordPiece); 4 tokens an image, or a tile."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    folder = tmp / f"idefics3-{text}{'-splitting' * splitting}"
    if folder.exists():
        return folder
    extra = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    extra += [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)] if splitting else []
    tokenizer = (word_piece_tokenizer if text == "lfm2" else byte_level_tokenizer)(extra)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64 if splitting else 32},
        max_image_size={"longest_edge": 32},
        do_image_splitting=splitting,
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS3_TEMPLATE)
    torch.manual_seed(0)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.3,
        },
        text_config=_text_config(text, tokenizer),
        tie_word_embeddings=False,
    )
    return _save(folder, Idefics3ForConditionalGeneration(config), processor)


def tiny_llava(tmp: Path) -> Path:
    """LLaVA over a CLIP tower and Llama; 16 tokens an image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp / "llava"
    if folder.exists():
        return folder
    tokenizer = byte_level_tokenizer(["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=_text_config("llama", tokenizer),
        vision_feature_layer=-1,
    )
    return _save(folder, LlavaForConditionalGeneration(config), processor)


def tiny_qwen2_vl(tmp: Path) -> Path:
    """Qwen2-VL, whose processor wants a video processor and whose images take as many tokens as they are large."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    folder = tmp / "qwen2-vl"
    if folder.exists():
        return folder

    class ImageOnly(Qwen2VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    ImageOnly.__name__ = "Qwen2VLProcessor"
    extra = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_level_tokenizer(extra)
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=256, max_pixels=2048)
    processor = ImageOnly(images, tokenizer, None, chat_template=QWEN_TEMPLATE)
    torch.manual_seed(0)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in extra}
    config = Qwen2VLConfig(
        text_config=_text_config("qwen2_vl_text", tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return _save(folder, Qwen2VLForConditionalGeneration(config), processor)
