"""Options that several verbs share, and what is made of them."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..types import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from ..data import TripletTable
    from ..experiments.demo import Settings
    from ..lvlm.endpoint.model import OpenAILVLM
    from ..lvlm.local.model import TransformersLVLM
    from ..retriever.retriever import DemoRetriever

__all__ = [
    "TRAINING_QUERIES",
    "check_device",
    "column_options",
    "data_options",
    "default_to_no_lvlm",
    "default_to_teacher",
    "encoder_dtype_option",
    "group_of",
    "image_check",
    "ints",
    "load_images_of",
    "load_lvlm",
    "load_teacher",
    "make_settings",
    "model_options",
    "names",
    "read_queries",
    "read_table",
    "read_tables",
    "training_options",
    "write_json",
]

TRAINING_QUERIES = "table of training queries; by default every demonstration is one, which never sees its own group"


def ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,4, got {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def encoder_dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--encoder-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the encoder; by default as it was saved. It is trained in float32 in any case",
    )


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"name": "value"}}, got {text!r}')
    return found


def budget(text: str) -> int | str | dict[str, Any]:
    if text in ("auto", "published"):
        return text
    return int(text) if text.isdecimal() else json_object(text)


def model_options(parser: argparse.ArgumentParser, *, lvlm: bool = True, encoder: bool = True) -> None:
    group = parser.add_argument_group("models")
    if lvlm:
        group.add_argument(
            "--lvlm", default="playground/lvlm", help="folder or Hub id of the LVLM (default: %(default)s)"
        )
        group.add_argument("--lvlm-revision", help="branch, tag or commit of the LVLM")
        group.add_argument(
            "--dtype",
            choices=("auto", "float32", "bfloat16", "float16"),
            default="auto",
            help="of the LVLM (default: %(default)s, as it was saved)",
        )
        group.add_argument(
            "--batch-size", type=int, default=64, help="sequences of the LVLM in a forward, at most (%(default)s)"
        )
        group.add_argument(
            "--max-batch-tokens",
            type=int,
            help="tokens of the LVLM in a forward, at most; by default what memory holds",
        )
        group.add_argument(
            "--image-budget",
            type=budget,
            default="auto",
            metavar="TOKENS",
            help="how closely images are looked at: tokens an image at most, or arguments of its image processor as "
            'JSON, such as \'{"do_image_splitting": false}\', or "published"; by default so that eight shots fit',
        )
        group.add_argument(
            "--query-image-budget", type=budget, metavar="TOKENS", help="the same for queries' images (--image-budget)"
        )
        group.add_argument(
            "--chat-template-kwargs",
            type=json_object,
            metavar="JSON",
            help="variables of the chat template, such as '{\"enable_thinking\": true}'; reasoning is off by default",
        )
        group.add_argument(
            "--score-end-of-turn",
            action=argparse.BooleanOptionalAction,
            help="whether the end of its turn is scored with an answer; by default where one choice begins another",
        )
        group.add_argument("--device-map", metavar="MAP", help='"auto" spreads the LVLM over all devices')
        group.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, flash_attention_2, …")
        group.add_argument("--load-in-4bit", action="store_true", help="quantize the LVLM (bitsandbytes)")
        group.add_argument("--load-in-8bit", action="store_true", help="quantize the LVLM (bitsandbytes)")
        group.add_argument(
            "--image-cache-dir", metavar="DIR", help="folder for image features that memory has no room for"
        )
        group.add_argument(
            "--endpoint",
            metavar="URL",
            action="extend",
            nargs="+",
            help="ask a chat endpoint that speaks OpenAI's protocol, such as http://localhost:8000/v1, or several "
            "that serve the same model; --lvlm is then the model's name there, and --lvlm-revision what you know of "
            "its weights",
        )
        group.add_argument(
            "--api-key-env", metavar="NAME", help="environment variable with the endpoint's key (OPENAI_API_KEY)"
        )
        group.add_argument(
            "--concurrency", type=int, default=8, help="requests at once, at each endpoint (%(default)s)"
        )
        group.add_argument("--max-requests", type=int, help="stop before the endpoint was sent more requests")
        group.add_argument("--max-tokens", type=int, help="stop when the endpoint has reported so many tokens")
    if encoder:
        group.add_argument(
            "--encoder", default="playground/clip", help="folder or Hub id of a CLIP or SigLIP (default: %(default)s)"
        )
    group.add_argument("--device", help="cuda, cpu, …; the best one there is by default")


def check_device(name: str) -> None:
    """Before anything is loaded for it.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a --device of this machine, such as cpu or cuda:0, got {name!r}: {reason}"
        ) from error


def column(text: str) -> tuple[str, str]:
    ours, _, theirs = text.partition("=")
    if not (ours and theirs):
        raise argparse.ArgumentTypeError(f"expected OURS=THEIRS such as prompt=question, got {text!r}")
    return ours, theirs


