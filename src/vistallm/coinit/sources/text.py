"""Sources answered in words: COCO captions, VQAv2, VQA-E, VQA-X, POPE, NLVR2 and LLaVA's conversations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vistallm.coinit.sources.base import (
    Draft,
    Reject,
    Source,
    SourceFormatError,
    SourceImage,
    SourceOptions,
    group_draft,
)
from vistallm.coinit.sources.records import Record, file_source, read_json, read_json_lines, read_object

_SETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
UNKNOWN = "unknown"  # the answer of a sample whose dataset publishes none; its meta says `unlabelled`

# ---- captions

_OFFICIAL = "it is Karpathy's split; for captions_*.json, give --set annotations=official (and --set year=2017)"
# image_id, the image's file, (width, height) or (0, 0) where the annotations have none, and its captions.
_Captioned = tuple[int, str, tuple[int, int], list[str]]


def load_coco_caption(options: SourceOptions) -> Source:
    """COCO captions by Karpathy's split or the official one, which differ: never mix the two.

    Training has one sample per caption, evaluation one per image with all its captions as references.
    """
    settings = options.read_settings(annotations=("karpathy", "official"), year=("2014", "2017"))
    training = options.split == "train"
    if settings["annotations"] == "official":
        folder = options.check_split("train", "val") + settings["year"]
        path = options.find_file(f"captions_{folder}.json", folders=("", "annotations/"))
        records = _official_captions(path, folder)
    else:
        split = options.check_split("train", "val", "test")
        path = options.find_file("dataset_coco.json", folders=("", "karpathy/"), hint=_OFFICIAL)
        # Images of val2014 that are in neither Karpathy's val nor his test split are trained on, as the papers do.
        records = _karpathy_captions(path, ("train", "restval") if training else (split,))

    def make(record: _Captioned, _: int) -> Iterator[Draft | Reject]:
        image_id, file, size, written = record
        captions = [caption for caption in written if caption]
        if not captions or len(captions) < len(written):
            yield Reject("empty-text", f"{path}, image {image_id}: a caption without a word, or none")
        image = SourceImage(options.image(file, file.rpartition("/")[2]), f"coco:{image_id}", *size)
        for number, caption in enumerate(captions if training else captions[:1]):
            fields: dict[str, Any] = {"caption": caption} if training else {"caption": caption, "answers": captions}
            name = f"coco-caption-{options.split}-{image_id}-{number}"
            yield image.draft(name, "caption", "coco-caption", fields=fields)

    return Source(records, make)


def _official_captions(path: Path, folder: str) -> Iterator[_Captioned]:
    data, images = read_object(path), dict[int, _Captioned]()
    for image in data.records("images"):
        size = (int(image.data.get("width", 0)), int(image.data.get("height", 0)))
        images[image.integer("id")] = (image.data["id"], f"{folder}/{image.text('file_name')}", size, [])
    for annotation in data.records("annotations"):
        if (image_id := annotation.integer("image_id")) not in images:
            raise annotation.fault(f"expected image_id of one of the images listed, got {image_id}")
        images[image_id][3].append(" ".join(annotation.text("caption").split()))  # some hold line breaks
    yield from images.values()


def _karpathy_captions(path: Path, splits: tuple[str, ...]) -> Iterator[_Captioned]:
    for image in read_object(path).records("images"):
        if image.text("split") in splits:
            captions = [" ".join(sentence.text("raw").split()) for sentence in image.records("sentences")]
            yield image.integer("cocoid"), f"{image.text('filepath')}/{image.text('filename')}", (0, 0), captions


# ---- questions about one image


def load_vqav2(options: SourceOptions) -> Source:
    """VQAv2; the test splits share the images of test2015 and have no answers."""
    options.read_settings()
    split = options.check_split(*_SETS)
    subset = "test2015" if split.startswith("test") else _SETS[split]

    def make(record: dict[str, Any], _: int) -> Iterator[Draft]:
        ten, name = record["answers"], f"vqav2-{split}-{record['question_id']}"
        fields = {"question": record["question"], "answer": record["multiple_choice_answer"]}
        meta = {"question_id": record["question_id"]} | ({} if ten else {"unlabelled": True})
        fields |= {"answers": ten} if ten else {}
        yield _coco(options, subset, record["img_id"]).draft(name, "vqa", "vqav2", meta, fields=fields)

    return Source(iter(_read_vqav2(options, split).values()), make)


def _read_vqav2(options: SourceOptions, split: str) -> dict[int, dict[str, Any]]:
    """question_id -> question with its ten answers and the most frequent one (none and UNKNOWN for a test split)."""
    name = f"v2_OpenEnded_mscoco_{_SETS[split]}_questions.json"
    questions, seen = dict[int, dict[str, Any]](), set()
    for record in read_object(options.find_file(name, folders=("", "Questions/"))).records("questions"):
        asked = {"img_id": record.integer("image_id"), "question": record.text("question").strip()}
        unknown = {"multiple_choice_answer": UNKNOWN, "answers": []}
        questions[record.integer("question_id")] = {"question_id": record.data["question_id"], **asked, **unknown}
    if split.startswith("test"):
        return questions
    name = f"v2_mscoco_{_SETS[split]}_annotations.json"
    for record in read_object(options.find_file(name, folders=("", "Annotations/"))).records("annotations"):
        ten = [answer.text("answer") for answer in record.records("answers")]
        if len(ten) != 10:
            raise record.fault(f"expected 10 answers, got {len(ten)}")
        seen.add(question_id := record.integer("question_id"))
        given = {"multiple_choice_answer": record.text("multiple_choice_answer"), "answers": ten}
        questions.get(question_id, {}).update(given)
    if missing := questions.keys() ^ seen:
        raise SourceFormatError(
            f"{options.root}, {split}: expected the same question_id in questions and annotations; "
            f"{len(missing)} are in one of them only, such as {min(missing)}"
        )
    return questions


def load_vqa_e(options: SourceOptions) -> Source:
    """VQA-E: questions of VQAv2 whose answer an image caption explains."""
    options.read_settings()
    split = options.check_split("train", "val")
    path = options.find_file(f"VQA-E_{split}_set.json")
    return _explained_source(options, "vqa-e", path, read_json(path, list))


def load_vqa_x(options: SourceOptions) -> Source:
    """VQA-X: explanations by people, of VQAv2's training questions (train) and validation questions (val, test)."""
    options.read_settings()
    split = options.check_split("train", "val", "test")
    names = f"{split}_exp_anno.json", f"vqaX_{split}.json"
    path = options.find_file(*names, folders=("", "textual/", "Annotations/", "VQA-X/"))
    if path.name == names[1]:
        return _explained_source(options, "vqa-x", path, map(_nle_record, read_json(path, dict).items()))
    joined = "train" if split == "train" else "val"
    questions, records = _read_vqav2(options, joined), []
    for key, explanations in read_json(path, dict).items():
        if not key.isdigit() or int(key) not in questions:
            raise SourceFormatError(f"{path}: expected a question_id of VQAv2 {joined}, got {key!r}")
        records.append(questions[int(key)] | {"explanation": explanations})
    return _explained_source(options, "vqa-x", path, records)


