"""Flickr30k Entities: sentences with phrase marks and XML boxes that count pixels from 1."""

SENTENCES = """[/EN#1/people Two men] in [/EN#2/clothing a blue shirt] stand on [/EN#3/scene a street] .
[/EN#2/clothing/other A shirt] , [/EN#0/notvisual nothing] and [/EN#1/people they] .
[/EN#3/scene A street] with [/EN#4/other a dot] .
"""
ANNOTATION = """<annotation><filename>36979.jpg</filename>
<size><width>64</width><height>48</height><depth>3</depth></size>
<object><name>2</name><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>20</xmax><ymax>12</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>48</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>
<object><name>1</name><name>5</name><bndbox><xmin>40</xmin><ymin>1</ymin><xmax>70</xmax><ymax>48</ymax></bndbox></object>
<object><name>4</name><bndbox><xmin>80</xmin><ymin>1</ymin><xmax>90</xmax><ymax>9</ymax></bndbox></object>
</annotation>
"""


def write(root, picture, sentences=SENTENCES, annotation=ANNOTATION):
    for folder, name, text in (("Sentences", "txt", sentences), ("Annotations", "xml", annotation)):
        (root / folder).mkdir(parents=True)
        (root / folder / f"36979.{name}").write_text(text)
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("36979\n")
    picture(root / "flickr30k-images" / "36979.jpg")


MADE = [("flickr30k", "train", write), ("flickr30k", "val", write)]


def test_boxes_follow_their_phrases(build, rejects):
    samples = build("flickr30k", "train", write)
    assert sorted(samples) == ["flickr30k-train-36979-0", "flickr30k-train-36979-1"]
    first = samples["flickr30k-train-36979-0"]
    assert (first.task, first.source, first.meta) == ("flickr", "flickr30k", {"image_ids": ["flickr30k:36979"]})
    assert first.fields == {
        "caption": "Two men {regions:0,1} in a blue shirt {regions:2} stand on a street.",
        "targets": [0, 1, 2],
    }
    # Pixels 1 to 30 span the edges 0 to 30; 40 to 70 go over the right edge.
    assert [r.box for r in first.regions] == [(0, 0, 30, 48), (39, 0, 64, 48), (10, 5, 20, 12)]
    assert [r.object for r in first.regions] == [0, 1, 2]
    second = samples["flickr30k-train-36979-1"]
    assert second.fields["caption"] == "A shirt {regions:0}, nothing and they {regions:1,2}."
    assert [reason for reason, _ in rejects("flickr30k")] == ["empty-box", "no-box"]


def test_evaluation_has_phrases_of_their_own(build):
    samples = build("flickr30k", "val", write)
    phrases = {name: sample for name, sample in samples.items() if sample.task == "grec"}
    assert sorted(phrases) == [f"flickr30k-val-36979-{name}" for name in ("0-0", "0-1", "1-0", "1-1")]
    men = phrases["flickr30k-val-36979-0-0"]
    assert men.fields == {"expr": "Two men", "targets": [0, 1]}
    assert [r.box for r in men.regions] == [(0, 0, 30, 48), (39, 0, 64, 48)]
    assert sum(sample.task == "flickr" for sample in samples.values()) == 2


def test_files_that_differ_stop_the_build(refusal):
    def write_wrong(root, picture):
        write(root, picture, annotation=ANNOTATION.replace("<xmin>11</xmin>", "<xmin>x</xmin>"))

    assert "36979.xml: expected a number in <bndbox/xmin>, got 'x'" in refusal("flickr30k", "train", write_wrong)


def test_marks_that_differ_stop_the_build(refusal):
    def write_wrong(root, picture):
        write(root, picture, sentences="[/EN#x/people A man] walks .")

    message = refusal("flickr30k", "train", write_wrong)
    assert "line 1: expected phrases as [/EN#1/people A man]" in message
