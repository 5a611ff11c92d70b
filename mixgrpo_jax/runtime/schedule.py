"""How long a compiled TPU program takes, by its compiler's own estimates: each operation's cycles, loops unrolled.

The compiler writes cycles down for what it makes itself, and chooses tiles by them. It has none for hand-written
kernels, which are counted by their FLOPs at a rate that is assumed, and none for collectives, which are counted by
their bytes over the links' bandwidth. Copies between a chip's own memories overlap with all else and are left out, as
are the host, the latency of collectives, and links that several transfers share. At JAX_OPTIMIZATION_LEVEL=O1 cycles
mean nothing: the compiler tries fewer tiles, and products take three times as many.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixgrpo_jax.runtime import hlo
from mixgrpo_jax.runtime.chips import Chip

RATE = 0.6  # of peak, a kernel's
OPERATIONS = ("products", "the rest", "kernels")

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CHAIN = re.compile(r"channel_id=(\d+)")
PACKAGE = "mixgrpo_jax/"


class Operation(NamedTuple):
    """What takes time on one device.

    kind: one of `OPERATIONS`, or a collective's. name: in the program. place: "FILE:LINE" in this package that asked
      for it, and " < FILE:LINE" of another file that called it. scope: JAX's name of it, in which
      "rematted_computation" says that it is recomputed.
    times: that it is executed. The other figures are of each time: cycles; a kernel's flops; bytes that a collective
      receives, and cycles and kernels' flops between its start and its end.
    """

    kind: str
    name: str
    place: str = ""
    scope: str = ""
    times: float = 1.0
    cycles: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    hiding_cycles: float = 0.0
    hiding_flops: float = 0.0

    def seconds(self, chip: Chip, rate: float = RATE) -> float:
        """That the device is busy with all of its executions, or waits for them."""
        busy = self.cycles / chip.clock + self.flops / (rate * chip.flops)
        return self.times * (busy + max(0.0, self._transfer(chip) - self._hiding(chip, rate)))

    def hidden(self, chip: Chip, rate: float = RATE) -> float:
        """Seconds of a transfer during which the device computes."""
        return self.times * min(self._transfer(chip), self._hiding(chip, rate))

    def _transfer(self, chip: Chip) -> float:
        return self.bytes / (chip.network_bandwidth if self.kind == hlo.ACROSS else chip.link_bandwidth)

    def _hiding(self, chip: Chip, rate: float) -> float:
        return self.hiding_cycles / chip.clock + self.hiding_flops / (rate * chip.flops)


@dataclass(frozen=True)
class Schedule:
    """A program's operations, in order. `flops` are of its products, not of kernels.

    `started` transfers have not ended yet, by a key that what ends or carries them `touches`.
    """

    operations: tuple[Operation, ...] = ()
    flops: float = 0.0
    started: tuple[tuple[str, Operation], ...] = ()
    touched: frozenset[str] = frozenset()

    def __mul__(self, times: float) -> "Schedule":
        repeated = [i._replace(times=i.times * times) for i in self.ended()]
        return Schedule(tuple(repeated), self.flops * times)

    def ended(self) -> tuple[Operation, ...]:
        """The operations, where nothing hides what is still on its way."""
        return self.operations + tuple(transfer for _, transfer in self.started)

    @property
    def cycles(self) -> dict[str, float]:
        """Of products and of the rest."""
        return {kind: sum(i.times * i.cycles for i in self.operations if i.kind == kind) for kind in OPERATIONS[:2]}

    def seconds(self, chip: Chip, rate: float = RATE) -> dict[str, float]:
        """By kind: products, the rest, kernels, waiting for collectives, and across slices; then their total.

        `rate` is kernels' share of peak FLOP/s.
        """
        result = dict.fromkeys((*OPERATIONS, "waiting", "waiting across"), 0.0)
        for i in self.operations:
            waiting = "waiting across" if i.kind == hlo.ACROSS else "waiting"
            result[i.kind if i.kind in OPERATIONS else waiting] += i.seconds(chip, rate)
        return result | {"total": sum(result.values())}

    def hidden(self, chip: Chip, rate: float = RATE) -> float:
        """Seconds of transfers during which the device computes."""
        return sum(i.hidden(chip, rate) for i in self.operations)

    def costliest(self, chip: Chip, count: int = 10, rate: float = RATE) -> list[dict[str, Any]]:
        """The operations that take the most seconds, of all their executions."""
        total = self.seconds(chip, rate)["total"]
        shown = sorted(self.operations, key=lambda i: -i.seconds(chip, rate))[:count]
        fields = ("kind", "name", "place", "scope", "times", "cycles")
        return [
            {name: getattr(i, name) for name in fields}
            | {"seconds": i.seconds(chip, rate), "share": i.seconds(chip, rate) / total if total else 0.0}
            for i in shown
        ]


def read(
    text: str, shares: Sequence[float] = (), kernel: Callable[[str, list[hlo.Shape]], float] | None = None
) -> Schedule:
    """The schedule of an optimised module for a TPU; arguments and errors are `hlo.cost`'s.

    Where a fusion has cycles, they are all of its own: those of what it calls are left out.
    """
    place = _places(text)

    def one(i: hlo.Instruction, called: list[Schedule]) -> Schedule:
        cost, cycles = hlo.own(i, kernel), _CYCLES.search(i.attributes)
        flops = sum((c.flops for c in called), 0.0 if i.opcode == "custom-call" else cost.flops)
        inner = [operation for c in called for operation in c.operations]
        started = [pair for c in called for pair in c.started]
        touched = {key for c in called for key in c.touched}
        about = (i.name, place(i.attributes), (_SCOPE.search(i.attributes) or ["", ""])[1])
        operations = inner
        if cycles:
            kind = OPERATIONS[0 if flops else 1]
            operations = [o for o in inner if o.bytes] + [Operation(kind, *about, cycles=float(cycles[1]))]
        elif i.opcode == "custom-call" and cost.flops:
            operations = [Operation("kernels", *about, flops=cost.flops)]
        for kind, (_, size) in cost.collectives.items():
            transfer = Operation(kind, *about, bytes=size)
            if i.opcode.endswith("-start") or i.opcode == "recv":
                started.append((i.name, transfer))
            elif "async_collective_fusion_config" in i.attributes:
                started.append((_chain(i), transfer))
            else:
                operations.append(transfer)
        if i.opcode == "async-start":
            started += [(i.name, o) for o in operations if o.bytes]
            operations = [o for o in operations if not o.bytes]
        elif i.opcode.endswith("-done"):
            touched |= {i.names[0]}
        elif "async_collective_fusion_config" in i.attributes:
            touched |= {_chain(i)}
        return Schedule(tuple(operations), flops, tuple(started), frozenset(touched))

    total = hlo.unroll(text, shares, one, _join, lambda s: (s.flops, sum(i.cycles + i.flops for i in s.operations)))
    return Schedule(total.ended(), total.flops)


def _join(scope: hlo.Computation, parts: list[Schedule]) -> Schedule:
    """A computation's schedule: what lies between a transfer's start and the last that touches it hides it."""
    touches = [{_origin(key, scope) for key in part.touched} for part in parts]
    last = {key: at for at, keys in enumerate(touches) for key in keys}
    operations: list[Operation] = []
    open_: dict[str, tuple[Operation, float, float]] = {}
    cycles = flops = 0.0
    for at, (part, keys) in enumerate(zip(parts, touches)):
        for key in [key for key in keys if last[key] == at and key in open_]:
            transfer, *since = open_.pop(key)
            operations.append(transfer._replace(hiding_cycles=cycles - since[0], hiding_flops=flops - since[1]))
        operations += part.operations
        cycles += sum(i.times * i.cycles for i in part.operations)
        flops += sum(i.times * i.flops for i in part.operations)
        open_ |= {key: (transfer, cycles, flops) for key, transfer in part.started}
    started = tuple((key, transfer) for key, (transfer, *_) in open_.items())
    return Schedule(tuple(operations), sum(part.flops for part in parts), started, frozenset(last))


def _origin(key: str, scope: hlo.Computation) -> str:
    """The instruction that started what another one hands on."""
    while key in scope and scope[key].opcode in ("get-tuple-element", "async-update", "bitcast"):
        key = scope[key].names[0]
    return key


def _chain(i: hlo.Instruction) -> str:
    return f"channel {(_CHAIN.search(i.attributes) or ['', i.name])[1]}"


def _places(text: str) -> Callable[[str], str]:
    """(an instruction's attributes) -> its place in this package: see `Operation`."""
    head = text[: first.start()] if (first := re.search(r"^(?:%|ENTRY)", text, re.MULTILINE)) else ""
    tables = {block.partition("\n")[0]: block for block in head.strip().split("\n\n")}

    def table(name: str, row: str) -> dict[str, tuple[str, ...]]:
        return {key: tuple(rest) for key, *rest in re.findall(row, tables.get(name, ""), re.MULTILINE)}

    files = table("FileNames", r'^(\d+) "(.*)"$')
    lines = table("FileLocations", r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)")
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    shift = (
        int(frames["1"][1] == "1") if frames else 0
    )  # the first frame is nobody's child: it shows how ids are printed

    def chain(frame: int) -> Iterable[str]:
        while str(frame) in frames:
            at, parent = frames[str(frame)]
            file, line = lines[at]
            yield f"{files[file][0]}:{line}"
            frame = int(parent or 0) - shift

    def place(attributes: str) -> str:
        if named := re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes):
            found: Iterable[str] = [f"{named[1]}:{named[2]}"]
        else:
            found = chain(int((re.search(r"stack_frame_id=(\d+)", attributes) or "00")[1]))
        ours = [PACKAGE + path.rpartition("/" + PACKAGE)[2] for path in found if "/" + PACKAGE in path]
        by_file = dict(reversed([(path.partition(":")[0], path) for path in ours]))  # the innermost line of each
        return " < ".join([*reversed(by_file.values())][:2])

    return place