def _nle_record(item: tuple[str, Any]) -> dict[str, Any]:
    """A question of vqaX_*.json, the form of NLX-GPT, as a record of VQA-E's form with its ten answers."""
    record = Record(item[1], f"question {item[0]}")
    ten = [answer.text("answer") for answer in record.records("answers")]
    most = {"multiple_choice_answer": Counter(ten).most_common(1)[0][0] if ten else None, "answers": ten}
    return {**record.data, **most, "question_id": int(item[0])}


def _explained_source(options: SourceOptions, source: str, path: Path, records: Iterable[Any]) -> Source:
    """Questions with an answer and explanations of it, in the forms of all files.

    With question ids, training has one sample per explanation, evaluation one per question; else one is of a record.
    """
    split = options.split

    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        texts = [text for text in record.require("explanation", list) if isinstance(text, str)]  # VQA-E adds a score
        if not texts:
            raise record.fault(f"expected 'explanation' to list texts, got {record.data['explanation']!r:.80}")
        answered = {"answer": record.text("multiple_choice_answer"), "answers": record.values("answers", str)}
        question_id = record.optional("question_id", int)
        meta = {} if question_id is None else {"question_id": question_id}
        for i, text in enumerate(texts if meta and split == "train" else texts[:1]):
            name = f"{source}-{split}-{question_id}-{i}" if meta else f"{source}-{split}-{number}"
            if not (explanation := " ".join(text.split())):
                yield Reject("empty-text", f"{name}: expected an explanation, got none")
                continue
            # A sentence, as "So the answer is .." follows it.
            explanation = explanation if explanation[-1] in ".!?" else f"{explanation}."
            fields = {"question": record.text("question"), "explanation": explanation, **answered}
            yield _explained_image(options, record).draft(name, "vqa_e", source, meta, fields=fields)

    return file_source(path, records, make)


