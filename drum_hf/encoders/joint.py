"""`JointEncoder`: a demonstration or query goes in as image, prompt and response; one unit vector comes out.

Each part is encoded on its own by a CLIP or SigLIP model, so that the dot product of two vectors is the weighted mean
of the parts' cosines. The paper describes the embedding as joint without giving its equation: this one is our choice.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from sentence_transformers.base.modules import Transformer
from torch import nn

from ..errors import NonFiniteEmbeddingError, SavedFileError
from ..utils.images import load_image
from ..utils.optional import bar_options, local_name, resolve_name
from ..utils.safe_models import (
    ADAPTER_CONFIG,
    check_adapter,
    check_extent,
    check_sizes,
    find_model,
    read_object,
)
from .adapters import active_adapter, attach, save_adapter

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["DTYPES", "PARTS", "JointEncoder", "encode_items", "read_saved"]

logger = logging.getLogger(__name__)

#: The parts of an item, in the order in which their vectors stand in the embedding.
PARTS = ("image", "prompt", "response")

#: What an encoder may be loaded in.
DTYPES = ("float32", "bfloat16", "float16")

_FAMILIES = ("clip", "siglip")
_KEYS = frozenset({"image", "text"})
#: What `save` writes the weights of the parts to, by sentence-transformers' name, and its keys; only the last three
#: are read.
SAVED_CONFIG = "sentence_bert_config.json"
_SAVED: dict[str, tuple[type, ...]] = {
    "transformer_task": (str,),
    "modality_config": (dict,),
    "module_output_name": (str,),
    "unpad_inputs": (bool,),
    "dtype": (str,),
    "learn_weights": (bool,),
    "log_weights": (list,),
}
_CHUNK = 16  # batches held as decoded images at once while a table is encoded
_BAR_FROM = 8  # batches; fewer are over before a progress bar could be read


class _Item(NamedTuple):
    image: Image | None
    prompt: str | None
    response: str | None


class JointEncoder(Transformer):
    """A sentence-transformers module that embeds (image, prompt, response) with a CLIP or SigLIP model.

    An item is a text (a prompt), a PIL image, or `{"image": image, "text": [prompt, response]}`, in which a part that
    is None, blank or missing is absent. Each part's embedding is scaled to unit length and by the square root of its
    weight; the three are concatenated. An absent part leaves zeros, and its weight goes to the parts that are there,
    in proportion. So the vectors have unit length and, for two items that have all parts, the dot product is
    `sum(weight[part] * cosine[part])`. A part of weight 0 is left out: it costs nothing and is not looked at.

    Texts are cut to the length of the text tower (77 tokens for CLIP, 64 for SigLIP), with one warning in the log that
    says how many.

    Args:
        model_name_or_path: a CLIP or SigLIP checkpoint on the Hub, or a folder.
        weights: of image, prompt and response, in this order or by name; not negative, scaled to sum to 1. Equal
            weights are our choice.
        learn_weights: train those weights that are not 0 along with the towers.
        dtype: of the towers, one of `DTYPES` or a `torch.dtype`. None: as they were saved.
        revision, token, cache_dir, local_files_only, force_download: as everywhere in transformers.
        trust_remote_code: load pickles, and run code that the model's files name. False: the files are checked, and
            only plain values, texts and safetensors are read.

    Attributes:
        base_model: what the weights of the towers were loaded from: the name or folder as it was given; a name where
            it is the folder of a model that ships with the package.
        base_revision: the commit of `base_model`, where it came from the Hub.

    Raises:
        ValueError: another model family or dtype, or weights that are negative, not finite, or all zero.
        SavedFileError: the model's files are not such as may be loaded.
        HubError: the model can't be fetched.
    """

    model: Any
    config_keys: list[str] = [*Transformer.config_keys, "learn_weights"]  # noqa: RUF012  # as the base class has it

    def __init__(
        self,
        model_name_or_path: str,
        *,
        weights: Sequence[float] | Mapping[str, float] = (1 / 3, 1 / 3, 1 / 3),
        learn_weights: bool = False,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        log_weights = _log_weights(weights)
        dtype = str(dtype or "auto").removeprefix("torch.")
        if dtype not in (*DTYPES, "auto"):
            raise ValueError(f"expected one of the dtypes {', '.join(DTYPES)}, or None, got {dtype!r}")
        source = find_model(
            model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            trust_remote_code=trust_remote_code,
        )
        if not trust_remote_code:
            _check_encoder(Path(source.place), model_name_or_path)
        super().__init__(
            source.place,
            model_kwargs={**source.options, **source.weights, "dtype": dtype},
            processor_kwargs=dict(source.options),
            config_kwargs=dict(source.options),
            unpad_inputs=False,
        )
        family = self.config.model_type
        if not (hasattr(self.processor, "image_processor") and hasattr(self.processor, "tokenizer")):
            family = "without a processor of images and texts"
        _check_family(family, model_name_or_path)
        self.base_model, self.base_revision = local_name(model_name_or_path), source.commit or revision
        # SigLIP was trained on texts padded to full length, with the padding attended to and the last token read.
        self._whole_length = family == "siglip"
        text = self.config.text_config
        tokenizer = self.processor.tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        self._width = int(self.config.projection_dim if family == "clip" else text.projection_size)
        self._warned_of_cut = False
        # Of no use here: only the contrastive loss of pretraining reads them.
        for name in ("logit_scale", "logit_bias"):
            if (parameter := getattr(self.model, name, None)) is not None:
                parameter.requires_grad_(False)
        self._used = tuple(math.isfinite(value) for value in log_weights)
        # Finite where a part is left out, too: an optimizer's step on -inf may give NaN.
        values = [value if used else 0.0 for value, used in zip(log_weights, self._used, strict=True)]
        self.log_weights = nn.Parameter(torch.tensor(values, dtype=torch.float32), requires_grad=learn_weights)

    # The weights

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part, by name; they sum to 1."""
        with torch.no_grad():
            values = self._log_shares(self._has_weight(self.log_weights.device)[None])[0]
            return dict(zip(PARTS, values.double().exp().tolist(), strict=True))

    @weights.setter
    def weights(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        self._set_log_weights(_log_weights(weights))

    @property
    def learn_weights(self) -> bool:
        """Whether the weights are trained; may be set."""
        return self.log_weights.requires_grad

    @learn_weights.setter
    def learn_weights(self, learn: bool) -> None:
        self.log_weights.requires_grad_(bool(learn))

    @property
    def log_weight_list(self) -> list[float]:
        """Logs of the weights as they are, -inf for a part that is left out; may be set, and then exactly so."""
        values = self.log_weights.detach().float().tolist()
        return [value if used else -math.inf for value, used in zip(values, self._used, strict=True)]

    @log_weight_list.setter
    def log_weight_list(self, values: Sequence[float]) -> None:
        self._set_log_weights(values)

    def _set_log_weights(self, values: Sequence[float]) -> None:
        self._used = tuple(math.isfinite(value) for value in values)
        with torch.no_grad():
            self.log_weights.copy_(torch.tensor([value if math.isfinite(value) else 0.0 for value in values]))

    def _has_weight(self, device: torch.device | None = None) -> torch.Tensor:
        return torch.tensor(self._used, device=device)

    def _log_shares(self, present: torch.Tensor) -> torch.Tensor:
        """Log of the share in its row of each part that is present and has weight: (B, 3) float32, -inf elsewhere."""
        return self.log_weights.float().where(present, -math.inf).log_softmax(dim=1)

    # What sentence-transformers asks of a module

    @property
    def modalities(self) -> list[Any]:
        """What an item may be. "message" is what sentence-transformers calls a batch of unlike items."""
        return ["text", "image", ("image", "text"), "message"]

    def get_embedding_dimension(self) -> int:
        """Width of the embedding: three times the projection of the towers."""
        return len(PARTS) * self._width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, processing_kwargs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Turn items into tensors whose first axis is the batch and whose other axes never vary.

        Args:
            inputs: B items.
            prompt: a text put before each item's prompt.
            processing_kwargs: left aside.
            **kwargs: `max_length` cuts texts to so many tokens, where the tower takes more; others are left aside.

        Returns:
            `present` (B, 3) bool; `pixel_values` (B, 3, H, W) float32, zeros where there is no image; `input_ids` and
            `text_mask` (B, 2, L) int64, prompt before response. Tensors of parts without weight are left out.

        Raises:
            ValueError: an item of another form, or one without any part that has weight.
        """
        items, usable = self._usable(inputs, 0)
        if prompt:
            items = [item._replace(prompt=prompt + item.prompt if item.prompt else None) for item in items]
        features = {"present": usable}
        if self._used[0]:
            features["pixel_values"] = self._pixels([item.image for item in items])
        if self._used[1] or self._used[2]:
            texts = []
            for item in items:
                texts += [item.prompt if self._used[1] else None, item.response if self._used[2] else None]
            features |= self._tokens(texts, kwargs.get("max_length"))
        return features

    def _usable(self, inputs: Sequence[Any], first: int) -> tuple[list[_Item], torch.Tensor]:
        """The items' parts, and which of them are there and have weight: (B, 3) bool.

        Args:
            first: the number of the first item, for errors.
        """
        items = [_parse(item, number) for number, item in enumerate(inputs, first)]
        present = torch.tensor([[part is not None for part in item] for item in items], dtype=torch.bool)
        usable = present & self._has_weight()
        if not bool(usable.any(dim=1).all()):
            row = int((~usable.any(dim=1)).nonzero()[0])
            used = [part for part, weight in self.weights.items() if weight]
            has = [part for part, there in zip(PARTS, present[row].tolist(), strict=True) if there]
            raise ValueError(
                f"expected items with at least one of {', '.join(used)}, the parts that have weight; "
                f"item {first + row} has {', '.join(has) or 'none'}. Fill the part in, leave it out, or set `.weights`"
            )
        return items, usable

    def _pixels(self, images: list[Image | None]) -> torch.Tensor:
        rows = [row for row, image in enumerate(images) if image is not None]
        if rows:
            shown = [load_image(image) for image in images if image is not None]
            # Said outright: a picture of 1 or 3 pixels' height would be taken for channels.
            values = self.processor.image_processor(shown, return_tensors="pt", input_data_format="channels_last")
            return _spread(values["pixel_values"], torch.tensor(rows), len(images))
        size = self.config.vision_config.image_size
        return torch.zeros(len(images), self.config.vision_config.num_channels, size, size)

    def _tokens(self, texts: list[str | None], max_length: int | None) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        longest = tokenizer.model_max_length
        limit = min(max_length or longest, longest)
        ids = torch.full((len(texts), longest), tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        given = [text for text in texts if text is not None]
        if given:
            tokens = tokenizer(
                given,
                padding="longest",
                truncation=True,
                max_length=limit,
                padding_side="right",
                return_attention_mask=True,
                return_tensors="pt",
            )
            width = tokens["input_ids"].shape[1]
            there = [text is not None for text in texts]
            rows = slice(None) if all(there) else there
            ids[rows, :width], mask[rows, :width] = tokens["input_ids"], tokens["attention_mask"]
            if width == limit and not self._warned_of_cut:
                self._warn_of_cut(given, tokens["attention_mask"].sum(dim=1) == limit, limit)
        return {
            "input_ids": ids.view(-1, 2, longest),
            # not "attention_mask": sentence-transformers' model card counts tokens by that, and takes it for (B, L)
            "text_mask": mask.view(-1, 2, longest),
        }

    def _warn_of_cut(self, texts: list[str], full: torch.Tensor, limit: int) -> None:
        filled = [texts[row] for row in full.nonzero()[:, 0].tolist()]
        lengths = [len(ids) for ids in self.processor.tokenizer(filled, verbose=False)["input_ids"]]
        cut = [text for text, length in zip(filled, lengths, strict=True) if length > limit]
        if cut:
            self._warned_of_cut = True
            logger.warning(
                "%d of %d texts are longer than the %d tokens that the text tower reads (the longest has %d): what "
                "follows is ignored, here and in later texts. The first is %.60r…",
                len(cut),
                len(texts),
                limit,
                max(lengths),
                cut[0],
            )

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Embed what `preprocess` made: adds `sentence_embedding`, (B, 3 * projection) float32 of unit length.

        Where `features` holds `image_key`, (B,) int64, rows of equal key are taken to show the same image, which is
        then encoded once.
        """
        present = features["present"] & self._has_weight(features["present"].device)
        images = self._rows(self._encode_images, features, present[:, :1])
        texts = self._rows(self._encode_texts, features, present[:, 1:])
        units = F.normalize(torch.cat([images, texts], dim=1), dim=2)
        shares = self._log_shares(present).mul(0.5).exp()  # in logs: the slope of a square root at 0 is infinite
        features["sentence_embedding"] = (units * shares[:, :, None]).flatten(1)  # of unit length, as squares sum to 1
        return features

    def _rows(
        self, encode: Callable[..., torch.Tensor], features: dict[str, Any], there: torch.Tensor
    ) -> torch.Tensor:
        """What a tower makes of the parts that are there (B, K): (B, K, projection) float32, zeros for the others."""
        places = there.flatten().nonzero()[:, 0]
        if len(places):
            pooled = _spread(encode(features, places).float(), places, there.numel())
        else:
            pooled = torch.zeros(there.numel(), self._width, device=there.device)
        return pooled.view(*there.shape, self._width)

    def _encode_images(self, features: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
        keys = features.get("image_key")
        if keys is not None:
            first, which = _distinct(keys[places])
            places = places[first]
        pixels = _taken(features["pixel_values"], places).to(self.model.dtype)
        pooled = self.model.get_image_features(pixel_values=pixels).pooler_output
        return pooled if keys is None else pooled[which]

    def _encode_texts(self, features: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
        ids, mask = (_taken(features[name].flatten(0, 1), places) for name in ("input_ids", "text_mask"))
        if self._whole_length:
            return self.model.get_text_features(input_ids=ids).pooler_output
        width = int(mask.sum(dim=1).max())
        return self.model.get_text_features(input_ids=ids[:, :width], attention_mask=mask[:, :width]).pooler_output

    # Files

    def get_config_dict(self) -> dict[str, Any]:
        """The module's configuration; `log_weights` is null for a part that is left out."""
        kept = [value if math.isfinite(value) else None for value in self.log_weight_list]  # a float32, exactly
        dtype = str(self.model.dtype).removeprefix("torch.")
        return super().get_config_dict() | {"dtype": dtype, "log_weights": kept}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write the model (with LoRA: the adapter alone), processor, configuration and weights of the parts.

        An adapter's configuration names the base model as it was given to us, and its commit.
        """
        if not self.has_adapter:
            super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
            return
        save_adapter(self, Path(output_path), base_model=self.base_model, base_revision=self.base_revision)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, subfolder: str = "", **kwargs: Any) -> JointEncoder:
        """What sentence-transformers calls to load a module; see `from_pretrained`.

        Args:
            subfolder: where in the folder or repository it is.
            **kwargs: `token`, `cache_folder`, `revision`, `local_files_only`; sentence-transformers' others are left
                aside, and so is `trust_remote_code`, which it asks for to import this class: no file needs it.
        """
        hub = {name: kwargs.get(name) for name in ("token", "cache_folder", "revision")}
        offline = bool(kwargs.get("local_files_only"))
        place = resolve_name(model_name_or_path)
        if subfolder:
            folder = cls.load_dir_path(place, subfolder=subfolder, local_files_only=offline, **hub)
            if folder is None:
                raise OSError(f"{model_name_or_path!r} has no folder {subfolder!r}; it is not a saved encoder")
            place, hub["revision"] = folder, None  # that of the repository is not the base model's
        return cls.from_pretrained(
            place,
            revision=hub["revision"],
            token=hub["token"],
            cache_dir=hub["cache_folder"],
            local_files_only=offline,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        learn_weights: bool | None = None,
        dtype: str | torch.dtype | None = None,
        base_model: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
    ) -> JointEncoder:
        """Load a CLIP or SigLIP checkpoint, or what `save` wrote.

        A saved adapter is put on the very commit of the base model that it was trained on, and can be trained further.

        Args:
            name_or_path: on the Hub, or a folder; "playground/clip" is the one that ships with the package.
            weights: of image, prompt and response. None: those that were saved, else equal ones.
            learn_weights: train them. None: as saved, else not.
            base_model, base_revision: where the base model of the adapter in the folder is on this machine, or its
                name and commit on the Hub. None: as noted beside the adapter.
            revision: branch, tag or commit on the Hub.
            dtype, token, cache_dir, local_files_only, force_download, trust_remote_code: as in the class.

        Raises:
            ValueError: another model family, or weights that can't be used.
            SavedFileError: the files are not such as may be loaded, or don't fit one another.
            HubError: it can't be fetched.
        """
        hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub |= {"force_download": force_download, "trust_remote_code": trust_remote_code}
        source = find_model(name_or_path, revision=revision, adapter=True, **hub)
        place = Path(source.place)
        saved = read_saved(place) if (place / SAVED_CONFIG).is_file() else {}
        if learn_weights is None:
            learn_weights = saved.get("learn_weights", False)
        options: dict[str, Any] = {"learn_weights": learn_weights, "dtype": dtype or saved.get("dtype"), **hub}
        if weights is not None:
            options["weights"] = weights
        if (place / ADAPTER_CONFIG).is_file():  # not left to transformers, which knows no base model but the one noted
            noted = check_adapter(place)
            if base_model in (None, noted.get("base_model_name_or_path")):
                base_model = noted.get("base_model_name_or_path")
                base_revision = base_revision or noted.get("revision")
            if not base_model:
                raise SavedFileError(
                    f"{place / ADAPTER_CONFIG}: expected the base model's name, got none; pass base_model="
                )
            module = cls(os.fspath(base_model), revision=base_revision, **options)
            attach(module, place, "default")
        else:
            options["force_download"] = False  # they have just been
            module = cls(os.fspath(name_or_path), revision=revision, **options)
        if weights is None and "log_weights" in saved:
            module.log_weight_list = saved["log_weights"]
        module.eval()  # an adapter's layers are new
        return module

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter such as LoRA is in use, so that `save` writes the adapter alone."""
        return active_adapter(self) is not None

    def __repr__(self) -> str:
        weights = ", ".join(f"{part}={weight:.3g}" for part, weight in self.weights.items())
        model = type(self.model).__name__ + (" with adapter" if self.has_adapter else "")
        return f"JointEncoder({model}, dimension={self.get_embedding_dimension()}, {weights})"


def encode_items(
    encoder: SentenceTransformer,
    items: Iterable[Any],
    *,
    batch_size: int = 64,
    show_progress: bool | None = None,
) -> np.ndarray:
    """Embed items; they are drawn a few batches at a time, so that a large table's images are never all in memory.

    Args:
        encoder: what `build_encoder` made.
        items: as `JointEncoder` takes them; any iterable.
        batch_size: items that pass through the towers at once.
        show_progress: a progress bar. None: from 8 batches on, where the number of items is known.

    Returns:
        float32 array of shape (number of items, dimension), rows of unit length in the order of `items`.

    Raises:
        NonFiniteEmbeddingError: NaN or infinity; names the first items by position.
        ValueError: an item of another form, or one without any part that has weight.
    """
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    total = len(items) if isinstance(items, Sized) else None
    shown = show_progress if show_progress is not None else bool(total and total > _BAR_FROM * batch_size)
    training = encoder.training
    done: list[np.ndarray] = []
    count = 0
    try:
        with tqdm(total=total, desc="encoding", unit="item", **bar_options(shown)) as bar:
            for chunk in _chunks(items, _CHUNK * batch_size):
                # Now, as sentence-transformers encodes them in another order.
                encoder[0]._usable(chunk, count)  # type: ignore[operator]
                vectors = encoder.encode(chunk, batch_size=batch_size, show_progress_bar=False)
                vectors = np.asarray(vectors, dtype=np.float32)
                bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
                if len(bad):
                    raise NonFiniteEmbeddingError(
                        f"expected finite embeddings, but {len(bad)} hold NaN or infinity, the first those of items "
                        f"{', '.join(str(count + i) for i in bad[:4].tolist())}; check their images, and try float32 "
                        "or a lower learning rate"
                    )
                done.append(vectors)
                count += len(chunk)
                bar.update(len(chunk))
    finally:
        if training:
            encoder.train()  # `encode` leaves the model in evaluation mode
    return np.concatenate(done) if done else np.zeros((0, encoder.get_embedding_dimension() or 0), np.float32)


def _parse(item: Any, row: int) -> _Item:
    """An item's parts, None where absent."""
    image: Any = None
    text: Any = None
    if isinstance(item, str):
        text = item
    elif isinstance(item, Image):
        image = item
    elif isinstance(item, Mapping) and item.keys() <= _KEYS:
        image, text = item.get("image"), item.get("text")
    else:
        got = f"a dict with {', '.join(map(repr, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise ValueError(f"item {row}: expected {_EXPECTED}, got {got}")
    texts = [text] if text is None or isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or len(texts) > 2 or any(not isinstance(t, str | None) for t in texts):
        raise ValueError(f"item {row}: expected {_EXPECTED}, got 'text' = {text!r:.80}")
    if image is not None and not isinstance(image, Image):
        raise ValueError(f"item {row}: expected {_EXPECTED}, got 'image' of type {type(image).__name__}")
    prompt, response = (t if t is not None and t.strip() else None for t in (*texts, None, None)[:2])
    return _Item(image, prompt, response)


_EXPECTED = "a text, a PIL image, or {'image': PIL image or None, 'text': [prompt, response]}"


def _taken(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows at these places, in order; no copy where that is all of them."""
    return rows if len(places) == len(rows) else rows[places]


def _spread(values: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """`size` rows: the values at these places, in order, and zeros elsewhere; no copy where that is all of them."""
    if len(places) == size:
        return values
    return values.new_zeros(size, *values.shape[1:]).index_put((places,), values)


def _distinct(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each distinct key stands first, in order, and which of these every key is."""
    _, which = keys.unique(return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = places.new_full((int(which.max()) + 1,), len(keys)).scatter_reduce(0, which, places, "amin")
    order = first.argsort()
    return first[order], order.argsort()[which]


def _log_weights(weights: Sequence[float] | Mapping[str, float]) -> list[float]:
    """Log of the weights, scaled to sum to 1; -inf for 0."""
    if isinstance(weights, Mapping):
        if unknown := [part for part in weights if part not in PARTS]:
            raise ValueError(f"weights are of {', '.join(PARTS)}, got one of {unknown[0]!r}")
        weights = [weights.get(part, 0.0) for part in PARTS]
    values = [float(weight) for weight in weights]
    if len(values) != len(PARTS) or not all(0 <= value < math.inf for value in values) or not any(values):
        raise ValueError(
            f"weights are three numbers for {', '.join(PARTS)}, finite, not negative and not all 0, got {weights!r}"
        )
    total = sum(values)
    return [math.log(value / total) if value else -math.inf for value in values]


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def read_saved(folder: Path) -> dict[str, Any]:
    """What `JointEncoder.save` noted: `dtype`, `learn_weights`, `log_weights` with -inf for a part that is left out.

    Returns:
        {} for a checkpoint that `JointEncoder` did not save.

    Raises:
        SavedFileError: it holds anything else.
    """
    path = folder / SAVED_CONFIG
    noted = read_object(path)
    if "log_weights" not in noted:
        return {}
    for name, value in noted.items():
        if not isinstance(value, _SAVED.get(name, ())):
            raise SavedFileError(
                f"{path}: expected what was saved with the adapter or encoder, which has no such {name[:80]!r}; "
                "download or save it again"
            )
    weights = [-math.inf if value is None else value for value in noted["log_weights"]]
    if (
        len(weights) != len(PARTS)
        or not all(isinstance(value, (int, float)) and value < math.inf for value in weights)
        or max(weights) == -math.inf
    ):
        raise SavedFileError(
            f"{path}: expected what was saved with the adapter or encoder, {str(noted['log_weights'])[:80]} are no "
            "weights of its parts; download or save it again"
        )
    if noted.get("dtype", "float32") not in DTYPES:
        raise SavedFileError(
            f"{path}: expected one of the dtypes {', '.join(DTYPES)}, got {noted['dtype'][:80]!r}; save it again"
        )
    return (
        {"learn_weights": False}
        | {key: noted[key] for key in ("dtype", "learn_weights") if key in noted}
        | {"log_weights": weights}
    )


def _check_encoder(folder: Path, name: str | os.PathLike[str]) -> None:
    """Refuse another family, and sizes beyond any encoder's or the weights', before anything is made of that size."""
    for file in ("config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / file).is_file():
            content = read_object(folder / file)
            if file == "config.json":
                _check_family(str(content.get("model_type")), name)
            check_sizes(folder / file, content)
    check_extent(folder)


def _check_family(family: str, name: str | os.PathLike[str]) -> None:
    if family not in _FAMILIES:
        raise ValueError(
            f"expected a CLIP or SigLIP model with its image processor and tokenizer, got {os.fspath(name)!r} of type "
            f"{family!r}; pass one such as 'openai/clip-vit-base-patch32' or 'google/siglip-base-patch16-224'"
        )
