from __future__ import annotations

import random
import string

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vistallm.data.sequence import build_codec
from vistallm.data.vocabulary import IMAGE_TOKENS, Piece, Vocabulary, encode, encode_pieces
from vistallm.schema import SampleReject


@pytest.mark.parametrize("tokenizer", ["lm", "qformer"])
def test_region_tokens_are_single_ids(vocabulary, tokenizer):
    made = getattr(vocabulary, tokenizer)
    first = {"lm": vocabulary.first_new, "qformer": vocabulary.qformer_first_new}[tokenizer]
    ids = [made.encode(token, add_special_tokens=False) for token in vocabulary.region_tokens]
    assert all(len(i) == 1 and i[0] >= first for i in ids)
    assert len({i[0] for i in ids}) == len(ids)
    glued = "box<b_st><bin_0><bin_32><b_sep><bin_5><b_ed>."
    pieces = made.tokenize(glued)
    assert [p for p in pieces if p.startswith("<")] == ["<b_st>", "<bin_0>", "<bin_32>", "<b_sep>", "<bin_5>", "<b_ed>"]


def test_image_tokens_are_not_in_the_instruction_tokenizer(vocabulary):
    assert all(len(vocabulary.lm.encode(t, add_special_tokens=False)) == 1 for t in IMAGE_TOKENS)
    assert vocabulary.lm.decode([vocabulary.image_id]) == "<im_patch>"
    assert not set(IMAGE_TOKENS) & set(vocabulary.qformer.get_vocab())


def test_bin_ids_follow_their_coordinates(vocabulary):
    for made, ids in (
        (vocabulary.lm, vocabulary.bin_ids),
        (vocabulary.qformer, vocabulary.qformer_bin_ids),
    ):
        assert ids == sorted(ids)
        assert made.convert_ids_to_tokens(ids) == [f"<bin_{i}>" for i in range(33)]
    assert len(vocabulary.bin_values) == 33
    assert (vocabulary.bin_values[0], vocabulary.bin_values[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("tokenizer", ["lm", "qformer"])
def test_any_printable_text_is_encodable(vocabulary, tokenizer):
    made, rng = getattr(vocabulary, tokenizer), random.Random(0)
    letters = string.digits + string.ascii_letters + string.punctuation
    for _ in range(50):
        text = "".join(rng.choices(letters + " ", k=30))
        ids = made.encode(text, add_special_tokens=False)
        assert made.unk_token_id not in ids, text
        assert made.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_words_of_the_task_table_are_one_token_each(vocabulary, builder, samples):
    lengths = [len(builder.build(s).labels[builder.build(s).labels >= 0]) for s in samples["pope"]]
    assert max(lengths) <= 7, "`The answer is yes .` and the end token"


def test_save_and_load_give_the_same_ids(vocabulary, tmp_path):
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    text = 'Is there a <p_st><bin_3><bin_4><p_ed> "zig-zag" thing? USER: <im_start><im_patch><im_end>'
    for name in ("lm", "qformer"):
        old, new = getattr(vocabulary, name), getattr(loaded, name)
        assert old.get_vocab() == new.get_vocab()
        assert old.encode(text) == new.encode(text)
        assert old.special_tokens_map == new.special_tokens_map
    for name in ("first_new", "qformer_first_new", "region_tokens", "bin_ids", "qformer_bin_ids", "image_id"):
        assert getattr(loaded, name) == getattr(vocabulary, name)
    assert (loaded.bin_values == vocabulary.bin_values).all()


def test_text_coordinates_add_no_region_token(tiny_config):
    config = tiny_config("coords=text")
    made = Vocabulary.build(config.model, build_codec(config))
    assert made.bin_ids == made.qformer_bin_ids == made.region_tokens == []
    assert len(made.qformer) == made.qformer_first_new


def test_a_folder_that_is_no_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary\.json"):
        Vocabulary.load(tmp_path)


def test_encode_is_the_wrappers_without_its_overhead(vocabulary):
    texts = [
        "Segment the red circle.",
        "The mask is <m_st><bin_1><bin_2><m_ed>.",
        "",
        "(A) Yes, 3 of 4!  zyx",
        "Image 2:",
    ]
    for tokenizer in (vocabulary.lm, vocabulary.qformer):
        for text in texts:
            assert encode(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)
    vocabulary.qformer.backend_tokenizer.enable_truncation(2)
    again = Vocabulary(**vars(vocabulary))
    assert len(encode(again.qformer, texts[0])) > 2, "a file may ask for truncation"


def llama_like():
    """A byte-fallback BPE with Llama's word mark, made here: its vocabulary holds </s>, its merges do not make it."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz<>/_?", *(f"<0x{b:02X}>" for b in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *letters, "▁a", "▁t", "he", "▁the"])}
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def test_special_tokens_in_words_are_text_for_a_llama_tokenizer_and_refused_by_a_slow_one():
    tokenizer = llama_like()
    tokenizer.add_tokens(["<im_patch>", "<b_st>", "<bin_7>", "<b_ed>"])
    pieces = [Piece("the </s> a <im_patch> "), Piece("<b_st><bin_7><b_ed>", 3), Piece(" a?")]
    ids = encode_pieces(tokenizer, pieces)
    names = tokenizer.convert_ids_to_tokens(ids)
    assert [name for name in names if name.endswith(">") and len(name) > 1] == ["<b_st>", "<bin_7>", "<b_ed>"]
    assert "".join(names).replace("▁", "") == "the</s>a<im_patch><b_st><bin_7><b_ed>a?"
    clean = [Piece("the a "), *pieces[1:]]
    assert encode_pieces(tokenizer, clean) == encode(tokenizer, "the a <b_st><bin_7><b_ed> a?")

    class Slow:
        unk_token_id = 0
        get_added_vocab = staticmethod(lambda: {"</s>": 2})
        encode = staticmethod(lambda text, add_special_tokens: [5, 2] if "</s>" in text else [5])

    slow = Slow()
    assert encode_pieces(slow, [Piece("a")]) == [5]
    with pytest.raises(SampleReject, match="fast tokenizer"):
        encode_pieces(slow, [Piece("a </s>")])
