"""Tracks of a video as text: order of objects, absence, keyframes and the vertices between them."""

import numpy as np
import pytest

from vistallm.regions.codec import RegionCodec, RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.regions.masks import mask_to_rle, polygons_to_mask, rle_to_mask
from vistallm.regions.tracks import align, between, fill_tracks, key_frames, write_tracks
from vistallm.schema import Region

LETTERBOX = Letterbox(100, 80, 100)


def box(frame, number, x, y=10):
    return Region(frame, "box", number, box=(x, y, x + 20, y + 20))


def test_every_frame_has_a_pair_for_every_object_in_a_fixed_order():
    codec = RegionCodec()
    tracks = [[box(0, 0, 10), box(2, 0, 30)], [box(1, 1, 50), box(2, 1, 60)]]
    text = write_tracks(codec, tracks, [LETTERBOX] * 3, "box")
    frames = text.split("frame ")[1:]
    assert [frame.split(":")[0] for frame in frames] == ["1", "2", "3"]
    assert [frame.count("<b_st>") for frame in frames] == [2, 2, 2]
    assert frames[0].rstrip().endswith("<b_st><b_ed>")
    assert "2: <b_st><b_ed> <b_st><bin_" in frames[1]
    parsed = codec.decode(text, [LETTERBOX] * 3, video=True)
    found = [(r.image, r.object, np.rint(r.box).tolist()[:2]) for r in parsed.regions]
    assert found == [(0, 0, [10, 10]), (1, 1, [50, 10]), (2, 0, [30, 10]), (2, 1, [60, 10])]


@pytest.mark.parametrize("coords", ["tokens", "text"])
def test_an_object_that_is_never_seen_is_an_empty_pair_in_each_frame(coords):
    codec = RegionCodec(coords)
    text = write_tracks(codec, [[]], [LETTERBOX] * 3, "mask")
    assert text == write_tracks(codec, [], [LETTERBOX] * 3, "mask")
    pair = "<m_st><m_ed>" if coords == "tokens" else "[]"
    assert text == f"frame 1: {pair} frame 2: {pair} frame 3: {pair}"
    parsed = codec.decode(text, [LETTERBOX] * 3, video=True)
    assert (parsed.kind, parsed.regions) == ("mask", [])
    assert write_tracks(codec, [[]], [LETTERBOX], "mask") == pair  # a single frame is not named


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<b_st><b_ed>", "no-image"),
        ("frame 4: <b_st><b_ed>", "bad-image"),
        ("frame 1: <b_st><bin_1><bin_1><bin_9><bin_9><b_sep><bin_1><bin_1><bin_9><bin_9><b_ed>", "wrong-count"),
    ],
)
def test_what_cannot_be_read_says_why(text, reason):
    with pytest.raises(RegionParseError) as error:
        RegionCodec().decode(text, [LETTERBOX] * 3, video=True)
    assert error.value.reason == reason


def test_two_regions_of_an_object_in_a_frame_are_an_error():
    with pytest.raises(ValueError, match="frame 1: expected one region of an object, got 2"):
        write_tracks(RegionCodec(), [[box(0, 0, 10), box(0, 0, 30)]], [LETTERBOX], "box")


def test_keyframes_write_fewer_frames_and_boxes_move_between_them():
    codec = RegionCodec(keyframes=3)
    track = [box(frame, 0, 10 + 6 * frame) for frame in range(8)]
    text = write_tracks(codec, [track], [LETTERBOX] * 8, "box")
    assert [int(part.split(":")[0]) - 1 for part in text.split("frame ")[1:]] == key_frames(8, 3) == [0, 3, 6, 7]
    read = codec.decode(text, [LETTERBOX] * 8, video=True).regions
    filled = fill_tracks(read, 8, 3)
    assert [region.image for region in filled] == list(range(8))
    assert np.abs(np.array([f.box for f in filled]) - np.array([t.box for t in track])).max() < 0.2
    assert fill_tracks(read, 8, 1) == read


def test_an_object_at_one_end_alone_is_shown_in_the_nearer_frames():
    filled = fill_tracks([box(0, 0, 10)], 8, 4)
    assert [region.image for region in filled] == [0, 1, 2]
    filled = fill_tracks([box(4, 0, 10)], 8, 4)
    assert [region.image for region in filled] == [3, 4, 5]


def test_vertices_are_paired_whatever_vertex_comes_first_and_however_many_there_are():
    angle, radius = np.arange(10) * 0.6283, np.tile((12, 6), 5)
    star = 20 + np.stack([np.cos(angle) * radius, np.sin(angle) * radius], 1)
    moved = np.roll(star + (30, 10), 3, axis=0)
    one, other = align(star, moved)
    np.testing.assert_allclose(other - one, np.tile((30, 10), (10, 1)), atol=1e-9)
    fewer = np.delete(moved, 4, axis=0)
    one, other = align(star, fewer)
    assert len(one) == len(other) == 10
    # the added vertex lies on the outline: the mask is that of the shorter polygon
    assert (polygons_to_mask([other], 60, 60) == polygons_to_mask([fewer], 60, 60)).all()


def test_the_mask_half_way_of_a_motion_is_the_moved_mask():
    square = [np.array([(10, 10), (30, 10), (30, 30), (10, 30)], np.float32)]
    first, last = Region(0, "mask", polygons=square), Region(2, "mask", polygons=[square[0] + (20, 8)])
    drawn = polygons_to_mask(between(first, last, 0.5).polygons, 80, 100)
    expected = np.zeros((80, 100), bool)
    expected[14:34, 20:40] = True
    assert (drawn == expected).all()
    two = Region(2, "mask", polygons=[*square, square[0] + 40])
    assert between(first, two, 0.25) is first
    assert between(first, two, 0.75) is two


def test_masks_come_back_from_their_text():
    mask = np.zeros((80, 100), bool)
    mask[20:50, 30:70] = True
    codec, track = RegionCodec(), [Region(1, "mask", 0, rle=mask_to_rle(mask))]
    text = write_tracks(codec, [track], [LETTERBOX] * 2, "mask")
    (region,) = codec.decode(text, [LETTERBOX] * 2, video=True).regions
    assert region.image == 1
    assert (polygons_to_mask(region.polygons, 80, 100) == rle_to_mask(track[0].rle)).all()
