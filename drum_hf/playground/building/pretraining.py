"""The playground's encoder: rendered pictures, and a tiny CLIP on captions with parts left out."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..language import caption_for_pretraining, vocabulary
from ..scenes import ATTRIBUTES, DIGITS, FRAMES, digit_images, render_digit, render_scene

logger = logging.getLogger(__name__)

PIXELS = 32
PATCH = 8
PATCHES = (PIXELS // PATCH) ** 2
WIDTH = 128

#: Worlds draw their digits from the odd rows of scikit-learn's table, training from the even ones.
TRAINING_DIGITS = slice(0, None, 2)


@dataclasses.dataclass(frozen=True)
class PicturePool:
    """Pictures to train on: pixels (N, 3, 32, 32) uint8, and what each shows."""

    pixels: torch.Tensor
    values: list[dict[str, str]]
    frames: list[str]

    def __len__(self) -> int:
        return len(self.frames)

    def normalised(self, index: np.ndarray | slice) -> torch.Tensor:
        """Pixels in [-1, 1], as the playground's image processors give them."""
        return self.pixels[index].float().div_(127.5).sub_(1.0)


def shrink(image: Image.Image) -> np.ndarray:
    """What the playground's image processors do to square pictures before normalising: bicubic; (3, 32, 32) uint8.

    A wide picture the LVLM's processor first shrinks to 32 across, which blurs it a little more.
    """
    return np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def render_pool(
    seed: int | Sequence[int], scenes: int, digits: int, digits_from: np.ndarray | None = None
) -> PicturePool:
    """Render scenes and digits (of the training rows, unless others are given): 1.3 ms a picture on one core."""
    rng = np.random.default_rng([*np.atleast_1d(seed), 1])
    pixels = np.empty((scenes + digits, 3, PIXELS, PIXELS), dtype=np.uint8)
    values: list[dict[str, str]] = []
    frames = [str(f) for f in rng.choice(sorted(FRAMES), scenes + digits)]
    rows = np.arange(len(digit_images()[1]))[TRAINING_DIGITS] if digits_from is None else digits_from
    for i in tqdm(range(scenes + digits), desc="rendering the training pictures", unit="picture", mininterval=2):
        if i < scenes:
            shown = {name: str(rng.choice(options)) for name, options in ATTRIBUTES.items()}
            picture = render_scene(shown, frames[i], rng)
        else:
            row = int(rng.choice(rows))
            shown = {"digit": DIGITS[digit_images()[1][row]]}
            shown |= {name: str(rng.choice(ATTRIBUTES[name])) for name in ("colour", "background")}
            picture = render_digit(row, shown["colour"], shown["background"], frames[i], rng)
        values.append(shown)
        pixels[i] = shrink(picture)
    return PicturePool(torch.from_numpy(pixels), values, frames)


