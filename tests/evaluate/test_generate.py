"""Batched, cached, left-padded, constrained generation against a loop that has none of these but the constraint."""

import dataclasses

import pytest
import torch

from vistallm.coinit.shards import read_raw
from vistallm.data.datamodule import split_shards
from vistallm.data.images import decode_sample
from vistallm.data.sequence import collate
from vistallm.evaluate.benchmarks import load_benchmarks
from vistallm.evaluate.generate import Answerer, Pace, generate_predictions, picked_images
from vistallm.evaluate.grammar import RegionGrammar, rule_of
from vistallm.evaluate.parse import read_answer
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


def alone(model, config, table, sequence):
    """One answer, token by token, the whole sequence anew each time."""
    batch = collate([sequence], model.vocabulary, generation=True)
    assert batch.attention_mask.all()
    embeddings, written = model.input_embeddings(batch), torch.zeros(1, 0, dtype=torch.long)
    grammar = RegionGrammar(table, [rule_of(sequence.sample)], config.points, NEW_TOKENS)
    for _ in range(NEW_TOKENS):
        logits = model.decoder(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        written = torch.cat([written, grammar(written, logits).argmax(1, keepdim=True)], 1)
        if written[0, -1] == model.vocabulary.lm.eos_token_id:
            written = written[:, :-1]
            break
        embeddings = torch.cat([embeddings, model.decoder.get_input_embeddings()(written[:, -1:])], 1)
    return model.vocabulary.lm.decode(written[0].tolist())


@torch.no_grad()
def test_a_batch_answers_as_an_uncached_loop_over_single_samples(livelier, tiny_config, sequences):
    config = tiny_config(f"decode.max_new_tokens={NEW_TOKENS}")
    answerer = Answerer(livelier, config)
    lengths = {len(sequence.input_ids) for sequence in sequences}
    assert len(lengths) > 4, "rows of one length would need no padding"
    expected = [alone(livelier, config, answerer.table, sequence) for sequence in sequences]
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
    assert (pace.samples, pace.images) == (4, sum(len(p.images) for p in found))
    images = picked_images(mini_root, chosen, found[1:])
    assert set(images) == {p.id for p in found[1:]}
    for prediction in found[1:]:
        assert [(i["height"], i["width"], 3) for i in prediction.images] == [i.shape for i in images[prediction.id]]
    elsewhere = {name: dataclasses.replace(one, shards="absent") for name, one in chosen.items()}
    assert picked_images(mini_root, elsewhere, found) == {}


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
