"""Batched, cached, left-padded, constrained generation against a loop that has none of these but the constraint."""

import dataclasses

import pytest
import torch

from vistallm.coinit.shards import read_raw, split_shards
from vistallm.data.images import decode_sample
from vistallm.data.sequence import collate
from vistallm.data.stream import reject_log
from vistallm.evaluate import generate
from vistallm.evaluate.benchmarks import load_benchmarks
from vistallm.evaluate.generate import (
    Answerer,
    Pace,
    generate_predictions,
    picked_images,
    read_answer,
    read_units,
)
from vistallm.evaluate.grammar import rule_of
from vistallm.tasks import find_task

TASKS = ("attcoseg", "pope", "rec", "nlvr2", "res", "caption", "coseg", "vcr", "gres")
NEW_TOKENS = 24


@pytest.fixture
def livelier(tiny_model):
    """A random model whose answers differ, and end now and then."""
    torch.manual_seed(5)
    for parameter in tiny_model.parameters():
        if parameter.ndim > 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return tiny_model


@pytest.fixture(scope="module")
def sequences(mini_root, builder):
    found = {}
    for shard in split_shards(mini_root, "test"):
        for sample in map(decode_sample, read_raw(shard)):
            found.setdefault(sample.task, builder.build(sample))
    return [found[task] for task in TASKS]


