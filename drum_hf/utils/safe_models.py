"""Models and adapters from untrusted folders and repositories: what they may hold, checked before anything loads them.

Without `trust_remote_code` a model's folder may hold safetensors, JSON of plain values, and text. It names no code, no
other repository and no file outside of itself, and its tokenizer's patterns can't take exponential time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DrumError, SavedFileError
from .files import leads_outside, read_json, refuse_special, settled
from .hub import commit_of, fetch_snapshot
from .optional import adapting, resolve_name

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "MODEL_FILES",
    "ModelSource",
    "check_adapter",
    "check_extent",
    "check_model",
    "check_sizes",
    "check_tokenizer",
    "find_model",
    "read_object",
    "reading_adapter",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

#: Settings of the model, its processor and its generation.
_SETTINGS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "tokenizer_config.json", "chat_template.json"),
)
#: What else is fetched: vocabularies and templates.
_TEXTS = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
    "sentence_bert_config.json",
)
_PATTERNS = (*_SETTINGS, *_TEXTS, WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors", ADAPTER_CONFIG, ADAPTER_WEIGHTS)
#: What a saved model or adapter may consist of, at the top of its folder; a later save replaces all of it.
MODEL_FILES = tuple(pattern.partition("/")[0] for pattern in _PATTERNS)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
#: Of a file of settings or a vocabulary; our choice (Gemma's tokenizer.json, one of the largest, has 33 MB).
_MOST_BYTES = 64 << 20

_ATTENTION = {"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "grouped_mm"}
_QUANTIZATION = {"awq", "bitsandbytes", "compressed-tensors", "gptq"}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "auto"}
#: Where a name or path stands that transformers only notes, and where users' words stand.
_NOTES = {"_name_or_path", "name_or_path", "id2label", "label2id", "chat_template", "special_tokens_map_file"}
_NOTES |= {"stop_strings", "license"}
_PLACE = re.compile(r"[\w.~@:-]*[/\\]")

#: Part of a setting's name -> the most that it may be in an encoder; "" for every other (vocabularies have a million
#: entries).
_LARGEST = {
    "layers": 1 << 10,
    "height": 1 << 12,
    "width": 1 << 12,
    "edge": 1 << 12,
    "image_size": 1 << 12,
    "": 1 << 24,
}

#: Of a pattern: its characters; in each of its alternatives, repetitions without a bound (the time then grows with the
#: cube of a text's length at most) and ways to take what is optional or has a bound. Our choice; published tokenizers
#: have 2 such repetitions and 28 ways. An adapter's patterns, which match names of modules, may have more.
_PATTERN_LENGTH, _REPETITIONS, _IN_NAMES, _WAYS = 4_096, 2, 6, 4_096
#: Of a tokenizer: how many times longer normalizing may make a text, and levels of nesting; our choice.
_GROWTH, _NESTING = 16, 12
_CHARMAP_TEXT = 256  # bytes that one character may become in a sentencepiece map (NFKC's longest has 33)

#: Settings of a LoRA adapter that may be given, and their types. Those of peft's others must be off.
_LORA = {
    **dict.fromkeys(("base_model_name_or_path", "peft_version", "revision", "task_type", "bias"), (str,)),
    **dict.fromkeys(("exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"), (str, list)),
    **dict.fromkeys(("fan_in_fan_out", "inference_mode", "lora_bias", "use_dora", "use_rslora"), (bool,)),
    **dict.fromkeys(("alpha_pattern", "auto_mapping", "rank_pattern"), (dict,)),
    "ensure_weight_tying": (bool,),
    "init_lora_weights": (bool, str),
    "layers_to_transform": (int, list),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "megatron_core": (str,),  # of no effect without megatron_config
    "peft_type": (str,),
    "qalora_group_size": (int,),  # of no effect without use_qalora
    "r": (int,),
    "target_modules": (str, list),
}
#: Settings that peft takes for regular expressions, in their values or keys.
_ADAPTER_PATTERNS = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"),
    *("rank_pattern", "alpha_pattern"),
)
_REMEDY = "do not use it, or download or save it again"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from, and the arguments for transformers.

    Attributes:
        place: for `from_pretrained`: a folder that was checked; with `trust_remote_code`, what the user named.
        options: for every `from_pretrained` of it: configuration, processor, model.
        weights: besides these, for the model's.
    """

    name: str
    place: str
    options: dict[str, Any]
    weights: dict[str, Any]

    @property
    def commit(self) -> str | None:
        """The commit on the Hub, once the model was loaded; None for a folder."""
        if os.path.isdir(self.name):
            return None
        snapshot = re.search(r"/snapshots/([0-9a-f]{40})/?$", Path(self.place).as_posix())
        where = {name: self.options.get(name) for name in ("revision", "cache_dir")}
        return snapshot[1] if snapshot else commit_of(self.place, **where)


