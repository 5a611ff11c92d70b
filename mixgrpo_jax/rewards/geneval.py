"""GenEval (arXiv 2310.11513): are the objects there that were asked for, in number, colour and place?

The rule alone, over any detector's boxes. Metadata are GenEval's own, an object a line of JSON:

    {"tag": "color_attr", "prompt": "a photo of a red circle and a blue square",
     "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}]}

`include` asks for objects; a clause may have `color`, and `position`, [relation, index of an earlier clause].
`exclude`, where there is one, says how many of a class are too many. `tag` is the kind of prompt.

`tasks.scenes.detector` finds the objects of the task `scenes`. A detector of photographs lives in an environment of its
own, behind a reward server, which is given each prompt's metadata as they are. There, in `detector.py`:

    def score(images, prompts, metadata):
        return geneval.scores([detect(image) for image in images], metadata)  # detect -> list[geneval.Detection]

with `reward_options = {"geneval": {"kind": "function", "path": "detector.py:score"}}` in the config that
`serve_rewards` is started with, and `{"geneval": {"kind": "remote", "urls": [...]}}` in the one that trains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts above it; to count objects, a detector must be surer
MAX_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # of two boxes' extents: centres nearer than that are level

Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """An object that a detector sees.

    name: of its class.  score: the detector's confidence, 0 to 1.  box: x0, y0, x1, y1, with y downwards.
    colour: its name by a classifier, or a function that asks the classifier, called where a colour matters.
    """

    name: str
    score: float
    box: Box
    colour: str | Callable[[], str] = ""

    def has_colour(self, name: str) -> bool:
        """Whether the classifier says `name`."""
        return (self.colour() if callable(self.colour) else self.colour) == name


@dataclass(frozen=True)
class Clause:
    """`count` objects of the class `name`; of a colour if it has one; `position` is (relation, index) to others."""

    name: str
    count: int
    colour: str = ""
    position: tuple[str, int] | None = None


class Request(NamedTuple):
    """Checked metadata."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


class Verdict(NamedTuple):
    """Whether all that was asked for holds; the share of it that does; and what does not, in words."""

    strict: bool
    graded: float
    reasons: tuple[str, ...]


def parse(metadata: Mapping[str, Any]) -> Request:
    """Metadata in GenEval's format, checked. Fields that it does not know are left alone.

    Raises:
        ValueError: a field is missing or is not what it should be; the message names it, its value and the remedy.
    """
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise _bad("tag", tag, f"use one of {', '.join(TAGS)}")
    include = _clauses("include", metadata.get("include"))
    if not include:
        raise _bad("include", metadata.get("include"), "ask for at least one object")
    return Request(tag, include, _clauses("exclude", metadata.get("exclude", [])))


def _clauses(field: str, clauses: Any) -> tuple[Clause, ...]:
    if not isinstance(clauses, Sequence) or isinstance(clauses, str):
        raise _bad(field, clauses, 'give a list of {"class": ..., "count": ...}')
    return tuple(_clause(f"{field}[{index}]", index, clause) for index, clause in enumerate(clauses))


def _clause(field: str, index: int, clause: Any) -> Clause:
    if not isinstance(clause, Mapping):
        raise _bad(field, clause, 'give {"class": ..., "count": ...}')
    name, count, colour, position = (clause.get(key) for key in ("class", "count", "color", "position"))
    if not isinstance(name, str) or not name:
        raise _bad(f"{field}.class", name, "give the name of a class")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise _bad(f"{field}.count", count, "give a whole number of at least 1")
    if colour is not None and not isinstance(colour, str):
        raise _bad(f"{field}.color", colour, "give the name of a colour, or leave it out")
    return Clause(name, count, colour or "", None if position is None else _position(field, index, position))


