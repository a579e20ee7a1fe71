"""Grammar-constrained decoding: at each step, which tokens keep the answer readable (a transformers logits processor).

In: what has been generated so far. Out: scores, -inf for every token that would make the answer unreadable.
Regions hold legal bins: 4 for a box (ordered), 2 for a point, 3 to `points` vertices for a mask object over all its
parts; every opened region closes before the tokens run out. Where the prompt shows several images, `image k:` stands
before each group (ascending in a region task), and only an empty pair may do without. An answer that is one of a few
(a letter, yes or no, True or False) is one of exactly these. Words are free otherwise, but must be there.

All rows of a batch move together as NumPy columns; tokens are told apart by a class each (`token_table.py`), so a step
costs some fifty operations on (B,) arrays and one (B, V) look-up, whatever the batch.
"""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from vistallm.data.vocabulary import Vocabulary
from vistallm.evaluate.token_table import SAYS, SEPARATORS, STARTS, STOPS, Token, TokenTable
from vistallm.schema import Sample
from vistallm.tasks import find_task, write_answer

KINDS = {None: 0, "mask": 1, "box": 2, "point": 3}
NUMBERS = np.array([0, 0, 4, 2])  # of one object, by kind; a mask has no fixed number
MIN_MASK_NUMBERS = 6  # three vertices
MAX_OBJECTS = 16  # in one region group
CLOSING = 4  # tokens kept free for what follows an object: a last number, a closing marker, the full stop, the end
PREFIX = 3  # tokens of `image k:`
EACH_KIND = np.arange(1, 4)[:, None]
NO_ROW = np.zeros(0, bool)


@dataclass(frozen=True)
class Rule:
    """What one answer may hold."""

    kind: str | None = None  # "mask", "box", "point": at least one group of this kind; None = of any one kind, or none
    single: bool = False  # exactly one object
    images: int = 1  # of the prompt
    choices: tuple[str, ...] = ()  # the whole answers to choose from; empty = any
    words: bool = False  # the answer must say something beside its regions


def rule_of(sample: Sample) -> Rule:
    """Return the rule of an evaluation sample, from its task and, for a multiple choice, from its options."""
    task, images = find_task(sample.task), len(sample.images)
    if task.kind != "text":
        # REC, RES and candidate questions have one target by definition; GREC, GRES and the rest none, one or several.
        return Rule(task.kind, task.metric in ("box", "mask", "candidates"), images)
    said: list[str] = {"yesno": ["yes", "no"], "truth": ["True", "False"]}.get(task.metric, [])
    if task.metric == "choice":
        options, form = str(sample.fields.get("options", "")), str(sample.fields.get("answer", "A"))
        letters = [letter for letter in string.ascii_uppercase if f"({letter})" in options]
        said = [f"({letter})" if "(" in form else letter for letter in letters]
    forms = (dataclasses.replace(sample, answer=None, fields={**sample.fields, "answer": word}) for word in said)
    return Rule(None, False, images, tuple(map(write_answer, forms)), words=True)


class Choices:
    """What is left to write of every row's choices, as token ids; rows without choices have none."""

    def __init__(self, rules: list[Rule], vocabulary: Vocabulary) -> None:
        text = vocabulary.lm
        said = {choice for rule in rules for choice in rule.choices}
        written = {choice: [*text.encode(choice, add_special_tokens=False), text.eos_token_id] for choice in said}
        self.left = [[written[choice] for choice in rule.choices] for rule in rules]
        self.tokens = len(text)

    def read(self, tokens: np.ndarray) -> None:
        """Move every row on by its token: what began otherwise is no longer to choose."""
        rows = zip(self.left, tokens.tolist(), strict=True)
        self.left = [[choice[1:] for choice in choices if choice[:1] == [token]] for choices, token in rows]

    def allowed(self) -> Tensor:
        """Return the tokens that may come next, (B, V) bool."""
        allowed = np.zeros((len(self.left), self.tokens), bool)
        for row, choices in enumerate(self.left):
            allowed[row, [choice[0] for choice in choices if choice]] = True
        return torch.from_numpy(allowed)


