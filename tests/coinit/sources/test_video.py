"""Videos: expressions over palette images and over run-length codes, tubes of boxes, questions about frames."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from vistallm.regions.masks import rle_to_mask

FRAMES = [f"{number:05d}" for number in range(0, 60, 5)]  # YouTube-VOS names every fifth frame


def square(frame, number):
    """Where object `number` is in a frame, (48, 64) bool; the second one leaves after half of the video."""
    mask = np.zeros((48, 64), bool)
    if number == 1 or frame < 6:
        mask[5 + 20 * (number - 1) :, 2 * frame :][:12, :14] = True
    return mask


def expressions(**more):
    items = {"0": {"exp": "a dog  running left", "obj_id": "1"}, "1": {"exp": "the cat that leaves", "obj_id": "2"}}
    return {"videos": {"walk": {"expressions": {**items, **more}, "frames": FRAMES}}}


def write_rvos(root, picture, data=None):
    folder = root / "meta_expressions" / "train"
    folder.mkdir(parents=True)
    (folder / "meta_expressions.json").write_text(json.dumps(data or expressions()))
    (root / "train" / "Annotations" / "walk").mkdir(parents=True)
    for frame, name in enumerate(FRAMES):
        picture(root / "train" / "JPEGImages" / "walk" / f"{name}.jpg")
        values = np.zeros((48, 64), np.uint8)
        for number in (1, 2):
            values[square(frame, number)] = number
        image = Image.fromarray(values, "P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        image.save(root / "train" / "Annotations" / "walk" / f"{name}.png")


def write_mevis(root, picture):
    folder = root / "train"
    folder.mkdir(parents=True)
    items = {"0": {"exp": "two animals walking", "obj_id": [0, 1], "anno_id": [7, 9]}}
    videos = {"pair": {"expressions": items, "vid_id": 3, "frames": FRAMES}}
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))

    def code(mask):
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": rle["size"], "counts": rle["counts"].decode()} if mask.any() else None

    track = {key: [code(square(f, n)) for f in range(len(FRAMES))] for key, n in (("7", 1), ("9", 2))}
    (folder / "mask_dict.json").write_text(json.dumps(track))
    for name in FRAMES:
        picture(folder / "JPEGImages" / "pair" / f"{name}.jpg")


def write_tubes(root, picture, count=20):
    root.mkdir(parents=True, exist_ok=True)
    boxes = [[4 + i, 6, 20, 30] for i in range(8)]
    one = {"img_num": 20, "img_size": [48, 64], "st_frame": 5, "st_time": 4, "ed_time": 12, "bbox": boxes}
    one |= {"English": "The man in black turns around.", "Chinese": ""}
    (root / "trainv2.json").write_text(json.dumps({"12_abc.mp4": one}))
    for number in range(1, count + 1):
        picture(root / "frames" / "12_abc" / f"{number:06d}.jpg")


def write_questions(root, picture):
    folder = root / "dataset"
    folder.mkdir(parents=True)
    questions = [
        {"video_name": "1QIU", "question": "is the athlete wearing trousers", "question_id": f"v_1QIU_{n}"}
        for n in (1, 2)
    ]
    (folder / "train_q.json").write_text(json.dumps(questions))
    (folder / "train_a.json").write_text(json.dumps([{"answer": "yes", "type": 3, "question_id": "v_1QIU_1"}]))
    for number in range(1, 11):
        picture(root / "frames" / "v_1QIU" / f"{number:06d}.jpg")


MADE = [
    ("ref-youtube-vos", "train", write_rvos),
    ("ref-davis17", "train", write_rvos),
    ("mevis", "train", write_mevis),
    ("hcstvg", "train", write_tubes),
    ("activitynet-qa", "train", write_questions),
]


def test_palette_images_are_masks_of_the_named_object(build):
    samples = build("ref-youtube-vos", "train", write_rvos)
    dog, cat = (samples[f"ref-youtube-vos-train-walk-{n}"] for n in (0, 1))
    assert dog.video
    assert dog.fields["expr"] == "a dog running left"
    assert dog.meta["ref_id"] == "walk-1"
    assert dog.meta["image_ids"][1] == "ref-youtube-vos:walk/00005"
    assert [region.image for region in dog.regions] == list(range(12))
    assert [region.image for region in cat.regions] == list(range(6))
    for sample, number in ((dog, 1), (cat, 2)):
        for region in sample.regions:
            assert (rle_to_mask(region.rle) == square(region.image, number)).all()
    assert {image.file for image in dog.images} == {image.file.rpartition("/")[2] for image in dog.images}


def test_few_frames_are_kept_evenly(build):
    samples = build("ref-youtube-vos", "train", write_rvos, "--set", "frames=4")
    cat = samples["ref-youtube-vos-train-walk-1"]
    assert [name.rpartition("/")[2] for name in cat.meta["image_ids"]] == ["00005", "00020", "00035", "00050"]
    assert [region.image for region in cat.regions] == [0, 1]


def test_mevis_names_several_tracks_of_its_mask_file(build):
    (sample,) = build("mevis", "train", write_mevis).values()
    assert sample.fields["targets"] == [0, 1]
    assert [(r.image, r.object) for r in sample.regions] == [(f, 0) for f in range(12)] + [(f, 1) for f in range(6)]
    assert all((rle_to_mask(r.rle) == square(r.image, r.object + 1)).all() for r in sample.regions)


def test_tubes_begin_at_their_first_frame_counted_from_one(build, rejects):
    (sample,) = build("hcstvg", "train", write_tubes).values()
    assert (sample.task, sample.fields["expr"]) == ("video_grounding", "The man in black turns around.")
    assert len(sample.images) == 20
    assert [region.image for region in sample.regions] == list(range(4, 12))
    assert sample.regions[2].box == (6, 6, 26, 36)


def test_questions_find_their_answers_by_id(build):
    first, second = build("activitynet-qa", "train", write_questions).values()
    assert (first.fields["question"], first.fields["answer"]) == ("is the athlete wearing trousers?", "yes")
    assert (first.meta["asks"], first.video, len(first.images)) == ("3", True, 10)
    assert second.meta["unlabelled"]


def test_a_video_without_all_of_its_frames_is_a_reject(build, rejects):
    def write(root, picture):
        write_tubes(root, picture)
        (root / "frames" / "12_abc" / "000003.jpg").unlink()
        whole = json.loads((root / "trainv2.json").read_text())
        one = whole["12_abc.mp4"]
        (root / "trainv2.json").write_text(json.dumps(whole | {"13_abc.mp4": one | {"img_num": 2}}))
        for number in (1, 2):
            picture(root / "frames" / "13_abc" / f"{number:06d}.jpg")

    assert list(build("hcstvg", "train", write)) == ["hcstvg-train-13_abc"]
    ((reason, where),) = rejects("hcstvg")
    assert reason == "no-frames"
    assert "expected 20 frames *.jpg" in where


def test_a_wrong_value_is_named_with_its_place(refusal):
    wrong = expressions(**{"2": {"exp": "x", "obj_id": 1.5}})
    message = refusal("ref-youtube-vos", "train", lambda root, picture: write_rvos(root, picture, wrong))
    assert "video walk, expression 2: expected 'obj_id' to be str or int or list, got '1.5'" in message


@pytest.mark.parametrize("source", ["ref-davis17"])
def test_davis_has_the_same_form(build, source):
    assert len(build(source, "train", write_rvos)) == 2
