"""Links in the whole model: sequences, batches, losses, generation, and runs that had none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vistallm.data.sequence import build_codec, build_sequencer, collate
from vistallm.data.vocabulary import Vocabulary
from vistallm.links import LINKS, Link, read_links
from vistallm.model.build import build_model
from vistallm.regions.masks import rle_box, rle_to_mask
from vistallm.schema import IGNORE_INDEX, SampleReject

LINKED = "model.links=all links.width=32 links.layers=2 links.heads=2 links.blocks=[0,2]".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def linked(tiny_config):
    """Config, builder and a seeded model with links, whose answers differ."""
    config = tiny_config(*LINKED)
    vocabulary = Vocabulary.build(config.model, build_codec(config), config.links)
    torch.manual_seed(0)
    model = build_model(config, vocabulary).eval()
    for parameter in model.decoder.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return config, build_sequencer(config, vocabulary), model


def test_the_text_names_kind_image_and_phrase():
    text = "The masks are image 1: [SEG] [SEG_1] [SEG_2] image 3: [SEG] [SEG_1] [SEG_2]."
    assert [(link.kind, link.image) for link in read_links(text)] == [("SEG", 0), ("SEG", 2)]
    text = "star [POSE][POSE_1][POSE_2], top left [POSE][POSE_1][POSE_2]."
    assert read_links(text) == [Link("POSE", 0, "star"), Link("POSE", 0, "top left")]


def test_a_link_stands_where_the_text_head_writes_tokens(linked, samples):
    _, builder, model = linked
    for task in ("res", "gres", "rec", "attcoseg"):
        sample = samples[task][0]
        sequence, text = builder.build(sample, head="link"), builder.build(sample, head="text")
        assert sequence.prompt == text.prompt
        assert "[" not in text.answer
        assert not text.links
        links = read_links(sequence.answer)
        assert [link.kind for link in links] == [target.kind for target in sequence.links]
        assert {target.kind for target in sequence.links} == {"SEG" if task == "attcoseg" else "GRD"}
        wanted = [region.image for region in sample.regions]
        assert [target.image for target in sequence.links for _ in target.boxes] == wanted
        if len(sample.images) > 1 and wanted:
            assert [link.image for link in links] == sorted(set(wanted))
        ids, labels = sequence.input_ids.tolist(), sequence.labels.tolist()
        routing = {numbers[0]: numbers[1:] for numbers in builder.vocabulary.link_ids}
        places = [i for i, token in enumerate(ids) if token in routing]
        assert len(places) == len(links)
        for place in places:
            assert ids[place + 1 : place + 5] == routing[ids[place]]
            assert labels[place] == ids[place], "the routing token is learned"
            assert labels[place + 1 : place + 5] == [IGNORE_INDEX] * 4, "its slots are given"


def test_targets_are_the_regions_on_the_letterbox_square(linked, samples):
    _, builder, _ = linked
    sample = next(one for one in samples["res"])
    (target,), image = builder.build(sample, head="link").links, sample.images[0]
    x0, y0, x1, y1 = rle_box(sample.regions[0].rle)
    side = max(image.width, image.height)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    expected = [(x0 + x1) / 2 + left, (y0 + y1) / 2 + top, x1 - x0, y1 - y0]
    np.testing.assert_allclose(target.boxes[0] * side, expected, atol=1e-3)
    share = rle_to_mask(sample.regions[0].rle).sum() / side**2
    assert abs(target.masks.mean() / 255 - share) < 1e-3, "the mask keeps its share of the square, within pixels too"
    assert target.masks.shape == (1, 24, 24)


def test_a_link_knows_the_words_of_its_phrase(linked):
    """The embeddings of the words since the last comma, colon, link or start, whatever stands behind them."""
    _, builder, model = linked
    lm, slots = builder.vocabulary.lm, "".join(builder.vocabulary.link_tokens[LINKS.index("DET")])
    table = model.decoder.get_input_embeddings().weight
    text = f"ASSISTANT: red star {slots}, circle {slots} image 2: {slots} green {slots} , , red"
    ids = torch.tensor([lm.encode(text, add_special_tokens=False)])
    hidden = torch.zeros(*ids.shape, table.shape[1])
    states, rows = model._slot_states(ids, hidden)
    wanted = torch.zeros(4, 2, table.shape[1])
    for link, words in ((0, ["red", "star"]), (1, ["circle"]), (3, ["green"])):
        wanted[link, : len(words)] = table[lm.convert_tokens_to_ids(words)]
    torch.testing.assert_close(states[:, 4:], wanted)
    assert rows.tolist() == [0] * 4


def test_a_batch_numbers_images_and_groups(linked, samples):
    _, builder, model = linked
    rows = [builder.build(samples[task][0], head="link") for task in ("attcoseg", "res", "gres")]
    links = collate(rows, builder.vocabulary).links
    first, single = len(rows[0].sample.images), [s.links for s in rows]
    assert links.row.tolist() == [i for i, some in enumerate(single) for _ in some]
    assert links.image[links.row == 1].tolist() == [first]
    assert links.group.tolist() == list(range(len(links.kind))), "links of phrases have object queries of their own"
    assert len(links.object_link) == len(links.boxes) == sum(len(t.boxes) for some in single for t in some)
    assert [LINKS[k] for k in links.kind[links.row == 1]] == ["GRD"]


def test_one_batch_and_two_have_the_same_sums(linked, samples):
    _, builder, model = linked
    rows = [builder.build(samples[task][i], head="link") for task in ("res", "gres", "attcoseg") for i in (0, 1)]
    whole = model(collate(rows, builder.vocabulary)).link_loss
    parts = [model(collate(rows[a:b], builder.vocabulary)).link_loss for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-4)


def test_every_parameter_of_the_links_gets_a_gradient(linked, samples):
    """Also in a batch without a link: ddp waits for them."""
    _, builder, model = linked
    for rows in ([builder.build(samples["pope"][0])], [builder.build(samples["res"][0], head="link")]):
        model.zero_grad()
        output = model(collate(rows, builder.vocabulary))
        (output.token_loss.sum() + output.link_loss).backward()
        parts = {"links": model.links, "region_encoder": model.region_encoder}
        missing = [f"{n}.{k}" for n, part in parts.items() for k, p in part.named_parameters() if p.grad is None]
        assert not missing
    model.zero_grad()


@torch.no_grad()
def test_generated_states_equal_those_of_the_answer_given(linked, samples):
    """Routing tokens are forced into the answers: the links then find what one pass over prompt and answer finds."""
    _, builder, model = linked
    rows = [builder.build(samples[task][0], head="link") for task in ("res", "attcoseg", "rec", "gres")]
    answers = [row.input_ids[row.prompt_length :].tolist() for row in rows]

    class Dictate:
        def __call__(self, input_ids, scores):
            step = input_ids.shape[1]
            kept = torch.full_like(scores, -torch.inf)
            for row, answer in enumerate(answers):
                kept[row, answer[min(step, len(answer) - 1)]] = 0.0
            return kept

    def dictated(chosen):
        nonlocal answers
        saved, answers = answers, [answers[i] for i in chosen]
        batch = collate([rows[i] for i in chosen], builder.vocabulary, generation=True)
        made = model.generate(batch, max(map(len, answers)), logits_processor=[Dictate()])
        answers = saved
        return made.links

    found, truth = dictated(range(4)), model.find(collate(rows, builder.vocabulary))
    alone = [dictated([i])[0] for i in range(4)]
    assert [len(row) for row in found] == [len(s.links) for s in rows]
    assert sum(len(row) for row in found) >= 4
    for some, others, single in zip(found, truth, alone, strict=True):
        for one, other, own in zip(some, others, single, strict=True):
            for name in ("scores", "boxes", "masks"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_slots_follow_a_routing_token_and_nothing_else_writes_one(linked, samples):
    _, builder, model = linked
    routing = model.link_ids[:, 0]

    class Favour:
        def __call__(self, input_ids, scores):
            return scores.index_add(1, routing, torch.full((len(scores), 4), 4.0))

    rows = [builder.build(samples[task][0], head="link") for task in ("res", "vqa", "rec")]
    made = model.generate(collate(rows, builder.vocabulary, generation=True), 24, logits_processor=[Favour()])
    slots, count = model.link_ids[:, 1:], 0
    for ids in made.ids.tolist():
        expected: list[int] = []
        for token in ids:
            if expected:
                assert token == expected.pop(0)
            else:
                assert token not in slots.flatten().tolist()
                if token in routing.tolist():
                    expected, count = slots[routing.tolist().index(token)].tolist(), count + 1
    assert count >= 3
    assert sum(map(len, made.links)) >= count - len(rows), "all but those that the limit has cut"


def test_a_model_without_links_refuses_their_tasks(builder, samples):
    with pytest.raises(SampleReject) as reject:
        builder.build(samples["res"][0], head="link")
    assert reject.value.reason == "needs-links"


def test_the_share_of_links_while_training(linked, samples):
    import random

    config, builder, _ = linked
    rng = random.Random(0)
    heads = [builder.build(samples["res"][0], rng).head for _ in range(60)]
    assert 15 < heads.count("link") < 45
    none = dataclasses.replace(builder, links=dataclasses.replace(config.links, share=0.0))
    assert {none.build(samples["res"][0], rng).head for _ in range(10)} == {"text"}


@torch.no_grad()
def test_a_run_without_links_gains_them_and_answers_texts_as_before(tiny_model, tiny_config, samples, tmp_path):
    """Word rows are matched by token: new words and tokens stand between the old ones."""
    from vistallm.evaluate.generate import Answerer
    from vistallm.model.checkpoint import save_exported
    from vistallm.train.run import build

    save_exported(tiny_model, tiny_config(), tmp_path / "old", torch.float32)
    config = tiny_config(*LINKED, f"ckpt={tmp_path / 'old'}", "trainer.max_steps=1", "decode.max_new_tokens=40")
    model = build(config, config.data.root)[0].model.eval()
    assert len(model.vocabulary.lm) > len(tiny_model.vocabulary.lm)
    assert model.link_ids.shape == (4, 5)
    answers = []
    for one, settings in ((tiny_model, tiny_config("decode.max_new_tokens=40")), (model, config)):
        own = Answerer(one, settings)
        rows = [own.builder.build(samples[task][0], head="text") for task in ("res", "gres", "attcoseg", "pope")]
        answers.append([answer.text for answer in own.answer(rows)])
    assert answers[0] == answers[1]
    assert sum(map(len, answers[0])) > 100


def test_region_prompts_reach_the_answer(linked, samples):
    """A question's region becomes a token that depends on the pixels it shows."""
    config, builder, model = linked
    sample = samples["boxqa"][0]
    shown, written = builder.build(sample, head="link"), builder.build(sample, head="text")
    assert "<region>" in shown.prompt
    assert "<b_st>" in written.prompt
    assert [image for image, _ in shown.prompts] == [0]
    batch = collate([shown], builder.vocabulary)
    x0, y0, x1, y1 = sample.regions[0].box
    side = max(sample.images[0].width, sample.images[0].height)
    assert abs(batch.prompts.float().mean().item() - (x1 - x0) * (y1 - y0) / side**2) < 0.03
    losses = model(batch).token_loss
    moved = dataclasses.replace(batch, prompts=batch.prompts.flip(1, 2))
    assert not torch.allclose(model(moved).token_loss, losses)


def test_predict_answers_by_links(linked, samples, tmp_path, capsys):
    import json
    import runpy
    from pathlib import Path

    import cv2

    from vistallm.model.checkpoint import save_exported

    config, _, model = linked
    save_exported(model, config, tmp_path / "model", torch.float32)
    sample = samples["res"][0]
    cv2.imwrite(str(tmp_path / "a.png"), sample.pixels[0][:, :, ::-1])
    main = runpy.run_path(str(Path(__file__).parents[2] / "tools/predict.py"))["main"]
    words = ["--ckpt", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "o.png")]
    main([*words, "--prompt", "Segment {box:2,2,30,30}.", "--link", "interactive"])
    text, record, *_ = capsys.readouterr().out.splitlines()
    assert text.endswith("[0].")
    (region,) = json.loads(record)["regions"]
    assert region["rle"]["size"] == [sample.images[0].height, sample.images[0].width]
    assert (tmp_path / "o.png").is_file()
    with pytest.raises(ValueError, match="task=vqa"):
        main([*words, "--prompt", "Why?", "--link", "vqa"])