class RegionGrammar(LogitsProcessor):
    """Masks the scores of a batch of answers: one rule per row, at most `points` vertices in a mask object.

    From 12 `max_new_tokens` on, every answer can be read whatever the scores are.
    """

    def __init__(self, table: TokenTable, rules: list[Rule], points: int, max_new_tokens: int) -> None:
        self.table, self.points, self.limit, self.seen = table, points, max_new_tokens, 0
        self.classes = torch.from_numpy(table.classes)
        self.asked = np.array([KINDS[rule.kind] for rule in rules])
        self.images = np.array([rule.images for rule in rules])
        self.single, self.words = (np.array([getattr(r, name) for r in rules], bool) for name in ("single", "words"))
        self.chosen = np.array([bool(rule.choices) for rule in rules])
        self.choices = Choices(rules, table.vocabulary) if self.chosen.any() else None
        self.asks, self.several = self.asked > 0, self.images > 1
        # group: kind of the open group, 0 outside; kind: of all groups so far; part, numbers: bins of the current part
        # and object; objects: closed ones of the group; last: the two bins before; image: of the last group.
        self.group, self.kind, self.part, self.numbers, self.objects, self.image, self.number = (
            np.zeros(len(rules), np.int64) for _ in range(7)
        )
        self.last = np.zeros((2, len(rules)), np.int64)
        # prefix: how much of `image k:` has just been written (0 to 3), number: its k; bare: an empty pair without it;
        # numbered: k has to come, now.
        self.prefix = np.zeros(len(rules), np.int64)
        self.closed, self.bare, self.said, self.answer = (np.zeros(len(rules), bool) for _ in range(4))
        self.numbered = NO_ROW

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask `scores` (B, V) given the generated ids (B, T); the prompt must not be among them."""
        written = input_ids.cpu().numpy()
        choosing = self.chosen.all()
        for step in range(self.seen, written.shape[1]):
            if not choosing:
                self._read(written[:, step])
            if self.choices is not None:
                self.choices.read(written[:, step])
        self.seen = written.shape[1]
        if self.choices is None:
            allowed = self._allowed()
        elif choosing:
            allowed = self.choices.allowed()
        else:
            allowed = torch.where(torch.from_numpy(self.chosen)[:, None], self.choices.allowed(), self._allowed())
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _allowed(self) -> Tensor:
        """Return the tokens that may come next, (B, V) bool; rows that choose among answers are not looked at."""
        permitted, lowest = self._permitted(self.limit - self.seen)
        allowed = torch.from_numpy(permitted).T.index_select(1, self.classes)
        if lowest is not None:
            ordered = np.arange(len(self.table.bin_ids)) >= lowest[:, None]
            allowed[:, self.table.bin_ids] &= torch.from_numpy(ordered)
        for row in np.flatnonzero(self.numbered):
            known = (self.table.place > 0) & (self.table.place <= self.images[row])
            allowed[row] &= torch.from_numpy(known & (self.table.classes == Token.DIGIT))
        return allowed

    def _read(self, tokens: np.ndarray) -> None:
        """Move every row's state on by one token (B,) int64."""
        token, place = self.table.classes[tokens], self.table.place[tokens]
        if token.max() >= Token.BIN:
            self._read_regions(token, place)
        if token.min() < Token.BIN or self.prefix.any():
            self._read_words(tokens, token, place)

    def _read_regions(self, token: np.ndarray, place: np.ndarray) -> None:
        is_bin, marks = token == Token.BIN, token >= STARTS[0]
        self.last[0], self.last[1] = np.where(is_bin, self.last[1], self.last[0]), np.where(is_bin, place, self.last[1])
        self.part += is_bin
        self.numbers += is_bin
        self.part[(token == Token.PART) | marks] = 0
        if not marks.any():
            return
        starts, stops = marks & (token <= STARTS[-1]), token >= STOPS[0]
        self.numbers[marks] = 0
        self.objects[starts] = 0
        self.objects += marks & ~starts & ~stops
        ready = self.prefix == PREFIX
        self.bare = np.where(starts, ~ready & (self.images > 1), self.bare)
        self.image = np.where(starts & ready, self.number, self.image)
        self.group = np.where(starts, token - STARTS[0] + 1, np.where(stops, 0, self.group))
        self.kind = np.where(starts, self.group, self.kind)
        self.closed |= stops

    def _read_words(self, tokens: np.ndarray, token: np.ndarray, place: np.ndarray) -> None:
        """How much of `image k:` stands at the end, and whether there are words beside it and after "answer is"."""
        before = self.prefix
        self.prefix = (token == Token.IMAGE).astype(np.int64)
        if before.any():
            digit = token == Token.DIGIT
            more = digit & (before == 2) & self.table.joined[tokens]
            first = digit & (before == 1)
            self.prefix += 2 * (first | more) + 3 * ((token == Token.COLON) & (before == 2))
            self.prefix = np.where((token == Token.BLANK) & (before != 2), before, self.prefix)
            value = np.where(more, self.number * self.table.shift[tokens] + place, place)
            self.number = np.where(first | more, value, self.number)
        if self.words.any():
            # A broken-off `image k` is words like any other; the codec takes a whole one as part of the group behind.
            starts = (token >= STARTS[0]) & (token <= STARTS[-1])
            self.said |= (SAYS[token] | (before > 0)) & (self.prefix == 0) & ~starts
            self.said &= ~((token == Token.IS) & self.answer)  # what is read is what follows "answer is"
            self.answer = token == Token.ANSWER

    def _permitted(self, left: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the classes that may come next, (classes, B) bool, and the lowest bins, (B,) int64, None for all 0."""
        may = np.zeros((len(Token), len(self.group)), bool)
        outside = self.group == 0
        self.numbered = NO_ROW
        if outside.any():
            self._permit_words(may, outside, left)
            if outside.all():
                return may, None
        mask, needed = self.group == 1, NUMBERS[self.group]
        room = 2 * self.points - self.numbers
        whole = mask & (self.part >= MIN_MASK_NUMBERS) & (self.part % 2 == 0)
        more = ~whole | ((room > 0) & (left > CLOSING))
        may[Token.BIN] = np.where(mask, more, self.part < needed) & ~self.bare & ~outside
        untouched = (self.numbers == 0) & (self.objects == 0) & ~self.single & (~self.several | self.bare)
        ends = whole | (~mask & (self.part == needed))
        here = self.group == EACH_KIND
        may[STOPS[0] : STOPS[-1] + 1] = here & (ends | untouched)
        if left > MIN_MASK_NUMBERS + CLOSING:
            may[Token.PART] = whole & (room >= MIN_MASK_NUMBERS)
            may[SEPARATORS[0] : SEPARATORS[-1] + 1] = here & ends & ~self.single & (self.objects + 1 < MAX_OBJECTS)
        lowest = np.where((self.group == 2) & (self.part >= 2), self.last[0], 0)
        return may, lowest if lowest.any() else None

    def _permit_words(self, may: np.ndarray, outside: np.ndarray, left: int) -> None:
        """Set what may come outside of groups: words, `image k:`, an opening marker, the end."""
        reserve = 2 * self.points + CLOSING
        forced = self.asks & ~self.closed if left <= reserve + PREFIX + 1 else NO_ROW
        fits = outside & ~(self.single & self.closed)
        if left <= reserve:
            fits &= forced
        opens, may[: Token.BANNED] = fits & ~(self.several & (self.single | self.closed)), outside
        ready = ahead = due = np.zeros_like(outside)
        if self.prefix.any():
            ahead = (self.number > np.where(self.asks, self.image, 0)) & (self.number <= self.images)
            ready = (self.prefix == PREFIX) & ahead
            opens = fits & ready | opens & np.where(self.several, self.prefix == 0, self.prefix < PREFIX)
            # Region tasks: a group follows `image k:` at once, and no such words name an image that can't be.
            due = self.asks & ready & fits
            may[: Token.BANNED] &= ~due
            may[Token.BLANK] |= due
            may[Token.COLON] &= ~self.asks | (self.prefix != 2) | (ahead & fits & (left != reserve + 1))
        kinds = np.where(self.asks, self.asked, self.kind)
        may[STARTS[0] : STARTS[-1] + 1] = opens & ((kinds == 0) | (kinds == EACH_KIND))
        if forced.any():
            may[: Token.BANNED] &= ~forced
            lost = outside & forced & self.several & ~ready
            self.numbered = lost & (self.prefix == 1)
            colon = lost & (self.prefix == 2) & ahead
            may[Token.IMAGE] |= lost & ~self.numbered & ~colon
            may[Token.DIGIT] |= self.numbered
            may[Token.COLON] |= colon
        silent = self.words & ~self.said & (self.prefix == 0)
        if left <= CLOSING:  # the last chance to say something
            may[1 : Token.BANNED] &= ~silent
        if left <= 2:
            may[Token.IS] = False
        may[Token.END] = np.where(self.asks, self.closed, ~silent) & outside & ~due
