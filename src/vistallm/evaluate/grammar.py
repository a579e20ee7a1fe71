"""Grammar-constrained decoding: at each step, which tokens keep the answer readable (a transformers logits processor).

In: what has been generated so far, row by row. Out: scores, -inf for every token that would break the region grammar.
Regions hold legal bins, an even number of them: 4 for a box (ordered), 2 for a point, 3 to `points` vertices for a mask
object over all its parts; every opened region closes before the tokens run out. Text around the regions is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vistallm.data.vocabulary import Vocabulary

LETTERS = {"mask": "m", "box": "b", "point": "p"}
NUMBERS = {"b": 4, "p": 2}
MIN_MASK_NUMBERS = 6  # three vertices
MAX_OBJECTS = 16  # in one region group


@dataclass(frozen=True)
class Rule:
    """What one answer may hold: regions of `kind` only (None = of any kind, or none), `single` = exactly one object."""

    kind: str | None = None
    single: bool = False


@dataclass
class State:
    """Where one row stands.

    letter: of the open group, "" outside; kind: letter of all groups so far; part: bins of the current part; numbers:
    bins of the current object; objects: closed ones of the group; closed: whether a group was; seen: tokens read.
    """

    letter: str = ""
    kind: str = ""
    part: tuple[int, ...] = ()
    numbers: int = 0
    objects: int = 0
    closed: bool = False
    seen: int = 0


class RegionGrammar(LogitsProcessor):
    """Masks the scores of a batch of answers.

    Args:
        vocabulary: of the model; must write coordinates as tokens.
        rules: one per row.
        points: vertices of one mask object at most.
        max_new_tokens: after which generation stops; regions close before.
    """

    def __init__(self, vocabulary: Vocabulary, rules: list[Rule], points: int, max_new_tokens: int) -> None:
        ids = vocabulary.text.get_vocab()
        self.marker = {token: ids[token] for token in vocabulary.region_tokens if not token.startswith("<bin_")}
        self.name = {number: token for token, number in self.marker.items()}
        self.bins = torch.tensor(vocabulary.bin_ids)
        self.value = {number: place for place, number in enumerate(vocabulary.bin_ids)}
        self.end = vocabulary.text.eos_token_id
        self.rules, self.states = rules, [State() for _ in rules]
        self.points, self.limit = points, max_new_tokens
        self.region_ids = torch.cat([self.bins, torch.tensor(list(self.marker.values()))])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask `scores` (B, V) given the generated ids (B, T); the prompt must not be among them."""
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        left = self.limit - input_ids.shape[1]
        rows = input_ids.tolist()
        for row, (state, rule) in enumerate(zip(self.states, self.rules, strict=True)):
            for token in rows[row][state.seen :]:
                self._read(state, token)
            state.seen = len(rows[row])
            self._allow(allowed[row], state, rule, left)
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _read(self, state: State, token: int) -> None:
        """Move a state on by one token."""
        if token in self.value:
            state.part += (self.value[token],)
            state.numbers += 1
            return
        name = self.name.get(token, "")
        if name.endswith("_st>"):
            state.letter = state.kind = name[1]
            state.part, state.numbers, state.objects = (), 0, 0
        elif name.endswith("_sep>"):
            state.part, state.numbers, state.objects = (), 0, state.objects + 1
        elif name == "<m_part>":
            state.part = ()
        elif name.endswith("_ed>"):
            state.letter, state.closed = "", True

    def _allow(self, row: Tensor, state: State, rule: Rule, left: int) -> None:
        """Set the allowed tokens of one row (V,) bool."""
        if not state.letter:
            row[:] = True
            row[self.region_ids] = False
            row[self.end] = state.closed or rule.kind is None
            if left > 2 * self.points + 4 and not (rule.single and state.closed):
                letters = state.kind or ("mbp" if rule.kind is None else LETTERS[rule.kind])
                for letter in letters:
                    row[self.marker[f"<{letter}_st>"]] = True
            return
        if state.letter == "m":
            self._allow_mask(row, state, rule, left)
        else:
            self._allow_fixed(row, state, rule, left)

    def _allow_fixed(self, row: Tensor, state: State, rule: Rule, left: int) -> None:
        """Bins of a box or point, then a separator or the end."""
        place, letter = len(state.part), state.letter
        if place < NUMBERS[letter]:
            lowest = state.part[place - 2] if place >= 2 else 0
            row[self.bins[lowest:]] = True
        else:
            self._allow_close(row, state, rule, left)
        if place == 0 and state.objects == 0 and not rule.single:
            row[self.marker[f"<{letter}_ed>"]] = True

    def _allow_mask(self, row: Tensor, state: State, rule: Rule, left: int) -> None:
        """Bins in pairs, at least three vertices a part, `points` an object; then a part, a separator or the end."""
        place, room = len(state.part), 2 * self.points - state.numbers
        whole = place >= MIN_MASK_NUMBERS and place % 2 == 0
        if not whole or (room > 0 and left > 4):
            row[self.bins] = True
        if whole:
            self._allow_close(row, state, rule, left)
            row[self.marker["<m_part>"]] = room >= MIN_MASK_NUMBERS and left > MIN_MASK_NUMBERS + 4
        if place == 0 and state.numbers == 0 and state.objects == 0 and not rule.single:
            row[self.marker["<m_ed>"]] = True

    def _allow_close(self, row: Tensor, state: State, rule: Rule, left: int) -> None:
        row[self.marker[f"<{state.letter}_ed>"]] = True
        more = not rule.single and state.objects + 1 < MAX_OBJECTS and left > MIN_MASK_NUMBERS + 4
        row[self.marker[f"<{state.letter}_sep>"]] = more