def build_tokenizer(
    special_tokens: dict[str, str], extra: tuple[str, ...] = (), words_too: tuple[str, ...] = (), **kwargs: Any
):
    """A WordPiece tokenizer over `vocabulary()` and more words; others are spelt by letters, so nothing is lost."""
    import string

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special_tokens.values(), *extra]
    letters = string.ascii_lowercase + string.digits
    words += [w for w in (*vocabulary(), *words_too) if w not in words]
    words += [c for c in letters if c not in words] + [f"##{c}" for c in letters]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([*special_tokens.values(), *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=list(extra), **special_tokens, **kwargs
    )


def build_clip(seed: int):
    """An untrained tiny CLIP and its processor."""
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer(
        {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}, model_max_length=32
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    torch.manual_seed(seed)
    tower = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    config = CLIPConfig(
        projection_dim=WIDTH,
        vision_config=tower | {"num_hidden_layers": 4, "image_size": PIXELS, "patch_size": PATCH},
        text_config=tower
        | {
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": bos,
            "eos_token_id": eos,
        },
    )
    images = CLIPImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS},
        do_center_crop=False,
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPModel(config), CLIPProcessor(images, tokenizer)


def train_steps(
    name: str,
    module: nn.Module,
    step_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    *,
    learning_rate: float,
    checkpoint: Path,
    weight_decay: float = 0.05,
    decay: bool = True,
    stop_when: Callable[[dict[str, float]], bool] | None = None,
) -> dict[str, float]:
    """Train `module` for at most `steps` steps with AdamW, warm-up and cosine `decay`; resume from `checkpoint`.

    `step_loss(step)` must be a pure function of the step's number, so that a resumed run sees the same batches.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    warm_up = min(60, steps // 10 + 1)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.02 if decay else 1)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, spent, report = 0, 0.0, {}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, spent, report = state["step"], state["seconds"], state["report"]
    began = time.perf_counter() - spent

    def save(step: int) -> None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(".part")
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state | {"step": step, "seconds": time.perf_counter() - began, "report": report}, part)
        part.replace(checkpoint)

    module.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, unit="step", mininterval=5)
    for step in bar:
        loss, figures = step_loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for key, value in figures.items():
            report[key] = value if step == 0 or key not in report else 0.95 * report[key] + 0.05 * value
        bar.set_postfix({k: f"{v:.3f}" for k, v in report.items()}, refresh=False)
        if (step + 1) % 100 == 0:
            logger.info("%s step %d: %s", name, step + 1, {k: round(v, 3) for k, v in report.items()})
        done = stop_when is not None and step >= 60 and stop_when(report)
        if (step + 1) % 200 == 0 or done:
            save(step + 1)
        if done:
            break
    bar.close()
    save(steps)
    module.eval()
    return report | {"seconds": time.perf_counter() - began}


def shifted(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Move a batch by up to one pixel each way, the edge repeated: a cheap augmentation."""
    dy, dx = rng.integers(0, 3, 2)
    padded = nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    return padded[..., dy : dy + PIXELS, dx : dx + PIXELS]


def _unique(texts: list[str]) -> Iterator[int]:
    seen: set[str] = set()
    for i, text in enumerate(texts):
        if text not in seen:
            seen.add(text)
            yield i


def _class_prompts(pool: PicturePool) -> list[tuple[str, list[str], np.ndarray]]:
    """For each attribute: its name, its values, and each row's value number (-1 where it has none)."""
    table = []
    for name, options in (*ATTRIBUTES.items(), ("digit", DIGITS), ("frame", tuple(sorted(FRAMES)))):
        number = {value: i for i, value in enumerate(options)}
        shown = pool.frames if name == "frame" else [values.get(name, "") for values in pool.values]
        table.append((name, list(options), np.array([number.get(v, -1) for v in shown])))
    return table


def train_vision(model, pool: PicturePool, *, seed: int, steps: int, checkpoint: Path, batch: int = 128):
    """Teach the CLIP's image tower to name every attribute through linear heads, which are then thrown away.

    Contrastive training alone reaches colours in 200 steps but shapes and digits only in many thousands.
    """
    prompts = _class_prompts(pool)
    heads = nn.ModuleList([nn.Linear(WIDTH, len(options)) for _, options, _ in prompts])
    module = nn.ModuleDict({"tower": model.vision_model, "heads": heads})

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 8, step])
        rows = rng.choice(len(pool), batch, replace=False)
        seen = model.vision_model(pixel_values=shifted(pool.normalised(rows), rng)).pooler_output
        loss, figures = torch.zeros(()), {}
        for head, (name, _, numbers) in zip(heads, prompts, strict=True):
            goal = torch.from_numpy(numbers[rows])
            shown = goal >= 0
            logits = head(seen[shown])
            loss = loss + nn.functional.cross_entropy(logits, goal[shown])
            if name in ("shape", "size", "count", "digit"):
                figures[name] = (logits.argmax(1) == goal[shown]).float().mean().item()
        return loss, {"loss": loss.item()} | figures

    return train_steps("image tower", module, step_loss, steps, learning_rate=2e-3, checkpoint=checkpoint)


def train_clip(model, processor, pool: PicturePool, *, seed: int, steps: int, checkpoint: Path, batch: int = 192):
    """Contrastive training on captions, and on single values against their attribute's other values.

    Captions of which a batch holds two alike count once. The second term is what a web of short captions gives a
    large CLIP; without it, ours needs ten times the steps to tell a star from a cross.
    """
    prompts = _class_prompts(pool)

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 2, step])
        rows = rng.choice(len(pool), batch, replace=False)
        captions = [caption_for_pretraining(pool.values[r], pool.frames[r], rng) for r in rows]
        kept = list(_unique(captions))
        rows, captions = rows[kept], [captions[i] for i in kept]
        text = processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        out = model(
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            pixel_values=shifted(pool.normalised(rows), rng),
        )
        target = torch.arange(len(rows))
        logits = out.logits_per_image
        loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        figures = {"loss": loss.item(), "top1": (logits.argmax(1) == target).float().mean().item()}
        values = [f"{name} {v}" if rng.random() < 0.5 else v for name, options, _ in prompts for v in options]
        text = processor.tokenizer(values, padding=True, return_tensors="pt")
        classes = model.get_text_features(**text).pooler_output
        classes = classes / classes.norm(dim=-1, keepdim=True)
        similarity = model.logit_scale.exp() * out.image_embeds @ classes.T
        first = 0
        for name, options, numbers in prompts:
            goal = torch.from_numpy(numbers[rows])
            shown = goal >= 0
            part = similarity[shown, first : first + len(options)]
            first += len(options)
            loss = loss + 0.5 * nn.functional.cross_entropy(part, goal[shown])
            if name in ("shape", "digit", "count"):
                figures[name] = (part.argmax(1) == goal[shown]).float().mean().item()
        return loss, figures

    return train_steps("tiny CLIP", model, step_loss, steps, learning_rate=7e-4, checkpoint=checkpoint)


@torch.no_grad()
def probe(features: torch.Tensor, pool: PicturePool, seed: int = 0) -> dict[str, float]:
    """Accuracy of a linear probe for each attribute on held-out rows of the pool; features (N, D)."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    x = features.float().numpy()
    scores = {}
    for name in (*ATTRIBUTES, "digit", "frame"):
        labels = [pool.frames[i] if name == "frame" else v.get(name) for i, v in enumerate(pool.values)]
        rows = rng.permutation([i for i, label in enumerate(labels) if label is not None])[:2000]
        if len(rows) < 100:
            continue
        cut = int(0.75 * len(rows))
        y = np.array([labels[i] for i in rows])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(max_iter=60).fit(x[rows[:cut]], y[:cut])
        scores[name] = float(fitted.score(x[rows[cut:]], y[cut:]))
    return scores
