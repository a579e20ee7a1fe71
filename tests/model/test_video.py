"""Videos in the whole model: sequences, batches, frames that are told apart, answers, and runs that knew no videos."""

import random

import numpy as np
import pytest
import torch

from vistallm.config import apply_overrides
from vistallm.data.sequence import build_codec, build_sequencer, collate
from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.generate import Answerer, make_prediction
from vistallm.links import read_links
from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.model.build import build_model
from vistallm.model.checkpoint import save_exported
from vistallm.model.qformer import FrameMixer
from vistallm.train.run import build

LINKED = "model.links=all links.width=32 links.layers=2 links.heads=2 links.blocks=[0,2]".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def videos():
    """One decoded sample of each task of videos."""
    import cv2

    found = {}
    for task in ("video_ref", "video_grounding", "video_qa"):
        sample, files = make_sample(MiniRecipe(seed=2, videos=True), "train", task, 4)
        sample.pixels = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data, _ in files]
        found[task] = sample
    return found


def made(tiny_config, *words):
    config = tiny_config("decode.max_new_tokens=400", *words)
    vocabulary = Vocabulary.build(config.model, build_codec(config), config.links)
    torch.manual_seed(0)
    return config, build_sequencer(config, vocabulary), build_model(config, vocabulary).eval()


def test_new_weights_change_no_bit_and_old_runs_take_them_up(tiny_config, videos, samples, mini_root, tmp_path):
    config, builder, model = made(tiny_config, "model.video=index")
    batch = collate([builder.build(samples["res"][0]), builder.build(videos["video_qa"])], builder.vocabulary)
    image_tokens = model.encode(batch)[0]
    former_config, former_builder, former = made(tiny_config)  # a run that knew no videos
    save_exported(former, former_config, tmp_path / "run", torch.float32)
    single = collate([former_builder.build(samples["res"][0])], former_builder.vocabulary)
    for kind in ("embedding", "attention"):
        torch.manual_seed(0)
        other = build_model(apply_overrides(config, [f"model.video={kind}"]), builder.vocabulary).eval()
        missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
        assert unexpected == []
        assert all(name.startswith("tokenizer.frames.") for name in missing)
        assert torch.equal(other.encode(batch)[0], image_tokens)
        words = [f"model.video={kind}", f"ckpt={tmp_path / 'run'}", "data.weights={res: 1}", "trainer.max_steps=1"]
        grown = build(tiny_config(*words), mini_root)[0].model.eval()
        with torch.no_grad():
            assert torch.equal(grown.encode(single)[0], former.encode(single)[0])
        assert len(grown.vocabulary.lm) > len(former.vocabulary.lm)
        own = build_sequencer(tiny_config(*words), grown.vocabulary)
        with torch.no_grad():
            after = grown.input_embeddings(collate([own.build(samples["res"][0])], grown.vocabulary))
            assert torch.equal(after, former.input_embeddings(single))  # the old words are found by name


def test_frames_are_told_apart_and_images_are_left_alone():
    torch.manual_seed(0)
    mixer = FrameMixer(16, 2, attention=True)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(6, 3, 16)
    frame = torch.tensor([-1, 0, 1, 2, 0, 1])
    out = mixer(states, frame)
    assert torch.equal(out[0], states[0])
    for rows in (slice(1, 4), slice(4, 6)):  # a video's result does not depend on the others of the batch
        torch.testing.assert_close(mixer(states[rows], frame[rows]), out[rows])
    # by hand: each query attends to itself over the frames
    x = mixer.norm(states[4:6] + mixer.places[:2, None])
    expected = mixer.attention(x[:, 1][None], x[:, 1][None], x[:, 1][None])[0][0]
    torch.testing.assert_close(out[4:6, 1], states[4:6, 1] + mixer.places[:2] + expected)
    assert torch.equal(mixer(states, None), states)


def test_sequences_name_frames_and_a_link_is_read_in_each(tiny_config, videos):
    _, builder, model = made(tiny_config, "model.video=embedding", *LINKED)
    sample = videos["video_ref"]
    text, link = builder.build(sample, head="text"), builder.build(sample, head="link")
    decoded = builder.vocabulary.lm.decode(link.input_ids)
    assert decoded.count("Frame ") == 8
    assert "Image " not in decoded
    assert [f"frame {k}:" in text.answer for k in range(1, 9)] == [True] * 8
    assert (len(read_links(link.answer)), len(link.links)) == (1, 8)
    batch = collate([link, builder.build(videos["video_qa"]), link], builder.vocabulary)
    assert batch.frame.tolist() == 3 * list(range(8))
    assert batch.links.token.tolist() == [0] * 8 + [1] * 8
    assert batch.links.image.tolist() == [*range(8), *range(16, 24)]
    masks = {region.image for region in sample.regions}
    assert sorted({int(batch.links.image[o]) for o in batch.links.object_link}) == sorted(
        masks | {i + 16 for i in masks}
    )
    output = model(batch)
    assert torch.isfinite(output.link_loss)
    (output.loss + output.link_loss).backward()
    assert model.tokenizer.frames.places.grad[:8].abs().sum(1).min() > 0
    assert model.tokenizer.frames.places.grad[8:].abs().max() == 0
    found = model.find(batch)  # the same states, so the same answers, in both copies
    assert [len(row) for row in found] == [8, 0, 8]
    torch.testing.assert_close(found[0][3].boxes, found[2][3].boxes)


@pytest.mark.parametrize("head", ["text", "link"])
def test_answers_of_a_random_model_are_readable_tracks(tiny_config, videos, head):
    config, builder, model = made(tiny_config, "model.video=attention", "video.keyframes=3", *LINKED)
    answerer = Answerer(model, config)
    for task in ("video_ref", "video_grounding"):
        sequence = answerer.builder.build(videos[task], head=head)
        (answer,) = answerer.answer([sequence])
        prediction = make_prediction(sequence, answer, answerer.builder, f"mini_{task}")
        assert prediction.failure is None, answer.text
        assert all(0 <= region.image < 8 for region in prediction.parsed.regions)
        if head == "text":
            numbers = [int(part.split(":")[0].split()[0]) for part in answer.text.lower().split("frame")[1:]]
            assert numbers == [1, 4, 7, 8]
        else:
            assert len(answer.links) == 8


def test_fewer_frames_are_taken_with_their_regions(videos):
    from vistallm.coinit.frames import choose_frames, frame_numbers
    from vistallm.coinit.shards import RawSample

    sample = videos["video_ref"]
    raw = RawSample("", "k", sample.to_json())
    assert choose_frames(raw, 8) is raw
    one = choose_frames(raw, 2)
    assert one.record["meta"]["frames"] == [2, 6]
    assert [image["file"] for image in one.record["images"]] == [sample.images[i].file for i in (2, 6)]
    kept = {region["image"]: region["rle"] for region in one.record["regions"]}
    assert kept == {(2, 6).index(r.image): r.rle for r in sample.regions if r.image in (2, 6)}
    drawn = [frame_numbers(32, 8, random.Random(seed)) for seed in range(200)]
    assert all(4 * i <= number < 4 * i + 4 for numbers in drawn for i, number in enumerate(numbers))
    assert {numbers[3] for numbers in drawn} == {12, 13, 14, 15}
    image = RawSample("", "k", {**sample.to_json(), "fields": {}})
    assert choose_frames(image, 2) is image
