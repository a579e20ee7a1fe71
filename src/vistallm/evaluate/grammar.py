"""Grammar-constrained decoding: at each step, which tokens keep the answer readable (a transformers logits processor).

In: what is generated so far. Out: scores, -inf for every token that leaves the grammar of the answer. The grammar is
EBNF, written by `write_grammar` from the answer forms of the task table and compiled by xgrammar: words are matched by
their bytes, so that byte tokens and word pieces are held to them alike, and region tokens by their ids. x0 <= x1 of a
box is left to reading, which sorts the corners.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import string
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import torch
import xgrammar as xg
from torch import Tensor
from transformers import LogitsProcessor

from vistallm.data.vocabulary import IMAGE_TOKENS, Vocabulary, token_ids
from vistallm.links import LINKS
from vistallm.regions.tracks import key_frames
from vistallm.schema import REGION_KINDS, Sample
from vistallm.tasks import find_task, write_answer

MAX_OBJECTS = 16  # in one region group
WORDS = 512  # tokens of free words
GROUP = 32  # tokens of what stands around the objects of one image: its number twice, markers, a short word
_SP = '" "?'
_SPACE = r" \t\n\r\x0b\x0c"
_LETTERS = r"0-9A-Za-z\u00C0-\u167F\u1681-\u1FFF\u3040-\uD7FF"  # characters that make a word
Role = IntEnum("Role", "WORD BIN PART START SEPARATOR STOP", start=0)
"""What a token is to a region: a bin, or the opening, separating or closing marker of a group."""


@dataclass(frozen=True)
class Rule:
    """What one answer may hold.

    forms: the whole answers to choose from, where `{targets}` is the regions and `{images}` a list of image numbers;
    empty = free words around the regions. words, for free words without a kind: "any"; "some", there is a word beside
    the regions; "short", no regions, and a word follows "answer is"; "list", phrases, each with its regions. link:
    its kind, if links write the regions: one link for all frames of a video.
    """

    kind: str | None = None  # "mask", "box" or "point": at least one group of it; None = of any one kind, or none
    single: bool = False  # exactly one object
    images: int = 1  # of the prompt; with several, `image k:` stands before each group that holds objects
    forms: tuple[str, ...] = ()
    words: Literal["any", "some", "short", "list"] = "any"
    link: str = ""
    frames: tuple[int, ...] = ()  # of a video, those whose regions are written, from 0; empty: the images are no frames


def rule_of(sample: Sample, head: str = "text", keyframes: int = 1) -> Rule:
    """Return the rule of an evaluation sample, from its task, head and, for a multiple choice, from its options."""
    task, images = find_task(sample.task), len(sample.images)
    frames = tuple(key_frames(images, keyframes)) if sample.video else ()
    link = task.link if head == "link" else ""
    if "{found}" in task.answer:
        return Rule(task.kind, False, images, words="list", link=link)
    if task.kind != "text":
        # REC, RES and candidate questions have one target by definition; GREC, GRES and the rest none, one or several.
        single = task.metric in ("box", "mask", "candidates")
        own = sample.answer is not None or "{targets}" not in task.answer
        forms = (task.answer, *((task.plural,) if task.plural and not single else ()))
        return Rule(task.kind, single, images, () if own else forms, link=link, frames=frames)
    choices: list[str] = {"yesno": ["yes", "no"], "truth": ["True", "False"]}.get(task.metric, [])
    if task.metric == "choice":
        options, form = str(sample.fields.get("options", "")), str(sample.fields.get("answer", "A"))
        letters = [letter for letter in string.ascii_uppercase if f"({letter})" in options]
        choices = [f"({letter})" if "(" in form else letter for letter in letters]
    answers = (dataclasses.replace(sample, answer=None, fields={**sample.fields, "answer": word}) for word in choices)
    words: Literal["some", "short"] = "short" if task.metric in ("vqa", "exact") else "some"
    return Rule(None, False, images, tuple(map(write_answer, answers)), words, frames=frames)


def write_grammar(rule: Rule, vocabulary: Vocabulary, points: int, objects: int) -> str:
    """Write a rule as EBNF.

    Words stand in the root itself, not in rules of their own: a token of several characters that leaves a rule is
    looked up at every step, one that stays within is known beforehand.

    Args:
        rule: what the answer may hold.
        vocabulary: its region tokens are terminals; where it has none, regions are bracketed numbers.
        points: vertices of one mask object, all parts together: `more_k` has at most k left to write.
        objects: of one group, at most.
    """
    lines = [
        *_terminals(vocabulary),
        "point ::= bin comma bin",
        "box ::= point comma point",
        f"mask ::= mask_{points}",
        *(f"mask_{k} ::= point comma point comma point more_{k - 3}" for k in range(3, points + 1)),
        *(f'more_{k} ::= "" | comma point more_{k - 1} | part mask_{k}' for k in range(3, points - 2)),
        *(f'more_{k} ::= "" | comma point more_{k - 1}' for k in (1, 2)),
        'more_0 ::= ""',
    ]
    if rule.link:
        lines.append(
            f"link ::= {' '.join(f'Token({number})' for number in vocabulary.link_ids[LINKS.index(rule.link)])}"
        )
    for kind in REGION_KINDS:
        more = f"(separator_{kind} {kind}){{0,{objects - 1}}}" if objects > 1 else ""
        lines.append(f"group_{kind} ::= start_{kind} ({kind} {more}) stop_{kind}")
        lines.append(f"empty_{kind} ::= start_{kind} stop_{kind}")
    # What begins and ends regions and links: no word holds it.
    x = ("<" if vocabulary.region_tokens else "") + (
        r"\[\]" if vocabulary.link_tokens or not vocabulary.region_tokens else ""
    )
    unit = '[fF] "rame"' if rule.frames else '[iI] "mage"'
    named = [rf'{_SP} {unit} {_SP} "{k}" {_SP} ":" {_SP}' for k in range(1, rule.images + 1)]
    if rule.forms:
        roots = [_literal(form) for form in rule.forms]
        numbers = f"({' | '.join(json.dumps(str(k)) for k in range(1, rule.images + 1))})"
        lines.append(f'images ::= {numbers} ({_SP} ("," | "and") {_SP} {numbers}){{0,{rule.images - 1}}}')
        lines += _tracks(rule, named, objects) if rule.frames and not rule.link else _targets(rule, named)
    elif rule.words == "list":
        group = "link" if rule.link else f"(group_{rule.kind} | empty_{rule.kind})"
        lines.append(f"item ::= [^{x},.:{_SPACE}]? [^{x},.:]* [{_LETTERS}] {_SP} {group}")
        roots = [f'item ({_SP} "," {_SP} item)* ({_SP} ".")?']
    elif rule.words == "short":
        roots = [_short_answer(x)]
    else:
        roots = [_words(rule, kind, named, x) for kind in ([rule.kind] if rule.kind else REGION_KINDS)]
    return "\n".join([*lines, f"root ::= {' | '.join(roots)}"])


def _terminals(vocabulary: Vocabulary) -> list[str]:
    """`bin`, `comma`, `part`, and for each kind `start`, `separator` and `stop`."""
    ends = {"start": ("st", '"["'), "separator": ("sep", f'"]" {_SP} "," {_SP} "["'), "stop": ("ed", '"]"')}
    if vocabulary.region_tokens:
        ids = dict(zip(vocabulary.region_tokens, token_ids(vocabulary.lm, vocabulary.region_tokens), strict=True))
        marks = [f"{n}_{k} ::= Token({ids[f'<{k[0]}_{e}>']})" for n, (e, _) in ends.items() for k in REGION_KINDS]
        bins = ", ".join(map(str, vocabulary.bin_ids))
        return [f"bin ::= Token({bins})", 'comma ::= ""', f"part ::= Token({ids['<m_part>']})", *marks]
    top = str(len(vocabulary.bin_values) - 1)
    lower = [f'"{top[:i]}" [0-{int(d) - 1}] [0-9]{{0,{len(top) - i - 1}}}' for i, d in enumerate(top) if d > "0"]
    lines = [f'bin ::= {_SP} ("{top}" | {" | ".join(lower)})', f'comma ::= {_SP} ","', f'part ::= {_SP} ";"']
    return lines + [f"{name}_{kind} ::= {_SP} {text}" for name, (_, text) in ends.items() for kind in REGION_KINDS]


def _literal(form: str) -> str:
    """An answer form as terminals; spaces beside marks are optional, as tokenizers write them or do not."""
    terminals, before = [_SP], False
    for field, word, mark in re.findall(r"\{(\w+)\}|(\w+)|([^\w\s])", form):
        terminals += ['" "' if before and word else _SP, field or json.dumps(word or mark)]
        before = bool(word)
    return " ".join(terminals)


def _tracks(rule: Rule, named: list[str], objects: int) -> list[str]:
    """`targets` of a video: in each frame that is written a pair of markers for every object, at most `objects`."""
    kind = rule.kind or "mask"
    pair = f"({_SP} (start_{kind} {kind} stop_{kind} | empty_{kind})){{1,{objects}}}"
    frames = [f"{named[frame] if len(named) > 1 else ''} {pair}" for frame in rule.frames]
    return [f"targets ::= {' '.join(frames)}"]


def _targets(rule: Rule, named: list[str]) -> list[str]:
    """`targets`, the regions of an answer form: image by image, ascending, each at most once."""
    group = "link" if rule.link else f"group_{rule.kind or 'mask'}"
    empty = "" if rule.single else "link | " if rule.link else f"empty_{rule.kind or 'mask'} | "
    if len(named) == 1 or rule.frames:
        return [f"targets ::= {group}" if rule.link else f"targets ::= {empty}{group}"]
    if rule.single:
        return [f"targets ::= ({' | '.join(named)}) {group}"]
    lines = [f"targets ::= {empty}from_1", f"from_{len(named)} ::= {named[-1]} {group}"]
    for k, name in enumerate(named[:-1], 1):
        lines.append(f"from_{k} ::= {name} {group} from_{k + 1}? | from_{k + 1}")
    return lines


def _words(rule: Rule, kind: str, named: list[str], x: str) -> str:
    """Free words, and groups of one kind among them: those of `rule.kind` must be there."""
    # Words before a group: they end in no number and colon, which would name an image.
    lead = f'(([^{x}]* [^{x}:{_SPACE}])? [{_SPACE}]* | ([^{x}]* [^{x}0-9{_SPACE}])? [{_SPACE}]* ":" [{_SPACE}]*)'
    between = rf"[,{_SPACE}]{{0,2}} [^{x}0-9:,{_SPACE}] {lead}"  # a comma alone would make two brackets one group
    one = f"({' | '.join(named)}) group_{kind}" if len(named) > 1 else f"group_{kind}"
    after = f" | [,{_SPACE}]{{0,2}} {one}" if len(named) > 1 else ""  # the name of an image parts groups, too
    # Empty brackets do not say their kind: a mask, unless the task does.
    if not rule.single and (rule.kind or kind == "mask" or x == "<"):
        one = f"({one} | empty_{kind})"
    if rule.single:
        return f"{_SP if len(named) > 1 else lead} {one} [^{x}]*"
    rest = f"{one} ({between} {one}{after})* [^{x}]*"
    if rule.kind:
        return f"{lead} {rest}"
    word = f"[^{x}{_LETTERS}]* [{_LETTERS}]"
    if rule.words == "some":
        return f"({_SP} {one})? {word} ([^{x}]* | {lead} {rest})"
    return f"[^{x}]* | {lead} {rest}"


def _short_answer(x: str) -> str:
    """Words without regions. What is read of them follows the last "answer is", so they do not end there.

    Where the last letters are the last k of "answer is", the one before differs; after them come marks.
    """
    pairs = [letter + letter.upper() if letter > " " else letter for letter in "answer is"]
    ends = [f"[^{x}]* [{_LETTERS.replace('A-Za-z', 'A-RT-Za-rt-z')}]"]
    for k in range(1, len(pairs)):
        ends.append(f"([^{x}]* [^{x}{pairs[-k - 1]}])? {' '.join(f'[{pair}]' for pair in pairs[-k:])}")
    return f"({' | '.join(ends)}) [^{x}{_LETTERS}]*"


@dataclass(frozen=True)
class AnswerGrammar:
    """A compiled rule."""

    compiled: xg.CompiledGrammar
    length: int  # the most tokens of an answer in a form; from there on free words take the next end that is permitted
    limit: int  # tokens that this takes at most, the end token included


class AnswerGrammars:
    """The grammars of one model, compiled once for each rule.

    `max_new_tokens`: free words end there, forms hold as many objects as fit, but at least one; None = `WORDS`, and as
    many objects as a form may hold. `points`: vertices of one mask object. `roles`: (V,) int64 `Role` of each token.
    """

    def __init__(self, vocabulary: Vocabulary, points: int, max_new_tokens: int | None = None) -> None:
        self.vocabulary, self.points, self.max_new_tokens = vocabulary, points, max_new_tokens
        lm, tokens = vocabulary.lm, vocabulary.region_tokens
        names = [str(name) for name in lm.convert_ids_to_tokens(list(range(len(lm))))]
        self.roles = np.zeros(len(names), np.int64)
        ends = {"part": Role.PART, "st": Role.START, "sep": Role.SEPARATOR, "ed": Role.STOP}
        for number, name in zip(token_ids(lm, tokens), tokens, strict=True):
            self.roles[number] = ends.get(name.strip("<>").partition("_")[2], Role.BIN)
        for number in {*lm.all_special_ids, *token_ids(lm, IMAGE_TOKENS)}:
            names[number] = ""  # no text matches it
        style = xg.VocabType.BYTE_LEVEL if any("Ġ" in name for name in names) else xg.VocabType.BYTE_FALLBACK
        if any(name.startswith("##") for name in names):  # WordPiece: all other tokens begin a word
            style = xg.VocabType.RAW
            names = [name[2:] if name.startswith("##") else name and f" {name}" for name in names]
        self.info = xg.TokenizerInfo(names, style, stop_token_ids=[lm.eos_token_id])
        self.ends = [torch.tensor([lm.eos_token_id])]
        pieces = [piece.strip() for piece in self.info.decoded_vocab]
        for role, bracket in ((Role.STOP, b"]"), (Role.START, b"[")):
            found = self.roles == role if tokens else np.array([piece == bracket for piece in pieces])
            self.ends.append(torch.from_numpy(np.flatnonzero(found)))
        self.ends.append(torch.tensor([ids[0] for ids in vocabulary.link_ids], dtype=torch.long))
        self.ends.append(torch.tensor([i for i, piece in enumerate(pieces) if len(piece) == 1 and piece.isalpha()]))
        # xgrammar 0.2.8 takes rules for the same that differ in the ids of Token() alone: its cache mixes them up
        self.compiler = xg.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        self.compile = functools.lru_cache(256)(self._compile)

    def _compile(self, rule: Rule) -> AnswerGrammar:
        """Tokens are counted as if each were a byte."""
        number = 1 if self.vocabulary.region_tokens else len(str(len(self.vocabulary.bin_values))) + 3
        numbers = {"mask": 2 * self.points, "box": 4, "point": 2}.get(rule.kind or "", 0)
        each = number * (numbers + numbers // 6 + 1)
        if rule.link:
            each = len(self.vocabulary.link_ids[0])
        objects, length = 1 if rule.single or rule.link else MAX_OBJECTS, self.max_new_tokens or WORDS
        limit = length + 16 * number + GROUP  # what is open ends within three vertices, or a word
        if rule.forms:
            words = max(2 * len(form.encode()) for form in rule.forms)
            if self.max_new_tokens is not None:
                fitting = ((self.max_new_tokens - words) // rule.images - GROUP) // each
                objects = max(1, min(objects, fitting))
            length = words + rule.images * (GROUP + objects * each) * bool(rule.kind)
            limit = length + 1
        text = write_grammar(rule, self.vocabulary, self.points, objects)
        return AnswerGrammar(self.compiler.compile_grammar(text), length, limit)

    def constrain(self, rules: list[Rule]) -> RegionGrammar:
        """Return the processor of one batch, a rule per row."""
        return RegionGrammar([self.compile(rule) for rule in rules], self.info.vocab_size, self.ends)


class PooledBins(LogitsProcessor):
    """Lets greedy decoding choose between a coordinate and a marker before it chooses the coordinate.

    A coordinate's probability lies on many bins, a marker's on one token: token by token, a marker that is one tenth
    likely beats nine tenths of coordinates, and "no target" or an early end of a polygon is written.
    """

    def __init__(self, roles: np.ndarray) -> None:
        self.bins = torch.from_numpy(np.flatnonzero(roles == Role.BIN))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask what is no bin in the rows of `scores` (B, V) whose bins together are likelier than any other token."""
        bins = self.bins.to(scores.device)
        others = scores.index_fill(1, bins, -torch.inf)
        pooled = scores[:, bins].logsumexp(1) > others.max(1).values
        return torch.where(pooled[:, None] & others.isfinite(), -torch.inf, scores)


