import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vistallm.regions.codec import RegionCodec, RegionParseError
from vistallm.regions.letterbox import Letterbox, square_resize
from vistallm.regions.masks import mask_to_rle
from vistallm.schema import Region

FRAME = Letterbox(640, 427, 224)


@pytest.fixture(params=["tokens", "text"])
def codec(request):
    return RegionCodec(coords=request.param)


def test_one_square_has_the_known_tokens():
    mask = np.zeros((100, 100), bool)
    mask[10:20, 30:50] = True
    text = RegionCodec().encode([Region(0, "mask", rle=mask_to_rle(mask))], [Letterbox(100, 100, 64)], "mask")
    corners = [(300, 100), (500, 100), (500, 200), (300, 200)]
    assert text == "<m_st>" + "".join(f"<bin_{x}><bin_{y}>" for x, y in corners) + "<m_ed>"


def test_tokens_are_markers_then_bins():
    codec = RegionCodec(num_bins=5)
    assert codec.tokens[:2] == ["<b_st>", "<b_sep>"]
    assert codec.tokens[10:] == [f"<bin_{i}>" for i in range(5)]
    assert codec.bin_values.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert RegionCodec(coords="text").tokens == []


@pytest.mark.parametrize("kind", ["mask", "box", "point"])
def test_no_target_is_an_empty_group(codec, kind):
    parsed = codec.decode(f"The answer is {codec.encode([], [FRAME], kind)}.", [FRAME], kind)
    assert (parsed.kind, parsed.regions, parsed.answer) == (kind, [], "The answer is .")


def test_text_without_regions():
    parsed = RegionCodec().decode(" yes, two. ", [FRAME])
    assert (parsed.kind, parsed.regions, parsed.answer) == ("text", [], "yes, two.")


def test_several_images_objects_and_parts_come_back(codec):
    triangle = np.array([(10, 10), (60, 10), (10, 50)], np.float32)
    regions = [
        Region(2, "mask", 0, polygons=[triangle]),
        Region(0, "mask", 1, polygons=[triangle, triangle + 100]),
        Region(0, "mask", 2, polygons=[triangle + 30]),
    ]
    letterboxes = [Letterbox(200, 200, 64)] * 3
    text = codec.encode(regions, letterboxes, "mask")
    assert text.startswith("image 1: ")
    assert " image 3: " in text
    parsed = codec.decode("The images are 1 and 3. " + text.replace(">", "> "), letterboxes)
    assert [(r.image, r.object, len(r.polygons)) for r in parsed.regions] == [(0, 0, 2), (0, 1, 1), (2, 2, 1)]
    assert parsed.answer == "The images are 1 and 3."
    np.testing.assert_allclose(parsed.regions[0].polygons[1], triangle + 100, atol=0.11)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<m_st><bin_1>", "unclosed"),
        ("<bin_1>", "stray-token"),
        ("<m_st><bin_1><bin_2><bin_3><m_ed>", "odd-count"),
        ("<m_st><bin_1><bin_2><bin_3><bin_4><m_ed>", "too-few-points"),
        ("<m_st><bin_1><bin_2>a cat<m_ed>", "bad-token"),
        ("<m_st><m_sep><m_ed>", "empty-object"),
        ("<b_st><bin_1><bin_2><bin_3><bin_1001><b_ed>", "bad-bin"),
        ("<b_st><bin_1><bin_2><b_ed>", "bad-count"),
        ("image 2: <p_st><bin_1><bin_2><p_ed>", "bad-image"),
        ("<p_st><p_ed><b_st><b_ed>", "mixed-kinds"),
    ],
)
def test_unreadable_answers_name_their_reason(text, reason):
    with pytest.raises(RegionParseError) as caught:
        RegionCodec().decode(text, [FRAME])
    assert caught.value.reason == reason


