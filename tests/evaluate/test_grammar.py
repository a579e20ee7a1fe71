"""Whatever the scores say, a constrained answer can be read."""

import pytest
import torch

from vistallm.config import load_config
from vistallm.data.datamodule import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.grammar import RegionGrammar, Rule
from vistallm.regions.codec import RegionParseError
from vistallm.regions.frame import Frame


@pytest.fixture(scope="module")
def parts():
    config = load_config(["model.encoder.weights=", "model.tokenizer.weights=", "num_bins=33", "points=6"])
    codec = build_codec(config)
    return codec, Vocabulary.build(config.model, codec)


def write(vocabulary, rule, seed, constrained=True, tokens=80):
    """Generate one answer from random scores that favour region tokens."""
    generator = torch.Generator().manual_seed(seed)
    grammar = RegionGrammar(vocabulary, [rule], points=6, max_new_tokens=tokens)
    ids = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(tokens):
        scores = torch.randn(1, len(vocabulary.text), generator=generator)
        scores[:, grammar.region_ids] += 2.0
        scores[:, vocabulary.text.eos_token_id] += 2.0
        scores = grammar(ids, scores) if constrained else scores
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == vocabulary.text.eos_token_id:
            break
    return vocabulary.text.decode(ids[0].tolist()).replace("</s>", "")


RULES = [Rule(kind, single) for kind in ("mask", "box", "point") for single in (False, True)] + [Rule()]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_random_scores_give_readable_regions(parts, rule):
    codec, vocabulary = parts
    frame = Frame(90, 60, 48)
    for seed in range(30):
        parsed = codec.decode(write(vocabulary, rule, seed), [frame])
        if rule.kind is not None:
            assert parsed.kind == rule.kind
        if rule.single:
            assert len(parsed.regions) == 1
        for region in parsed.regions:
            if region.kind == "mask":
                assert sum(map(len, region.polygons)) <= 6


def test_the_same_scores_without_the_grammar_are_unreadable(parts):
    codec, vocabulary = parts
    broken = 0
    for seed in range(30):
        try:
            codec.decode(write(vocabulary, Rule("mask"), seed, constrained=False), [Frame(90, 60, 48)])
        except RegionParseError:
            broken += 1
    assert broken > 15


def test_rows_of_a_batch_are_independent(parts):
    _, vocabulary = parts
    text = vocabulary.text
    ids = torch.tensor([text.convert_tokens_to_ids(["<m_st>"]), text.convert_tokens_to_ids(["The"])])
    grammar = RegionGrammar(vocabulary, [Rule("mask"), Rule("box")], points=6, max_new_tokens=60)
    scores = grammar(ids, torch.zeros(2, len(text)))
    end, box = text.eos_token_id, text.convert_tokens_to_ids("<b_st>")
    assert torch.isneginf(scores[0, end])
    assert torch.isneginf(scores[1, end]), "no box has been written yet"
    assert scores[1, box] == 0
    assert torch.isneginf(scores[0, box])
