"""VCR: index lists become names and regions, four forms, a test split without labels."""

import json

import pytest

RECORD = {
    "movie": "3015_CHARLIE_ST_CLOUD",
    "objects": ["person", "person", "person", "car"],
    "img_fn": "lsmdc_3015/a@0.jpg",
    "metadata_fn": "lsmdc_3015/a@0.json",
    "question": ["Does", [2], "feel", "comfortable", "?"],
    "answer_choices": [
        ["Yes", "."],
        ["No", "she", "does", "n't", "."],
        ["Yes", ",", [0, 1], "do", "."],
        ["Maybe", "."],
    ],
    "answer_label": 1,
    "rationale_choices": [[[2], "smiles", "."], ["It", "rains", "."], [[3, 0], "left", "."], [[2], "'s", "sad", "."]],
    "rationale_label": 3,
    "img_id": "train-0",
    "question_number": 0,
    "annot_id": "train-0",
    "answer_likelihood": "possible",
}
METADATA = {
    "boxes": [[1, 2, 11, 12, 0.9], [20, 2, 30, 12, 0.8], [40.5, 5, 70, 45, 0.99], [5, 30, 25, 40, 0.7]],
    "segms": [
        [[[1, 2], [11, 2], [11, 12], [1, 12]]],
        [[[20, 2], [30, 2], [30, 12], [20, 12]]],
        [[[41, 5], [51, 5], [51, 15], [41, 15]], [[60, 20], [64, 20], [64, 40], [60, 40]]],
        [],
    ],
    "names": ["person", "person", "person", "car"],
    "width": 64,
    "height": 48,
}
QUESTION = "Does person {regions:2} feel comfortable?"
ANSWERS = "(A) Yes. (B) No she doesn't. (C) Yes, person {regions:0,1} do. (D) Maybe."
REASONS = (
    "(A) person {regions:2} smiles. (B) It rains. (C) car and person {regions:3,0} left. (D) person {regions:2}'s sad."
)
REASON = "person {regions:2}'s sad."


def write(root, picture, record=RECORD, metadata=METADATA):
    picture(root / "vcr1images" / record["img_fn"], 64, 48)
    (root / "vcr1images" / record["metadata_fn"]).write_text(json.dumps(metadata))
    (root / "train.jsonl").write_text(json.dumps(record) + "\n")
    (root / "val.jsonl").write_text(json.dumps(record | {"annot_id": "val-0", "img_id": "val-0"}) + "\n")
    unlabelled = {key: value for key, value in record.items() if not key.endswith("_label")}
    (root / "test.jsonl").write_text(json.dumps(unlabelled | {"annot_id": "test-0", "img_id": "test-0"}) + "\n")


MADE = [("vcr", "train", write)]

CHOICE = {"question": QUESTION, "options": ANSWERS, "answer": "(B)"}
EXPECTED = {  # form -> task, instruction, answer, fields
    "q_ra": ("instruct", f"{QUESTION} Explain your answer first.", f"{REASON} No she doesn't.", {}),
    "qc_a": ("vcr", None, None, CHOICE),
    "qc_rac": (
        "vcr",
        f"{QUESTION} Options: {ANSWERS} Give the reason, the answer and its letter.",
        f"{REASON} No she doesn't. The answer is (B).",
        CHOICE,
    ),
    "qac_r": (
        "vcr",
        None,
        None,
        {
            "question": f"{QUESTION} No she doesn't. Which of these explains the answer?",
            "options": REASONS,
            "answer": "(D)",
        },
    ),
}
BOXES = {0: (1, 2, 11, 12), 1: (20, 2, 30, 12), 2: (40.5, 5, 64, 45), 3: (5, 30, 25, 40)}


def test_every_form(build):
    found = build("vcr", "train", write)
    assert set(found) == {f"vcr-train-train-0-{form}" for form in EXPECTED}
    for form, (task, instruction, answer, fields) in EXPECTED.items():
        sample = found[f"vcr-train-train-0-{form}"]
        assert (sample.task, sample.instruction, sample.answer, sample.fields) == (task, instruction, answer, fields)
        assert sample.meta["image_ids"] == ["vcr:lsmdc_3015/a@0.jpg"]
        assert sample.meta["form"] == form
        assert {r.object: tuple(r.box) for r in sample.regions} == {r.object: BOXES[r.object] for r in sample.regions}
    assert [r.object for r in found["vcr-train-train-0-qc_a"].regions] == [0, 1, 2]
    assert [r.object for r in found["vcr-train-train-0-q_ra"].regions] == [2]


def test_some_forms(build):
    found = build("vcr", "train", write, "--set", "forms=qac_r,q_ra")
    assert [s.meta["form"] for s in found.values()] == ["qac_r", "q_ra"]


def test_validation_asks_for_answer_and_rationale_of_a_group(build):
    found = build("vcr", "val", write)
    assert {key: (s.task, s.meta["mode"], s.meta["group"], s.fields["answer"]) for key, s in found.items()} == {
        "vcr-val-val-0-qc_a": ("vcr", "q_a", "val-0", "(B)"),
        "vcr-val-val-0-qac_r": ("vcr", "qa_r", "val-0", "(D)"),
    }


def test_the_test_split_asks_for_a_rationale_of_every_answer(build):
    found = build("vcr", "test", write)
    names = ["qc_a-0", *(f"qac_r-{i}" for i in range(4))]
    assert sorted(found) == sorted(f"vcr-test-test-0-{name}" for name in names)
    assert all(s.meta["unlabelled"] for s in found.values())
    third = found["vcr-test-test-0-qac_r-2"]
    assert third.meta["given"] == 2
    asked = f"{QUESTION} Yes, person {{regions:0,1}} do. Which of these explains the answer?"
    assert third.fields == {"question": asked, "options": REASONS, "answer": "(A)"}


@pytest.mark.parametrize(
    ("record", "metadata", "message"),
    [
        ({"answer_label": 4}, {}, "record 0: expected answer_label and rationale_label 0 to 3, got [4, 3]"),
        ({"question": ["Does", [7], "?"]}, {}, "record 0: expected numbers of its 4 objects, got [7]"),
        (
            {"answer_choices": [["Yes"]]},
            {},
            "record 0: expected 4 answer_choices, got 1",
        ),
        ({}, {"boxes": []}, "expected one box for each of 4 objects, got 0"),
        ({}, {"boxes": [[1, 2, 3, 4]] * 4}, "object 0: expected x0, y0, x1, y1 and a score, got [1, 2, 3, 4]"),
        ({"objects": None}, {}, "record 0: expected 'objects' to be list"),
    ],
)
def test_a_changed_format_stops(refusal, record, metadata, message):
    said = refusal("vcr", "val", lambda root, picture: write(root, picture, RECORD | record, METADATA | metadata))
    assert message in said


def test_settings_are_checked(refusal):
    assert "expected some of q_ra,qc_rac,qc_a,qac_r, got 'q_x'" in refusal("vcr", "train", write, "--set", "forms=q_x")
    assert "expected some of qc_a,qac_r, got 'q_ra'" in refusal("vcr", "test", write, "--set", "forms=q_ra")
