"""Whatever the scores say, a constrained answer can be read."""

import re

import pytest
import torch

from vistallm.config import load_config
from vistallm.data.datamodule import build_codec
from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.generate import read_answer
from vistallm.evaluate.grammar import RegionGrammar, Rule, rule_of
from vistallm.evaluate.token_table import Token, TokenTable
from vistallm.regions.codec import RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.tasks import TASKS

POINTS = 6
FRAMES = [Letterbox(90, 60, 48)] * 3


@pytest.fixture(scope="module")
def parts():
    config = load_config(["model.encoder.weights=", "model.tokenizer.weights=", "num_bins=33", f"points={POINTS}"])
    codec = build_codec(config)
    return codec, TokenTable.build(Vocabulary.build(config.model, codec))


def write(table, rules, seed, tokens=60, constrained=True):
    """Generate answers from random scores that favour region tokens, `image k:`, "answer is" and the end."""
    generator = torch.Generator().manual_seed(seed)
    text = table.vocabulary.lm
    favour = torch.from_numpy(table.classes >= Token.END) * 2.0
    favour[text.convert_tokens_to_ids([*"123:.", "image", "answer", "is"])] = 3.0
    grammar, ids = RegionGrammar(table, rules, POINTS, tokens), torch.zeros(len(rules), 0, dtype=torch.long)
    for _ in range(tokens):
        scores = torch.randn(len(rules), len(text), generator=generator) + favour
        scores = grammar(ids, scores) if constrained else scores
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    rows = [row[: row.index(text.eos_token_id)] if text.eos_token_id in row else row for row in ids.tolist()]
    return [text.decode(row) for row in rows]


REGION_RULES = [
    Rule(kind, single, images) for kind in ("mask", "box", "point") for single in (False, True) for images in (1, 3)
]


@pytest.mark.parametrize("tokens", [14, 60])
def test_random_scores_give_readable_regions(parts, tokens):
    codec, table = parts
    shown = set()
    for seed in range(12):
        rules = [rule for rule in REGION_RULES for _ in range(3)]
        for rule, text in zip(rules, write(table, rules, seed, tokens), strict=True):
            parsed = codec.decode(text, FRAMES[: rule.images])
            assert parsed.kind == rule.kind, text
            assert len(parsed.regions) == 1 or not rule.single
            named = [int(number) for number in re.findall(r"image (\d+) : (?=<)", text)]
            assert named == sorted(set(named)), text
            shown |= set(named) if rule.images == 3 else set()
            for region in parsed.regions:
                assert region.kind != "mask" or sum(map(len, region.polygons)) <= POINTS
    assert shown == {1, 2, 3} or tokens == 14


WORD_TASKS = ("vqa", "caption", "vcr", "pope", "nlvr2", "pointqa")


def test_random_scores_give_readable_words(parts, samples):
    """Random answers are read by the task's own reader; a choice is one of the options, in the task's own words."""
    codec, table = parts
    chosen = [sample for sample in samples if sample.task in WORD_TASKS]
    answers = {name: set() for name in WORD_TASKS}
    for seed in range(4):
        texts = write(table, [rule_of(sample) for sample in chosen], seed, 24)
        for sample, text in zip(chosen, texts, strict=True):
            parsed, failure = read_answer(text, FRAMES[: len(sample.images)], codec, TASKS[sample.task])
            assert failure is None, (sample.task, text)
            answers[sample.task].add(parsed.answer)
            if sample.task == "nlvr2":
                assert text in ("That is True .", "That is False .")
    assert answers["pope"] == {"yes", "no"}
    assert answers["nlvr2"] == {"True", "False"}
    assert answers["vcr"] == set("ABCD")


def test_free_text_may_hold_regions_and_image_numbers(parts):
    codec, table = parts
    texts = write(table, [Rule(images=images) for images in (1, 3) for _ in range(20)], 0)
    parsed = [codec.decode(text, FRAMES[: 1 if row < 20 else 3]) for row, text in enumerate(texts)]
    assert sum(bool(one.regions) for one in parsed) > 5
    assert len({one.kind for one in parsed}) == 4


def test_the_same_scores_without_the_grammar_are_unreadable(parts):
    codec, table = parts
    broken = 0
    for text in write(table, [Rule("mask")] * 30, 0, constrained=False):
        try:
            codec.decode(text, FRAMES[:1])
        except RegionParseError:
            broken += 1
    assert broken > 15


def permitted(table, rule, written, tokens=60):
    """The tokens that may follow a written beginning."""
    text = table.vocabulary.lm
    ids = torch.tensor([text.encode(written, add_special_tokens=False)], dtype=torch.long).reshape(1, -1)
    scores = RegionGrammar(table, [rule], POINTS, tokens)(ids, torch.zeros(1, len(text)))
    return set(text.convert_ids_to_tokens(torch.isfinite(scores[0]).nonzero().flatten().tolist()))


def bins(tokens):
    return {token for token in tokens if token.startswith("<bin_")}


