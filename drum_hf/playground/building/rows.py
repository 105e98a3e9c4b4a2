"""Distinct playground rows by the thousand, and their joint embeddings, to measure an index on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...data import TripletTable
from ...encoders.joint import encode_items
from ...encoders.loading import build_encoder
from ...types import content_key, image_key
from ...utils.optional import resolve_name
from ..language import CAPTION_PROMPTS, CLASSIFY_PROMPTS, QUESTIONS, private_words
from ..scenes import ATTRIBUTES, DIGITS, FRAMES, digit_images, render_digit, render_scene

if TYPE_CHECKING:
    from PIL.Image import Image
    from sentence_transformers import SentenceTransformer

__all__ = ["PlaygroundVectors", "embed_rows", "playground_rows", "playground_table"]

#: Pictures of a batch: scenes with two questions each, scenes with a caption, and digits; 1,000 rows.
_ASKED, _CAPTIONED, _DIGITS = 400, 100, 100
#: One picture in so many of a batch is asked about, until there are enough queries.
_EVERY = 5
#: Of the batches; used nowhere else in the package.
_SEED = 500_000
_BLOCK = 1 << 13


@dataclasses.dataclass(frozen=True)
class PlaygroundVectors:
    """Joint embeddings (image, prompt, response) of distinct playground rows, by the playground's CLIP.

    A batch is 1,000 rows as a hard world's: twelve sites with words of their own, two questions about each of 400
    pictures, 100 captioned pictures, 100 handwritten digits. A fifth of the first batches' pictures are held out to be
    asked about. Rows are distinct by content: pixels, prompt and response.

    Args:
        count: rows of the table.
        queries: rows that are asked, in full, as one with a good draft is.
        cache: folder that keeps each batch's embeddings, so that a stopped run goes on where it was.
    """

    count: int
    queries: int
    cache: str

    name = "playground"

    def prepare(self, *, workers: int = 1) -> None:
        """Embed what is missing, one file a batch, and put the table together.

        Args:
            workers: processes of one thread each.
        """
        from tqdm.auto import tqdm

        if self._table.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        batches = -(-(self.count + self.queries) // (2 * _ASKED + _CAPTIONED + _DIGITS))
        missing = [number for number in range(batches) if not self._batch(number).exists()]
        spawn = multiprocessing.get_context("spawn")  # a forked torch may hang
        with (
            ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_torch_thread) as pool,
            tqdm(total=batches, initial=batches - len(missing), desc="embedding thousands of rows") as bar,
        ):
            futures = [pool.submit(_embed_batch, number, os.fspath(self._batch(number))) for number in missing]
            for future in as_completed(futures):
                future.result()
                bar.update()
        self._assemble()

    def _assemble(self) -> None:
        asked: list[np.ndarray] = []
        seen: set[bytes] = set()
        beside = self._table.with_suffix(".part")
        height = number = 0
        table = None
        while height < self.count:
            if not self._batch(number).exists():
                _embed_batch(number, os.fspath(self._batch(number)))
            with np.load(self._batch(number)) as batch:
                vectors, keys, pictures = batch["vectors"], batch["keys"], batch["pictures"]
            number += 1
            held_out = (pictures % _EVERY == 0) & (len(asked) < self.queries)
            asked += [*vectors[held_out]]
            seen |= {key.tobytes() for key in keys[held_out]}
            if table is None:
                shape = (self.count, vectors.shape[1])
                table = np.lib.format.open_memmap(beside, "w+", dtype=np.float32, shape=shape)
            fresh: list[int] = []
            for row in np.flatnonzero(~held_out).tolist():
                if (key := keys[row].tobytes()) not in seen and height + len(fresh) < self.count:
                    seen.add(key)
                    fresh.append(row)
            table[height : height + len(fresh)] = vectors[fresh]
            height += len(fresh)
        assert table is not None
        table.flush()
        np.save(self._asked, np.stack(asked[: self.queries]))
        os.replace(beside, self._table)

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` rows, float32 (n, dimension), some at a time."""
        table = np.load(self._table, mmap_mode="r")
        for start in range(0, count, _BLOCK):
            yield np.array(table[start : min(start + _BLOCK, count)])

    def asked(self) -> np.ndarray:
        """The queries, float32 (queries, dimension)."""
        return np.load(self._asked)

    @property
    def dimension(self) -> int:
        return self.asked().shape[1]

    def describe(self) -> dict[str, str | int]:
        """What they are, for the report."""
        return {
            "vectors": "joint embeddings of distinct playground rows by playground/clip",
            "dimension": self.dimension,
            "queries": len(self.asked()),
        }

    @property
    def _folder(self) -> Path:
        weights = Path(resolve_name("playground/clip"), "model.safetensors").read_bytes()
        return Path(self.cache, f"playground-{hashlib.sha256(weights).hexdigest()[:12]}")

    def _batch(self, number: int) -> Path:
        return self._folder / f"batch-{number:06d}.npz"

    @property
    def _table(self) -> Path:
        return self._folder / f"table-{self.count}-{self.queries}.npy"

    @property
    def _asked(self) -> Path:
        return self._folder / f"asked-{self.count}-{self.queries}.npy"