def column_options(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--columns",
        type=column,
        nargs="+",
        metavar="OURS=THEIRS",
        help="what the table calls id, image, prompt, response, references, group or label",
    )
    group.add_argument("--image-root", metavar="DIR", help="folder that image paths are relative to")
    group.add_argument(
        "--group",
        metavar="COLUMN",
        default="image",
        help="rows that may not demonstrate one another: image (those of one picture, the default), none, or the "
        "column that names their group",
    )


def data_options(
    parser: argparse.ArgumentParser,
    *,
    required: bool,
    queries: str | None = "table of queries with gold responses; by default split off --data",
    task: bool = True,
    metric: bool = True,
) -> None:
    """Where the demonstrations are, and if asked for, what `--queries` is (in words), the task and its metric."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        help="table of demonstrations: CSV, TSV, JSONL, JSON, parquet or Arrow, a folder of images with one of these, "
        "a folder of class folders, a zip of such a folder, or a data set of the Hub",
    )
    group.add_argument("--split", help="which split of --data, where there are several")
    if queries is not None:
        group.add_argument("--queries", help=queries)
        group.add_argument("--query-split", help="which split of --queries, or of --data where --queries is left out")
    column_options(group)
    group.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that can't be used, and count them"
    )
    if task:
        group.add_argument("--task", choices=TASKS, default="vqa", help="default: %(default)s")
    if metric:
        group.add_argument(
            "--metric", help="exact_match, vqa_accuracy, top1, cider_d or roc_auc; by default the task's own"
        )


def training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--rounds", type=int, help="rounds of proposing, scoring and training (3)")
    group.add_argument("--candidates", type=int, help="new pairs that each query buys in a round (10)")
    group.add_argument("--epochs", type=int, help="epochs in each round (3)")
    group.add_argument("--learning-rate", type=float, help="at its peak (3e-4)")
    group.add_argument("--train-batch-size", dest="batch", type=int, help="queries in a step (64)")
    group.add_argument("--list-size", type=int, help="candidates drawn for a query in a step (8)")
    group.add_argument(
        "--set-level-rounds", type=int, help="last rounds, in which DRUM scores candidates beside the best (1)"
    )
    group.add_argument("--lora", action="store_true", help="train LoRA adapters rather than all weights")
    group.add_argument("--seed", type=int, default=0, help="of training and sampling (%(default)s)")


def group_of(args: argparse.Namespace) -> str | None:
    """What `--group` means to `load_table`."""
    return None if args.group == "none" else args.group


def read_queries(args: argparse.Namespace) -> TripletTable | None:
    """The table of `--queries` or `--query-split`; None where neither is given."""
    path = args.queries or (args.data if args.query_split else None)
    return read_table(path, args, split=args.query_split) if path else None


def read_table(path: str, args: argparse.Namespace, *, split: str | None = None) -> TripletTable:
    """The table at a path; images that a local LVLM's processor refuses are bad rows."""
    from ..data import load_table

    lvlm = "" if getattr(args, "endpoint", None) else getattr(args, "lvlm", None) or ""
    # the models that ship take any image
    check = image_check(lambda: load_images_of(lvlm, args)) if lvlm and not lvlm.startswith("playground/") else None
    return load_table(
        path,
        split=split,
        on_bad_rows="skip" if args.skip_bad_rows else "raise",
        columns=dict(args.columns or ()),
        group=group_of(args),
        image_root=args.image_root,
        check_image=check,
    )


def load_images_of(lvlm: str, args: argparse.Namespace) -> Any:
    """An LVLM's processor, without its weights.

    Raises:
        ModelError: there is no such model.
    """
    from transformers import AutoConfig

    from ..lvlm.local.processors import load_processor
    from ..utils.optional import loading
    from ..utils.safe_models import find_model

    with loading("an LVLM", lvlm):
        source = find_model(lvlm, revision=getattr(args, "lvlm_revision", None), weights=False)
        return load_processor(
            source.place, AutoConfig.from_pretrained(source.place, **source.options), **source.options
        )


def image_check(load: Callable[[], Any]) -> Callable[[Image], None]:
    """For `load_table`: refuses images that a processor refuses, by their size.

    Args:
        load: makes the processor, when the first image is there.
    """
    from ..errors import ImageError

    processor = functools.cache(load)
    refused: dict[tuple[int, int], str] = {}  # "" where it is taken

    def check(image: Image) -> None:
        if image.size not in refused:
            images = processor().image_processor
            try:
                images(images=[image], return_tensors="pt")
                refused[image.size] = ""
            # Processors raise what they like.
            except Exception as error:
                refused[image.size] = f"{type(error).__name__}: {error}"
        if refused[image.size]:
            raise ImageError(
                f"the LVLM's processor refuses this image of {image.width} x {image.height} pixels "
                f"({refused[image.size]}); crop it"
            )

    return check