def _position(field: str, index: int, position: Any) -> tuple[str, int]:
    if isinstance(position, str) or not isinstance(position, Sequence) or len(position) != 2:
        raise _bad(f"{field}.position", position, "give [relation, index of an earlier clause]")
    relation, target = position
    if relation not in RELATIONS:
        raise _bad(f"{field}.position[0]", relation, f"use one of {', '.join(RELATIONS)}")
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < index:
        raise _bad(f"{field}.position[1]", target, f"give the index of an earlier clause, below {index}")
    return relation, target


def _bad(field: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"metadata.{field}={value!r} is not in GenEval's format: {remedy}")


def counted(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class: the surest first, at most 16, all above 0.3, or 0.9 in "counting"."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        group = found.setdefault(detection.name, [])
        if detection.score > threshold and len(group) < MAX_OBJECTS:
            group.append(detection)
    return found


def relations(a: Box, b: Box) -> set[str]:
    """Where a is, seen from b: none, one or two of RELATIONS.

    With o the offset of the centres, and s the sum of the boxes' extents, a relation along an axis holds where

        max(|o| - 0.1 s, 0) / |o|_2 > 1 / 2.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    extent = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    reach = math.hypot(*offset) / 2
    holding = set()
    for o, s, (before, after) in zip(offset, extent, (("left of", "right of"), ("above", "below"))):
        if max(abs(o) - POSITION_THRESHOLD * s, 0) > reach:
            holding.add(before if o < 0 else after)
    return holding


def judge(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> Verdict:
    """What a picture's detections are worth for its prompt.

    Strict wants every clause's count exactly, all of the clause's colour, every one of them in its place to every one
    of the clause it refers to, and fewer than `exclude` says. Graded is the mean of the clauses' terms:

        1 - |count - found| / count,
        1 - |count - found of the colour| / count,  where a colour is asked for,
        1 or 0,                                     where a place is,

    the latter two 0 when the count is wrong. It is at most 1, and falls below 0 with many objects too many.

    Raises ValueError as `parse` does.
    """
    request = parse(metadata)
    found = counted(detections, request.tag)
    terms: list[float] = []
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []  # by clause
    for clause in request.include:
        objects = found.get(clause.name, [])
        results = _judge(clause, objects, matched)
        terms += [term for term, _ in results]
        wrong = [reason for _, reason in results if reason]
        matched.append(None if wrong else objects)
        reasons += wrong
    for clause in request.exclude:
        if (number := len(found.get(clause.name, []))) >= clause.count:
            reasons.append(f"{number} of {clause.name}, and fewer than {clause.count} asked for")
    return Verdict(not reasons, sum(terms) / len(terms), tuple(reasons))


def _judge(clause: Clause, objects: list[Detection], matched: list[list[Detection] | None]) -> list[tuple[float, str]]:
    """(term, what is wrong) of each property that a clause asks for."""
    count = len(objects)
    exact = count == clause.count
    results = [_agreement(clause.count, count, clause.name)]
    if clause.colour:
        coloured = sum(detection.has_colour(clause.colour) for detection in objects) if exact else 0
        results.append(_agreement(clause.count, coloured, f"{clause.colour} {clause.name}"))
    if clause.position:
        relation, target = clause.position
        others = matched[target]
        right = exact and others is not None
        right = right and all(relation in relations(a.box, b.box) for a in objects for b in others or ())
        results.append((1.0, "") if right else (0.0, f"{clause.name} is not {relation} clause {target}"))
    return results


def _agreement(wanted: int, found: int, what: str) -> tuple[float, str]:
    return 1 - abs(wanted - found) / wanted, "" if wanted == found else f"{found} of {what}, and {wanted} asked for"


def scores(
    detections: Sequence[Sequence[Detection]], metadata: Sequence[Mapping[str, Any]], strict: bool = False
) -> np.ndarray:
    """Graded or strict scores of pictures by their detections, float32 [B]. Raises ValueError as `parse` does."""
    verdicts = [judge(*pair) for pair in zip(detections, metadata, strict=True)]
    return np.array([verdict.strict if strict else verdict.graded for verdict in verdicts], np.float32)
