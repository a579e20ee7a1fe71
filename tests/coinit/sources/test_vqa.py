"""VQAv2 joined on question_id, and its explained answers: VQA-E's list and VQA-X's dict."""

import json

IMAGE = {"train": 458752, "val": 262148, "test": 262144}
SETS = {"train": "train2014", "val": "val2014", "test": "test2015"}
QUESTION = "What is this photo taken looking through?"
TEN = ["net"] * 7 + ["netting", "mesh", "net"]


def write_vqav2(root, picture, answers=TEN, key="question_id"):
    for split, subset in SETS.items():
        image_id = IMAGE[split]
        picture(root / "images" / f"COCO_{subset}_{image_id:012d}.jpg")
        question = {"image_id": image_id, "question": QUESTION, "question_id": image_id * 1000}
        (root / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps({"questions": [question]}))
        annotation = {"question_type": "what is this", "multiple_choice_answer": "net", "answer_type": "other"}
        annotation |= {"image_id": image_id, key: image_id * 1000}
        annotation["answers"] = [
            {"answer": a, "answer_confidence": "maybe", "answer_id": i + 1} for i, a in enumerate(answers)
        ]
        if split != "test":
            (root / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps({"annotations": [annotation]}))


VQA_E = {
    "img_id": 458752,
    "question": QUESTION,
    "question_type": "what is this",
    "answers": TEN,
    "multiple_choice_answer": "net",
    "answer_type": "other",
    "explanation": ["A pitcher is seen through a net", 0.83],
}


def write_vqa_e(root, picture, record=VQA_E):
    picture(root / "train2014" / "COCO_train2014_000000458752.jpg")
    (root / "VQA-E_train_set.json").write_text(json.dumps([record, dict(VQA_E, explanation=[" ", 0.1])]))


def write_vqa_x(root, picture):
    write_vqav2(root, picture)
    for split in ("train", "val"):
        explanations = {str(IMAGE[split] * 1000): ["there is a mesh in front.", "the view has holes"]}
        (root / f"{split}_exp_anno.json").write_text(json.dumps(explanations))


IMAGES = ("--images", "{root}/images")
MADE = [
    ("vqav2", "train", write_vqav2, *IMAGES),
    ("vqa-e", "train", write_vqa_e),
    ("vqa-x", "train", write_vqa_x, *IMAGES),
]


def test_vqav2_joins_questions_and_answers(build, tmp_path):
    for split in ("train", "val"):
        (sample,) = build("vqav2", split, write_vqav2, *IMAGES).values()
        assert (sample.id, sample.task) == (f"vqav2-{split}-{IMAGE[split]}000", "vqa")
        assert sample.fields == {"question": QUESTION, "answer": "net", "answers": TEN}
        assert sample.meta == {"image_ids": [f"coco:{IMAGE[split]}"], "question_id": IMAGE[split] * 1000}
    (sample,) = build("vqav2", "test", write_vqav2, *IMAGES).values()
    assert sample.fields == {"question": QUESTION, "answer": "unknown"}
    assert sample.meta["unlabelled"] is True


def test_vqav2_refusals(refusal):
    def nine(root, picture):
        write_vqav2(root, picture, TEN[:9])

    assert "annotation 0: expected 10 answers, got 9" in refusal("vqav2", "val", nine)


def test_vqav2_needs_the_same_questions(refusal):
    def renamed(root, picture):
        write_vqav2(root, picture)
        path = root / "v2_mscoco_val2014_annotations.json"
        path.write_text(path.read_text().replace("262148000", "262148001"))

    assert "2 are in one of them only, such as 262148000" in refusal("vqav2", "val", renamed)


def test_vqa_e_explains(build, rejects):
    (sample,) = build("vqa-e", "train", write_vqa_e).values()
    assert (sample.id, sample.task, sample.source) == ("vqa-e-train-0", "vqa_e", "vqa-e")
    explanation = "A pitcher is seen through a net."
    assert sample.fields == {"question": QUESTION, "explanation": explanation, "answer": "net", "answers": TEN}
    assert [reason for reason, _ in rejects("vqa-e")] == ["empty-text"]


def test_vqa_e_needs_its_keys(refusal):
    def without(root, picture):
        write_vqa_e(root, picture, {key: value for key, value in VQA_E.items() if key != "explanation"})

    assert "VQA-E_train_set.json, record 0: expected key 'explanation'" in refusal("vqa-e", "train", without)


def test_vqa_x_trains_on_every_explanation_and_evaluates_once(build):
    found = build("vqa-x", "train", write_vqa_x, *IMAGES)
    assert {key: s.fields["explanation"] for key, s in found.items()} == {
        "vqa-x-train-458752000-0": "there is a mesh in front.",
        "vqa-x-train-458752000-1": "the view has holes.",
    }
    (sample,) = build("vqa-x", "val", write_vqa_x, *IMAGES).values()
    assert sample.fields == {
        "question": QUESTION,
        "explanation": "there is a mesh in front.",
        "answer": "net",
        "answers": TEN,
    }
    assert sample.meta == {"image_ids": ["coco:262148"], "question_id": 262148000}


def test_vqa_x_in_the_form_of_nlx_gpt(build):
    def write_nle(root, picture):
        for split in ("train", "val"):
            file = f"COCO_{split}2014_{IMAGE[split]:012d}.jpg"
            picture(root / f"{split}2014" / file)
            ten = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i, answer in enumerate(TEN)]
            entry = {"question": QUESTION, "answers": ten, "image_id": str(IMAGE[split]), "image_name": file}
            entry["explanation"] = ["there is a mesh in front.", "the view has holes"]
            (root / f"vqaX_{split}.json").write_text(json.dumps({f"{IMAGE[split]}001": entry}))

    found = build("vqa-x", "train", write_nle)
    assert sorted(found) == ["vqa-x-train-458752001-0", "vqa-x-train-458752001-1"]
    explained = {"explanation": "the view has holes.", "question": QUESTION, "answer": "net", "answers": TEN}
    assert found["vqa-x-train-458752001-1"].fields == explained
    (sample,) = build("vqa-x", "val", write_nle).values()
    assert sample.meta == {"image_ids": ["coco:262148"], "question_id": 262148001}
