"""Regions <-> answer text: boxes, points, polygons (original pixels) <-> coordinate tokens of the padded square.

`coords="tokens"` writes `<m_st><bin_1><bin_2>...<m_part>...<m_sep>...<m_ed>`: `_sep` separates objects, `<m_part>` the
parts of one object, and an empty pair says that there is no target. `coords="text"` writes bracketed integers as the
paper's figures do, `[1,2,...;3,4,...],[...]`: a bracket per object, `;` between its parts, `[]` for no target.
With several images `image k:` (k from 1) goes before the regions of image k; in a video `frame k:`, and then a pair of
markers for each object (`regions/tracks.py`). Reading ignores white space.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vistallm.regions.contours import MIN_VERTICES
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import (
    box_polygon,
    canonical_polygons,
    check_options,
    mask_to_polygons,
    rle_box,
    rle_to_mask,
)
from vistallm.schema import REGION_KINDS, Parsed, Region

MARKERS = ("<b_st>", "<b_sep>", "<b_ed>", "<p_st>", "<p_sep>", "<p_ed>", "<m_st>", "<m_sep>", "<m_part>", "<m_ed>")
KIND_OF_LETTER = {kind[0]: kind for kind in REGION_KINDS}

_BIN = re.compile(r"<bin_(\d+)>")
_BINS = re.compile(r"(?:<bin_\d+>)*")
_FLAGS = re.DOTALL | re.IGNORECASE | re.ASCII  # the digits and spaces that a grammar of answers knows
_IMAGE = r"(?:(?:image|frame)\s*(?P<image>\d+)\s*:\s*)?"
_TOKEN_GROUP = re.compile(_IMAGE + r"<(?P<kind>[bpm])_st>(?P<body>.*?)<(?P=kind)_ed>", _FLAGS)
_BRACKET = r"\[[\d\s,;]*\]"
_TEXT_GROUP = re.compile(_IMAGE + rf"(?P<body>{_BRACKET}(?:\s*,\s*{_BRACKET})*)", _FLAGS)
_ANY_MARKER = re.compile(r"<(?:[bpm]_st|[bpm]_ed|[bpm]_sep|m_part|bin_\d+)>")


class RegionParseError(ValueError):
    """An answer whose regions cannot be read; `reason` is a short kebab-case word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class RegionCodec:
    """Writes regions as text that a tokenizer with `tokens` added reads token by token, and reads such text back.

    Args:
        coords: "tokens" or "text" (the ablation).
        num_bins: bins per axis of the padded square; bin i stands for i / (num_bins - 1).
        points: vertex budget of one mask object, shared by its parts.
        mask_sampler: "uniform", "curvature" or "adaptive".
        target_iou: if set, the fewest points (at most `points`) whose polygons reach this IoU.
        cache_size: masks whose polygons are kept in memory (about 1 kB each): a mask is sampled once, not every epoch.
        keyframes: in a video every so many frames, and the last, are written; `regions/tracks.py` adds the others.
    """

    def __init__(
        self,
        coords: str = "tokens",
        num_bins: int = 1001,
        points: int = 32,
        mask_sampler: str = "adaptive",
        target_iou: float | None = None,
        cache_size: int = 16384,
        keyframes: int = 1,
    ) -> None:
        if coords not in ("tokens", "text"):
            raise ValueError(f"coords: expected 'tokens' or 'text', got {coords!r}")
        check_options(points, mask_sampler, target_iou)
        if num_bins < 2:
            raise ValueError(f"num_bins: expected at least 2, got {num_bins}")
        self.coords, self.num_bins, self.points, self.keyframes = coords, num_bins, points, keyframes
        self.tokens = [*MARKERS, *(f"<bin_{i}>" for i in range(num_bins))] if coords == "tokens" else []
        self.bin_values = np.arange(num_bins) / (num_bins - 1)

        def sample(counts: str | bytes, height: int, width: int) -> tuple[np.ndarray, ...]:
            mask = rle_to_mask({"size": [height, width], "counts": counts})
            polygons = mask_to_polygons(mask, points, mask_sampler, target_iou=target_iou, num_bins=num_bins)
            for polygon in polygons:
                polygon.flags.writeable = False
            return tuple(polygons)

        self._sample = lru_cache(maxsize=cache_size)(sample)

    def encode(self, regions: list[Region], letterboxes: list[Letterbox], kind: str, unit: str = "image") -> str:
        """Write regions, in image order, as one group per image.

        Args:
            regions: one per object, of any image; masks are taken from `polygons`, else sampled from `rle`. None at
                all give an empty pair.
            letterboxes: the sample's images; with more than one, every group says its image.
            kind: "mask", "box" or "point": how the regions are written; a box can be taken from a mask.
            unit: what an image is called, "image" or "frame".

        Raises:
            ValueError: a region lacks what `kind` needs, lies in no image, or its mask is empty.
        """
        if kind not in REGION_KINDS:
            raise ValueError(f"region kind: expected one of {', '.join(REGION_KINDS)}, got {kind!r}")
        if any(not 0 <= r.image < len(letterboxes) for r in regions):
            raise ValueError(
                f"regions lie in images {sorted({r.image for r in regions})}, but there are {len(letterboxes)} images"
            )
        if not regions:
            return self._write_group([], kind)
        groups = []
        for index, letterbox in enumerate(letterboxes):
            objects = [self._object_bins(r, letterbox, kind) for r in regions if r.image == index]
            if objects:
                prefix = f"{unit} {index + 1}: " if len(letterboxes) > 1 else ""
                groups.append(prefix + self._write_group(objects, kind))
        return " ".join(groups)

    def decode(
        self,
        text: str,
        letterboxes: list[Letterbox],
        kind: str | None = None,
        labels: bool = False,
        video: bool = False,
    ) -> Parsed:
        """Read every region group of an answer.

        Args:
            text: the answer, with markers; white space between tokens is ignored.
            letterboxes: the sample's images, in the order of their numbers.
            kind: what an empty bracket of `coords="text"` stands for, "mask" if not given; tokens say it themselves.
            labels: each region gets the phrase before its group as its label ("star [..], red cross [..]").
            video: the images are frames. A group is of one object, whose number is the group's place in its frame.

        Returns:
            Regions in original pixels, float32, clipped to the image; the kind is "text" when no marker occurs; the
            answer is the text without its region groups.

        Raises:
            RegionParseError: the regions cannot be read; `.reason` says why.
        """
        pattern = _TOKEN_GROUP if self.coords == "tokens" else _TEXT_GROUP
        regions: list[Region] = []
        kinds: set[str] = set()
        image: int | None = None
        end = place = 0
        for match in pattern.finditer(text):
            found, objects = self._read_group(match, kind)
            kinds.add(found)
            place = place + 1 if video and image is not None and match["image"] is None else 0
            if video and len(objects) > 1:
                raise RegionParseError("wrong-count", f"expected one object in a pair of a track, got {len(objects)}")
            if place == 0 and (objects or video):
                image = self._image_index(match["image"], len(letterboxes))
            label = re.split(r"[,.:]", text[end : match.start()])[-1].strip() if labels else None
            end = match.end()
            for parts in objects:
                assert image is not None
                number = place if video else len(regions)
                regions.append(self._region(found, parts, image, number, letterboxes[image]))
                regions[-1].label = label
        rest = pattern.sub(" ", text)
        if self.coords == "tokens" and (stray := _ANY_MARKER.search(rest)):
            raise RegionParseError(
                "unclosed" if "_st>" in stray[0] else "stray-token", f"{stray[0]} outside a closed group"
            )
        if len(kinds) > 1:
            raise RegionParseError("mixed-kinds", f"expected regions of one kind, got {', '.join(sorted(kinds))}")
        return Parsed(kinds.pop() if kinds else "text", regions, re.sub(r"\s+", " ", rest).strip())

    def number_regions(self, text: str) -> str:
        """An answer with the numbers of its objects in the place of their coordinates: "The masks are [0, 1]."."""
        numbers = itertools.count()

        def name(match: re.Match[str]) -> str:
            image = f"image {match['image']}: " if match["image"] else ""
            return f" {image}{[next(numbers) for _ in self._read_group(match, None)[1]]}"

        text = (_TOKEN_GROUP if self.coords == "tokens" else _TEXT_GROUP).sub(name, text)
        return re.sub(r"\s+(?=[.,])", "", re.sub(r"\s+", " ", text)).strip()

    def quantise(self, points: np.ndarray, letterbox: Letterbox) -> np.ndarray:
        """Original pixels -> bins: (n, 2) float, clipped to the image -> (n, 2) int64 in 0..num_bins-1."""
        return np.rint(letterbox.to_unit(points) * (self.num_bins - 1)).astype(np.int64)

    def restore(self, bins: np.ndarray, letterbox: Letterbox) -> np.ndarray:
        """Bins -> original pixels: (n, 2) int in 0..num_bins-1 -> (n, 2) float32, clipped to the image."""
        return letterbox.to_pixels(np.asarray(bins).reshape(-1, 2) / (self.num_bins - 1))

    def _object_bins(self, region: Region, letterbox: Letterbox, kind: str) -> list[np.ndarray]:
        """One region -> its parts as (n, 2) bins; a box has one part of two points, a point one of one."""
        if kind == "point":
            if region.point is None:
                raise ValueError(f"expected a region with a point, got {region}")
            return [self.quantise(np.array(region.point), letterbox)]
        if kind == "box":
            box = region.box if region.box is not None else region.rle and rle_box(region.rle)
            if not box:
                raise ValueError(f"expected a region with a box or a mask, got {region}")
            return [self.quantise(np.array(box), letterbox)]
        polygons: Sequence[np.ndarray] | None = region.polygons
        if polygons is None and region.rle is not None:
            height, width = region.rle["size"]
            polygons = self._sample(region.rle["counts"], int(height), int(width))
        if not polygons:
            raise ValueError("expected a mask of at least one pixel, got an empty or missing one; drop the object")
        bins = [self.quantise(p, letterbox) for p in polygons]
        if parts := canonical_polygons(bins):  # parts that quantisation flattens are dropped, but never all of them
            return parts
        # The whole object is thinner than a bin: write the smallest box around it that the bins can draw.
        flat = np.concatenate(bins)
        low = np.minimum(flat.min(0), self.num_bins - 2)
        return [box_polygon(np.stack([low, np.maximum(flat.max(0), low + 1)]), self.points)]

    def _write_group(self, objects: list[list[np.ndarray]], kind: str) -> str:
        if self.coords == "text":
            bodies = [";".join(",".join(map(str, p.ravel().tolist())) for p in parts) for parts in objects]
            return ",".join(f"[{body}]" for body in bodies) or "[]"
        letter = kind[0]
        bodies = [
            "<m_part>".join("".join(f"<bin_{v}>" for v in p.ravel().tolist()) for p in parts) for parts in objects
        ]
        return f"<{letter}_st>" + f"<{letter}_sep>".join(bodies) + f"<{letter}_ed>"

    def _read_group(self, match: re.Match[str], kind: str | None) -> tuple[str, list[list[list[int]]]]:
        """One group -> its kind and, per object, per part, the bins in a row."""
        body = re.sub(r"\s+", "", match["body"])
        if self.coords == "text":
            objects = [[_integers(p) for p in b.split(";")] for b in body[1:-1].split("],[")] if body != "[]" else []
            sizes = {len(p) for parts in objects for p in parts}
            single = all(len(parts) == 1 for parts in objects)
            found = "point" if sizes == {2} and single else "box" if sizes == {4} and single else "mask"
            return (kind or "mask") if not objects else found, objects
        found = KIND_OF_LETTER[match["kind"].lower()]
        if not body:
            return found, []
        objects = []
        for chunk in body.split(f"<{found[0]}_sep>"):
            parts = chunk.split("<m_part>") if found == "mask" else [chunk]
            for part in parts:
                if not _BINS.fullmatch(part):
                    raise RegionParseError("bad-token", f"expected only bins between markers, got {part[:80]!r}")
            objects.append([[int(v) for v in _BIN.findall(part)] for part in parts])
        return found, objects

    def _image_index(self, written: str | None, count: int) -> int:
        if written is None:
            if count > 1:
                raise RegionParseError("no-image", f"expected 'image k:' before the regions of {count} images")
            return 0
        if not 1 <= int(written) <= count:
            raise RegionParseError("bad-image", f"expected an image from 1 to {count}, got {written}")
        return int(written) - 1

    def _region(self, kind: str, parts: list[list[int]], image: int, number: int, letterbox: Letterbox) -> Region:
        """Checked bins of one object -> Region in original pixels."""
        polygons = []
        for values in parts:
            if not values:
                raise RegionParseError("empty-object", "expected coordinates between two separators, got none")
            if max(values) >= self.num_bins:
                raise RegionParseError("bad-bin", f"expected bins up to {self.num_bins - 1}, got {max(values)}")
            if len(values) % 2:
                raise RegionParseError("odd-count", f"expected x, y pairs, got {len(values)} numbers")
            polygons.append(self.restore(np.array(values), letterbox))
        if kind == "mask":
            if min(map(len, polygons)) < MIN_VERTICES:
                raise RegionParseError("too-few-points", f"expected at least {MIN_VERTICES} vertices in each part")
            return Region(image, kind, number, polygons=polygons)
        expected, given = (4 if kind == "box" else 2), 2 * len(polygons[0])
        if given != expected:
            raise RegionParseError("bad-count", f"expected {expected} numbers in a {kind}, got {given}")
        flat = tuple(float(v) for v in polygons[0].ravel())
        if kind == "point":
            return Region(image, kind, number, point=flat)
        low, high = polygons[0].min(0).tolist(), polygons[0].max(0).tolist()
        return Region(image, kind, number, box=(*low, *high))  # corners in any order


def _integers(text: str) -> list[int]:
    """Read "1,2,3" as [1, 2, 3] and an empty text as []."""
    try:
        return [int(v) for v in text.split(",")] if text else []
    except ValueError:
        raise RegionParseError("bad-token", f"expected integers between commas, got {text[:80]!r}") from None