def find_model(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    trust_remote_code: bool = False,
    adapter: bool = False,
    weights: bool = True,
) -> ModelSource:
    """Find a model, fetch it where it is on the Hub, and check its files.

    Args:
        name_or_path: folder, Hub id, or a model that ships with the package.
        trust_remote_code: leave all this to transformers: nothing is checked.
        adapter: whether an adapter may be there instead of a model.
        weights: False leaves the weights out: settings and processor are fetched and checked alone.

    Raises:
        SavedFileError: a file is not what it may be, or there are no weights as safetensors; see `check_model`.
        HubError: it can't be fetched.
        OSError: the folder holds no model.
    """
    name = resolve_name(name_or_path)
    if trust_remote_code:
        given = {"revision": revision, "token": token, "cache_dir": cache_dir}
        options = {key: value for key, value in given.items() if value is not None}
        options |= {"local_files_only": local_files_only, "force_download": force_download}
        return ModelSource(name, name, {**options, "trust_remote_code": trust_remote_code}, {})
    folder = settled(name)
    if not folder.is_dir():
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        patterns = _PATTERNS if weights else (*_SETTINGS, *_TEXTS)
        hub |= {"force_download": force_download, "patterns": patterns}
        folder = fetch_snapshot(name, revision=revision, **hub)
        is_pickled = not any((folder / file).exists() for file in (WEIGHTS, WEIGHTS_INDEX, ADAPTER_CONFIG))
        if weights and revision is None and not local_files_only and is_pickled:
            converted = _conversion(name, token)
            folder = folder if converted is None else fetch_snapshot(name, revision=converted, **hub)
    check_model(folder, adapter=adapter, weights=weights)
    safe = {"use_safetensors": True, "weights_only": True}
    return ModelSource(name, os.fspath(folder), {"trust_remote_code": False, "local_files_only": True}, safe)


def _conversion(name: str, token: str | bool | None) -> str | None:
    """The pull request by which the Hub's own converter offers a repository's weights as safetensors."""
    from huggingface_hub import HfApi

    try:
        found = HfApi(token=token).get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request")
        return next((each.git_reference for each in found if each.status == "open"), None)
    except Exception:  # any failure of a request: the error to come says that there are no safetensors
        return None


def check_model(folder: Path, *, adapter: bool = False, weights: bool = True) -> None:
    """Check everything in a folder that transformers may read of a model: names, links, sizes, keys, values.

    Args:
        adapter: whether an adapter may be there instead of a model.
        weights: whether weights have to be there, and are checked.

    Raises:
        SavedFileError: a file leads out of the folder or is none; settings name code, another repository or file, or
            what loads such; the weights are no safetensors; the tokenizer is one that can take without end.
        OSError: there is no model in it.
    """
    if not (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        raise OSError(f"{folder}: expected a model's folder, it has no config.json")
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        _check_file(path, folder)
    if (folder / ADAPTER_CONFIG).exists() and adapter:
        check_adapter(folder)
        return
    if (folder / ADAPTER_CONFIG).exists():
        raise SavedFileError(
            f"{folder}: expected a whole model, got one with an adapter ({ADAPTER_CONFIG}): load its base model, and "
            "pass this folder as the adapter"
        )
    for name in _SETTINGS:
        if (folder / name).exists():
            _check_settings(folder / name, read_object(folder / name))
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder / "tokenizer.json")
    if weights:
        _check_weights(folder)


