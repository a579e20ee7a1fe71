"""The two text tokenizers of a run, the language model's and the QFormer's, with the region tokens added.

In: config and codec. Out: a `Vocabulary`, saved beside the weights so that a checkpoint keeps its token ids.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vistallm.config import LinkConfig, ModelConfig
from vistallm.links import LINKS, REGION_TOKEN, link_tokens, routing_token, slot_tokens
from vistallm.regions.codec import RegionCodec
from vistallm.schema import SampleReject
from vistallm.tasks import TASKS, load_templates

IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
PRINTABLE = [chr(code) for code in range(33, 127)]
_STORED = ("first_new", "instruction_first_new", "region_tokens", "bin_values")  # keys of vocabulary.json


@dataclass
class Vocabulary:
    """Both tokenizers and the ids that the model needs."""

    lm: PreTrainedTokenizerBase  # the language model's
    qformer: PreTrainedTokenizerBase  # the QFormer's, with the same region tokens
    first_new: int  # ids of `lm` from here on were added
    qformer_first_new: int
    region_tokens: list[str]
    bin_values: np.ndarray  # (num_bins,) float64, the coordinates of the `<bin_i>`, in [0, 1]
    link_tokens: list[list[str]] = field(default_factory=list)  # of each of LINKS: routing token, slots; empty: none

    def __post_init__(self) -> None:
        """A tokenizer.json may ask for truncation and padding, which `encode` must not do."""
        for tokenizer in (self.lm, self.qformer):
            fast = getattr(tokenizer, "backend_tokenizer", None)
            if fast is not None:
                fast.no_truncation()
                fast.no_padding()

    @classmethod
    def build(cls, model: ModelConfig, codec: RegionCodec, links: LinkConfig | None = None) -> Vocabulary:
        """Load (or, for a model from scratch, make) both tokenizers and add image, region and `links` tokens."""
        lm, qformer = _lm_tokenizer(model), _qformer_tokenizer(model)
        first_new, qformer_first_new = len(lm), len(qformer)
        lm.add_tokens([*IMAGE_TOKENS, *codec.tokens])
        qformer.add_tokens(codec.tokens)
        tokens: list[list[str]] = []
        if links is not None and model.links != "none":
            lm.add_tokens(link_tokens(links))
            qformer.add_tokens([REGION_TOKEN])
            tokens = [[routing_token(kind), *slot_tokens(kind, links)] for kind in LINKS]
        return cls(lm, qformer, first_new, qformer_first_new, codec.tokens, np.asarray(codec.bin_values), tokens)

    @property
    def image_id(self) -> int:
        """Id of `<im_patch>`."""
        return token_ids(self.lm, IMAGE_TOKENS[:1])[0]

    @property
    def region_id(self) -> int:
        """Id of `<region>`."""
        return token_ids(self.lm, [REGION_TOKEN])[0]

    @property
    def link_ids(self) -> list[list[int]]:
        """Ids of each kind of link: its routing token, then its slots."""
        return [token_ids(self.lm, tokens) for tokens in self.link_tokens]

    @property
    def phrase_ends(self) -> list[int]:
        """Ids that no phrase of a link holds: marks between phrases, and tokens of links and of images."""
        marks = [number for token, number in self.lm.get_vocab().items() if token.strip("\u2581\u0120") in (*",.:",)]
        return sorted({*marks, self.image_id, *(number for ids in self.link_ids for number in ids)})

    @property
    def bin_ids(self) -> list[int]:
        """Ids of `<bin_i>` in the language model's vocabulary, ascending; empty for text coordinates."""
        return token_ids(self.lm, (t for t in self.region_tokens if t.startswith("<bin_")))

    @property
    def qformer_bin_ids(self) -> list[int]:
        """Ids of `<bin_i>` in the QFormer's vocabulary."""
        return token_ids(self.qformer, (t for t in self.region_tokens if t.startswith("<bin_")))

    def save(self, folder: Path) -> None:
        """Write both tokenizers and the ids to `folder`."""
        self.lm.save_pretrained(folder / "text")
        self.qformer.save_pretrained(folder / "instruction")
        values = (self.first_new, self.qformer_first_new, self.region_tokens, self.bin_values.tolist())
        stored = dict(zip(_STORED, values, strict=True)) | {"link_tokens": self.link_tokens}
        (folder / "vocabulary.json").write_text(json.dumps(stored))

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Inverse of `save`; raises ValueError when the folder is not one."""
        path = folder / "vocabulary.json"
        if not path.is_file():
            raise ValueError(f"{folder}: expected the vocabulary of a run (vocabulary.json), got no such file")
        try:
            stored = json.loads(path.read_text())
            lm, qformer = (AutoTokenizer.from_pretrained(folder / name) for name in ("text", "instruction"))
            first_new, qformer_first_new, region_tokens, values = (stored[name] for name in _STORED)
            links = stored.get("link_tokens", [])
            return cls(lm, qformer, first_new, qformer_first_new, region_tokens, np.asarray(values), links)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{folder}: cut short, or of another version ({reason}); copy the run again") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    """The id of each token."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text, nothing added before or after."""
    fast = getattr(tokenizer, "backend_tokenizer", None)  # the wrapper's own work is most of the time of a short text
    ids = (fast or tokenizer).encode(text, add_special_tokens=False)
    return ids.ids if fast else ids


