"""Mini videos: what an expression says is true of its object alone, by the motion of the drawn masks, read anew."""

import re

import numpy as np
import pytest

from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.mini.tasks import mini_words
from vistallm.mini.videos import FRAMES, VIDEO_MAKERS, video_words
from vistallm.regions.masks import rle_to_mask

RECIPE = MiniRecipe(seed=5, videos=True)
WAYS = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}


def boxes(sample, colour, shape):
    """Frame -> box of the one object of that colour and shape, where it is seen; read from the record of the scenes."""
    found = {}
    for frame, scene in enumerate(sample.meta["scenes"]):
        for row in scene:
            if row[:2] == [shape, colour]:
                found[frame] = np.array(row[4:], float)
    return found


def looks(sample):
    """(colour, shape) of every object that is seen in the first frame."""
    return [(row[1], row[0]) for row in sample.meta["scenes"][0] if row[0] != "wall"]


def steps(track):
    """Which of the frames' steps move the centre of a box, in pixels, where both frames show it."""
    centre = {frame: (box[:2] + box[2:]) / 2 for frame, box in track.items()}
    return {f: centre[f + 1] - centre[f] for f in centre if f + 1 in centre}


def goes(track):
    """The way an object goes: of the largest displacement between two frames; "" if it hardly moves."""
    moved = sum(steps(track).values(), np.zeros(2))
    if np.abs(moved).max() < 8:
        return ""
    axis = int(np.abs(moved).argmax())
    return next(way for way, (a, sign) in WAYS.items() if a == axis and sign * moved[axis] > 0)


@pytest.mark.parametrize("task", VIDEO_MAKERS)
def test_samples_are_videos_of_eight_frames_and_always_the_same(task):
    for serial in range(6):
        sample, files = make_sample(RECIPE, "train", task, serial)
        again, other = make_sample(RECIPE, "train", task, serial)
        assert (sample.to_json(), files) == (again.to_json(), other)
        assert sample.video
        assert len(sample.images) == len(files) == FRAMES
        assert len({(info.width, info.height) for info in sample.images}) == 1
        words = set(re.findall(r"\w+", " ".join(map(str, sample.fields.values())))) - {"True"}
        assert words <= set(video_words()) | set(mini_words())


def test_masks_are_of_the_object_that_does_what_is_said():
    for serial in range(28):
        sample, _ = make_sample(RECIPE, "train", "video_ref", serial)
        verb = sample.meta["asks"]
        match = re.fullmatch(r"the (?:(\w+) )??(\w+) that (\w+) ?(\w*)", sample.fields["expr"])
        masks = {region.image: rle_to_mask(region.rle) for region in sample.regions}
        assert match
        assert match[3] == verb
        track = {}
        for frame, mask in masks.items():
            rows, columns = np.nonzero(mask)
            track[frame] = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
        fitting = [look for look in looks(sample) if match[1] in (None, look[0]) and match[2] in ("object", look[1])]
        assert len(fitting) >= 2  # the words alone do not tell which one
        if verb in ("leaves", "hides"):
            assert set(masks) == set(range(len(masks)))
            assert len(masks) < FRAMES
        else:
            assert set(masks) == set(range(FRAMES))
        if verb == "moves":
            assert goes(track) == match[4]
        if verb in ("stays", "turns") and len(masks) == FRAMES:
            assert np.abs(track[0] + 0 - track[FRAMES - 1]).max() < 60


def test_grounding_boxes_are_in_the_frames_in_which_it_is_true():
    for serial in range(24):
        sample, _ = make_sample(RECIPE, "train", "video_grounding", serial)
        match = re.fullmatch(r"the (\w+) (\w+) (while it moves|while it stays|before it \w+)", sample.fields["expr"])
        track, frames = boxes(sample, match[1], match[2]), sorted(region.image for region in sample.regions)
        assert frames == list(range(frames[0], frames[-1] + 1))
        if match[3].startswith("before"):
            assert frames == sorted(track)
            continue
        inside = [np.abs(step).max() for frame, step in steps(track).items() if frame in frames[:-1]]
        outside = [np.abs(s).max() for f, s in steps(track).items() if f not in frames and f + 1 not in frames]
        moving, still = (inside, outside) if match[3] == "while it moves" else (outside, inside)
        # Another object may cross in front, which moves a visible box a little: medians.
        assert not moving or not still or np.median(moving) > np.median(still)


def test_answers_to_questions_are_what_the_boxes_show():
    seen = set()
    for serial in range(48):
        sample, _ = make_sample(RECIPE, "train", "video_qa", serial)
        asks, answer, question = sample.meta["asks"], sample.fields["answer"], sample.fields["question"]
        seen.add(asks)
        if asks == "way":
            match = re.fullmatch(r"Which way does the (\w+) (\w+) move\?", question)
            assert goes(boxes(sample, match[1], match[2])) == answer
        elif asks == "count":
            assert sum(goes(boxes(sample, *look)) != "" for look in looks(sample)) == int(answer)
        elif asks == "order":
            last = {look[0]: max(boxes(sample, *look)) for look in looks(sample)}
            assert len(set(last.values())) == 2
            assert answer == (min if "first" in question else max)(last, key=last.get)
        elif asks in ("colour", "shape"):
            assert any(answer in look for look in looks(sample))
    assert seen == {"way", "count", "order", "colour", "shape", "doing"}


def test_videos_leave_all_other_samples_as_they_are():
    plain, videos = MiniRecipe(seed=5, train=300, test=30), MiniRecipe(seed=5, train=300, test=30, videos=True)
    for split in ("train", "test"):
        mine = [one for one in videos.plan(split) if not one[0].startswith("video")]
        assert sorted(mine) == sorted(plain.plan(split))
        assert make_sample(plain, split, *mine[0])[1] == make_sample(videos, split, *mine[0])[1]
    alone = MiniRecipe(seed=5, train=300, videos=True, images=False)
    assert {task for task, _ in alone.plan("train")} == set(VIDEO_MAKERS)