def _explained_image(options: SourceOptions, record: Record) -> SourceImage:
    """The image of a question, by its COCO id or its file."""
    if "image_name" not in record.data:
        return _coco(options, _SETS["train" if options.split == "train" else "val"], record.integer("img_id"))
    file = record.text("image_name")
    if not (digits := re.search(r"(\d{12})\.jpg$", file)):
        raise record.fault(f"expected a COCO file name in 'image_name', got {file!r}")
    return SourceImage(options.coco_image(file), f"coco:{int(digits[1])}")


def _coco(options: SourceOptions, subset: str, image_id: int) -> SourceImage:
    """An image of a part of COCO, such as "train2014"."""
    return SourceImage(options.coco_image(f"COCO_{subset}_{image_id:012d}.jpg"), f"coco:{image_id}")


def load_pope(options: SourceOptions) -> Source:
    """POPE: yes/no questions about objects; the splits are the ways to pick absent ones, all for evaluation.

    `--set questions=aokvqa` or `gqa` takes the other two sets, which are distributed as indented lists.
    """
    of = options.read_settings(questions=("coco", "aokvqa", "gqa"))["questions"]
    split = options.check_split("random", "popular", "adversarial")
    names = f"{of}_pope_{split}.json", f"{of}_pope_seem_{split}.json"
    path = options.find_file(*names, folders=("", f"{of}/", f"output/{of}/", f"seem/{of}/"))
    begin = "pope-" if of == "coco" else f"pope-{of}-"

    def make(record: Record, _: int) -> Iterator[Draft]:
        label, file = record.text("label"), record.text("image")
        image_id = file.rpartition("_")[2].partition(".")[0]
        if label not in ("yes", "no") or (of != "gqa" and not image_id.isdigit()):
            raise record.fault(f"expected label yes or no and a COCO image, got {label!r}, {file!r}")
        question_id, fields = record.integer("question_id"), {"question": record.text("text"), "answer": label}
        if of == "gqa":  # its images are Visual Genome's, in one folder
            image = SourceImage(options.image(file, f"images/{file}"), f"vg:{image_id}")
        else:
            image = SourceImage(options.coco_image(file), f"coco:{int(image_id)}")
        meta = {"level": split, "question_id": question_id}
        yield image.draft(f"{begin}{split}-{question_id}", "pope", "pope", meta, fields=fields)

    return file_source(path, read_json_lines(path), make)


# ---- statements about two images


