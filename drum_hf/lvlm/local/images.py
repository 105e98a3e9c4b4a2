"""Images as a model's inputs: each passes processor and vision tower once, if the family lets it, and is then kept."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ChatTemplateError, DrumError, RowError
from ...types import ICLRequest, Query, image_key
from ..prompts import ChatFormat, Row
from .processors import image_tokens

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["ImageInputs", "KeptImage"]

logger = logging.getLogger(__name__)

#: The most that is kept in memory where the user sets no limit, and the share of free memory it may take. Our choice.
_MOST_KEPT = 4 << 30
_SHARE_KEPT = 0.25
#: Numbers in the pixels of the images that pass the vision tower together. Our choice: on the CPU two images of 512 x
#: 512 pixels, the fastest of one to eight at the shape of SmolVLM-256M's tower; on a GPU eight.
_PIXELS_AT_ONCE = {"cpu": 2 * 3 * 512 * 512, "other": 8 * 3 * 512 * 512}

#: Images from which a CPU's products round alike, however many there are; fewer are filled up. Measured on the
#: playground's tower.
_FEWEST_AT_ONCE = 4

#: Ends the key of an image that is one of several of its conversation, in families to which that matters.
_PAIRED = "+"

#: Stands in the key of a query's image, where queries are shown otherwise than demonstrations.
_ASKED = "q"

_NOBODY = ICLRequest(Query(None, "nobody"))


@dataclasses.dataclass
class KeptImage:
    """What one image gives the model.

    Attributes:
        ids: the tokens that stand for it, in place of the placeholder.
        outputs: of the vision tower, by name; each (image tokens, hidden), on the host.
        inputs: of the processor, beside pixels, by name; first dimension 1.
    """

    ids: tuple[int, ...]
    outputs: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.outputs.values())


class ImageInputs:
    """Expands rows for one model, and keeps the features of the images that were shown last.

    Args:
        model, chat: what runs, and the format of its conversations.
        query_processor: what queries' images go through; None: what the demonstrations' go through.
        batch_size: images that pass the vision tower together, at most.
        limit: bytes of features to keep in memory; None: a quarter of the free memory, at most 4 GiB.
        folder: where features go that memory has no room for; called once, on first need. None: they are dropped.

    Attributes:
        tokens_an_image: the most seen so far, to estimate lengths.
        encoded: images that passed the vision tower so far.
        apart: whether queries' images go through a processor of their own; not before the trial is over.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        *,
        query_processor: Any = None,
        batch_size: int,
        limit: int | None = None,
        folder: Callable[[], Path] | None = None,
    ) -> None:
        self.model, self.format, self.processor = model, chat, chat.processor
        self.query_processor = query_processor
        self.apart = False
        self._text_through_processor = False
        self._shown_as: dict[str, str] = {}  # key of an image -> whose it is, for messages
        self.batch_size = batch_size
        self.limit = _affordable() if limit is None else limit
        self.tokens_an_image = 1
        self.encoded = 0
        self.kept: OrderedDict[str, KeptImage] = OrderedDict()
        self.kept_bytes = 0
        self._folder = folder
        self._at: Path | None = None
        self._one_by_one = False
        self._pixels = 0  # numbers in the pixels of the largest image seen
        self._output_type: Any = None
        self._stacked = False  # the family takes one tensor of features rather than one an image
        self._inner = getattr(model, "model", model)
        features = getattr(self._inner, "get_image_features", None)
        self._tower_takes = set(inspect.signature(features).parameters) if features is not None else set()
        self._model_takes = set(inspect.signature(model.forward).parameters)
        #: Processor outputs with one entry a token: 1 where an image's token stands, else 0.
        self.per_token: set[str] = set()
        #: Token that features take the place of; the placeholder in a rendered conversation may be another.
        self.image_id: int | None = getattr(model.config, "image_token_id", None)
        # An image alone in its conversation may be cut finer than one of several: it is then kept twice.
        #: Tokens of every image seen, those whose features are gone included.
        self.kept_ids: dict[str, int] = {}
        self._counts = "batch_num_images" in self._tower_takes

    # ---- the plain way ----

    def expand(self, rows: list[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        """Ids of each row with its images' tokens in place, and what else the model takes.

        Each row has images, or none has.

        Raises:
            RowError: the processor refuses an image.
        """
        pictured = any(row.images for row in rows)
        if not pictured and not self._text_through_processor:
            return [row.ids for row in rows], {}
        out = self._processed(rows, pictured)
        shape, mask = out["input_ids"].shape, out["attention_mask"].bool()
        ids = []
        for row, full, real in zip(rows, out["input_ids"], mask, strict=True):
            own = full[real].tolist()
            own = own[: len(own) - row.cut]
            if own[len(own) - row.tail :] != row.ids[len(row.ids) - row.tail :]:
                raise ChatTemplateError(
                    f"the processor and the tokenizer disagree on the response's tokens of query "
                    f"{row.request.query.id!r}; check that the processor's tokenizer is the one it was saved with"
                )
            ids.append(own)
            if pictured:
                grown = (len(own) - len(row.ids)) // len(row.images)
                self.tokens_an_image = max(self.tokens_an_image, 1 + grown)
        extra: dict[str, Any] = {}
        for key, value in out.items():
            if key in ("input_ids", "attention_mask"):
                continue
            # One entry a token, such as token_type_ids, or a row of entries, such as Mllama's cross_attention_mask.
            if tuple(getattr(value, "shape", ())[:2]) == tuple(shape):
                value = [v[real].tolist()[: len(i)] for v, real, i in zip(value, mask, ids, strict=True)]
                self.per_token.add(key)
            extra[key] = value
        return ids, extra

    def _processed(self, rows: list[Row], pictured: bool) -> Any:
        try:
            return self.processor(
                text=[row.text for row in rows],
                **({"images": [row.images for row in rows]} if pictured else {}),
                padding=True,
                return_tensors="pt",
                add_special_tokens=self.format.add_special_tokens,
            )
        except (ValueError, ZeroDivisionError) as error:
            if not pictured or isinstance(error, DrumError):
                raise
            for row in rows:  # which of them it is
                for key, image in zip(self.keyed([row])[0][0], row.images, strict=True):
                    self._one(self.processor, key, image, times=2 if key.endswith(_PAIRED) else 1)
            raise

    def try_text(self, chat: ChatFormat) -> None:
        """Find out whether the processor changes text without images (Janus adds a system prompt)."""
        for row in chat.prompt_rows([ICLRequest(Query(None, "which one?"))]):
            try:
                (ids,) = self.processor(text=[row.text], add_special_tokens=chat.add_special_tokens)["input_ids"]
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                logger.debug("the processor takes no text alone: %s", error)
                continue
            self._text_through_processor = [int(i) for i in ids] != row.ids

    # ---- with features that are kept ----

    @property
    def can_keep(self) -> bool:
        """Whether processor and model have what it takes; whether the result is right is for a trial to say."""
        image_token = getattr(self.processor, "image_token", None)
        return (
            image_token is not None
            and image_token == self.format.image_token
            and getattr(self.processor, "image_token_id", None) is not None
            and self.image_id is not None
            and "pixel_values" in self._tower_takes
            and "mm_encoder_outputs" in self._model_takes
        )

    def keyed(self, rows: Sequence[Row]) -> tuple[list[list[str]], dict[str, Image]]:
        """Each row's image keys in order, and the different images by key; one object is hashed once."""
        known: dict[int, str] = {}
        images: dict[str, Image] = {}
        keys = []
        for row in rows:
            own: list[str] = []
            for image in row.images:
                if id(image) not in known:
                    known[id(image)] = image_key(image)
                key = known[id(image)]
                if self.apart and len(own) == len(row.images) - 1 and row.request.query.image is not None:
                    key += _ASKED
                if self._counts and len(row.images) > 1:
                    key += _PAIRED
                self._shown_as[key] = _whose(row, len(own))
                images.setdefault(key, image)
                own.append(key)
            keys.append(own)
        return keys, images

    def place(self, row: Row, keys: Sequence[str], kept: Mapping[str, KeptImage]) -> list[int]:
        """A row's tokens with its images' tokens in place of the placeholders."""
        if self.format.expansions is not None:
            return row.ids  # the text was expanded before it was tokenized
        turn = iter(keys)
        return [t for i in row.ids for t in (kept[next(turn)].ids if i == self.processor.image_token_id else (i,))]

    def learn_expansion(self, images: Sequence[Image]) -> None:
        """Find out whether an image's tokens may replace its placeholder, or its text must.

        Raises:
            ValueError: neither may.
        """
        _, pictures = self.keyed([Row(_NOBODY, "", [], list(images))])
        for image in self.keep(pictures).values():
            if {image.ids[0], image.ids[-1]} <= self.format.special_ids:
                continue
            # Ordinary text at its ends may merge with what stands beside it: expand the text, then tokenize.
            text = self._text(image.ids)
            if self.format.tokenizer(text, add_special_tokens=False)["input_ids"] != list(image.ids):
                raise ValueError(f"the tokens that stand for an image are no text of their own: {text!r}")
            self.format.expansions = self._texts

    def _text(self, ids: Sequence[int]) -> str:
        return self.format.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _texts(self, images: list[Image]) -> list[str]:
        (keys,), pictures = self.keyed([Row(_NOBODY, "", [], images)])
        kept = self.keep(pictures)
        return [self._text(kept[key].ids) for key in keys]

    def keep(self, images: Mapping[str, Image]) -> dict[str, KeptImage]:
        """Features of the images by key, computed for those that are neither in memory nor on disk."""
        kept: dict[str, KeptImage] = {}
        missing: list[str] = []
        for key in images:
            if key in self.kept:
                self.kept.move_to_end(key)
                kept[key] = self.kept[key]
            elif (read := self._read(key)) is not None:
                kept[key] = read
                self._remember(key, read)
            else:
                missing.append(key)
        missing.sort(key=lambda key: _ASKED in key)  # what goes through another processor goes apart
        start = 0
        while start < len(missing):
            batch = missing[start : start + self._at_once]
            batch = [key for key in batch if (_ASKED in key) == (_ASKED in batch[0])]
            paired = batch[0].endswith(_PAIRED)
            if not self._pixels:  # how many go at once is known from the first
                self._encode([images[batch[0]]], batch[:1], paired=paired)
            # A few pictures are multiplied otherwise than many, and round otherwise; an image's features must not
            # depend on which others were known already, or a run that was taken up again would not be the same.
            fill = max(0, min(self._at_once, _FEWEST_AT_ONCE) - len(batch))
            filled = batch + batch[-1:] * fill
            made = self._encode([images[key] for key in filled], filled, paired=paired)
            made = made if made is None else made[: len(batch)]
            if made is None:
                self._one_by_one = True  # what comes of several can't be told apart
                continue
            start += len(batch)
            for key, image in zip(batch, made, strict=True):
                kept[key] = image
                self._remember(key, image)
        return kept

    @property
    def _at_once(self) -> int:
        if self._one_by_one or self._counts or not self._pixels:
            return 1
        most = _PIXELS_AT_ONCE.get(self.model.device.type, _PIXELS_AT_ONCE["other"])
        return max(1, min(self.batch_size, most // self._pixels))

    def _one(self, processor: Any, key: str, image: Image, times: int) -> None:
        """An image by itself through the processor.

        Raises:
            RowError: the processor refuses it.
        """
        token = getattr(processor, "image_token", None) or self.format.image_token
        if token is None:
            return
        try:
            processor(text=[token * times], images=[[image] * times], return_tensors="pt", padding=True)
        except (ValueError, ZeroDivisionError) as error:
            whose = self._shown_as.get(key, "a conversation")
            raise RowError(
                f"expected images that {type(processor).__name__} takes, but it refuses that of {whose} "
                f"({image.width} x {image.height} pixels): {error}; leave the row out, or crop the image"
            ) from error

    def _encode(self, images: list[Image], keys: list[str], paired: bool) -> list[KeptImage] | None:
        """Several images at once through processor and vision tower; None where they come out as one.

        With `paired`, an image is shown beside another (itself), and the first of the two is kept.
        """
        import torch

        times = 2 if paired else 1
        processor = self.query_processor if _ASKED in keys[0] else self.processor
        try:
            out = processor(
                text=[processor.image_token * times] * len(images),
                images=[[image] * times for image in images],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
        except (ValueError, ZeroDivisionError):
            for key, image in zip(keys, images, strict=True):  # which of them it is
                self._one(processor, key, image, times)
            raise
        ids = [tuple(i[m.bool()].tolist()) for i, m in zip(out["input_ids"], out["attention_mask"], strict=True)]
        ids = [own[: len(own) // times] for own in ids]
        taken = {k: v for k, v in out.items() if k in self._tower_takes and isinstance(v, torch.Tensor)}
        inputs = {k: self.on_device(v) for k, v in taken.items()}
        self._pixels = max(self._pixels, taken["pixel_values"].numel() // (len(images) * times))
        with torch.inference_mode():
            result = self._inner.get_image_features(**inputs, return_dict=True)
        self._output_type = type(result)
        features = result.pooler_output
        self._stacked = isinstance(features, torch.Tensor)
        deep = list(getattr(result, "deepstack_features", None) or [])
        if paired:
            parts = [[_flat(layer[0])] for layer in (features, *deep)]
        elif len(images) == 1:
            parts = [[_flat(features)], *([_flat(layer)] for layer in deep)]
        elif len(features) == len(images) and all(len(layer) == len(images) for layer in deep):
            parts = [[_flat(f) for f in layer] for layer in (features, *deep)]
        else:
            return None
        made = []
        for i, own in enumerate(ids):
            self.tokens_an_image = max(self.tokens_an_image, len(own))
            if len(parts[0][i]) != own.count(self.image_id):
                if len(images) == 1:
                    raise ValueError(f"{own.count(self.image_id)} tokens for {len(parts[0][i])} features")
                return None
            # Copies on the host: a view would keep the whole batch, and the device's memory is for running.
            outputs = {
                name: layer[i].detach().to("cpu", copy=True)
                for name, layer in zip(["pooler_output", *(f"deep.{n}" for n in range(len(deep)))], parts, strict=True)
            }
            # Grids and sizes: what positions are made of. Masks of pixels are as large as the pixels, and done with.
            beside = {
                k: v[i : i + 1].clone()
                for k, v in taken.items()
                if not k.startswith("pixel_") and len(v) == len(images)
            }
            made.append(KeptImage(own, outputs, beside))
        self.encoded += len(images)
        return made

    def merged(self, images: Sequence[KeptImage]) -> dict[str, Any]:
        """What `forward` takes in place of the pixels of these images, in the order they are shown."""
        if not images:
            return {}
        import torch

        def moved(name: str) -> list[torch.Tensor]:
            return [image.outputs[name].to(self.model.device) for image in images]

        features: Any = moved("pooler_output")
        fields: dict[str, Any] = {"pooler_output": torch.cat(features) if self._stacked else features}
        deep = [name for name in images[0].outputs if name.startswith("deep.")]
        if deep:
            fields["deepstack_features"] = [moved(name) for name in deep]
        return {"mm_encoder_outputs": {"image": self._output_type(**fields)}}

    def beside(self, images: Sequence[KeptImage]) -> dict[str, torch.Tensor]:
        """What the processor gives beside pixels, such as grids, of these images in order."""
        import torch

        # What comes by tiles has no one entry an image, unless all images are one tile each.
        names = [name for name in (images[0].inputs if images else ()) if all(name in i.inputs for i in images)]
        return {name: torch.cat([image.inputs[name] for image in images]) for name in names}

    def expand_kept(self, rows: list[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        """As `expand`, but with features in place of pixels."""
        keys, images = self.keyed(rows)
        kept = self.keep(images)
        ids = [self.place(row, mine, kept) for row, mine in zip(rows, keys, strict=True)]
        shown = [kept[key] for mine in keys for key in mine]
        extra = self.merged(shown)
        extra |= {k: v for k, v in self.beside(shown).items() if k in self._model_takes and "grid" in k}
        extra |= {name: [[int(i == self.image_id) for i in own] for own in ids] for name in self.per_token}
        return ids, extra

    @property
    def budgets_differ(self) -> bool:
        """Whether queries' images are shown otherwise than demonstrations'."""
        return self.query_processor is not None

    def tokens_of(self, image: Image, *, query: bool = False) -> int:
        """Tokens of an image that is one of several of its conversation.

        Raises:
            RowError: the processor refuses it.
        """
        processor = self.query_processor if query and self.budgets_differ else self.processor
        try:
            return image_tokens(processor, image)
        except (ValueError, ZeroDivisionError):
            self._one(processor, "", image, 1)
            raise

    def fewer_tokens(self, factor: int) -> ImageInputs:
        """The same images, joined with this one's memory of them, in a `factor`th of the tokens."""
        return _FewerTokens(self, factor)

    # ---- what is kept ----

    def _remember(self, key: str, image: KeptImage) -> None:
        self.kept[key] = image
        self.kept_ids[key] = image.ids.count(self.image_id)
        self.kept_bytes += image.nbytes
        while self.kept_bytes > self.limit and self.kept:
            oldest, dropped = self.kept.popitem(last=False)
            self.kept_bytes -= dropped.nbytes
            self._write(oldest, dropped)

    def _file(self, key: str) -> Path | None:
        if self._folder is None:
            return None
        if self._at is None:
            self._at = self._folder()
            self._at.mkdir(parents=True, exist_ok=True)
        return self._at / f"{key}.safetensors"

    def _write(self, key: str, image: KeptImage) -> None:
        import os

        import torch
        from safetensors.torch import save_file

        path = self._file(key)
        if path is None or path.exists():
            return
        tensors = {f"outputs.{k}": v.contiguous() for k, v in image.outputs.items()}
        tensors |= {f"inputs.{k}": v.contiguous() for k, v in image.inputs.items()}
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file({**tensors, "ids": torch.tensor(image.ids)}, part)
        part.replace(path)  # other processes see a whole file or none

    def _read(self, key: str) -> KeptImage | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._file(key)
        if path is None or not path.exists() or self._output_type is None:
            return None
        try:
            tensors = load_file(path)
            parts: dict[str, dict[str, torch.Tensor]] = {"outputs": {}, "inputs": {}}
            ids = tuple(tensors.pop("ids").tolist())
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                parts[kind][rest] = tensor
            if len(parts["outputs"]["pooler_output"]) != ids.count(self.image_id):
                raise KeyError("as many features as tokens")
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s can't be read (%s): the image is encoded anew", path, error)
            path.unlink(missing_ok=True)
            return None
        return KeptImage(ids, **parts)

    # ---- tensors ----

    def on_device(self, value: Any) -> Any:
        """A tensor on the model's device, floats in its dtype; anything else as it is."""
        if not hasattr(value, "to"):
            return value
        if value.is_floating_point():
            return value.to(self.model.device, dtype=self.model.dtype)
        return value.to(self.model.device)

    def pad(self, ids: list[list[int]], extra: dict[str, Any]) -> dict[str, Any]:
        """Tensors on the model's device, padded on the left."""
        import torch

        def stack(rows: list[list[Any]], fill: int) -> torch.Tensor:
            padded = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row) for row in rows], batch_first=True, padding_value=fill, padding_side="left"
            )
            return padded.to(self.model.device)

        inputs = {
            "input_ids": stack(ids, self.format.tokenizer.pad_token_id or 0),
            "attention_mask": stack([[1] * len(row) for row in ids], 0),
        }
        for key, value in extra.items():
            per_token = isinstance(value, list) and key not in inputs
            inputs[key] = stack(value, 0) if per_token else self.on_device(value)
        return inputs


class _FewerTokens(ImageInputs):
    """Another's images with neighbouring features averaged: `factor` tokens become one."""

    def __init__(self, whole: ImageInputs, factor: int) -> None:
        self.__dict__.update(whole.__dict__)
        self.whole, self.factor = whole, factor
        self.kept_ids = {}

    def keep(self, images: Mapping[str, Image]) -> dict[str, KeptImage]:
        kept = {key: self._joined(image) for key, image in self.whole.keep(images).items()}
        self._output_type, self._stacked = self.whole._output_type, self.whole._stacked
        self.kept_ids.update({key: image.ids.count(self.image_id) for key, image in kept.items()})
        return kept

    def _joined(self, image: KeptImage) -> KeptImage:
        import torch

        ids: list[int] = []
        owner: list[int] = []  # of each feature: which token it goes into
        tokens = -1
        for token, run in itertools.groupby(image.ids):
            length = len(list(run))
            if token != self.image_id:
                ids += [token] * length
                continue
            cells = _cells(length, self.factor)
            owner += [tokens + 1 + cell for cell in cells]
            tokens += max(cells) + 1
            ids += [token] * (max(cells) + 1)
        index = torch.tensor(owner)
        sizes = torch.bincount(index)[:, None]
        outputs = {
            name: torch.zeros(tokens + 1, values.shape[1], dtype=torch.float32).index_add_(0, index, values.float())
            for name, values in image.outputs.items()
        }
        return KeptImage(
            tuple(ids), {n: (v / sizes).to(image.outputs[n].dtype) for n, v in outputs.items()}, image.inputs
        )


def _whose(row: Row, number: int) -> str:
    """Whose image a conversation's image of this number is."""
    shown = [f"the demonstration {d.id!r}" for d in row.request.demonstrations if d.image is not None]
    return shown[number] if number < len(shown) else f"the query {row.request.query.id!r}"


def _cells(length: int, factor: int) -> list[int]:
    """Into which token each of `length` features goes: blocks of a square, where both are squares, else stretches."""
    side, block = math.isqrt(length), math.isqrt(factor)
    if side * side == length and block * block == factor and side % block == 0:
        across = side // block
        return [(i // side // block) * across + (i % side) // block for i in range(length)]
    return [i // factor for i in range(length)]


def _flat(features: Any) -> torch.Tensor:
    """(image tokens, hidden), whether they came as one tensor, one a tile or several in a list."""
    import torch

    tensor = features if isinstance(features, torch.Tensor) else torch.cat([_flat(part) for part in features])
    return tensor.reshape(-1, tensor.shape[-1])


def _affordable() -> int:
    import psutil

    return min(_MOST_KEPT, int(_SHARE_KEPT * psutil.virtual_memory().available))
