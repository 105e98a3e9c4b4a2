"""One way in for pictures: whatever is an image becomes upright RGB, within bounds."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ..errors import ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "base64_bytes", "is_image", "load_image"]

#: Largest image that is decoded, in pixels (our choice: a 64-megapixel photograph, 192 MB as RGB).
MAX_PIXELS = 64_000_000
#: Largest encoded image that is read, in bytes: as many pixels, uncompressed, with transparency.
MAX_BYTES = 4 * MAX_PIXELS
#: No format whose decoder starts another program (EPS calls Ghostscript) or needs one of the platform (WMF).
FORMATS = frozenset({"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"})

_KINDS = "a path, encoded bytes, a file, base64 text, a PIL image, an array or tensor, or {'bytes': ..., 'path': ...}"
_ORIENTATION = 0x0112  # of EXIF
_SHORTEST_BASE64 = 32  # characters; no image is smaller, and shorter texts are names of files


def load_image(
    source: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    urls: bool | Literal["private"] = False,
    timeout: float = 20.0,
) -> Image:
    """Make an upright RGB picture of whatever is an image.

    - Transparency is laid on white.
    - Grey of 16 bits is scaled by its full range, 0 to 65535. Grey of 32 bits (Pillow's mode "I") likewise where it
      fits, otherwise from its minimum to its maximum.
    - Floats in [0, 1] are taken as they are; others from their minimum to their maximum (a constant gives black). NaN
      and infinity are refused.
    - The orientation that a camera noted is applied, and all metadata is dropped.
    - Of several frames the first is taken; of a PIL image the one that it shows.

    Args:
        source: a path; encoded bytes; a file that is open for reading; base64 text, also as a data URI; a PIL image
            of any mode; an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a torch tensor of shape (H, W),
            (1, H, W), (3, H, W) or (4, H, W); or `{"bytes": ..., "path": ...}` as `datasets` has it. Arrays are bool,
            uint8, uint16, float, or other integers from 0 to 255.
        max_pixels: refuse larger images before they are decoded.
        urls: whether an http(s) address may be fetched: False; True, from public hosts; or "private", from hosts of
            this machine and its network as well.
        timeout: seconds for an address to be fetched, in all.

    Returns:
        A PIL image of mode "RGB" without metadata. It is `source` itself where that is one already.

    Raises:
        ImageError: it is no image, or one that can't be read or is too large.

    Example:
        >>> import numpy as np
        >>> load_image(np.full((2, 3), 30000, dtype=np.uint16)).getpixel((0, 0))
        (117, 117, 117)
    """
    from PIL import Image

    if _is_loaded(source):
        return source
    shown = _brief(source)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
                if _is_lazy(image) and image.format not in FORMATS:
                    raise ValueError(f"{image.format} is none of the formats {', '.join(_readable_formats())}")
            else:
                array = _as_array(source)
                if array is not None:
                    _refuse_size(array.shape[1], array.shape[0], max_pixels)
                    return _from_array(array)
                file = _encoded(source, shown, urls, timeout)
                if isinstance(file, io.BytesIO) and not file.getbuffer().nbytes:
                    raise ValueError("it is empty")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # bounded below, for every size
                    image = stack.enter_context(Image.open(file, formats=_readable_formats()))
            return _upright(image, max_pixels)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"no such file: {shown}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"expected at most {max_pixels:,} pixels, got {error}; shrink it, or pass max_pixels="
        ) from error
    # Broken files make Pillow's decoders raise nearly anything: SyntaxError, struct.error, EOFError, zlib.error…
    except Exception as error:
        if _is_heic(source):
            raise ImageError(
                f"expected an image of a common format ({', '.join(_readable_formats())}), got {shown}, which is HEIC "
                "as phones write it; convert it to JPEG"
            ) from error
        raise ImageError(
            f"expected an image of a common format ({', '.join(_readable_formats())}), "
            f"got {shown}, which can't be read ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def is_image(given: Any) -> bool:
    """Whether it can only be meant as one image: texts and paths, bytes, files, PIL images, arrays of up to 3 axes."""
    from PIL.Image import Image

    if isinstance(given, (str, bytes, bytearray, memoryview, os.PathLike, Image)) or hasattr(given, "read"):
        return True
    return _is_array(given) and given.ndim <= 3


def base64_bytes(text: str) -> bytes | None:
    """What base64 text or a data URI holds; None where it is neither.

    Raises:
        ImageError: it is longer than an image may be.
    """
    head, comma, data = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if (head and not comma) or (not head and len(data) < _SHORTEST_BASE64):
        return None
    if len(data) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(f"expected an image of at most {MAX_BYTES:,} bytes, got {_brief(text)}; shrink it")
    data = re.sub(r"\s+", "", data).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


# ---- where it comes from ----


def _encoded(source: Any, shown: str, urls: bool | str, timeout: float) -> io.BytesIO | str:
    """A file in memory, or the path of one."""
    if isinstance(source, Mapping):
        if not source.keys() <= {"bytes", "path"} or not any(v is not None for v in source.values()):
            raise ImageError(f"expected {_KINDS}, got a dict with {', '.join(map(repr, source)) or 'nothing'}")
        if source.get("bytes") is None:
            return _path(source["path"], shown)
        source = source["bytes"]
    if isinstance(source, os.PathLike):
        return _path(source, shown)
    if isinstance(source, str):
        if re.match(r"https?://", source, re.IGNORECASE):
            from .download import download

            if not urls:
                raise ImageError(
                    f"expected an image that is here, got the address {shown}; download it first, or allow addresses "
                    "with urls=True (of load_image, or a pipeline's call)"
                )
            source = download(source, timeout=timeout, max_bytes=MAX_BYTES, private=urls == "private")
        elif source[:5].lower() == "data:" or not os.path.exists(source):
            found = base64_bytes(source)
            if found is None:
                raise ImageError(f"no such file: {shown}")
            source = found
        else:
            return _path(source, shown)
    elif hasattr(source, "read"):
        if hasattr(source, "seek"):
            with contextlib.suppress(OSError, ValueError):  # a pipe; io.UnsupportedOperation is both
                source.seek(0)
        source = source.read(MAX_BYTES + 1)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise ImageError(f"expected an image as {_KINDS}, got {type(source).__name__}")
    _refuse_bytes(len(source), shown)
    return io.BytesIO(source)


def _path(source: Any, shown: str) -> str:
    path = os.fsdecode(source)
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end
        raise ImageError(f"expected a file, {shown} is none; name the image")
    _refuse_bytes(found.st_size, shown)
    return path


def _refuse_bytes(size: int, shown: str) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"expected an image of at most {MAX_BYTES:,} bytes, {shown} has more; shrink it")


def _refuse_size(width: int, height: int, max_pixels: int) -> None:
    from PIL.Image import DecompressionBombError

    if width * height > max_pixels:
        raise DecompressionBombError(f"{width} x {height} pixels")
    if not width * height:
        raise ValueError("it has no pixels")


def _brief(source: Any) -> str:
    """What was given, short enough for an error; of an address no password and no query."""
    if isinstance(source, Mapping) and source.keys() <= {"bytes", "path"}:
        source = source.get("path") if source.get("path") is not None else source.get("bytes")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source):,} bytes"
    if isinstance(source, os.PathLike):
        source = os.fsdecode(source)
    if isinstance(source, str):
        if "://" in source[:10]:
            with contextlib.suppress(ValueError):
                parts = urlsplit(source)
                source = f"{parts.scheme}://{parts.hostname}{parts.path}"
        if source[:5].lower() == "data:" or len(source) > 400:
            return f"{source[:40]!r}... ({len(source):,} characters)"
        return repr(source)
    if _is_array(source):
        return f"{type(source).__name__} of shape {tuple(source.shape)}"
    return type(source).__name__


# ---- what becomes of it ----


def _is_loaded(source: Any) -> bool:
    """Whether it is what `load_image` gives."""
    from PIL.Image import Image

    return (
        type(source) is Image
        and source.mode == "RGB"
        and source.width * source.height > 0
        and not source.info
        and not source.getexif()
    )


def _is_heic(source: Any) -> bool:
    """Whether an image that can't be read begins as a photo of a phone does."""
    with contextlib.suppress(Exception):
        file = _encoded(source, "", False, 1.0)
        if isinstance(file, str):
            with open(file, "rb") as opened:
                head = opened.read(32)
        else:
            head = file.read(32)
        brands = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
        return head[4:8] == b"ftyp" and head[8:12] in brands
    return False


def _is_lazy(image: Image) -> bool:
    from PIL import ImageFile

    return isinstance(image, ImageFile.ImageFile) and bool(image.tile)


def _upright(image: Image, max_pixels: int) -> Image:
    from PIL.Image import Transpose

    _refuse_size(image.width, image.height, max_pixels)
    image.load()
    _refuse_size(image.width, image.height, max_pixels)  # an icon's header and its picture may differ
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(image.getexif().get(_ORIENTATION, 1))  # read after loading: TIFF is turned by its own decoder
    rgb = _rgb(image) if turn is None else _rgb(image).transpose(turn)
    rgb.getexif().clear()  # what the camera noted of place and time goes no further
    rgb.info = {}
    return rgb


def _rgb(image: Image) -> Image:
    import numpy as np
    from PIL import Image as Images

    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        grey = _grey(values if image.mode in ("I", "F") else values.astype(np.uint16))
        if isinstance(transparent, int):
            grey = np.where(values == transparent, np.uint8(255), grey)
        return Images.fromarray(grey).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or transparent is not None:
        solid = image.convert("RGBA")
        canvas = Images.new("RGB", image.size, "white")
        canvas.paste(solid, mask=solid.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _grey(values: np.ndarray) -> np.ndarray:
    """Numbers of more than 8 bits as uint8, by the rules of `load_image`."""
    import numpy as np

    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds NaN or infinity")
    if values.dtype.kind == "f":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    return np.rint((values.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _is_array(source: Any) -> bool:
    import numpy as np

    return isinstance(source, np.ndarray) or (type(source).__module__ == "torch" and hasattr(source, "detach"))


def _as_array(source: Any) -> np.ndarray | None:
    """An array with channels last; None where it is none."""
    if not _is_array(source):
        return None
    shape = tuple(source.shape)
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        array = (source.float() if source.is_floating_point() else source).numpy()
        array = array if array.ndim != 3 else array.transpose(1, 2, 0)
        expected = "(H, W), (1, H, W), (3, H, W) or (4, H, W)"
    else:
        array, expected = source, "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"expected an image of shape {expected}, got one of shape {shape}; move its axes")
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _from_array(array: np.ndarray) -> Image:
    import numpy as np
    from PIL import Image

    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16 or array.dtype.kind == "f":
        if array.ndim == 3 and array.shape[2] == 4 and array.dtype.kind == "f" and not _in_unit(array):
            raise ImageError("expected floats in [0, 1] beside transparency, got others; scale them")
        array = _grey(array)
    elif array.dtype.kind in "iu":
        if array.dtype != np.uint8 and not 0 <= array.min() <= array.max() <= 255:
            raise ImageError(
                f"expected integers from 0 to 255, got {array.dtype} from {array.min()} to {array.max()}; convert "
                "them to uint16, or scale them"
            )
        array = array.astype(np.uint8)
    else:
        raise ImageError(f"expected an array of integers or floats, got {array.dtype}")
    return _rgb(Image.fromarray(np.ascontiguousarray(array)))


def _in_unit(array: np.ndarray) -> bool:
    return bool(array.min() >= 0 and array.max() <= 1)


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))