def load_nlvr2(options: SourceOptions) -> Source:
    """NLVR2: statements about a left and a right image.

    The identifier "dev-850-0-1" holds split, set, pair and sentence. Consistency counts a sentence as right when all
    its pairs are, so `meta["group"]` is the identifier without the pair: "dev-850-1".
    """
    split = options.check_split("train", "dev", "test1", "test2")
    file = options.read_settings(file="")["file"]
    path = options.find_file(file or f"{split}.json", folders=("",) if file else ("", "data/", "nlvr2/data/"))

    def make(record: Record, _: int) -> Iterator[Draft]:
        identifier, label = record.text("identifier"), record.text("label").lower()
        parts = identifier.split("-")
        if len(parts) != 4 or parts[0] != split or label not in ("true", "false"):
            got = f"{identifier!r} and {record.text('label')!r}"
            raise record.fault(f"expected identifier as {split}-SET-PAIR-SENTENCE and label True or False, got {got}")
        folders = [f"{split}/", ""]
        if (directory := record.data.get("directory")) is not None:  # training images are spread over folders, 0 to 99
            folders = [f"{split}/{directory}/", f"images/{split}/{directory}/", f"{directory}/", ""]
        images = []
        for side in (0, 1):
            name = f"{'-'.join(parts[:3])}-img{side}"
            path = options.image(*(f"{folder}{name}.png" for folder in folders), usual="images")
            images.append(SourceImage(path, f"nlvr2:{name}"))
        fields = {"statement": record.text("sentence").strip(), "answer": label.title()}
        meta = {"group": "-".join([*parts[:2], parts[3]])}
        yield group_draft(images, f"nlvr2-{identifier}", "nlvr2", "nlvr2", meta, fields=fields)

    return file_source(path, read_json_lines(path), make)


# ---- conversations


def load_llava(source: str, file: str, options: SourceOptions) -> Source:
    """LLaVA-Instruct, on COCO's images under their bare number, and LLaVA's pretraining captions of web images.

    The last round is the instruction and answer, those before are `rounds`; ids repeat, so names hold the record.
    """
    settings = options.read_settings(file=file)
    options.check_split("train")
    path = options.find_file(settings["file"])

    def make(record: Record, number: int) -> Iterator[Draft | Reject]:
        if isinstance(record.data, dict) and not record.data.get("image"):
            yield Reject("no-image", f"{record.where}: a conversation without an image")
            return
        file, speakers, texts = record.text("image"), [], []
        for turn in record.records("conversations"):
            if turn.text("from") not in ("human", "gpt"):
                raise turn.fault(f"expected 'from' human or gpt, got {turn.data['from']!r}")
            speakers.append(turn.data["from"])
            # `<image>` is removed, as the sequence puts the image before the first round.
            texts.append(re.sub(r"\s*<image>\s*", " ", turn.text("value")).strip())
        problems = {
            "turn-order": not texts or speakers != ["human", "gpt"] * (len(texts) // 2),
            "empty-text": not all(texts),
            "placeholder": any("{regions:" in text for text in texts),
        }
        if problem := next((reason for reason, wrong in problems.items() if wrong), None):
            yield Reject(problem, f"{record.where}: the conversation has turns {texts!r:.200} by {speakers}")
            return
        *rounds, last = zip(texts[0::2], texts[1::2], strict=True)
        # A bare COCO number: the 2017 sets are the 2014 ones under new names.
        folders = "train2017/", "train2014/COCO_train2014_", "COCO_train2014_", "val2014/COCO_val2014_", "COCO_val2014_"
        places = [] if "/" in file else [f"{folder}{file}" for folder in folders]
        image = SourceImage(options.image(file, *places), _image_id(file))
        name = f"{source}-train-{number}-{record.require('id', str, int)}"
        fields = {"rounds": [list(pair) for pair in rounds]} if rounds else {}
        yield image.draft(name, "instruct", source, instruction=last[0], answer=last[1], fields=fields)

    return file_source(path, read_json(path, list), make)


def _image_id(image: str) -> str:
    """The canonical id of an image, by which leaks into evaluation sets are seen."""
    stem = PurePosixPath(image).stem.rpartition("_")[2]
    if "VG_100K" in image or image.startswith("vg/"):
        return f"vg:{stem}"
    return f"coco:{int(stem)}" if len(stem) == 12 and stem.isdigit() else f"llava:{image}"
