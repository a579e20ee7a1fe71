"""Image files -> what a shard holds: the bytes as they are, or a PNG where a shard can't hold them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from vistallm.config import PAD_COLOUR

_ENDINGS = {"JPEG": ("jpg", b"\xff\xd9"), "MPO": ("jpg", b"\xff\xd9"), "PNG": ("png", b"IEND\xaeB`\x82")}


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes, their suffix ("jpg" or "png"), its (width, height) in pixels."""

    data: bytes
    suffix: str
    size: tuple[int, int]


def decode_pixels(data: bytes, name: object) -> np.ndarray:
    """The pixels of an encoded image, (H, W, 3) uint8 RGB; raises ValueError, with `name`, when it does not decode.

    The one rule for an EXIF orientation, here and wherever an image is read: it is not applied. Annotations are in the
    stored pixels (COCO's are), and so are shards, masks and answers. What is transparent has the colour of padding.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise ValueError(f"{name}: expected a whole image, its {len(data)} bytes do not decode; is the file cut off?")
    with Image.open(io.BytesIO(data)) as image:
        if not image.has_transparency_data:
            return pixels
        return on_padding(pixels, np.asarray(image.convert("RGBA").getchannel("A")))


def on_padding(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Lay (H, W, 3) uint8 RGB pixels of (H, W) uint8 opacity on the colour of padding; (H, W, 3) uint8."""
    share = opacity[..., None] / 255
    return np.rint(share * pixels + (1 - share) * PAD_COLOUR).astype(np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header; raises as `read_image` does."""
    with path.open("rb") as file:
        return _read_header(file, path)[1]


def _read_header(file: BinaryIO, path: Path) -> tuple[str, tuple[int, int]]:
    """Format ("" where a shard can't hold the bytes as they are) and size of the image as it is stored."""
    try:
        with Image.open(file) as header:
            return "" if header.has_transparency_data else str(header.format), header.size
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise ValueError(f"{path}: expected an image, got {type(error).__name__} at its header") from error


def read_image(path: Path) -> ImageFile:
    """Read a file: JPEG and PNG as they are, all else and what is transparent as opaque PNG.

    Raises:
        OSError: the file is not there or can't be read.
        ValueError: it is not a whole image.
    """
    data = path.read_bytes()
    kind, size = _read_header(io.BytesIO(data), path)
    if kind in _ENDINGS:
        suffix, ending = _ENDINGS[kind]
        if not data.endswith(ending):  # a cut file has another ending, but some whole ones have it too
            decode_pixels(data, path)
        return ImageFile(data, suffix, size)
    pixels = decode_pixels(data, path)
    return ImageFile(cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes(), "png", size)
