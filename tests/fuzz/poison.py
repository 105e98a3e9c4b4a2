"""Settings that transformers, sentence-transformers and peft know, with values that lead elsewhere; files replaced."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

from .mutations import Evil, strange_files

Chance = random.Random

#: Of transformers: what chooses classes, files, repositories, kernels, places and formats.
TRANSFORMERS = (
    *("auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "architectures", "model_type"),
    *("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type"),
    *("video_processor_type", "slow_tokenizer_class", "image_processor", "tokenizer", "torch_dtype", "dtype"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"),
    *("quantization_config", "transformers_weights", "fast_tokenizer_files", "tokenizer_file", "vocab_file"),
    *("merges_file", "spm_file", "chat_template", "special_tokens_map_file", "extra_special_tokens"),
    *("added_tokens_decoder", "additional_special_tokens", "use_safetensors", "weights_only"),
    *("trust_remote_code", "revision", "code_revision", "local_files_only", "cache_dir", "subfolder"),
    *("adapter_kwargs", "_adapter_model_path", "device_map", "offload_folder", "offload_state_dict"),
    *("gguf_file", "kernel_config", "use_kernels", "backend", "hub_kernels", "tp_plan", "base_model_tp_plan"),
    *("ep_plan", "distributed_config", "state_dict", "weights_name", "variant", "proxies", "token"),
    *("use_auth_token", "text_config", "vision_config", "sub_configs", "backbone", "backbone_config"),
    *("use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs", "timm_model", "hidden_act"),
    *("pruned_heads", "problem_type", "loss_type", "id2label", "finetuning_task", "tokenizer_name"),
    *("generation_config", "watermarking_config", "compile_config", "cache_implementation", "cache_config"),
    *("assistant_model", "custom_generate", "prompt_lookup_num_tokens", "stop_strings", "sequence_bias"),
    *("max_length", "max_new_tokens", "num_hidden_layers", "hidden_size", "vocab_size"),
    *("max_position_embeddings", "image_size", "patch_size", "num_attention_heads", "size", "crop_size"),
    *("do_resize", "resample", "image_mean", "image_std", "rescale_factor", "model_max_length", "device"),
)
SENTENCE_TRANSFORMERS = (
    *("type", "path", "name", "idx", "model_args", "model_kwargs", "config_args", "config_kwargs"),
    *("tokenizer_args", "processor_kwargs", "tokenizer_kwargs", "tokenizer_name_or_path", "model_name_or_path"),
    *("transformer_task", "modality_config", "module_output_name", "backend", "unpad_inputs", "max_seq_length"),
    *("do_lower_case", "similarity_fn_name", "prompts", "default_prompt_name", "activation_function"),
    *("truncate_dim", "__version__", "base_model", "base_revision", "log_weights", "weights", "learn_weights"),
    *("kind", "family"),
)
PEFT = (
    *("peft_type", "auto_mapping", "base_model_name_or_path", "task_type", "inference_mode", "r", "lora_alpha"),
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("runtime_config", "use_dora", "use_rslora", "use_qalora", "qalora_group_size", "trainable_token_indices"),
    *("arrow_config", "alora_invocation_tokens", "ensure_weight_tying", "lora_bias", "bias", "fan_in_fan_out"),
    *("peft_version", "lora_dropout", "monteclora_config"),
)
#: Of tokenizer.json, of the index of weights, and of our own files.
OTHERS = (
    *("normalizer", "pre_tokenizer", "post_processor", "decoder", "pattern", "weight_map", "metadata"),
    *("total_size", "added_tokens", "truncation", "padding", "model", "files", "card", "teacher", "strategy"),
    *("format_version", "options", "support", "index", "included", "rows", "fingerprint", "images", "top_k"),
    *("adapter", "dimension", "support_encoder", "repo_id", "entries", "ids", "groups", "image_root", "image"),
    *("references", "label"),
)
KEYS = tuple(dict.fromkeys((*TRANSFORMERS, *SENTENCE_TRANSFORMERS, *PEFT, *OTHERS)))


def values(secret: Path) -> list[Any]:
    """What an attacker would put there; files of `secret` are models and pictures that nothing may open."""
    place = str(secret)
    return [
        place,
        f"{place}/secret.json",
        "../secret",
        "../../secret",
        "../../secret/model.safetensors",
        "stranger/repo",
        "stranger/repo--evil.Evil",
        "http://127.0.0.1:9/x.png",
        "file:///etc/passwd",
        "os.system",
        "subprocess.Popen",
        "kernels-community/flash-attn",
        "evil.py",
        "(a+)+$",
        "x" * 200_000,
        True,
        False,
        None,
        10**9,
        -1,
        float("nan"),
        "\ud800\x00\x1b[2J",
        {"weights_only": False, "dtype": "auto", "use_safetensors": False},
        {"trust_remote_code": True, "local_files_only": False, "cache_dir": place},
        {"": "disk"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "hqq", "modules": place},
        {"AutoModel": "evil.Evil", "AutoConfig": "stranger/repo--evil.Evil", "AutoTokenizer": ["evil.Evil", None]},
        {"base_model_class": "system", "parent_library": "os"},
        {"Regex": "(x+x+)+y|(a|aa)+$"},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000},
        {"a": {"b": [["../../secret/secret.png"] * 50] * 50}},
        ["evil.Evil", place],
        [f"{place}/evil.py", "../../secret/evil.py"],
        [[0, 10**6]],
        [],
        {},
        json.loads("[" * 200 + "]" * 200),
    ]


def hide(secret: Path) -> None:
    """What the values above name: a model, a picture, code, whose opening is noticed."""
    from .basics import picture

    secret.mkdir(parents=True, exist_ok=True)
    picture(7).save(secret / "secret.png")
    for name in ("secret.json", "config.json", "tokenizer.json", "adapter_config.json", "preprocessor_config.json"):
        (secret / name).write_text('{"model_type": "clip"}')
    for name in ("evil.py", "model.safetensors", "adapter_model.safetensors", "index.json"):
        (secret / name).write_text("raise SystemExit('code was run')")


def _objects(content: Any) -> list[dict[str, Any]]:
    found, waiting = [], [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found.append(one)
        waiting += list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
    return found


def poison(folder: Path, number: int, chance: Chance, secret: Path) -> str:
    """Set the `number`-th pair of a known setting and a hostile value, in one object of one JSON file."""
    files = sorted(path for path in folder.rglob("*.json") if path.is_file() and not path.is_symlink())
    if not files:
        return ""
    choices = values(secret)
    # two primes: neighbours differ in both, and all pairs have their turn
    key = KEYS[number * 7 % len(KEYS)]
    value = choices[(number + number // len(KEYS)) % len(choices)]
    path = chance.choice(files)
    content = json.loads(path.read_text("utf-8"))
    objects = _objects(content)
    having = [one for one in objects if key in one]
    if not objects:
        return ""
    target = chance.choice(having) if having and chance.random() < 0.7 else chance.choice([objects[0], *objects])
    target[key] = value
    if key == "model_type" or chance.random() < 0.15:  # the class that would read it
        target["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
        (path.parent / "evil.py").write_text("import os\nos.mkdir('code-was-run')\n")
    path.write_text(json.dumps(content), "utf-8")
    return f"{path.relative_to(folder).as_posix()}: {key} = {value!r:.60}"


def replacements(folder: Path) -> int:
    """How many ways there are to replace a file of this folder."""
    return len(_files(folder)) * _WAYS


_WAYS = 24


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    by_suffix: dict[str, list[Path]] = {}
    for path in files:
        by_suffix.setdefault(f"{path.parent}{path.suffix}", []).append(path)
    return sorted(path for paths in by_suffix.values() for path in paths[:3])  # pictures are many and alike


def replace(folder: Path, number: int, secret: Path, mark: Path) -> str:
    """Put the `number`-th thing in place of a file: a pickle, a link, a pipe, a folder, a file more beside it."""
    files = _files(folder)
    path, way = files[number // _WAYS % len(files)], number % _WAYS
    name = path.relative_to(folder).as_posix()
    strange = strange_files(mark)
    if way < 9:
        content = strange[(1, 2, 3, 4, 6, 8, 9, 10, 12)[way]]
        path.write_bytes(content)
        return f"{name}: strange content {way}"
    if way < 15:
        target = [secret / "secret.png", secret / "model.safetensors", secret / "secret.json"]
        target += [Path("/etc/passwd"), Path("/dev/zero"), path]
        path.unlink()
        path.symlink_to(target[way - 9])
        return f"{name}: a link to {target[way - 9]}"
    if way == 15:
        path.unlink()
        os.mkfifo(path)
        return f"{name}: a pipe"
    if way == 16:
        path.unlink()
        path.mkdir()
        return f"{name}: a folder"
    if way == 17:
        place = path.parent
        if place == folder:
            return ""
        shutil.rmtree(place)
        place.symlink_to(secret)
        return f"{place.name}: a link to a folder"
    if way == 18:  # as a killed save leaves it
        (folder / ".saved").write_text(".saving-0123456789abcdef")
        (folder / ".saving-0123456789abcdef").symlink_to(secret)
        return "a save that is a link"
    if way == 19:
        os.mkfifo(folder / ".saved")
        return "a pipe for the marker of a save"
    if way == 20:
        path.unlink()
        path.write_text("[" * 100_000)
        return f"{name}: deep"
    if way == 21:
        path.write_text(json.dumps({"a": "x" * (80 << 20)}))
        return f"{name}: 80 MB"
    stray = path.with_name(["pytorch_model.bin", "pytorch_model.bin.index.json"][way - 22])
    if way == 22:
        stray.write_bytes(pickle.dumps(Evil(mark)))
        if path.suffix == ".safetensors":
            path.unlink()
    else:
        (path.parent / "weights.txt").write_bytes(pickle.dumps(Evil(mark)))
        stray.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "weights.txt", "b": "../../secret/x.bin"}}))
    return f"{stray.name}: a file more"