def alone(model, grammars, sequence):
    """One answer, token by token, the whole sequence anew each time."""
    batch = collate([sequence], model.vocabulary, generation=True)
    assert batch.attention_mask.all()
    embeddings, written = model.input_embeddings(batch), torch.zeros(1, 0, dtype=torch.long)
    grammar = grammars.constrain([rule_of(sequence.sample)])
    for _ in range(grammar.limit):
        logits = model.decoder(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        written = torch.cat([written, grammar(written, logits).argmax(1, keepdim=True)], 1)
        if written[0, -1] == model.vocabulary.lm.eos_token_id:
            written = written[:, :-1]
            break
        embeddings = torch.cat([embeddings, model.decoder.get_input_embeddings()(written[:, -1:])], 1)
    return model.vocabulary.lm.decode(written[0].tolist())


@torch.no_grad()
def test_a_batch_answers_as_an_uncached_loop_over_single_samples(livelier, tiny_config, sequences):
    answerer = Answerer(livelier, tiny_config(f"decode.max_new_tokens={NEW_TOKENS}"))
    lengths = {len(sequence.input_ids) for sequence in sequences}
    assert len(lengths) > 4, "rows of one length would need no padding"
    expected = [alone(livelier, answerer.grammars, sequence) for sequence in sequences]
    together = answerer.answer(sequences)
    assert [answer.text for answer in together] == expected
    assert [answerer.answer([sequence])[0].text for sequence in sequences] == expected
    assert [answer.text for answer in answerer.answer(sequences[::-1])] == expected[::-1]
    assert len({answer.tokens for answer in together}) > 2, "some rows must end before others"
    assert len(set(expected)) == len(expected)


def test_predictions_and_their_pace(livelier, tiny_config, mini_root, tmp_path):
    config = tiny_config("decode.limit=2", f"decode.max_new_tokens={NEW_TOKENS}", f"run_dir={tmp_path}")
    chosen = {name: one for name, one in load_benchmarks().items() if name in ("mini_coseg", "mini_rec")}
    pace = Pace()
    found = list(generate_predictions(livelier, config, mini_root, chosen, pace))
    assert [p.benchmark for p in found] == ["mini_rec"] * 2 + ["mini_coseg"] * 2
    assert all(p.failure is None for p in found)
    assert all(p.parsed.regions[0].confidence is not None for p in found[:2])
    assert (pace["samples"], pace["images"]) == (4, sum(len(p.images) for p in found))
    images = picked_images(mini_root, chosen, found[1:])
    assert set(images) == {p.id for p in found[1:]}
    for prediction in found[1:]:
        assert [(i["height"], i["width"], 3) for i in prediction.images] == [i.shape for i in images[prediction.id]]
    elsewhere = {name: dataclasses.replace(one, shards="absent") for name, one in chosen.items()}
    assert picked_images(mini_root, elsewhere, found) == {}


def test_samples_of_like_length_share_a_batch_and_come_back_in_the_order_of_the_data(
    livelier, tiny_config, mini_root, tmp_path, monkeypatch
):
    config = tiny_config("decode.batch_size=3", "decode.limit=null", f"run_dir={tmp_path}")
    one = dataclasses.replace(load_benchmarks()["mini_nlvr2"], split="train")
    (unit, *rest) = read_units(mini_root, [one], 12, None, {})
    answerer, batches = Answerer(livelier, config), []
    answer = answerer.answer

    def noted(rows, *options):
        batches.append([row.prompt_length for row in rows])
        return answer(rows, *options)

    monkeypatch.setattr(answerer, "answer", noted)
    made, pace = answerer.answer_unit(unit, reject_log(config))
    assert [p.id for p in made] == [raw.record["id"] for raw in unit.raws]
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2
    assert [len(batch) for batch in batches] == [3] * 4
    assert [unit.number for unit in rest] == list(range(1, len(rest) + 1))
    alone, _ = answerer.answer_unit(dataclasses.replace(unit, raws=unit.raws[5:6]), reject_log(config))
    assert alone[0].text == made[5].text
    assert pace["samples"] == 12


def test_shards_are_read_once_for_all_benchmarks(mini_root, monkeypatch):
    read = []
    monkeypatch.setattr(generate, "read_raw", lambda shard, keep: read.append(shard) or read_raw(shard, keep))
    mini = [one for one in load_benchmarks().values() if one.data == "mini" and not one.needs_links | one.needs_video]
    units = list(read_units(mini_root, mini, 8, None, {}))
    assert sorted(read) == sorted(set(split_shards(mini_root, "test")))
    assert sum(len(unit.raws) for unit in units) == 30


def test_the_prompt_alone_decides_whether_a_sample_fits(livelier, tiny_config, mini_root, tmp_path):
    one = load_benchmarks()["mini_gres"]
    (unit,) = read_units(mini_root, [one], 9, None, {})
    config = tiny_config(f"run_dir={tmp_path}", "data.max_reject_share=1")
    made = [Answerer(livelier, config)._prompt(raw) for raw in unit.raws]
    longest = max(sequence.prompt_length for sequence in made)
    assert any(len(sequence.input_ids) > longest for sequence in made), "a true answer must not fit beside its prompt"
    config.data.max_length = longest
    assert len(Answerer(livelier, config).answer_unit(unit, reject_log(config))[0]) == len(unit.raws)
    config.data.max_length, rejects = longest - 1, reject_log(config)
    kept, pace = Answerer(livelier, config).answer_unit(unit, rejects)
    assert pace["rejected"] == len(unit.raws) - len(kept) == rejects.counts["too-long"] > 0


def test_a_cut_answer_is_marked_and_without_a_limit_the_form_decides(livelier, tiny_config, mini_root, tmp_path):
    chosen = {"mini_caption": load_benchmarks()["mini_caption"]}
    config = tiny_config("decode.limit=2", "decode.max_new_tokens=3", f"run_dir={tmp_path}")
    found = list(generate_predictions(livelier, config, mini_root, chosen, Pace()))
    assert all(p.cut and p.to_json()["cut"] for p in found)
    forms = {name: load_benchmarks()[name] for name in ("mini_res", "mini_pope")}
    found = list(generate_predictions(livelier, config, mini_root, forms, Pace()))
    assert not any(p.cut or p.failure for p in found), "an answer in a form is as long as it must be"


def test_answers_of_random_models_are_readable(livelier, tiny_config, sequences, builder):
    """By the grammar; without it almost none are."""
    answerer = Answerer(livelier, tiny_config(f"decode.max_new_tokens={NEW_TOKENS}"))

    def failures():
        read = [
            read_answer(answer.text, sequence.letterboxes, builder.codec, find_task(sequence.sample.task))[1]
            for sequence, answer in zip(sequences[:4], answerer.answer(sequences[:4]), strict=True)
        ]
        return [failure for failure in read if failure is not None]

    assert failures() == []
    answerer.config.decode.grammar = False
    assert failures()
