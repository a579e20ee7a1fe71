"""Whatever the scores say, a constrained answer can be read."""

import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from vistallm.config import load_config
from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import IMAGE_TOKENS, Vocabulary
from vistallm.evaluate.generate import read_answer
from vistallm.evaluate.grammar import MAX_OBJECTS, AnswerGrammars, PooledBins, Role, Rule, rule_of
from vistallm.regions.codec import RegionParseError
from vistallm.regions.letterbox import Letterbox
from vistallm.schema import REGION_KINDS
from vistallm.tasks import TASKS

POINTS = 6
LETTERBOXES = [Letterbox(90, 60, 48)] * 3
VOCABULARIES = ["mini-tokens", "mini-text", "llama-tokens", "llama-text"]
FAVOURED = [*"123:.,[];<", "image", "answer", "is", "▁image", "▁is", "▁answer", "age", "##m", "##a", "##g", "##e"]
FAVOURED += [f"<0x{byte:02X}>" for byte in b"<[:1 i\xc4\xb1\xe2"]  # `ı` is an i to a case-blind pattern


def llama_tokenizer():
    """A tokenizer as Llama's SentencePiece: few words, letters, and a token for each byte."""
    words = ["▁image", "image", "▁answer", "answer", "▁is", "▁The", "▁mask", "age", "▁box", "▁are", "is", "▁1", "▁2"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*(chr(code) for code in range(33, 127)), "é", "中", *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@functools.cache
def parts(name, points=POINTS, num_bins=33):
    """Codec and vocabulary."""
    tokenizer, coords = name.split("-")
    words = ["model.encoder.weights=", "model.tokenizer.weights=", f"num_bins={num_bins}", f"points={points}"]
    config = load_config([*words, f"coords={coords}"])
    codec = build_codec(config)
    vocabulary = Vocabulary.build(config.model, codec)
    if tokenizer == "llama":
        lm = llama_tokenizer()
        lm.add_tokens([*IMAGE_TOKENS, *codec.tokens])
        vocabulary = dataclasses.replace(vocabulary, lm=lm)
    return codec, vocabulary


@functools.cache
def grammars(name, tokens=60):
    return AnswerGrammars(parts(name)[1], POINTS, tokens)


def write(name, rules, seed, tokens=60, constrained=True):
    """Generate answers from random scores that favour region tokens, `image k:`, "answer is" and the end."""
    generator, lm = torch.Generator().manual_seed(seed), parts(name)[1].lm
    known, own = grammars(name, tokens), lm.get_vocab()
    favour = torch.from_numpy((known.roles > Role.WORD) * 2.0).float()
    favour[lm.eos_token_id] = 2.0
    favour[[own[token] for token in FAVOURED if token in own]] = 3.0
    grammar, ids = known.constrain(rules), torch.zeros(len(rules), 0, dtype=torch.long)
    for _ in range(grammar.limit):
        scores = torch.randn(len(rules), len(lm), generator=generator) + favour
        scores = grammar(ids, scores) if constrained else scores
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        if (ids == lm.eos_token_id).any(1).all():
            break
    assert not constrained or (ids == lm.eos_token_id).any(1).all(), "an answer that is longer than the limit"
    return [lm.decode(row[: row.index(lm.eos_token_id)] if lm.eos_token_id in row else row) for row in ids.tolist()]


FORMS = {
    "mask": ("The mask is {targets}.", "The images are {images}. The masks are {targets}."),
    "box": ("The bounding box is {targets}.",),
    "point": ("The answer is {targets}.",),
}
REGION_RULES = [
    Rule(kind, single, images, forms)
    for kind in REGION_KINDS
    for single in (False, True)
    for images in (1, 3)
    for forms in ((), FORMS[kind])
]
WORD_RULES = [Rule(images=images, words=words) for images in (1, 3) for words in ("any", "some", "short")]


def check(name, rule, text):
    parsed = parts(name)[0].decode(text, LETTERBOXES[: rule.images], rule.kind)
    if rule.kind:
        assert parsed.kind == rule.kind, text
        assert len(parsed.regions) == 1 or not rule.single, text
        assert len(parsed.regions) <= MAX_OBJECTS * rule.images or not rule.forms
    if rule.forms:
        images = [region.image for region in parsed.regions]
        assert images == sorted(images), text
    for region in parsed.regions:
        assert region.kind != "mask" or sum(map(len, region.polygons)) <= POINTS, text
    assert rule.words == "any" or re.search(r"\w", parsed.answer), text
    if rule.words == "short":
        assert re.search(r"\w", parsed.answer[parsed.answer.lower().rfind("answer is") :][9:] or parsed.answer), text
    return parsed


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("tokens", [14, 60, None])
@pytest.mark.parametrize("seeds", [4, pytest.param(112, marks=pytest.mark.slow)])
def test_answers_of_random_models_are_readable(name, tokens, seeds):
    """The slow ones are 10,080 answers for each vocabulary."""
    shown, rules = set(), REGION_RULES + WORD_RULES
    for seed in range(seeds):
        for rule, text in zip(rules, write(name, rules, seed, tokens), strict=True):
            shown |= {region.image for region in check(name, rule, text).regions if rule.images == 3}
    assert shown == {0, 1, 2}


def test_the_same_scores_without_the_grammar_are_unreadable():
    broken = 0
    for text in write("mini-tokens", [Rule("mask")] * 30, 0, constrained=False):
        try:
            parts("mini-tokens")[0].decode(text, LETTERBOXES[:1])
        except RegionParseError:
            broken += 1
    assert broken > 15


WORD_TASKS = ("vqa", "caption", "vcr", "pope", "nlvr2", "pointqa")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_random_scores_give_readable_words(name, samples):
    """Random answers are read by the task's own reader; a choice is one of the options, in the task's own words."""
    chosen = [sample for sample in samples if sample.task in WORD_TASKS]
    answers = {task: set() for task in WORD_TASKS}
    for seed in range(4):
        texts = write(name, [rule_of(sample) for sample in chosen], seed, 24)
        for sample, text in zip(chosen, texts, strict=True):
            letterboxes = LETTERBOXES[: len(sample.images)]
            parsed, failure = read_answer(text, letterboxes, parts(name)[0], TASKS[sample.task])
            assert failure is None, (sample.task, text)
            answers[sample.task].add(parsed.answer)
            if sample.task == "nlvr2":
                assert re.sub(r"##| ", "", text) in ("ThatisTrue.", "ThatisFalse."), text
    assert answers["pope"] == {"yes", "no"}
    assert answers["nlvr2"] == {"True", "False"}
    assert answers["vcr"] == set("ABCD")


def permitted(name, rule, written, tokens=60):
    """The tokens that may follow a written beginning (a text, or a list of tokens), one after the other."""
    lm = parts(name)[1].lm
    ids = lm.encode(written, add_special_tokens=False) if isinstance(written, str) else None
    ids = torch.tensor([ids if ids is not None else lm.convert_tokens_to_ids(written)], dtype=torch.long)
    scores = grammars(name, tokens).constrain([rule])(ids.reshape(1, -1), torch.zeros(1, len(lm)))
    names = lm.convert_ids_to_tokens(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    return {token.replace("▁<", "<") for token in names}  # an added token may show its normal form


MASK, BOX, POINT = (Rule(kind) for kind in REGION_KINDS)
SEVERAL, SOME = Rule("mask", images=3), Rule(words="some")
FORM = Rule("mask", images=3, forms=("The masks are {targets}.",))
BIN, END = "<bin_1>", "</s>"


@pytest.mark.parametrize(
    ("rule", "written", "yes", "no"),
    [
        (MASK, "The mask is", {"<m_st>", "red"}, {"<b_st>", END, "<bin_3>", "<pad>", "<im_patch>"}),
        (MASK, "<m_st>", {"<m_ed>", "<bin_0>", "<bin_32>"}, {"red", "<m_sep>", "<m_part>", END}),
        (Rule("mask", single=True), "<m_st>", {"<bin_0>"}, {"<m_ed>"}),
        (MASK, "<m_st>" + BIN * 6, {"<m_ed>", "<m_sep>", "<m_part>", BIN}, {"red"}),
        (MASK, "<m_st>" + BIN * 7, {BIN}, {"<m_ed>", "<m_sep>", "<m_part>"}),
        (MASK, "<m_st>" + BIN * 12, {"<m_ed>", "<m_sep>"}, {BIN, "<m_part>"}),
        (Rule("mask", single=True), "<m_st>" + BIN * 6 + "<m_ed>", {END, "."}, {"<m_st>"}),
        (BOX, "<b_st>" + BIN * 3, {BIN, "<bin_0>"}, {"<b_ed>"}),
        (BOX, "<b_st>" + BIN * 4, {"<b_ed>", "<b_sep>"}, {BIN}),
        (POINT, "<p_st>" + BIN * 2, {"<p_ed>", "<p_sep>"}, {BIN, "<m_ed>"}),
        (SEVERAL, "The masks are", {"image", "<m_st>"}, {END}),
        (SEVERAL, "The masks are <m_st>", {"<m_ed>"}, {BIN}),
        (SEVERAL, "The masks are image 2:", {"<m_st>"}, {END, "<b_st>"}),
        (SEVERAL, "image 2: <m_st>", {BIN}, {"<m_ed>"}),
        (SEVERAL, "The masks are image 4:", {"and"}, {"<m_st>", END}),
        (SEVERAL, "image 1: <m_st>" + BIN * 6 + "<m_ed> image 2:", {"<m_st>"}, {BIN}),
        (SEVERAL, "image 1: <m_st>" + BIN * 6 + "<m_ed>, image 2:", {"<m_st>"}, {BIN}),
        (Rule(images=2), "image 1: <b_st>" + BIN * 4 + "<b_ed> image 2:", {"<b_st>"}, {"<m_st>"}),
        (Rule("mask", images=12), "image 12:", {"<m_st>"}, set()),
        (MASK, "image 2", {"and", "<m_st>"}, set()),
        (MASK, "image 2:", {"and"}, {"<m_st>"}),
        (SOME, "The answer is", {"red", "<m_st>", END}, set()),
        (SOME, "", {"red", "<m_st>"}, {END}),
        (SOME, "<b_st><b_ed>", {"red"}, {END, "<m_st>"}),
        (Rule(images=2, words="some"), "image 1: <b_st>" + BIN * 4 + "<b_ed>", {"red"}, {END}),
        (Rule(words="short"), "The answer is", {"red"}, {END, "<m_st>"}),
        (Rule(words="short"), "The answer is red", {END, "red"}, set()),
        (Rule(), "", {END, "<m_st>", "red"}, {BIN}),
        (FORM, "The masks are", {"image", "<m_st>"}, {"red", END}),
        (FORM, "The masks are image", {"1", "2", "3"}, {"0", "4", "red"}),
        (FORM, "The masks are image 2: <m_st>" + BIN * 6 + "<m_ed> image", {"3"}, {"1", "2"}),
        (FORM, "The masks are image 3: <m_st>" + BIN * 6 + "<m_ed>", {"."}, {"image", END}),
        (FORM, "The masks are <m_st><m_ed>.", {END}, {"image"}),
        (Rule(forms=("The answer is (A).", "That is True.")), "", {"The", "That"}, {END, "A"}),
        (Rule(forms=("The answer is (A).", "The answer is (C).")), "The answer is (", {"A", "C"}, {"B"}),
        (Rule(forms=("The answer is (A).",)), "The answer is (A).", {END}, {"."}),
    ],
)
def test_what_may_follow(rule, written, yes, no):
    allowed = permitted("mini-tokens", rule, written)
    assert yes <= allowed
    assert not no & allowed


@pytest.mark.parametrize(
    ("name", "words", "digits"),
    [
        ("mini-tokens", ["i", "##m", "##a", "##g", "##e"], ["9", "##1", ":"]),
        ("mini-tokens", ["image"], ["9", ":"]),
        ("llama-tokens", ["▁image"], ["<0x39>", "<0x3A>"]),
        ("llama-tokens", [f"<0x{byte:02X}>" for byte in b"image "], ["9", "<0x3A>", "<0x20>"]),
    ],
)
def test_an_image_is_named_however_it_is_spelled(name, words, digits):
    """A prompt of one image: `image 9:` before a region would name an image that is not there."""
    assert "<m_st>" in permitted(name, MASK, ["a", *words])
    assert "<m_st>" not in permitted(name, MASK, [*words, *digits])
    assert "<m_st>" in permitted(name, MASK, [*words, *digits, ":"][:-1] + ["red" if name[0] == "m" else "é"])


def test_bytes_between_image_and_region_part_them():
    """`image 3:` with any byte behind it is no name of an image, so a region may not follow."""
    named = ["▁image", "3", ":"]
    assert BIN in permitted("llama-tokens", SEVERAL, [*named, "<m_st>"])
    for other in ("<0xE2> <0x80> <0x82>", "<0xC4> <0xB1>"):
        assert "<m_st>" not in permitted("llama-tokens", SEVERAL, named + other.split()[:-1])
        assert BIN not in permitted("llama-tokens", SEVERAL, [*named, *other.split(), "<m_st>"])


def test_bytes_spell_no_marker():
    allowed = permitted("llama-tokens", MASK, "The mask is")
    assert {"<m_st>", "é", "<0xC4>"} <= allowed
    assert not {"<", "<0x3C>"} & allowed
    assert not {"[", "<0x5B>"} & permitted("llama-text", Rule("mask", single=True), "[1,2")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_no_answer_of_a_form_is_longer_than_its_limit(name):
    """Scores that favour whatever makes an answer longer."""
    known, lm = grammars(name, None), parts(name)[1].lm
    rules = [rule for rule in REGION_RULES if rule.forms]
    later = torch.zeros(len(lm))
    for role, score in ((Role.BIN, 3), (Role.SEPARATOR, 2), (Role.PART, -1), (Role.STOP, -2)):
        later[torch.from_numpy(known.roles == role)] = score
    later[lm.convert_tokens_to_ids([*",]. ", "</s>"])] = torch.tensor([1.0, -2, -3, 0, -9])
    lengths, limits = [], []
    for rule in rules:
        grammar, ids = known.constrain([rule]), torch.zeros(1, 0, dtype=torch.long)
        while ids.shape[1] == 0 or ids[0, -1] != lm.eos_token_id:
            ids = torch.cat([ids, grammar(ids, later[None]).argmax(-1, keepdim=True)], 1)
        lengths.append(ids.shape[1])
        limits.append(grammar.limit)
        check(name, rule, lm.decode(ids[0, :-1].tolist()))
    assert all(length <= limit for length, limit in zip(lengths, limits, strict=True))
    assert max(lengths) > max(limits) / 2 or name != "mini-tokens", "the bound must be of use"


def test_few_tokens_leave_room_for_few_objects():
    rule = Rule("mask", forms=("The masks are {targets}.",))
    limits = [grammars("mini-tokens", tokens).constrain([rule]).limit for tokens in (1, 120, 150, None)]
    assert limits == sorted(set(limits))
    assert limits[1] <= 121
    assert limits[-1] > MAX_OBJECTS * 2 * POINTS
    one = "The masks are <m_st>" + BIN * 12
    assert "<m_sep>" not in permitted("mini-tokens", rule, one, tokens=1)
    assert "<m_sep>" in permitted("mini-tokens", rule, one, tokens=None)


def test_words_end_where_the_tokens_run_out():
    words = " red" * 60
    assert END in permitted("mini-tokens", Rule(), words[:-4])
    assert permitted("mini-tokens", Rule(), words) == {END}
    assert permitted("mini-tokens", Rule(), words + "<m_st>" + BIN * 6) == {"<m_ed>"}
    assert END not in permitted("mini-tokens", BOX, " red" * 30, tokens=20), "a region must come"
    assert permitted("mini-tokens", BOX, " red" * 30 + "<b_st>" + BIN * 4, tokens=20) == {"<b_ed>"}


def test_true_answers_are_of_the_grammar(samples, predictions):
    """Of all tasks of the mini world; so none is cut, and a trained model may write what it was taught."""
    vocabulary = parts("mini-tokens", 32, 1001)[1]
    known, end = AnswerGrammars(vocabulary, 32), vocabulary.lm.eos_token_id
    for sample, prediction in zip(samples, predictions, strict=True):
        grammar = known.constrain([rule_of(sample)])
        ids = [*vocabulary.lm.encode(prediction.text, add_special_tokens=False), end]
        assert len(ids) <= grammar.limit
        for step, token in enumerate(ids):
            scores = grammar(torch.tensor([ids[:step]], dtype=torch.long), torch.zeros(1, len(vocabulary.lm)))
            assert scores[0, token] == 0, (sample.task, prediction.text, vocabulary.lm.decode(ids[:step]))


def test_rows_of_a_batch_are_independent():
    known, lm = grammars("mini-tokens"), parts("mini-tokens")[1].lm
    rules = [MASK, Rule("box", True), Rule(forms=("yes", "no")), Rule(images=3, words="some")]
    rows = ["<m_st><bin_1>", "The <b_st>", "yes", "image 1"]
    ids = torch.stack([torch.tensor(lm.encode(row, add_special_tokens=False)[:1]) for row in rows])
    together = torch.isfinite(known.constrain(rules)(ids, torch.zeros(4, len(lm))))
    for row, rule in enumerate(rules):
        alone = known.constrain([rule])(ids[row : row + 1], torch.zeros(1, len(lm)))
        assert torch.equal(together[row], torch.isfinite(alone[0]))
    assert len({tuple(row.tolist()) for row in together}) == 4


def test_greedy_decoding_weighs_a_marker_against_all_coordinates():
    roles = np.array([Role.WORD, Role.BIN, Role.BIN, Role.BIN, Role.STOP])
    scores = torch.tensor([[0.0, 0.2, 0.25, 0.2, 0.35], [0.0, 0.15, 0.2, 0.1, 0.55], [0.7, 0.0, 0.0, 0.0, 0.3]]).log()
    chosen = PooledBins(roles)(torch.zeros(3, 0, dtype=torch.long), scores)
    assert scores.argmax(1).tolist() == [4, 4, 0]
    assert chosen.argmax(1).tolist() == [2, 4, 0]
    assert torch.equal(chosen[0, 1:4], scores[0, 1:4]), "coordinates keep their scores"
    assert torch.equal(chosen[1:], scores[1:])


def test_a_token_outside_of_the_grammar_is_refused():
    grammar, lm = grammars("mini-tokens").constrain([MASK]), parts("mini-tokens")[1].lm
    with pytest.raises(ValueError, match="row 0: expected a token that its grammar permits"):
        grammar(torch.tensor([lm.encode(BIN, add_special_tokens=False)]), torch.zeros(1, len(lm)))
