"""Pictures of a table: decoded when read, within bounds, and held as the bytes or path they came as."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import ImageError
from ..types import image_key
from ..utils.images import load_image

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from PIL.Image import Image

#: Rows built, written or read together: bounds memory while pictures pass through.
CHUNK = 256
_CACHED_PIXELS = 128_000_000  # 384 MB of RGB, whatever the number of images allowed


def decode(source: Any, *, max_pixels: int) -> Image:
    """Upright RGB of a table's cell: a PIL image or {"bytes", "path"}.

    Raises:
        ImageError: it can't be read, or has more pixels.
    """
    try:
        image = load_image(source, max_pixels=max_pixels)
        if image.width * image.height > max_pixels:  # a PIL image that is upright RGB comes back as it is
            raise ImageError(
                f"expected at most {max_pixels:,} pixels, got {image.width} x {image.height} pixels; shrink it, or "
                "pass max_pixels="
            )
    except ImageError as error:
        raise ImageError(f"column 'image': {error}") from error
    return image


def decode_as(source: dict[str, Any], key: str, *, id: str, max_pixels: int, where: str = "") -> Image:
    """As `decode`, of a cell whose pixels' hash is known.

    Args:
        key: hash of the pixels.
        id: of the row, for errors.
        where: the file that holds the picture, for errors.

    Raises:
        ImageError: it can't be read, or shows another picture.
    """
    try:
        image = decode(source, max_pixels=max_pixels)
    except ImageError as error:
        raise ImageError(f"id {id!r}, {error}; it was readable when the table was made") from error
    if image_key(image) != key:
        raise ImageError(
            f"id {id!r}, column 'image': {where or 'the table'} shows another picture than when the table was made or "
            "saved; put the very file back, or make the table anew"
        )
    return image


class ImageCache:
    """Least recently used pictures, bounded in number and in pixels. A copy in another process starts empty."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._images: OrderedDict[str, Image] = OrderedDict()
        self._pixels = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ImageCache], tuple[int]]:
        return type(self), (self.limit,)

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: str) -> Image | None:
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
            return self._images.get(key)

    def put(self, key: str, image: Image) -> None:
        with self._lock:
            if key not in self._images:
                self._images[key] = image
                self._pixels += image.width * image.height
            while self._images and (len(self._images) > self.limit or self._pixels > _CACHED_PIXELS):
                _, old = self._images.popitem(last=False)
                self._pixels -= old.width * old.height


def image_column(sources: Iterable[dict[str, Any] | None]) -> pa.ChunkedArray:
    """Undecoded images; in chunks, for one Arrow array holds no more than 2 GB of bytes."""
    import datasets
    import pyarrow as pa

    storage, remaining = datasets.Image().pa_type, iter(sources)
    chunks = iter(lambda: list(itertools.islice(remaining, CHUNK)), [])
    return pa.chunked_array([pa.array(chunk, type=storage) for chunk in chunks], type=storage)


def image_dataset(column: pa.ChunkedArray, *, fingerprint: str) -> datasets.Dataset:
    """A Dataset of one undecoded column; a given fingerprint spares it from hashing every picture's bytes."""
    import datasets
    import pyarrow as pa

    info = datasets.DatasetInfo(features=datasets.Features(image=datasets.Image(decode=False)))
    return datasets.Dataset(pa.table({"image": column}), info=info, fingerprint=fingerprint)
