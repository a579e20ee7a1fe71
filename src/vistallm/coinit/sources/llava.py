"""Conversations about one image in LLaVA's form: llava-instruct (150k), llava-pretrain (558k captions of web images).

In: a JSON list of {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ..]}; out: `instruct` samples.
The last round is the sample's instruction and answer, those before it are `fields["rounds"]`; `<image>` is removed, as
the sequence puts the image before the first round. Records without an image, and conversations that do not alternate
from human to gpt, are counted rejects. Ids repeat within the 150k file, so a record's place is part of a sample's id.

Setting: `file=NAME`, another file of the same form in `--root` (chat.json of LLaVA-CC3M, detail_23k.json ..).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from vistallm.coinit.sources.base import Draft, Reject, Source, SourceImage, SourceOptions, first_file
from vistallm.coinit.sources.records import Record, file_source, read_list

# where a bare COCO name may be: the 2017 sets are the 2014 ones under new names
_COCO_PLACES = ("train2017/", "train2014/COCO_train2014_", "COCO_train2014_", "val2014/COCO_val2014_", "COCO_val2014_")


def load_llava_instruct(options: SourceOptions) -> Source:
    """LLaVA-Instruct; split train. Images of COCO, named by their bare number ("000000033471.jpg")."""
    return _load("llava-instruct", "llava_instruct_150k.json", options)


def load_llava_pretrain(options: SourceOptions) -> Source:
    """LLaVA's pretraining captions; split train."""
    return _load("llava-pretrain", "blip_laion_cc_sbu_558k.json", options)


def _load(source: str, file: str, options: SourceOptions) -> Source:
    settings = options.read_settings(file=file)
    options.check_split("train")
    path = options.find_file(settings["file"])

    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        if isinstance(record.data, dict) and not record.data.get("image"):
            yield Reject("no-image", f"{record.where}: a conversation without an image")
            return
        image = record.text("image")
        turns = [_turn(Record(turn, record.where)) for turn in record.values("conversations", dict)]
        if problem := _problem(turns):
            yield Reject(problem, f"{record.where}: the conversation has turns {turns!r:.200}")
            return
        texts = [text for _, text in turns]
        rounds = [list(pair) for pair in zip(texts[0::2], texts[1::2], strict=True)]
        instruction, answer = rounds.pop()
        places = _COCO_PLACES if "/" not in image else ()
        bare = PurePosixPath(image).name
        found = first_file(options.image_folder, image, *(f"{place}{bare}" for place in places))
        yield SourceImage(found, _image_id(image)).draft(
            f"{source}-train-{number}-{record.require('id', str, int)}",
            "instruct",
            source,
            instruction=instruction,
            answer=answer,
            fields={"rounds": rounds} if rounds else {},
        )

    return file_source(path, read_list(path), make)


def _turn(turn: Record) -> tuple[str, str]:
    speaker = turn.text("from")
    if speaker not in ("human", "gpt"):
        raise turn.fault(f"expected 'from' human or gpt, got {speaker!r}")
    return speaker, re.sub(r"\s*<image>\s*", " ", turn.text("value")).strip()


def _problem(turns: list[tuple[str, str]]) -> str | None:
    """Why a conversation can't be used, as a reject's reason, or None."""
    if not turns or [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        return "turn-order"
    if not all(text for _, text in turns):
        return "empty-text"
    return "placeholder" if any("{regions:" in text for _, text in turns) else None


def _image_id(image: str) -> str:
    """The canonical id of an image, by which leaks into evaluation sets are seen."""
    stem = PurePosixPath(image).stem.rpartition("_")[2]
    if "VG_100K" in image or image.startswith("vg/"):
        return f"vg:{stem}"
    return f"coco:{int(stem)}" if len(stem) == 12 and stem.isdigit() else f"llava:{image}"
