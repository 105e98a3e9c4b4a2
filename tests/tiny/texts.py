"""What the tiny models share: tokenizers trained on the spot, chat templates, decoder sizes, saving."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "what which colour shape word is the a of in this picture red green blue round square wug blick seven dax".split()  # noqa: SIM905
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ROLES = "User: Assistant: USER: ASSISTANT: user assistant model"

# Up to two other characters go before a word, so that what a template writes merges with a response's first letters.
_PIECES = r"[^\p{L}\p{N}]{0,2}\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MERGED = [f"{mark}{word}" for mark in (": ", "\n", "]", "] ", ">", "\n\n") for word in ("red", "seven", "a", "dax")]


@functools.cache
def _byte_level_backend(extra: tuple[str, ...], merging: bool, trim: bool) -> str:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces = [pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")] if merging else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merging)]
    )
    backend.decoder = decoders.ByteLevel()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=[*SPECIAL.values(), *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([" ".join(WORDS), ROLES, *_MERGED] * 3, trainer)
    return backend.to_str()


def byte_level_tokenizer(
    extra: list[str], *, merging: bool = True, trim: bool = False, **kwargs: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which a word's first token depends on what stands before it.

    Args:
        extra: special tokens beside the usual ones.
        merging: whether that is any two characters that are no letters; otherwise it is a space.
        trim: whether offsets leave out the whitespace that a token begins with, as GPT-2's do.
        kwargs: for the tokenizer.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_backend(tuple(extra), merging, trim)),
        additional_special_tokens=extra,
        model_max_length=512,
        **SPECIAL,
        **kwargs,
    )


def word_piece_tokenizer(extra: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """Lower-cased words, other ones spelt; as the playground's."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*SPECIAL.values(), *extra, *WORDS, "user", "assistant", ":", "?", *letters, *(f"##{c}" for c in letters)]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([*SPECIAL.values(), *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=extra, model_max_length=512, **SPECIAL, **kwargs
    )


def chatml(image: str, *, before: str = "", system: str = "") -> str:
    """The template of Qwen and those who followed it, with what it writes for an image."""
    first = f"<|im_start|>system\n{system}<|im_end|>\n"
    default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {first!r} }}}}{{% endif %}}" if system else ""
    return (
        before + default + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ "
        + repr(image)
        + " }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def text_config(kind: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Sizes of a decoder; weights large enough that tokens differ clearly."""
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "lfm2":
        config |= {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    return config | more


def vision_config(**more: Any) -> dict[str, Any]:
    """Sizes of a vision tower that sees 32 x 32 pixels as 4 x 4 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.3, **more}


def save(folder: Path, model: Any, processor: Any, videos: str | None = None) -> Path:
    """Save both; `videos` names the video processor that a repository of this family describes, too."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if videos is not None:
        file = folder / "processor_config.json"
        described = {"video_processor_type": videos, "do_sample_frames": True}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"video_processor": described}))
    return folder