class Piece(NamedTuple):
    """A piece of a sample's text: words, or regions, with so many region or link tokens."""

    text: str
    tokens: int = 0


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> list[int]:
    """Token ids of pieces of text, one after another; a special token that words spell out (`</s>`) is read as text.

    Raises SampleReject (special-token) where it can't be: the tokenizer is none of the `tokenizers` library.
    """
    ids = encode(tokenizer, "".join(piece.text for piece in pieces))
    special, plain = _without_special(tokenizer)
    if sum(map(special.__contains__, ids)) == sum(piece.tokens for piece in pieces):
        return ids
    if plain is None:
        text = "the text holds a special token; write it another way, or use a fast tokenizer"
        raise SampleReject("special-token", text)
    ids = []
    for coded, run in groupby(pieces, key=lambda piece: piece.tokens > 0):
        text = "".join(piece.text for piece in run)
        ids += encode(tokenizer, text) if coded else plain.encode(text, add_special_tokens=False).ids
    return ids


@functools.lru_cache(maxsize=8)
def _without_special(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], Tokenizer | None]:
    """Ids of all added tokens but the unknown one, and the tokenizer without them (None for a slow one)."""
    special = frozenset(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return special, None
    bare = json.loads(fast.to_str()) | {"added_tokens": [], "post_processor": None}
    return special, Tokenizer.from_str(json.dumps(bare))


@contextlib.contextmanager
def loading(key: str, value: str) -> Iterator[None]:
    """Turn what transformers or open_clip raises for missing and broken files into a ValueError that names the key."""
    try:
        yield
    except Exception as error:
        text = str(error).strip()
        reason = " ".join(text.split()) if isinstance(error, RuntimeError) else text.partition("\n")[0]
        text = f"{key}={value}: can't be loaded; give a whole local folder or a reachable hub name ({reason})"
        raise ValueError(text) from error


def _lm_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    if model.decoder.weights is None:
        return _from_words(model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    with loading("model.decoder.weights", model.decoder.weights):
        tokenizer = AutoTokenizer.from_pretrained(model.decoder.weights)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token  # as Vicuna's training code does: no row is added for padding
    return tokenizer


def _qformer_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    if model.tokenizer.text_tokenizer is None:
        return _from_words(model, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    name = model.tokenizer.text_tokenizer
    itself = Path(name).is_dir() and not (Path(name) / "qformer_tokenizer").is_dir()
    with loading("model.tokenizer.text_tokenizer", name):
        return AutoTokenizer.from_pretrained(name, subfolder="" if itself else "qformer_tokenizer")


def _from_words(model: ModelConfig, **special: str) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer over the words and marks of the mini world; other printable text is spelled in letters.

    With links the words of their tasks come last, then with videos those of videos: the other words keep their ids.
    """
    from vistallm.mini.link_tasks import link_words  # here: a pretrained vocabulary does not import the mini world
    from vistallm.mini.tasks import mini_words
    from vistallm.mini.videos import video_words

    splitter, words = pre_tokenizers.BertPreTokenizer(), list[str]()
    known = [task for task in TASKS.values() if task.mini]
    groups = [(["USER: ASSISTANT: Image image", *mini_words()], [t for t in known if not (t.mini_links or t.video)])]
    groups += [(link_words(), [t for t in known if t.mini_links])] if model.links != "none" else []
    groups += [(video_words(), [t for t in known if t.video])] if model.video != "none" else []
    for texts, tasks in groups:
        texts = texts + [text or "" for task in tasks for text in (task.answer, task.plural)]
        texts += [line for task in tasks for line in load_templates(task.name, "mini")]
        words += sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    pieces = [*special.values(), *PRINTABLE, *("##" + c for c in PRINTABLE), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    unknown = special["unk_token"]
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