def read_tables(args: argparse.Namespace) -> tuple[TripletTable, TripletTable]:
    from ..experiments.demo import split_table

    table, queries = read_table(args.data, args, split=args.split), read_queries(args)
    return split_table(table) if queries is None else (table, queries)


def load_lvlm(args: argparse.Namespace, name: str | None = None) -> TransformersLVLM | OpenAILVLM:
    """The LVLM of `--lvlm`, or a local one of another name under the same options."""
    if name is None and args.endpoint is not None:
        return _connect(args)
    if name is None and (args.api_key_env, args.max_requests, args.max_tokens) != (None, None, None):
        raise ValueError("--api-key-env, --max-requests and --max-tokens are for an endpoint; give its --endpoint URL")
    from ..lvlm.local.model import TransformersLVLM

    return TransformersLVLM.from_pretrained(
        name or args.lvlm,
        revision=None if name else args.lvlm_revision,
        dtype=args.dtype,
        device=args.device,
        batch_size=args.batch_size,
        max_batch_tokens=args.max_batch_tokens,
        image_cache_dir=args.image_cache_dir,
        image_budget=args.image_budget,
        query_image_budget=args.query_image_budget,
        chat_template_kwargs=None if name else args.chat_template_kwargs,
        score_end_of_turn=args.score_end_of_turn,
        device_map=args.device_map,
        attn_implementation=args.attn_implementation,
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
    )


def describe_images(lvlm: TransformersLVLM | OpenAILVLM, table: TripletTable) -> str:
    """A line on what the table's first image costs a local LVLM, and what it would under other budgets; or ""."""
    from ..lvlm.local.model import TransformersLVLM

    image = next((row.image for row in table if row.image is not None), None)
    if image is None or not isinstance(lvlm, TransformersLVLM):
        return ""
    tokens = lvlm.image_tokens(image)
    others = [f"{n:,} ({budget})" for budget, n in lvlm.other_budgets(image).items() if n != tokens]
    more = f"; under other budgets {', '.join(others)}" if others else ""
    return f"an image ({image.width} x {image.height}) takes {tokens:,} tokens (--image-budget){more}\n"


def default_to_teacher(parser: argparse.ArgumentParser) -> None:
    """Have `load_teacher` know whether the user named an LVLM."""
    default_to_no_lvlm(parser, "that which the retriever learned from, or playground/lvlm")


def default_to_no_lvlm(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Leave `--lvlm` None where the user names none; `meaning` says what that is in the help."""
    action = parser._option_string_actions["--lvlm"]
    action.default = None
    action.help = f"folder or Hub id of the LVLM (default: {meaning})"


def load_teacher(args: argparse.Namespace, retriever: DemoRetriever | None) -> TransformersLVLM | OpenAILVLM:
    """The LVLM of `--lvlm`; where that is left out, the one that the retriever learned from, or the playground's."""
    if args.lvlm is not None:
        return load_lvlm(args)
    teacher = (retriever.teacher if retriever is not None else None) or {}
    args.lvlm = teacher.get("name") or "playground/lvlm"
    args.lvlm_revision = args.lvlm_revision or teacher.get("revision")
    try:
        return load_lvlm(args)
    except ModelError as error:
        raise ModelError(f"{error}; it is what the retriever learned from: name the LVLM by --lvlm") from error


def _connect(args: argparse.Namespace) -> OpenAILVLM:
    import os

    from ..lvlm.endpoint.model import OpenAILVLM

    key = None
    if args.api_key_env is not None:
        key = os.environ.get(args.api_key_env)
        if key is None:
            raise ValueError(f"expected a key in the environment variable {args.api_key_env}, which is not set")
    return OpenAILVLM(
        args.lvlm,
        base_url=args.endpoint,
        api_key=key,
        revision=args.lvlm_revision,
        max_concurrency=args.concurrency,
        max_requests=args.max_requests,
        max_tokens=args.max_tokens,
        extra_body={"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else None,
    )


def make_settings(args: argparse.Namespace, **more: Any) -> Settings:
    from ..experiments.demo import Settings

    given = {
        "rounds": args.rounds,
        "candidates": args.candidates,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch,
        "list_size": args.list_size,
        "set_level_rounds": args.set_level_rounds,
        "lora": args.lora or None,
        "seed": args.seed,
    }
    return Settings(**{name: value for name, value in (given | more).items() if value is not None})


def write_json(path: Path | None, content: Any, **about: Any) -> None:
    """Write a command's results where `--json` says, and their manifest beside them.

    Args:
        about: for `write_manifest`.
    """
    if path is not None:
        from ..utils.files import write_text
        from ..utils.manifest import manifest_beside

        write_text(path, json.dumps(content, indent=1) + "\n")
        manifest_beside(path, **about)
