"""What a compiled program does, read from its HLO text: floating-point operations and collectives, loops unrolled."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ACROSS = "across slices"  # of a TPU's: what one slice's chips send to another's, through their hosts
CALLS = ("fusion", "call", "async-start", "custom-call")

Shape = tuple[str, tuple[int, ...]]  # element type, sizes

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
# A TPU's asynchronous fusions repeat a collective in each product that hides it and at its end. It starts at flag -1.
_STEP = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1)')
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}|/\*.*?\*/")


@dataclass(frozen=True)
class Cost:
    """Of one device: flops; bytes that products read and write; collectives {kind: (count, bytes received)}."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        kinds = dict.fromkeys([*self.collectives, *other.collectives])
        pairs = {kind: (self.collectives.get(kind, (0, 0)), other.collectives.get(kind, (0, 0))) for kind in kinds}
        summed = {kind: (a[0] + b[0], a[1] + b[1]) for kind, (a, b) in pairs.items()}
        return Cost(self.flops + other.flops, self.bytes + other.bytes, summed)

    def __mul__(self, times: float) -> "Cost":
        collectives = {kind: (times * count, times * size) for kind, (count, size) in self.collectives.items()}
        return Cost(times * self.flops, times * self.bytes, collectives)

    @property
    def moved(self) -> float:
        """Bytes that the device receives in all collectives inside its slice."""
        return sum(size for kind, (_, size) in self.collectives.items() if kind != ACROSS)

    @property
    def across(self) -> float:
        """Bytes that the device receives from other slices."""
        return self.collectives.get(ACROSS, (0.0, 0.0))[1]


class Instruction(NamedTuple):
    """A line of HLO: name, result, opcode, the text in its parentheses, its operands' names and shapes, the rest."""

    name: str
    result: list[Shape]
    opcode: str
    arguments: str
    names: list[str]
    operands: list[Shape]
    attributes: str


Computation = dict[str, Instruction]  # by name, in order; the last one is the root


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and its entry's name."""
    computations: dict[str, Computation] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(_LAYOUT.sub("", line))):
            name, result, opcode, arguments, attributes = match.groups()
            if opcode == "all-reduce" and current.startswith("all-reduce-scatter"):
                opcode = "reduce-scatter"  # a TPU's: a fusion of the all-reduce and of a slice of it
            shapes = [(kind, _sizes(sizes)) for kind, sizes in _SHAPE.findall(result)]
            scope, names = computations[current], re.findall(r"%([\w.\-]+)", arguments)
            operands = [shape for operand in names if operand in scope for shape in scope[operand].result]
            scope[name] = Instruction(name, shapes, opcode, arguments, names, operands, attributes)
    return computations, entry


def cost(text: str, shares: Sequence[float] = (), kernel: Callable[[str, list[Shape]], float] | None = None) -> Cost:
    """Cost of an optimised module: loops' bodies by their trip counts.

    Args:
        text: `compiled.as_text()`.
        shares: of each `conditional`, in order of execution, the share of times that its costlier branch is taken;
            always, if there are none.
        kernel: (instruction's name, operands' shapes) -> flops of a custom call, which HLO does not tell; 0 by default.

    Raises ValueError for a loop without a constant trip count, or other conditionals than `shares` are given for.
    """

    def join(scope: Computation, costs: list[Cost]) -> Cost:
        return sum(costs, Cost())

    def one(i: Instruction, called: list[Cost]) -> Cost:
        return sum(called, own(i, kernel))

    return unroll(text, shares, one, join, lambda branch: (branch.flops, branch.moved))


def unroll(
    text: str,
    shares: Sequence[float],
    one: Callable[[Instruction, list[Any]], Any],
    join: Callable[[Computation, list[Any]], Any],
    weight: Callable[[Any], Any],
) -> Any:
    """A value of a whole module, whose values can be multiplied by how often they run: see `cost`.

    one: (an instruction, values of the computations that it calls) -> its value; loops and conditionals aside.
    join: (a computation, values of its instructions) -> its value.
    weight: of a conditional's branches, the one that weighs most is taken.
    """
    computations, entry = parse(text)
    gates: list[float] = []

    def walk(name: str) -> Any:
        scope = computations[name]
        return join(scope, [value(i, scope) for i in scope.values()])

    def value(i: Instruction, scope: Computation) -> Any:
        if i.opcode == "while":
            return walk(_called(i, "body")[0]) * _trip_count(i, scope, computations)
        if i.opcode == "conditional":
            gates.append(shares[len(gates)] if len(gates) < len(shares) else 1.0)
            share = gates[-1]
            branches = _called(i, "branch_computations", "true_computation", "false_computation")
            return max(map(walk, branches), key=weight) * share
        names = _called(i, "calls", "to_apply", "called_computations") if i.opcode in CALLS else []
        return one(i, [walk(name) for name in names])

    total = walk(entry)
    if shares and len(gates) != len(shares):
        raise ValueError(f"the program has {len(gates)} conditionals, and shares are given for {len(shares)}")
    return total


