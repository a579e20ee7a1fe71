"""Shards -> undecoded samples -> decoded samples; whatever is broken comes out as a fault, never as silence."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import cv2
import numpy as np
from PIL import Image
from webdataset.tariterators import tar_file_iterator

from vistallm.coinit.shards import broken_seal
from vistallm.data.remote import Files
from vistallm.schema import Sample, SampleReject

_NAME = re.compile(r"[^./\\][^/\\]*\.[A-Za-z0-9.]+")  # <key>.<extension>, no folder
MAX_PIXELS = 50_000_000  # of one image
SMALL = 320  # pixels of the longer side under which an image is decoded in full: it is quick, and its result exact
BROKEN = (tarfile.TarError, EOFError, OSError)  # what reading a damaged tar raises
_DAMAGED = "is not as it was written: a byte has changed; copy or build the shard again"
HEADROOM = 1.1  # a JPEG is decoded at reduced scale while it stays so much larger than the target


@dataclass
class RawSample:
    """One sample of a shard, undecoded.

    Attributes:
        shard: place of the shard; key: the sample's name in it.
        record: its JSON, None when broken or not there; files: image members by name ("0.jpg"), as bytes.
        copy: how many times the run has met this sample before; fault: why it can't be used, None = nothing known.
    """

    shard: str
    key: str
    record: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    copy: int = 0
    fault: SampleReject | None = None

    @property
    def task(self) -> str | None:
        """The task of the sample, None when its JSON can't be read (decoding then rejects it)."""
        return None if self.record is None else str(self.record.get("task"))


def read_raw(
    place: str | Path,
    keep: Callable[[str], bool] = lambda task: True,
    files: Files | None = None,
    size: int | None = None,
) -> Iterator[RawSample]:
    """Yield the samples of a tar shard in file order; images of tasks that `keep` refuses are not read.

    Broken and strange members become samples with a `fault`; a tar that ends or breaks early does so as the last one.

    `size` is what the file must have, in bytes; it is checked when a remote shard is copied to the cache.

    Raises:
        ValueError: a remote shard can't be read.
    """
    place = str(place)
    try:
        with (files or Files()).open(place, size) as file:
            yield from _group(file, place, keep)
    except BROKEN as error:
        text = f"{place}: not a readable tar file to its end ({error}); run `python tools/build_coinit.py check` on it"
        yield RawSample(place, "", fault=SampleReject("broken-shard", text))


def _group(file: BinaryIO, place: str, keep: Callable[[str], bool]) -> Iterator[RawSample]:
    sample: RawSample | None = None
    wanted = True  # set by a sample's JSON, which comes first, and asked before its images are read

    def of_wanted(name: str) -> bool:
        return wanted or sample is None or name.partition(".")[0] != sample.key

    broken: Exception | None = None
    for member in _members(file, of_wanted):
        if isinstance(member, Exception):
            broken = member  # the sample before it is whole, and goes first
            break
        key, _, name = member["fname"].partition(".")
        if not _NAME.fullmatch(member["fname"]):
            text = f"member {member['fname']!r}: expected a file <key>.<extension> without folders; left out"
            yield RawSample(place, member["fname"], fault=SampleReject("bad-member", text))
            continue
        if sample is None or key != sample.key:
            if sample is not None and wanted:
                yield sample
            sample, wanted = RawSample(place, key), True
        if name == "json":
            wanted = _read_record(sample, member["data"], keep)
        else:
            sample.files[name] = member["data"]
    if sample is not None and wanted:
        yield sample
    if broken is not None:
        raise broken


def _members(file: BinaryIO, select: Callable[[str], bool]) -> Iterator[dict[str, Any] | Exception]:
    """Name ("fname") and content ("data") of the selected files of a tar; an error that ends it comes last."""
    try:
        yield from tar_file_iterator(cast(Any, file), skip_meta=None, select_files=select)
    except BROKEN as error:
        yield error


def _read_record(sample: RawSample, content: bytes, keep: Callable[[str], bool]) -> bool:
    """Parse the JSON of a sample; returns whether the sample is wanted."""
    try:
        record = json.loads(content)
        sample.record = record if isinstance(record, dict) and "task" in record else None
        if sample.record is None:
            sample.fault = SampleReject("bad-json", f"{sample.key}: expected a sample's record, got {content[:60]!r}")
        elif broken_seal(record, content):
            sample.record, sample.fault = None, SampleReject("checksum", f"{sample.key}.json {_DAMAGED}")
    except ValueError as error:
        sample.fault = SampleReject("bad-json", f"{sample.key}: {error}")
    return sample.record is None or keep(str(sample.record["task"]))


def decode_sample(raw: RawSample, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Sample:
    """Decode the images of a raw sample.

    Args:
        raw: from `read_raw`.
        size: side of the square that the images are needed at, in pixels; JPEGs much larger than it are decoded at
            1/2, 1/4 or 1/8 scale (`sample.pixels` then is smaller than `sample.images` says). None = in full.
        max_pixels: a larger image is a reject, before it is decoded.

    Raises:
        SampleReject: bad-json, checksum, missing-image, bad-image, too-many-pixels, or the fault the sample came with.
    """
    if raw.fault is not None:
        raise raw.fault
    if raw.record is None:
        raise SampleReject("bad-json", f"{raw.key}: no member {raw.key}.json in the shard")
    try:
        sample = Sample.from_json(raw.record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SampleReject("bad-json", f"{raw.key}: {error}") from error
    sample.pixels = []
    for info in sample.images:
        if info.file not in raw.files:
            raise SampleReject("missing-image", f"{raw.key}: no member {raw.key}.{info.file} in the shard")
        where, expected, data = f"{raw.key}.{info.file}", (info.width, info.height), raw.files[info.file]
        if "crc32" in raw.record and raw.record["crc32"].get(info.file) != zlib.crc32(data):
            raise SampleReject("checksum", f"{where} {_DAMAGED}")
        sample.pixels.append(decode_image(data, expected, where, size, max_pixels))
    return sample


def decode_image(
    data: bytes, expected: tuple[int, int], where: str, size: int | None = None, max_pixels: int = MAX_PIXELS
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
