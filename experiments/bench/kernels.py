"""Kernels of a compiled chunk of rounds, counted in XLA's text of it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# What starts nothing on a device: names, views and the control of the program.
FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "domain"),
        *("while", "conditional", "call", "after-all", "opt-barrier", "add-dependency"),
        *("partition-id", "replica-id", "async-done", "async-update", "copy-done"),
    }
)
TRAINS = "transpose(jvp("  # in the name of what a client step differentiates


class Step(NamedTuple):
    """One instruction: what it starts, and the computations that it runs."""

    kernels: int
    loop: str  # body of a while loop
    times: int  # that it runs; 1 where XLA does not know
    branches: tuple[str, ...]  # of which one is run
    called: str
    trains: bool


class Kernels(NamedTuple):
    """Of one round."""

    client_step: int
    outside_loops: int  # the conditionals' largest branches included
    rest: int  # a round's without client steps, loops as often as they run


def of_chunk(text: str) -> Kernels:
    """Counts the kernels of a chunk of at least two rounds.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: no loop over rounds, or none over client steps, is found.
    """
    computations = dict(_computations(text))
    entry = next(name for name in computations if name.startswith("ENTRY "))
    loops = [step.loop for name in computations for step in computations[name] if step.loop]
    training = [name for name in loops if any(step.trains for step in computations[name])]
    rounds = [step.loop for step in computations[entry] if step.loop]
    if not training or not rounds:
        raise ValueError("this program has no rounds of client steps")

    def launches(name: str, with_loops: bool) -> int:
        total = 0
        for step in computations[name]:
            total += step.kernels
            if step.called:
                total += launches(step.called, with_loops)
            if step.branches:
                total += max(launches(branch, with_loops) for branch in step.branches)
            if step.loop and with_loops and step.loop not in training:
                total += step.times * launches(step.loop, with_loops)
        return total

    body = max(rounds, key=lambda name: launches(name, True))
    return Kernels(
        client_step=max(launches(name, True) for name in training),
        outside_loops=launches(body, False),
        rest=launches(body, True),
    )


def bytes_of(text: str) -> float:
    """That the kernels of a program without loops read and write: all operands and results.

    Args:
      text: `compiled.as_text()`.
    """
    sizes: dict[str, float] = {}
    total = 0.0
    for line in text[text.index("\nENTRY ") :].splitlines()[1:]:
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if found is None:
            continue
        rest = line[found.end() :]
        after = _after_type(rest)
        sizes[found[1]] = _size(rest[: len(rest) - len(after)])
        kind, _, operands = after.partition("(")
        if kind not in FREE:
            names = re.findall(r"%([\w.\-]+)", operands.partition(")")[0])
            total += sizes[found[1]] + sum(sizes.get(name, 0.0) for name in names)
    return total


def _size(kind: str) -> float:
    """Bytes of a type, `(f32[10,3]{1,0}, pred[])`."""
    total = 0.0
    for name, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", kind):
        bits = int(re.sub(r"\D", "", name) or 8)
        total += bits / 8 * math.prod(int(length) for length in shape.split(",") if length)
    return total


def _computations(text: str) -> Iterator[tuple[str, list[Step]]]:
    """Name and instructions of each; of those inside fusions nothing is ever run by name."""
    name, steps = "", []
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, steps = (opened[1] or "") + opened[2], []
        elif line.startswith("}") and name:
            yield name, steps
            name = ""
        elif name and (step := _step(line)):
            steps.append(step)


def _step(line: str) -> Step | None:
    found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = ", line)
    if found is None:
        return None
    operation = re.match(r"([\w\-]+)\(", _after_type(line[found.end() :]))
    if operation is None:
        return None
    kind = operation[1]
    loop = re.search(r"body=%?([\w.\-]+)", line)
    times = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
    several = re.search(r"branch_computations=\{([^}]*)\}", line)
    either = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
    # A call may be XLA's name for a recorded list of launches, which is as long as what is in it.
    called = re.search(r"to_apply=%?([\w.\-]+)", line) if kind == "call" else None
    return Step(
        kernels=int(kind not in FREE),
        loop=loop[1] if loop and kind == "while" else "",
        times=int(times[1]) if times else 1,
        branches=tuple(re.findall(r"[\w.\-]+", several[1]) if several else either),
        called=called[1] if called else "",
        trains=TRAINS in line,
    )


def _after_type(text: str) -> str:
    """What follows a type, which may be a tuple of types."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return text[place + 1 :]
    return ""
