"""Pictures of a table: decoded when read, within bounds, and held as the bytes or path they came as."""

from __future__ import annotations

import functools
import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import ImageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from PIL.Image import Image

#: Largest image that is decoded, in pixels (our choice: a 64-megapixel photograph, 192 MB as RGB).
MAX_PIXELS = 64_000_000
#: No format whose decoder starts another programme (EPS calls Ghostscript) or needs one of the platform (WMF).
FORMATS = frozenset({"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"})
#: Rows built, written or read together: bounds memory while pictures pass through.
CHUNK = 256
_CACHED_PIXELS = 128_000_000  # 384 MB of RGB, whatever the number of images allowed


def decode(source: Any, *, max_pixels: int) -> Image:
    """RGB picture, upright, from a PIL image or {"bytes", "path"}; its size is checked before its pixels are read."""
    from PIL import Image, ImageOps

    opened = None
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            data, path = source["bytes"], source["path"]
            image = opened = Image.open(path if data is None else io.BytesIO(data), formats=_readable_formats())
        pixels = image.width * image.height
        if pixels > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        if not pixels:
            raise ValueError("it has no pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image if image.mode == "RGB" else image.convert("RGB")
        image.getexif().clear()  # a copy by now: what the camera noted of place and time goes no further
        image.info = {}
        return image
    except FileNotFoundError as error:
        raise ImageError(f"column 'image': no such file: {source['path']}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"column 'image': expected at most {max_pixels:,} pixels, got {error}; shrink it, or pass max_pixels="
        ) from error
    # Broken files make Pillow's decoders raise nearly anything: SyntaxError, struct.error, EOFError, zlib.error…
    except Exception as error:
        raise ImageError(
            f"column 'image': expected an image of a common format ({', '.join(_readable_formats())}), "
            f"got one that can't be read ({type(error).__name__}: {error})"
        ) from error
    finally:
        if opened is not None:
            opened.close()


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


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