def playground_rows(number: int) -> tuple[list[Image], list[tuple[int, str, str]]]:
    """Batch `number` of playground rows, drawn as a hard world's are.

    Returns:
        The pictures, and each row's (place of its picture, prompt, response).
    """
    rng = np.random.default_rng([_SEED, number])
    frames, fresh = sorted(FRAMES), itertools.cycle(rng.permutation(private_words()))
    words: dict[tuple[str, str], str] = {}
    pictures: list[Image] = []
    rows: list[tuple[int, str, str]] = []

    def one(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    def answer(frame: str, value: str) -> str:
        if (frame, value) not in words:
            words[frame, value] = next(fresh)
        return f"{value} {words[frame, value]}"

    for place in range(_ASKED + _CAPTIONED + _DIGITS):
        frame = one(frames)
        values = {name: one(options) for name, options in ATTRIBUTES.items()}
        if place >= _ASKED + _CAPTIONED:
            digit = int(rng.integers(len(digit_images()[1])))
            pictures.append(render_digit(digit, values["colour"], values["background"], frame, rng))
            rows.append((place, one(CLASSIFY_PROMPTS), answer(frame, DIGITS[digit_images()[1][digit]])))
            continue
        pictures.append(render_scene(values, frame, rng))
        names = [str(name) for name in rng.choice(list(ATTRIBUTES), 2, replace=False)]
        answers = [answer(frame, values[name]) for name in names]
        if place < _ASKED:
            rows += [(place, one(QUESTIONS[name]), text) for name, text in zip(names, answers, strict=True)]
        else:
            rows.append((place, one(CAPTION_PROMPTS), " ".join([answer(frame, frame), *answers])))
    return pictures, rows


def embed_rows(
    encoder: SentenceTransformer, pictures: Sequence[Image], rows: Sequence[tuple[int, str, str]]
) -> np.ndarray:
    """The rows' joint embeddings, each picture and each text encoded once: parts that stand alone add up."""
    texts = [list(dict.fromkeys(row[part] for row in rows)) for part in (1, 2)]
    kinds: list[list[dict[str, Any]]] = [[{"image": picture} for picture in pictures]]
    kinds += [[{"text": [prompt]} for prompt in texts[0]], [{"text": [None, response]} for response in texts[1]]]
    weights = np.sqrt(np.asarray(list(cast(Any, encoder[0]).weights.values()), np.float32))
    parts = [encode_items(encoder, kind, show_progress=False) * w for kind, w in zip(kinds, weights, strict=True)]
    places = [{text: place for place, text in enumerate(several)} for several in texts]
    image, prompt, response = parts
    return (
        image[[row[0] for row in rows]]
        + prompt[[places[0][row[1]] for row in rows]]
        + response[[places[1][row[2]] for row in rows]]
    )


def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _embed_batch(number: int, path: str) -> None:
    """Write the embeddings of a batch's rows, their content keys and the numbers of their pictures."""
    pictures, rows = playground_rows(number)
    images = [image_key(picture) for picture in pictures]
    keys = b"".join(bytes.fromhex(content_key(images[place], *texts)) for place, *texts in rows)
    arrays = {
        "vectors": embed_rows(_encoder(), pictures, rows),
        "keys": np.frombuffer(keys, np.uint8).reshape(len(rows), -1),
        "pictures": np.asarray([place for place, *_ in rows], np.int32),
    }
    beside = f"{path}.{os.getpid()}.part"
    with open(beside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays for `allow_pickle`
    os.replace(beside, path)


@functools.cache
def _encoder() -> SentenceTransformer:
    return build_encoder("playground/clip", device="cpu")


def playground_table(count: int) -> TripletTable:
    """The first `count` playground rows as a table; rows of one picture are a group."""
    rows: list[dict[str, Any]] = []
    batch = 0
    while len(rows) < count:
        pictures, told = playground_rows(batch)
        for i, (place, prompt, response) in enumerate(told):
            row = {"id": f"{batch}-{i}", "image": pictures[place], "prompt": prompt, "response": response}
            rows.append(row | {"group": f"{batch}-{place}"})
        batch += 1
    return TripletTable.from_dataset(rows[:count])
