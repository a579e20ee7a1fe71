from __future__ import annotations

import struct

import cv2
import numpy as np
import pytest

from vistallm.config import PAD_COLOUR
from vistallm.data.images import decode_image, reduction
from vistallm.regions.letterbox import Letterbox, square_resize
from vistallm.schema import SampleReject


def photo(width, height, seed=0):
    """(H, W, 3) uint8 with the spectrum of a photograph: noise at every scale, less at the finer ones."""
    rng, image = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for octave in range(1, 9):
        grid = rng.normal(size=(max(2, height * 2**octave // 512), max(2, width * 2**octave // 512), 3))
        image += cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) / octave
    return np.clip(128 + 50 * image, 0, 255).astype(np.uint8)


def jpeg(image):
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(640, 480, 2), (427, 640, 2), (641, 479, 2), (500, 375, 2), (990, 743, 4), (900, 601, 2), (1920, 1280, 4)],
)
def test_reduced_decoding_is_full_decoding_then_resizing_within_an_error(width, height, scale):
    data = jpeg(photo(width, height))
    assert reduction((width, height), 224) == scale
    full = decode_image(data, (width, height), "a")
    small = decode_image(data, (width, height), "a", 224)
    assert small.shape == (-(-height // scale), -(-width // scale), 3)
    (one, letterbox), (two, same) = (square_resize(image, 224, PAD_COLOUR, (width, height)) for image in (full, small))
    assert letterbox == same == Letterbox(width, height, 224)
    error = np.abs(one.astype(float) - two)
    assert error.mean() < 1.5, "grey levels of 255"
    assert np.percentile(error, 99) < 12


def test_small_images_and_near_targets_are_decoded_in_full():
    assert reduction((319, 200), 48) == 1, "the mini world's images"
    assert reduction((480, 375), 224) == 1, "240 pixels would be too near to 224"
    assert reduction((500, 375), 224) == 2
    image = photo(300, 200)
    assert np.array_equal(decode_image(jpeg(image), (300, 200), "a", 48), decode_image(jpeg(image), (300, 200), "a"))


def test_colours_are_rgb_at_every_scale():
    image = np.full((640, 640, 3), (200, 30, 60), np.uint8)
    for size in (None, 224, 60):
        assert np.abs(decode_image(jpeg(image), (640, 640), "a", size).mean((0, 1)) - (200, 30, 60)).max() < 3


def test_an_exif_rotation_is_not_applied():
    """Annotations are of the stored pixels."""
    data = jpeg(photo(64, 32))
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # orientation 6: turn by 90 degrees
    exif = b"Exif\0\0" + tiff
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (64, 32, 3), "the tag is read"
    assert np.array_equal(decode_image(turned, (64, 32), "a"), decode_image(data, (64, 32), "a"))


def test_sizes_are_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", None)
    data = jpeg(photo(64, 32))
    for expected, limit, reason in (((32, 64), 9999, "bad-image"), ((64, 32), 2000, "too-many-pixels")):
        with pytest.raises(SampleReject) as error:
            decode_image(data, expected, "a", None, limit)
        assert error.value.reason == reason
