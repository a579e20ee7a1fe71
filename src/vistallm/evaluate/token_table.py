"""What a token means to the region grammar: its class, and the number that a bin or a digit token stands for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vistallm.data.vocabulary import IMAGE_TOKENS, Vocabulary, token_ids

# Words come first, then what no answer holds, the end, and the region tokens: the grammar compares by this order.
Token = IntEnum(
    "Token",
    "CONTENT PUNCTUATION BLANK IMAGE DIGIT COLON ANSWER IS BANNED END BIN PART "
    "START_M START_B START_P SEPARATOR_M SEPARATOR_B SEPARATOR_P STOP_M STOP_B STOP_P",
    start=0,
)
STARTS, SEPARATORS, STOPS = ([Token[f"{name}_{letter}"] for letter in "MBP"] for name in ("START", "SEPARATOR", "STOP"))
SAYS = np.isin(np.arange(len(Token)), (Token.CONTENT, Token.DIGIT, Token.ANSWER, Token.IS))  # by class: real words


@dataclass(frozen=True)
class TokenTable:
    """What each of the V tokens of a vocabulary means to the grammar; made once for a model.

    classes: (V,) int64 `Token`; place: (V,) int64, i for `<bin_i>`, the number for a digit token, else 0; shift: (V,)
    int64, ten to the number of digits; joined: (V,) bool, continues the word before it; bin_ids: (num_bins,) int64.
    """

    classes: np.ndarray
    place: np.ndarray
    shift: np.ndarray
    joined: np.ndarray
    bin_ids: np.ndarray
    vocabulary: Vocabulary

    @classmethod
    def build(cls, vocabulary: Vocabulary) -> TokenTable:
        """Read the decoder's vocabulary; raises ValueError for one that writes coordinates as text."""
        if not vocabulary.region_tokens:
            raise ValueError("the region grammar needs coords=tokens; with coords=text use decode.grammar=false")
        text = vocabulary.lm
        names = [str(name) for name in text.convert_ids_to_tokens(list(range(len(text))))]
        pieces = any(name.startswith("##") for name in names)  # WordPiece marks what continues, others what starts
        joined = [name.startswith("##") if pieces else not name.startswith(("▁", "Ġ")) for name in names]
        said = [_surface(name) for name in names]
        classes = np.array([_spoken_class(word) for word in said], np.int64)
        digits = classes == Token.DIGIT
        place = np.array([int(word) if digit else 0 for word, digit in zip(said, digits, strict=True)], np.int64)
        shift = np.array([10 ** len(word) if digit else 1 for word, digit in zip(said, digits, strict=True)], np.int64)
        classes[[*text.all_special_ids, *token_ids(text, IMAGE_TOKENS)]] = Token.BANNED
        classes[text.eos_token_id] = Token.END
        bin_ids = np.array(vocabulary.bin_ids)
        classes[bin_ids], place[bin_ids] = Token.BIN, np.arange(len(bin_ids))
        parts = {"st": "START", "sep": "SEPARATOR", "ed": "STOP"}
        for name in vocabulary.region_tokens:
            if not name.startswith("<bin_"):
                letter, part = name.strip("<>").split("_")
                number = text.convert_tokens_to_ids(name)
                classes[number] = Token.PART if part == "part" else Token[f"{parts[part]}_{letter.upper()}"]
        return cls(classes, place, shift, np.array(joined), bin_ids, vocabulary)


def _surface(name: str) -> str:
    """Return what a token writes, without word marks, blanks and case."""
    if name.startswith("<0x") and name.endswith(">"):  # a byte of SentencePiece
        return chr(int(name[3:-1], 16)).strip().lower()
    return name.removeprefix("##").replace("▁", " ").replace("Ġ", " ").replace("Ċ", " ").strip().lower()


def _spoken_class(word: str) -> Token:
    if not word:
        return Token.BLANK
    if not any(map(str.isalnum, word)):
        return Token.COLON if word == ":" else Token.PUNCTUATION
    if word.isascii() and word.isdigit():
        return Token.DIGIT
    if word == "image" or word.endswith("answer"):
        return Token.IMAGE if word == "image" else Token.ANSWER
    return Token.IS if word.startswith("is") else Token.CONTENT