@pytest.mark.parametrize(
    ("rule", "written", "yes", "no"),
    [
        (Rule("mask"), "The mask is", {"<m_st>", "red"}, {"<b_st>", "</s>", "<bin_3>", "<pad>", "<im_patch>"}),
        (Rule("mask"), "<m_st>", {"<m_ed>", "<bin_0>", "<bin_32>"}, {"red", "<m_sep>", "<m_part>", "</s>"}),
        (Rule("mask", single=True), "<m_st>", {"<bin_0>"}, {"<m_ed>"}),
        (Rule("mask"), "<m_st>" + "<bin_1>" * 6, {"<m_ed>", "<m_sep>", "<m_part>", "<bin_1>"}, {"red"}),
        (Rule("mask"), "<m_st>" + "<bin_1>" * 7, {"<bin_1>"}, {"<m_ed>", "<m_sep>", "<m_part>"}),
        (Rule("mask"), "<m_st>" + "<bin_1>" * 12, {"<m_ed>", "<m_sep>"}, {"<bin_1>", "<m_part>"}),
        (Rule("mask", single=True), "<m_st>" + "<bin_1>" * 6 + "<m_ed>", {"</s>", "."}, {"<m_st>"}),
        (Rule("box"), "<b_st><bin_5><bin_9>", {"<bin_5>"}, {"<bin_4>", "<b_ed>"}),
        (Rule("box"), "<b_st><bin_5><bin_9><bin_5>", {"<bin_9>"}, {"<bin_8>"}),
        (Rule("box"), "<b_st><bin_5><bin_9><bin_5><bin_9>", {"<b_ed>", "<b_sep>"}, {"<bin_9>"}),
        (Rule("point"), "<p_st><bin_5><bin_0>", {"<p_ed>"}, {"<bin_9>", "<m_ed>"}),
        (Rule("mask", images=3), "The masks are", {"image", "<m_st>"}, {"</s>"}),
        (Rule("mask", images=3), "The masks are <m_st>", {"<m_ed>"}, {"<bin_1>"}),
        (Rule("mask", images=3), "The masks are image 2", {":", "and"}, {"<m_st>"}),
        (Rule("mask", images=3), "The images are 2", {":", "and"}, {"</s>"}),
        (Rule("mask", images=3), "The masks are image 2:", {"<m_st>"}, {"red", "</s>", "image", "<b_st>"}),
        (Rule("mask", images=3), "image 2: <m_st>", {"<bin_1>"}, {"<m_ed>"}),
        (Rule("mask", images=3), "The masks are image 4", {"and"}, {":", "<m_st>"}),
        (Rule("mask", images=3), "image 2: <m_st>" + "<bin_1>" * 6 + "<m_ed> image 2", {"."}, {":"}),
        (Rule("mask", images=3), "image 2: <m_st>" + "<bin_1>" * 6 + "<m_ed> image 3", {":"}, {"<m_st>"}),
        (Rule("mask", images=12), "image 12", {":"}, set()),
        (Rule("mask", images=12), "image 1 2: <m_st>", {"<m_ed>"}, {"<bin_1>"}),
        (Rule("mask"), "image 2", {"<m_st>"}, {":"}),
        (Rule(words=True), "The answer is", {"red", "<m_st>"}, {"</s>"}),
        (Rule(words=True), "The answer is red", {"</s>"}, set()),
        (Rule(words=True), "<b_st><b_ed>", {"red"}, {"</s>", "<m_st>"}),
        (Rule(words=True, images=2), "image 1", {"</s>"}, set()),
        (Rule(words=True, images=2), "image 1: <b_st><bin_1><bin_1><bin_1><bin_1><b_ed>", {"red"}, {"</s>"}),
        (Rule(), "", {"</s>", "<m_st>", "red"}, {"<bin_1>"}),
    ],
)
def test_what_may_follow(parts, rule, written, yes, no):
    allowed = permitted(parts[1], rule, written)
    assert yes <= allowed
    assert not no & allowed


def test_a_region_is_forced_before_the_tokens_run_out(parts):
    table = parts[1]
    words = " red" * 50
    assert permitted(table, Rule("box"), words, 60) == {"<b_st>"}
    assert permitted(table, Rule("box", single=True, images=3), words, 60) == {"image", "Image"}
    assert permitted(table, Rule("box", single=True, images=3), words + " image", 60) >= {"1", "2", "3"}
    assert not permitted(table, Rule("box", single=True, images=3), words + " image", 60) & {"0", "4", "red"}
    assert permitted(table, Rule("box", single=True, images=3), words + " image 3:", 60) == {"<b_st>"}


def test_choices_are_written_to_the_end(parts):
    rule = Rule(choices=("The answer is (A).", "The answer is (C).", "That is True."))
    table = parts[1]
    assert permitted(table, rule, "") == {"The", "That"}
    assert permitted(table, rule, "The answer is (") == {"A", "C"}
    assert permitted(table, rule, "The answer is (A).") == {"</s>"}
    assert permitted(table, rule, "That is True.") == {"</s>"}


def test_rows_of_a_batch_are_independent(parts):
    table = parts[1]
    text = table.vocabulary.lm
    rules = [Rule("mask"), Rule("box", True), Rule(choices=("yes", "no")), Rule(images=3, words=True)]
    rows = ["<m_st><bin_1>", "The <b_st>", "yes", "image 1"]
    ids = torch.stack([torch.tensor(text.encode(row, add_special_tokens=False)[:1]) for row in rows])
    together = torch.isfinite(RegionGrammar(table, rules, POINTS, 60)(ids, torch.zeros(4, len(text))))
    for row, rule in enumerate(rules):
        alone = RegionGrammar(table, [rule], POINTS, 60)(ids[row : row + 1], torch.zeros(1, len(text)))
        assert torch.equal(together[row], torch.isfinite(alone[0]))
    assert len({tuple(row.tolist()) for row in together}) == 4


def test_text_coordinates_have_no_grammar():
    config = load_config(["coords=text"])
    with pytest.raises(ValueError, match=r"decode\.grammar=false"):
        TokenTable.build(Vocabulary.build(config.model, build_codec(config)))
