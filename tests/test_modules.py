"""Calls of modules: the grammar by cases, positions of errors, and what the three modules do with a stand-in model."""

import numpy as np
import pytest

from vistallm.api import Answer, AnswerRegion
from vistallm.modules import MODULES, Call, CallError, read_calls, run_calls, write_calls
from vistallm.regions.masks import mask_to_rle

CALL = "<module>segment</module><instruction>the red star</instruction>"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("No call, a < b > c.", ["No call, a < b > c."]),
        (CALL, [Call("segment", "the red star")]),
        (f"Here. {CALL} Done.", ["Here. ", Call("segment", "the red star"), " Done."]),
        (f"{CALL}<region>1,2,30.5,40</region>", [Call("segment", "the red star", (1, 2, 30.5, 40))]),
        (CALL + CALL, [Call("segment", "the red star")] * 2),
    ],
)
def test_texts_are_read_and_written_back(text, parts):
    assert read_calls(text) == parts
    assert write_calls(parts) == text


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("a </module>", 2, "<module> first"),
        ("<instruction>x</instruction>", 0, "<module> first"),
        ("<module>segment", 15, "</module>"),
        ("<module>segment</module> the star", 24, "<instruction>"),
        ("<module>segment</module>", 24, "<instruction>"),
        ("<module>segment<instruction>", 15, "</module>"),
        ("<module></module><instruction>x</instruction>", 8, "a text in <module>"),
        ("<module>Segment it</module><instruction>x</instruction>", 8, "a name of small letters"),
        (f"{CALL}<region>1,2,3</region>", len(CALL) + 8, "a box x0,y0,x1,y1"),
        (f"{CALL}<region>5,2,3,9</region>", len(CALL) + 8, "x0 < x1"),
        (f"{CALL}<region>1,2,3,4", len(CALL) + 15, "</region>"),
        (f"{CALL}</instruction>", len(CALL), "<module> first"),
    ],
)
def test_errors_say_where_and_what_was_expected(text, position, expected):
    with pytest.raises(CallError, match=f"position {position}: expected ") as error:
        read_calls(text)
    assert error.value.position == position
    assert expected in str(error.value)


class Painter:
    """Answers any prompt by the pixels of the image that are red, as a model would; keeps the prompts."""

    def __init__(self):
        self.asked = []

    def predict(self, images, prompt, task=None, head="text"):
        many = isinstance(prompt, list)
        frames = images[0] if many else images
        self.asked.append((prompt[0] if many else prompt, task, head, [image.shape[:2] for image in frames]))
        regions = []
        for number, image in enumerate(frames):
            mask = image[..., 0] > 200
            if mask.any():
                rows, columns = np.nonzero(mask)
                box = tuple(map(float, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
                rle = mask_to_rle(mask)
                regions.append(AnswerRegion(number, "mask", 0, box, rle=rle, height=mask.shape[0], width=mask.shape[1]))
        answer = Answer("found", "", "mask", regions)
        return [answer] if many else answer


def picture(x=60, y=40, size=6):
    image = np.zeros((100, 150, 3), np.uint8)
    image[y : y + size, x : x + size, 0] = 255
    return image


def test_crop_asks_again_on_a_window_and_answers_in_the_whole_image():
    model, image = Painter(), picture()
    ((call, answer),) = run_calls("<module>crop</module><instruction>it</instruction>", model, [image])
    assert call == Call("crop", "it")
    assert [shape for *_, shape in model.asked] == [[(100, 150)], [(32, 32)]]
    (region,) = answer.regions
    assert (region.mask() == (image[..., 0] > 200)).all()
    assert region.box == (60, 40, 66, 46)
    corner = "<module>crop</module><instruction>it</instruction><region>140,90,150,100</region>"
    ((_, answer),) = run_calls(corner, model, [picture(142, 92)])
    assert model.asked[-1][3] == [(21, 21)]  # the window ends where the image does
    assert (answer.regions[0].mask() == (picture(142, 92)[..., 0] > 200)).all()
    ((_, answer),) = run_calls("<module>crop</module><instruction>it</instruction>", model, [0 * image])
    assert (answer.text, answer.regions) == ("Nothing is found.", [])


def test_segment_and_track_ask_in_the_forms_of_their_tasks():
    model = Painter()
    text = f"{CALL}<module>segment</module><instruction>this</instruction><region>1,2,30,40</region>"
    text += "<module>track</module><instruction>the star that leaves</instruction>"
    answers = run_calls(text, model, [picture(), picture(80)], head="text")
    assert [asked[:3] for asked in model.asked] == [
        ("Segment the red star.", "gres", "text"),
        ("Segment {box:1.0,2.0,30.0,40.0}.", "interactive", "text"),
        ("Segment the star that leaves in each frame.", "video_ref", "text"),
    ]
    assert [region.image for region in answers[-1][1].regions] == [0, 1]


def test_an_unknown_module_is_refused_before_anything_runs():
    model = Painter()
    text = f"{CALL} then <module>paint</module><instruction>it blue</instruction>"
    expected = f"position {text.index('paint')}: expected one of segment, crop, track, got 'paint'"
    with pytest.raises(CallError, match=expected):
        run_calls(text, model, [picture()])
    assert model.asked == []
    own = {**MODULES, "paint": lambda model, message: Answer(f"{message.text} after {message.answer.text}", "")}
    assert run_calls(text, model, [picture()], modules=own)[1][1].text == "it blue after found"
