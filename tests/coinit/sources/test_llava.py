"""Conversations: rounds, the image token, and what is left out."""

import json


def turns(*values):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)]


ONE = turns("<image>\nWhat are the colors of the bus?", "The bus is white and red.")
TWO = turns("What is it?\n<image>", "A bus.", "Is it new?", "No, it is old.")
INSTRUCT = [
    {"id": "000000033471", "image": "000000033471.jpg", "conversations": ONE},
    {"id": "000000033471", "image": "000000033471.jpg", "conversations": TWO},
    {"id": "a", "conversations": ONE},
    {"id": "b", "image": "000000033471.jpg", "conversations": ONE[::-1]},
    {"id": "c", "image": "000000033471.jpg", "conversations": turns("<image>", "A bus.")},
    {"id": "d", "image": "000000033471.jpg", "conversations": turns("See {regions:0}", "A bus.")},
]


def write_instruct(root, picture, records=INSTRUCT):
    picture(root / "train2014" / "COCO_train2014_000000033471.jpg")
    (root / "llava_instruct_150k.json").write_text(json.dumps(records))


def write_pretrain(root, picture):
    picture(root / "images" / "00453" / "004539375.jpg")
    record = {"id": "004539375", "image": "00453/004539375.jpg"}
    record["conversations"] = turns("Render a clear summary.\n<image>", "a bus in the rain")
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps([record]))


MADE = [
    ("llava-instruct", "train", write_instruct),
    ("llava-pretrain", "train", write_pretrain, "--images", "{root}/images"),
]


def test_rounds_and_rejects(build, rejects):
    found = build("llava-instruct", "train", write_instruct)
    assert sorted(found) == ["llava-instruct-train-0-000000033471", "llava-instruct-train-1-000000033471"]
    one, two = (found[key] for key in sorted(found))
    assert (one.task, one.instruction, one.answer) == (
        "instruct",
        "What are the colors of the bus?",
        "The bus is white and red.",
    )
    assert (one.fields, one.meta) == ({}, {"image_ids": ["coco:33471"]})
    assert (two.instruction, two.answer) == ("Is it new?", "No, it is old.")
    assert two.fields == {"rounds": [["What is it?", "A bus."]]}
    reasons = [(reason, where.split("record ")[1][:1]) for reason, where in rejects("llava-instruct")]
    assert sorted(reasons) == [("empty-text", "4"), ("no-image", "2"), ("placeholder", "5"), ("turn-order", "3")]


def test_pretraining_captions(build):
    (sample,) = build("llava-pretrain", "train", write_pretrain, "--images", "{root}/images").values()
    assert (sample.instruction, sample.answer) == ("Render a clear summary.", "a bus in the rain")
    assert sample.meta == {"image_ids": ["llava:00453/004539375.jpg"]}


def test_refusals(refusal):
    def other_speaker(root, picture):
        records = json.loads(json.dumps(INSTRUCT))
        records[0]["conversations"][1]["from"] = "bot"
        write_instruct(root, picture, records)

    assert "conversation 1: expected 'from' human or gpt, got 'bot'" in refusal(
        "llava-instruct", "train", other_speaker
    )
    assert "one of train, got 'val'" in refusal("llava-instruct", "val", other_speaker)
    assert "chat.json" in refusal("llava-instruct", "train", other_speaker, "--set", "file=chat.json")