class RegionGrammar(LogitsProcessor):
    """Masks the scores of a batch of answers; `limit` is how many tokens to generate at most.

    `ends`: the ids that end an answer, that end a group, that begin one, that begin a link, and letters.
    """

    def __init__(self, grammars: list[AnswerGrammar], vocab_size: int, ends: list[Tensor]) -> None:
        self.grammars, self.ends, self.seen = grammars, ends, 0
        self.limit = max(grammar.limit for grammar in grammars)
        self.matchers = [xg.GrammarMatcher(grammar.compiled) for grammar in grammars]
        self.bits = xg.allocate_token_bitmask(len(grammars), vocab_size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask `scores` (B, V) given the generated ids (B, T); the prompt must not be among them.

        Raises:
            ValueError: a generated token is not of the grammar.
        """
        written = input_ids[:, self.seen :].tolist()
        for row, matcher in enumerate(self.matchers):
            for token in written[row]:
                if not matcher.is_terminated() and not matcher.accept_token(token):
                    raise ValueError(f"row {row}: expected a token that its grammar permits, got {token}")
            if not matcher.is_terminated():
                matcher.fill_next_token_bitmask(self.bits, row)
        self.seen = input_ids.shape[1]
        scores = scores.clone()
        xg.apply_token_bitmask_inplace(scores, self.bits.to(scores.device))
        for row, grammar in enumerate(self.grammars):
            if self.seen >= grammar.length and not self.matchers[row].is_terminated():
                self._end(scores[row])
        return scores

    def _end(self, scores: Tensor) -> None:
        """Keep only what brings the end nearest: the first kind of `ends` of which the grammar permits any."""
        for ends in self.ends:
            kept = scores[ends]
            if kept.isfinite().any():
                scores.fill_(-torch.inf)
                scores[ends] = kept
                return
