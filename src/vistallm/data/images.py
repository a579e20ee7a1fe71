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
    """Decode the images of a raw sample.

    Args:
        raw: from `read_raw`.
        size: side of the square that the images are needed at, in pixels; JPEGs much larger than it are decoded at
            1/2, 1/4 or 1/8 scale (`sample.pixels` then is smaller than `sample.images` says). None = in full.
            Of an image that neighbours share, `sample.pixels` holds the square itself, which is made once for all.
        max_pixels: a larger image is a reject, before it is decoded.

    Raises:
        SampleReject: bad-json, checksum, missing-image, bad-image, too-many-pixels, or the fault the sample came with.
    """
    sample = raw.sample()
    sample.pixels = []
    for info in sample.images:
        shape, member = (info.width, info.height), raw.member(info.file)
        pixels = raw.squares.get(member) if size is not None and raw.squares is not None else None
        if pixels is None:
            pixels = decode_image(raw.files[info.file], shape, f"{raw.key}, image {info.file}", size, max_pixels)
            if size is not None and raw.squares is not None:
                pixels = raw.squares[member] = square_resize(pixels, size, PAD_COLOUR, shape)[0]
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
        size: as in `decode_sample`.
        max_pixels: as in `decode_sample`.
    """
    if expected[0] * expected[1] > max_pixels:
        raise SampleReject(
            "too-many-pixels", f"{where}: {expected[0]}x{expected[1]} pixels, data.max_pixels is {max_pixels}"
        )
    header = _header(data)
    if header is None or header[1:] != expected:
        got = "no image" if header is None else f"{header[1]}x{header[2]}"
        raise SampleReject("bad-image", f"{where}: expected {expected[0]}x{expected[1]} pixels, got {got}")
    scale = reduction(expected, size) if header[0] == "JPEG" and size is not None else 1
    flags = _REDUCED[scale] | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise SampleReject("bad-image", f"{where}: {error}") from error
    if pixels is None:
        raise SampleReject("bad-image", f"{where}: the {header[0]} can't be decoded")
    return pixels


# OpenCV's names say "grayscale" where the bit of BGR is not set; ours is the bit of RGB.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def reduction(shape: tuple[int, int], size: int) -> int:
    """The scale 1/n (n = 1, 2, 4, 8) at which a JPEG of this width and height is decoded for a square of `size`."""
    longer = max(shape)
    fits = [n for n in (2, 4, 8) if longer >= SMALL and longer / n >= HEADROOM * size]
    return max(fits, default=1)


def _header(data: bytes) -> tuple[str, int, int] | None:
    """Format, width and height from the first bytes of an image, None if it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return str(image.format), *image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
