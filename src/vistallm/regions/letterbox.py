"""Image sizes -> the square the model sees: (H, W, 3) pixels -> (size, size, 3) pixels, and the map both ways.

Coordinates are pixels of the original image, x to the right and y down, with pixel EDGES at integers: the image spans
[0, W] x [0, H] and the pixel in its top left corner is the box [0, 0, 1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Letterbox:
    """How an image of `width` x `height` pixels lies in its padded square, which is resized to `size` pixels."""

    width: int
    height: int
    size: int

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.size) < 1:
            raise ValueError(f"letterbox: expected width, height and size of at least 1, got {self}")

    @property
    def side(self) -> int:
        """Side of the padded square in original pixels."""
        return max(self.width, self.height)

    @property
    def padding(self) -> tuple[int, int]:
        """(left, top) padding in original pixels; where the padding is odd, the extra row or column is at the end."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def to_unit(self, points: np.ndarray) -> np.ndarray:
        """Original pixels, (n, 2) float, clipped to the image -> (n, 2) float64 in [0, 1] of the padded square."""
        inside = np.clip(np.asarray(points, np.float64).reshape(-1, 2), 0, (self.width, self.height))
        return (inside + self.padding) / self.side

    def to_pixels(self, unit: np.ndarray) -> np.ndarray:
        """[0, 1] of the padded square, (n, 2) float -> (n, 2) float32, original pixels, clipped to the image."""
        pixels = np.asarray(unit, np.float64).reshape(-1, 2) * self.side - self.padding
        return np.clip(pixels, 0, (self.width, self.height)).astype(np.float32)


def square_resize(
    image: np.ndarray, size: int, pad_colour: tuple[int, ...] | np.ndarray, original: tuple[int, int] | None = None
) -> tuple[np.ndarray, Letterbox]:
    """Pad an image to a centred square and resize it.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: side of the result in pixels.
        pad_colour: (3,) 0..255, the colour around the image (the encoder's mean: near zero after normalisation).
        original: width and height in pixels before the image was decoded at a scale of 1/n; None = it is whole.

    Returns:
        (size, size, 3) uint8 RGB, and the letterbox of the original image.

    Raises:
        ValueError: the array is not (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}; convert it to RGB first")
    colour = np.asarray(pad_colour, np.float64).round().tolist()
    if original is not None and original != image.shape[1::-1]:
        return _square_of_reduced(image, letterbox := Letterbox(*original, size), colour), letterbox
    letterbox = Letterbox(image.shape[1], image.shape[0], size)
    left, top = letterbox.padding
    right, bottom = letterbox.side - letterbox.width - left, letterbox.side - letterbox.height - top
    # OpenCV's border is three times quicker than filling and copying with NumPy.
    square = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)
    if letterbox.side != size:
        # INTER_AREA averages when shrinking (no aliasing); enlarging needs a real interpolation kernel.
        kernel = cv2.INTER_AREA if letterbox.side > size else cv2.INTER_CUBIC
        return cv2.resize(square, (size, size), interpolation=kernel).astype(np.uint8, copy=False), letterbox
    return square, letterbox


def _square_of_reduced(image: np.ndarray, letterbox: Letterbox, colour: list[float]) -> np.ndarray:
    """The square of an image that was decoded at a scale of 1/n, which has filtered it for most of the way."""
    scale, size = round(letterbox.side / max(image.shape)), (letterbox.size, letterbox.size)
    whole = [length * letterbox.size for length in (*letterbox.padding, letterbox.width, letterbox.height)]
    if not any(length % letterbox.side for length in whole):  # the image fills whole pixels: only it is resized
        left, top, width, height = (length // letterbox.side for length in whole)
        right, bottom = letterbox.size - left - width, letterbox.size - top - height
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return cv2.copyMakeBorder(resized, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)
    if not any(length % scale for length in (letterbox.side, *letterbox.padding)):
        left, top = (padding // scale for padding in letterbox.padding)
        bottom, right = (
            letterbox.side // scale - start - n for start, n in zip((top, left), image.shape[:2], strict=True)
        )
        square = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)
        return cv2.resize(square, size, interpolation=cv2.INTER_LINEAR)
    # The padding ends within a pixel: one affine map, which takes twice the time, keeps the image where it belongs.
    step = letterbox.side / letterbox.size / scale
    x, y = (0.5 * step - 0.5 - padding / scale for padding in letterbox.padding)
    inverse = np.array([[step, 0, x], [0, step, y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, inverse, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=colour)