def test_corners_of_a_box_are_read_in_any_order():
    boxes = ["<bin_9><bin_2><bin_3><bin_4>", "<bin_3><bin_4><bin_9><bin_2>", "<bin_3><bin_2><bin_9><bin_4>"]
    read = {RegionCodec().decode(f"<b_st>{box}<b_ed>", [FRAME]).regions[0].box for box in boxes}
    assert len(read) == 1


@pytest.mark.parametrize("name", ["ımage 3: ", "image \u0663: ", "image 3:\u2002"])
def test_only_ascii_names_an_image(name):
    """What a pattern that ignores case would take for `image 3:`, a picture that is not there."""
    parsed = RegionCodec().decode(name + "<p_st><bin_1><bin_2><p_ed>", [FRAME])
    assert [region.image for region in parsed.regions] == [0]
    assert parsed.answer == name.strip()


def test_regions_of_several_images_need_their_number():
    with pytest.raises(RegionParseError, match="no-image"):
        RegionCodec().decode("<p_st><bin_1><bin_2><p_ed>", [FRAME, FRAME])


def test_empty_mask_and_wrong_image_are_refused():
    empty = Region(0, "mask", rle=mask_to_rle(np.zeros((9, 9), bool)))
    with pytest.raises(ValueError, match="at least one pixel"):
        RegionCodec().encode([empty], [Letterbox(9, 9, 8)], "mask")
    with pytest.raises(ValueError, match="1 images"):
        RegionCodec().encode([Region(1, "point", point=(1, 2))], [FRAME], "point")


coordinate = st.integers(0, 640), st.integers(0, 427)
polygons = st.lists(st.tuples(*coordinate), min_size=3, max_size=12).map(lambda p: np.array(p, np.float32))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 1), st.lists(polygons, min_size=1, max_size=3)), max_size=4), st.booleans())
def test_mask_text_is_a_fixed_point(objects, as_text):
    codec = RegionCodec(coords="text" if as_text else "tokens")
    letterboxes = [FRAME, Letterbox(640, 500, 224)]
    regions = [Region(image, "mask", k, polygons=parts) for k, (image, parts) in enumerate(objects)]
    text = codec.encode(regions, letterboxes, "mask")
    parsed = codec.decode(text, letterboxes)
    assert len(parsed.regions) == len(regions)
    assert codec.encode(parsed.regions, letterboxes, "mask") == text


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(*coordinate, *coordinate), min_size=1, max_size=4))
def test_boxes_and_points_come_back_within_half_a_bin(boxes):
    codec = RegionCodec()
    for kind in ("box", "point"):
        regions = [
            Region(0, kind, k, box=(min(a, c), min(b, d), max(a, c), max(b, d)), point=(a, b))
            for k, (a, b, c, d) in enumerate(boxes)
        ]
        text = codec.encode(regions, [FRAME], kind)
        parsed = codec.decode(text, [FRAME])
        assert codec.encode(parsed.regions, [FRAME], kind) == text
        for before, after in zip(regions, parsed.regions, strict=True):
            np.testing.assert_allclose(getattr(after, kind), getattr(before, kind), atol=0.5 * 640 / 1000 + 1e-3)


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 256))
def test_frame_maps_back(width, height, size):
    letterbox = Letterbox(width, height, size)
    points = np.array([(0, 0), (width, height), (width / 3, height / 7)])
    unit = letterbox.to_unit(points)
    assert (unit >= 0).all()
    assert (unit <= 1).all()
    np.testing.assert_allclose(letterbox.to_pixels(unit), points, atol=1e-4)


def test_square_resize_pads_in_the_middle():
    image = np.full((2, 4, 3), 200, np.uint8)
    square, letterbox = square_resize(image, 4, (1, 2, 3))
    assert square.shape == (4, 4, 3)
    assert (square[1:3] == 200).all()
    assert (square[[0, 3]] == (1, 2, 3)).all()
    np.testing.assert_allclose(letterbox.to_unit(np.array([(0, 0), (4, 2)])), [(0, 0.25), (1, 0.75)])
    with pytest.raises(ValueError, match="uint8"):
        square_resize(image.astype(float), 4, (0, 0, 0))