def group_size(attributes: str) -> int:
    """Devices that take part in one group of a collective; 1 where it has no groups.

    >>> group_size("replica_groups=mesh['a'=2,'b'=32] {'b'}"), group_size("replica_groups=[8,4]<=[32]")
    (32, 4)
    >>> group_size("replica_groups=mesh['a'=32,'b'=2], device_ids=([2,32]T(1,0)) {'a'}")
    32

    Raises ValueError for groups that are written in another way.
    """
    if named := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    if groups := re.search(r"replica_groups=.{,80}", attributes):
        raise ValueError(f"a collective's groups are not understood: {groups[0]}")
    return 1


def own(i: Instruction, kernel: Callable | None) -> Cost:
    """Cost of an instruction without what it calls."""
    kind = i.opcode.removesuffix("-start")
    if kind in KINDS:
        if _STEP.search(i.attributes):
            return Cost()
        return Cost(collectives={kind: (1, _received(kind, _bytes(i.operands), group_size(i.attributes)))})
    if i.opcode == "recv" and "xla_megascale_runtime" in i.attributes:
        return Cost(collectives={ACROSS: (1, _across(i))})
    if i.opcode == "custom-call" and kernel:
        flops = kernel(i.name, i.operands)
    elif i.opcode in ("dot", "convolution"):
        flops = _dot(i) if i.opcode == "dot" else _convolution(i)
    else:
        return Cost()
    return Cost(flops, _bytes(i.operands) + _bytes(i.result) if flops else 0)


def _received(kind: str, operands: float, n: int) -> float:
    """Bytes that a device receives at least, when n devices take part and each holds `operands` bytes."""
    if kind == "collective-permute":
        return operands
    times = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
    return times * operands


def _across(i: Instruction) -> float:
    """Bytes that a device receives at least from other slices: all that it is sent, or of a sum its part, twice."""
    size, target = _bytes(i.result[:1]), re.search(r'_xla_megascale_target="\{([\d,:]*)\}', i.attributes)
    if not target or '_xla_megascale_transfer_type="ALL_REDUCE"' not in i.attributes:
        return size
    ranges = [[int(end) for end in part.split(":")] for part in target[1].split(",")]
    return _received("all-reduce", size, sum(ends[-1] - ends[0] + 1 for ends in ranges))


def _dot(i: Instruction) -> float:
    contracted = _sizes(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1])  # type: ignore[index]
    return 2.0 * math.prod(i.result[0][1]) * math.prod(i.operands[0][1][axis] for axis in contracted)


def _convolution(i: Instruction) -> float:
    """2 for each multiply-add of elements that exist: a TPU's batched products are convolutions, mostly of holes."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()  # type: ignore[union-attr]
    (_, x), (_, w) = i.operands[:2]
    y = i.result[0][1]
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{(.*?)\}", i.attributes) or [""] * 2)[1]))

    def entry(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    def pairs(axis: int) -> int:
        """(output, kernel) positions that meet an element of the input."""
        stride, base, dilation = (int(entry(n, axis, "1")) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        start = int(entry("pad", axis, "0_0").split("_")[0])
        o, k = np.arange(y[out.index(str(axis))])[:, None], np.arange(w[right.index(str(axis))])
        at = o * stride + k * dilation - start
        return int(((at >= 0) & (at % base == 0) & (at <= (x[left.index(str(axis))] - 1) * base)).sum())

    spatial = math.prod(pairs(axis) for axis in range(len(left) - 2))
    return 2.0 * y[out.index("b")] * y[out.index("f")] * w[right.index("i")] * spatial


def _trip_count(loop: Instruction, scope: Computation, computations: dict[str, Computation]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition, body = (computations[_called(loop, name)[0]] for name in ("condition", "body"))
    test = [*condition.values()][-1]
    bound = [value for name in test.names if (value := _constant(name, condition)) is not None]
    counter = [index for name in test.names if (index := re.search(r"index=(\d+)", condition[name].attributes))]
    if test.opcode != "compare" or "direction=LT" not in test.attributes or not (bound and counter):
        raise ValueError(f"{loop.name} has no constant trip count: it goes on while {test.opcode}({test.arguments})")
    place = int(counter[0][1])
    increment = body[[*body.values()][-1].names[place]]
    steps = [value for name in increment.names if (value := _constant(name, body)) is not None]
    start = _constant(scope[loop.names[0]].names[place], scope) if scope[loop.names[0]].opcode == "tuple" else 0
    return math.ceil((bound[0] - (start or 0)) / (steps[0] if increment.opcode == "add" and steps else 1))


def _constant(name: str, scope: Computation) -> int | None:
    i = scope[name]
    if i.opcode in ("copy", "bitcast"):
        return _constant(i.names[0], scope)
    return int(i.arguments) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments) else None


def _called(i: Instruction, *attributes: str) -> list[str]:
    """Names of the computations under these attributes."""
    found = re.findall(rf"\b(?:{'|'.join(attributes)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", i.attributes)
    return [name.strip().lstrip("%") for many, single in found for name in (many or single).split(",")]


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bytes(shapes: Iterable[Shape]) -> float:
    return sum(math.prod(sizes) * _width(kind) for kind, sizes in shapes)


def _width(kind: str) -> float:
    bits = re.search(r"\d+", kind)
    return 1.0 if kind == "pred" or not bits else int(bits[0]) / 8