def _check_file(path: Path, folder: Path) -> None:
    if leads_outside(path, folder):
        raise SavedFileError(f"{path}: a link that leads out of the folder; {_REMEDY}")
    if path.is_dir():
        return
    if not path.is_file():
        raise SavedFileError(f"{path}: expected a file, got a pipe, a device or a dead link; {_REMEDY}")
    small = path.suffix in (".json", ".jinja", ".txt", ".model")
    if small and path.stat().st_size > _MOST_BYTES:
        raise SavedFileError(
            f"{path}: expected at most {_MOST_BYTES >> 20} MB, got {path.stat().st_size >> 20} MB; {_REMEDY}"
        )
    if path.name in _TEXTS or path.suffix == ".jinja":
        try:
            path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SavedFileError(f"{path}: expected a text in UTF-8 ({error}); {_REMEDY}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SavedFileError: it can't be read, or is something else.
    """
    try:
        content = read_json(path, limit=_MOST_BYTES)
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise SavedFileError(f"{path}: expected a JSON object ({error}); {_REMEDY}") from error
    return content


def _check_settings(path: Path, content: Any, name: str = "") -> None:
    """Nothing that leads elsewhere: no code, no repository, no path, no kernel, no method that fetches one."""
    if name in _NOTES:
        return
    if name == "quantization_config" and content:
        method = content.get("quant_method") if isinstance(content, dict) else content
        if str(method) not in _QUANTIZATION:
            raise _refusal(path, name, method, f"one of {', '.join(sorted(_QUANTIZATION))}")
    elif name in ("auto_map", "custom_pipelines", "transformers_weights", "fast_tokenizer_files") and content:
        raise _refusal(path, name, content, "none: it names files or code")
    elif name.endswith("_file") and content is not None:
        raise _refusal(path, name, content, "none")
    elif "attn_implementation" in name or "experts_implementation" in name:
        values = content.values() if isinstance(content, dict) else (content,)
        if any(not isinstance(value, bool | None) and str(value) not in _ATTENTION for value in values):
            raise _refusal(path, name, content, f"one of {', '.join(sorted(_ATTENTION))}")
    elif name in ("dtype", "torch_dtype") and isinstance(content, str) and content.split(".")[-1] not in _DTYPES:
        raise _refusal(path, name, content, f"one of {', '.join(sorted(_DTYPES))}")
    if isinstance(content, dict):
        for key, value in content.items():
            _check_settings(path, value, key)
    elif isinstance(content, list):
        for value in content:
            _check_settings(path, value, "")
    elif isinstance(content, str) and path.name != "tokenizer_config.json" and _PLACE.match(content):
        raise _refusal(path, name, content, "no path and no other repository")


def _refusal(path: Path, name: str, got: Any, expected: str) -> SavedFileError:
    return SavedFileError(
        f"{path}: {name!r} is {str(got)[:80]!r}, expected {expected}; do not use this model, or pass "
        "trust_remote_code=True if you trust whoever made it"
    )


def check_sizes(path: Path, content: Any, name: str = "") -> None:
    """Refuse numbers that would have the loader make an encoder, or pictures, larger than any machine's memory.

    Raises:
        SavedFileError: there is one.
    """
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else ((name, value) for value in content):
            check_sizes(path, value, str(key))
    elif isinstance(content, (int, float)):
        most = next((limit for part, limit in _LARGEST.items() if part in name), _LARGEST[""])
        if not abs(content) <= most:
            raise SavedFileError(f"{path}: {name!r} is {content:.3g}, far beyond what any encoder has; do not use it")


def _check_weights(folder: Path) -> None:
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return
    if not index.exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        got = f", got {others[0]}, a pickle, which can run code" if others else ""
        raise SavedFileError(
            f"{folder}: expected weights in {WEIGHTS}{got}; save the model with save_pretrained, pass the revision= "
            "that has safetensors, or pass trust_remote_code=True if you trust whoever made it"
        )
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise SavedFileError(f"{index}: expected a 'weight_map' of weights and their files; {_REMEDY}")
    for name in set(map(str, shards.values())):
        if not _SHARD.fullmatch(name) or not (folder / name).is_file():
            raise SavedFileError(
                f"{index}: it names {name[:80]!r}, expected files of the folder such as "
                f"model-00001-of-00002.safetensors; {_REMEDY}"
            )


def check_extent(folder: Path) -> None:
    """Refuse a configuration of a model far larger than the weights: what is missing would be made up, in memory.

    Raises:
        SavedFileError: it has more than twice as many numbers as the files.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModel

    held = 0
    for path in folder.glob("model*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as file:
                held += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SavedFileError(f"{path}: expected weights as safetensors ({error}); {_REMEDY}") from error
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if wanted > 2 * held + 1_000:
        raise SavedFileError(
            f"{folder / 'config.json'}: it describes a model of {wanted:,} numbers, and the weights have {held:,}; "
            f"{_REMEDY}"
        )


# Tokenizers


def check_tokenizer(path: Path) -> None:
    """Check that a tokenizer.json can be loaded and used in bounded time and memory.

    A pattern has at most two unbounded repetitions in each alternative, and none of a group; normalizing makes a text
    at most 16 times as long, and a character at most 256 bytes by a sentencepiece map.

    Raises:
        SavedFileError: it may take longer, or more.
    """
    content = read_object(path)
    growth = 1.0
    # Iterative: what is nested too deep is refused, not followed.
    waiting = [(value, 1) for key, value in content.items() if key not in ("model", "added_tokens")]
    while waiting:
        part, depth = waiting.pop()
        if depth > _NESTING:
            raise SavedFileError(f"{path}: expected parts nested at most {_NESTING} deep, got more; {_REMEDY}")
        if isinstance(part, list):
            waiting += [(value, depth) for value in part]
        if not isinstance(part, dict):
            continue
        if isinstance(pattern := part.get("Regex"), str) and (fault := _endless(pattern)):
            raise SavedFileError(f"{path}: the pattern {pattern[:80]!r} may match without end: {fault}; {_REMEDY}")
        if part.get("type") in ("Replace", "Prepend", "Precompiled"):
            growth *= _growth(path, part)
        waiting += [(value, depth + 1) for key, value in part.items() if key != "precompiled_charsmap"]
    if growth > _GROWTH:
        raise SavedFileError(f"{path}: it makes texts up to {growth:.3g} times as long; {_REMEDY}")
    for setting in ("truncation", "padding"):
        check_sizes(path, content.get(setting))
    model = content.get("model")
    if isinstance(model, dict):
        longest = model.get("max_input_chars_per_word")
        if isinstance(longest, (int, float)) and longest > 1_000:
            raise SavedFileError(f"{path}: 'max_input_chars_per_word' is {longest:.3g}, expected 1000; {_REMEDY}")
        if model.get("dropout"):
            raise SavedFileError(f"{path}: its 'dropout' makes tokens random, expected none; {_REMEDY}")


def _growth(path: Path, part: dict[str, Any]) -> float:
    """How many times longer a normalizer can make a text."""
    if part["type"] == "Precompiled":
        try:
            data = base64.b64decode(part.get("precompiled_charsmap") or "")
        except (TypeError, ValueError, binascii.Error) as error:
            raise SavedFileError(f"{path}: its 'precompiled_charsmap' can't be read ({error}); {_REMEDY}") from error
        texts = data[4 + int.from_bytes(data[:4], "little") :]
        if (longest := max(map(len, texts.split(b"\0")))) > _CHARMAP_TEXT:
            raise SavedFileError(f"{path}: its map makes {longest} bytes of a character; {_REMEDY}")
        return 1.0
    added = part.get("content") if part["type"] == "Replace" else part.get("prepend")
    pattern = part.get("pattern")
    whole = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(str(added or "")) / max(1, len(str(whole or ""))))


def _endless(pattern: str, most: int = _REPETITIONS) -> str | None:
    """What may make a regular expression take without end, or None."""
    if len(pattern) > _PATTERN_LENGTH:
        return f"it has {len(pattern)} characters"
    plain = _without_classes(pattern)
    if plain is None:
        return "its brackets don't match, or it refers back to a group"
    if re.search(r"\(\?(?!:|=|!|<=|<!|>|[imsx-]+[:)])", plain):
        return "it has a group of a kind that is not supported"
    plain = re.sub(r"\(\?(?:<?[=!]|>|[imsx-]*:?)", "(", plain)
    plain = re.sub(r"\([^()*+?|{}]*(?:\{\d+\})?\)", "c", plain)  # of one length: as good as a character
    if re.search(r"\)[*+{]", plain):
        return "it repeats a group"
    groups: list[int] = []  # alternatives in each group that is open
    repetitions, ways = 0, 1
    for part in re.findall(r"[*+?][+?]?|\{\d*,?\d*\}[+?]?|.", plain, re.DOTALL):
        if part == "(":
            groups.append(1)
        elif part == ")" and groups:
            ways *= groups.pop()
        elif part == "|" and groups:
            groups[-1] += 1
        elif part == "|":
            repetitions, ways = 0, 1
        elif part[0] in "*+":
            repetitions += 1
        elif part[0] == "?":
            ways *= 2
        elif part[0] == "{" and len(part) > 1:
            low, comma, high = part.strip("{}+?").partition(",")
            if comma and not high:
                repetitions += 1
            ways *= 1 + max(int(low or 0), int(high or 0))
        if repetitions > most:
            return f"more than {most} repetitions follow one another"
        if ways > _WAYS:
            return "there are too many ways to match it"
    return None


def _without_classes(pattern: str) -> str | None:
    """The pattern with "c" for each escape and each class of characters; None where that can't be told."""
    out: list[str] = []
    depth = place = 0
    while place < len(pattern):
        mark = pattern[place]
        if mark == "\\":
            following = pattern[place + 1 : place + 2]
            if not following or (depth == 0 and following in "123456789gk"):
                return None
            place += 2
            braces = re.match(r"\{[^{}]*\}", pattern[place:]) if following in "pPxuo" else None
            place += braces.end() if braces else 0
            if depth == 0:
                out.append("c")
            continue
        if mark == "[":
            depth += 1
            # "[]a]" and "[^]a]" hold a bracket
            opening = re.match(r"\[\^?\]?", pattern[place:])
            place += opening.end() if opening else 1
            if depth == 1:
                out.append("c")
            continue
        if depth == 0:
            out.append(mark)
        elif mark == "]":
            depth -= 1
        place += 1
    return "".join(out) if depth == 0 else None


# Adapters


@contextlib.contextmanager
def reading_adapter(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Check an adapter's files before peft reads them, and say what was read where it fails.

    Raises:
        SavedFileError: in place of nearly anything that peft, transformers and torch raise of a file that is none.
    """
    check_adapter(Path(folder))
    try:
        with adapting():
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            yield
    except DrumError:
        raise
    except Exception as error:
        raise SavedFileError(
            f"{os.fspath(folder)}: the adapter can't be put on this model ({error}); expected one that was trained on "
            "it; download or save it again"
        ) from error


def check_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of a LoRA adapter: of known keys and types, with numbers and patterns that can be used.

    Raises:
        SavedFileError: it is another, or its weights are no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    for file in (path, weights):
        if leads_outside(file, folder):
            raise SavedFileError(f"{file}: a link that leads out of the folder; {_REMEDY}")
    config = read_object(path)
    try:
        refuse_special(weights)
        with safe_open(weights, framework="numpy") as file:
            widest = max([0, *(side for key in file.keys() for side in file.get_slice(key).get_shape())])  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SavedFileError(f"{weights}: expected the adapter's weights ({error}); {_REMEDY}") from error
    if config.get("peft_type") != "LORA":
        raise SavedFileError(f"{path}: expected a LoRA adapter, got {str(config.get('peft_type'))[:80]!r}; {_REMEDY}")
    for name, value in config.items():
        if not value and not isinstance(value, str):
            continue
        if name not in _LORA:
            raise SavedFileError(f"{path}: {name[:80]!r} is not supported; {_REMEDY}")
        if not isinstance(value, _LORA[name]):
            kinds = " or ".join(kind.__name__ for kind in _LORA[name])
            raise SavedFileError(f"{path}: expected {name!r} to be {kinds}, got {type(value).__name__}; {_REMEDY}")
    for name in _ADAPTER_PATTERNS:
        for text in _texts(config.get(name)):
            if fault := _endless(text, _IN_NAMES):
                raise SavedFileError(
                    f"{path}: the pattern {text[:80]!r} in {name!r} may match without end: {fault}; {_REMEDY}"
                )
    ranks = config.get("rank_pattern")
    for rank in [config.get("r"), *(ranks.values() if isinstance(ranks, dict) else ())]:
        if isinstance(rank, (int, float)) and not 0 <= rank <= widest:
            raise SavedFileError(
                f"{path}: the rank {rank:.3g} is none of the adapter's weights, which have at most {widest}; {_REMEDY}"
            )
    return config


def _texts(value: Any) -> list[str]:
    """A text, or those in a list, or the keys of an object."""
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else []
    return [text for text in values if isinstance(text, str)]
