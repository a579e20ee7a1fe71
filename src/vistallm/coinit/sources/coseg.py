"""Object co-segmentation (PASCAL, iCoSeg, MSRC): folders of images and masks in, `coseg` samples out.

Copies of these sets differ, so a layout says where the files are: a YAML file such as `configs/coseg/icoseg.yaml`,
named with `--set layout=FILE`, or its keys one by one (`--set image_glob=...`), which win over the file:

    name        of the set, for image ids ("icoseg")
    image_glob  images under --images or --root; the folder of an image is its class ("images/*/*.jpg")
    mask_glob   the mask of an image, with {class} and {stem} filled in ("ground_truth/{class}/{stem}.png")
    foreground  ">127": above that in any channel; "64,0,0": that colour; in the file also a rule for each class
    image_id    what tells images apart: "{class}/{stem}" or "{stem}"
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceImage, SourceOptions, group_draft, is_training
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Region

_LAYOUT = {"name": "", "image_glob": "", "mask_glob": "", "foreground": ">127", "image_id": "{class}/{stem}"}


def load_coseg(options: SourceOptions) -> Source:
    """Groups of images that share an object: `train` draws one of two to four images for every image.

    Any other split name takes each class in groups of four in order of name, with every image once (the last two
    groups are smaller where one image would be left over).
    """
    layout = _read_layout(options)
    folder, classes = options.images or options.root, dict[str, list[Path]]()
    for path in sorted(folder.glob(layout["image_glob"])):
        classes.setdefault(path.parent.name, []).append(path)
    wanted = layout["classes"].split(",") if layout["classes"] else list(classes)
    if unknown := sorted(set(wanted) - set(classes)):
        raise ValueError(f"--set classes: {unknown[0]!r} is no folder of images; there are {', '.join(classes)}")
    if not classes:
        raise ValueError(f"{folder}: no image matches image_glob {layout['image_glob']!r}; see configs/coseg/")
    groups = [(name, *group) for name in wanted for group in enumerate(_groups(classes[name], name, options))]
    return Source(groups, lambda group, _: [_draft(options, layout, *group)])


def _read_layout(options: SourceOptions) -> dict[str, Any]:
    settings = options.read_settings(layout="", classes="", **_LAYOUT)
    given: dict[str, Any] = {}
    if settings["layout"]:
        path = Path(settings["layout"])
        if not path.is_file():
            raise ValueError(f"--set layout: expected a YAML file such as configs/coseg/icoseg.yaml, got {path}")
        given = dict(OmegaConf.to_container(OmegaConf.load(path)) or {})  # type: ignore[arg-type]
        if unknown := sorted(set(given) - set(_LAYOUT)):
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; a layout has {', '.join(_LAYOUT)}")
    layout: dict[str, Any] = {"classes": "", **_LAYOUT, **given, **options.settings}
    if missing := [key for key in ("name", "image_glob", "mask_glob") if not layout[key]]:
        example = f"--set layout=configs/coseg/icoseg.yaml or --set {missing[0]}="
        raise ValueError(f"coseg: expected {missing[0]}, from {example}")
    return layout


def _groups(paths: list[Path], name: str, options: SourceOptions) -> Iterator[list[Path]]:
    """Groups of the images of one class; a lone image makes one group of itself, which is then rejected."""
    if len(paths) < 2:
        yield paths
    elif is_training(options.split):
        rng = np.random.default_rng([options.seed, *name.encode()])
        for first in range(len(paths)):
            others = rng.permutation([i for i in range(len(paths)) if i != first])
            chosen = [first, *others[: int(rng.integers(1, 4))].tolist()]
            yield [paths[i] for i in rng.permutation(chosen)]
    else:
        while paths:
            size = 3 if len(paths) == 5 else 4  # 5 = 3 + 2: none is left alone
            yield paths[:size]
            paths = paths[size:]


def _draft(options: SourceOptions, layout: dict[str, Any], name: str, number: int, paths: list[Path]) -> Draft | Reject:
    if len(paths) < 2:
        return Reject("lone-image", f"{paths[0]}: class {name!r} has no other image")
    images, regions = [], []
    for index, path in enumerate(paths):
        mask = _read_mask(options, layout, name, path)
        if isinstance(mask, Reject):
            return mask
        image_id = layout["image_id"].replace("{class}", name).replace("{stem}", path.stem)
        images.append(SourceImage(path, f"{layout['name']}:{image_id}", mask.shape[1], mask.shape[0]))
        regions.append(Region(index, "mask", index, rle=mask_to_rle(mask)))
    sample_id = f"coseg-{options.split}-{layout['name']}-{name}-{number}"
    fields, meta = {"targets": list(range(len(paths)))}, {"class": name, "set": layout["name"]}
    return group_draft(images, sample_id, "coseg", "coseg", meta, fields=fields, regions=regions)


def _read_mask(options: SourceOptions, layout: dict[str, Any], name: str, path: Path) -> np.ndarray | Reject:
    """The (H, W) bool mask of an image; the builder compares its size with the image's."""
    pattern = layout["mask_glob"].replace("{class}", glob.escape(name)).replace("{stem}", glob.escape(path.stem))
    files = sorted(options.root.glob(pattern))
    if len(files) > 1:
        raise ValueError(f"{path}: expected one mask {pattern}, got {files[0].name} and {files[1].name}")
    if not files:
        return Reject("no-mask", f"{path}: expected a mask {pattern} in {options.root}")
    try:
        with Image.open(files[0]) as file:
            pixels = np.asarray(file.convert("RGB"))
    except OSError as error:
        return Reject("no-mask", f"{files[0]}: {error}")
    rule = layout["foreground"]
    rule = str(rule[name]) if isinstance(rule, dict) and name in rule else str(rule)
    if above := re.fullmatch(r">(\d+)", rule):
        mask = pixels.max(axis=2) > int(above[1])
    elif colour := re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", rule):
        mask = (pixels == np.array([int(value) for value in colour.groups()])).all(axis=2)
    else:
        expected = "expected foreground as >127, as 64,0,0, or one of them for its class"
        raise ValueError(f"{files[0]}: {expected}, got {rule!r}")
    return mask if mask.any() else Reject("empty-mask", f"{files[0]}: no pixel is foreground by {rule!r}")
