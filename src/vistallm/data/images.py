"""Undecoded samples -> samples with pixels; whatever is broken comes out as a reject, never as silence."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from vistallm.coinit.shards import RawSample
from vistallm.config import PAD_COLOUR, DataConfig
from vistallm.regions.letterbox import square_resize
from vistallm.schema import Sample, SampleReject

SMALL = 320  # pixels of the longer side under which an image is decoded in full: it is quick, and its result exact
HEADROOM = 1.1  # a JPEG is decoded at reduced scale while it stays so much larger than the target


def decode_sample(raw: RawSample, size: int | None = None, max_pixels: int = DataConfig.max_pixels) -> Sample:
    """Decode the images of a raw sample, each as `decode_image` does; raises SampleReject as it and `raw.sample` do.

    With `size`, `sample.pixels` may be smaller than `sample.images` says; of an image that neighbours share it is the
    square itself, which is made once for all of them.
    """
    sample = raw.sample()
    sample.pixels = []
    for info in sample.images:
        shape, member = (info.width, info.height), raw.member(info.file)
        squares = None if size is None else raw.squares
        pixels = None if squares is None else squares.get(member)
        if pixels is None:
            pixels = decode_image(raw.files[info.file], shape, f"{raw.key}, image {info.file}", size, max_pixels)
            if size is not None and squares is not None:
                pixels = squares[member] = square_resize(pixels, size, PAD_COLOUR, shape)[0]
        sample.pixels.append(pixels)
    return sample


def decode_image(
    data: bytes, expected: tuple[int, int], where: str, size: int | None = None, max_pixels: int = DataConfig.max_pixels
) -> np.ndarray:
    """Encoded image -> (H, W, 3) uint8 RGB of the stored pixels (an EXIF rotation is not applied).

    Args:
        data: the file's bytes.
        expected: width and height in pixels that the record says.
        where: the image's name, for messages.
        size: side of the square that the image is needed at, in pixels; a JPEG much larger than it is decoded at 1/2,
            1/4 or 1/8 scale. None = in full.
        max_pixels: a larger image is not decoded.

    Raises:
        SampleReject: too-many-pixels, or bad-image.
    """
    if expected[0] * expected[1] > max_pixels:
        text = f"{where}: {expected[0]}x{expected[1]} pixels, data.max_pixels is {max_pixels}"
        raise SampleReject("too-many-pixels", text)
    try:
        with Image.open(io.BytesIO(data)) as header:
            kind, got = str(header.format), header.size
        if got != expected:
            raise ValueError(f"expected {expected[0]}x{expected[1]} pixels, got {got[0]}x{got[1]}")
        scale = reduction(expected, size) if kind == "JPEG" and size is not None else 1
        # "grayscale": the bit of BGR is not set; RGB's is
        reduced = getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{scale}", 0)
        flags = reduced | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:
            raise ValueError(f"the {kind} can't be decoded")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, cv2.error) as error:
        raise SampleReject("bad-image", f"{where}: {error}") from error
    return pixels


def reduction(shape: tuple[int, int], size: int) -> int:
    """The scale 1/n (n = 1, 2, 4, 8) at which a JPEG of this width and height is decoded for a square of `size`."""
    longer = max(shape)
    fits = [n for n in (2, 4, 8) if longer >= SMALL and longer / n >= HEADROOM * size]
    return max(fits, default=1)
