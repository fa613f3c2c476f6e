"""Bytes that devices exchange, read from a compiled program's HLO.

Counting rule: the bytes that one device receives, mean over devices. For a group of g devices and
a result (of one device) of n bytes,

    all-gather          (g - 1) / g  n      every part but its own
    reduce-scatter      (g - 1)  n          a part from everyone, added up
    all-reduce          2 (g - 1) / g  n    a reduce-scatter, then an all-gather
    all-to-all          (g - 1) / g  n
    collective-permute  n                   times the share of devices that have a source

whatever algorithm runs, at once or asynchronously (counted where it starts). Collectives in a loop
count as often as the loop runs; both branches of a conditional count. Groups of one device move
nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(hlo: str | None, *, at_least: bool = False) -> dict[str, int]:
    """Bytes received by one device for each kind of collective in an optimized HLO module.

    ``at_least``: a loop whose length is unknown counts once.

    Raises:
      ValueError: for a loop of unknown length around a collective (unless ``at_least``), or replica
        groups in an unknown notation.
    """
    if not hlo:
        raise ValueError("there is no text to read; pass compiled.as_text()")
    computations, entry = _computations(hlo)
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else 1
    found: dict[str, Counter[str]] = {}

    def count(name: str) -> Counter[str]:
        if name in found:
            return found[name]
        total: Counter[str] = Counter()
        for line in computations.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            result, operation, rest = match.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                size = _bytes(result if kind == operation else _started(kind, result))
                total[kind] += _received(kind, size, rest, devices)
            times = 1
            inside: Counter[str] = Counter()
            for one, several in _CALLED.findall(rest):
                for called in [one] if one else re.findall(r"[\w.\-]+", several):
                    inside += count(called)
            if operation == "while" and inside:
                trips = _TRIPS.search(rest)
                if trips is None and not at_least:
                    raise ValueError(f"a loop of unknown length moves {dict(inside)}: {line[:200]}")
                times = int(trips[1]) if trips else 1
            total.update({kind: times * size for kind, size in inside.items()})
        found[name] = total
        return total

    return {kind: count(entry)[kind] for kind in KINDS}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation, and the name of the first to run."""
    lines: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    if not entry:
        raise ValueError("the text holds no entry computation; pass compiled.as_text()")
    return lines, entry


def _bytes(result: str) -> int:
    """Bytes of a result, which may be a tuple."""
    total = 0
    for kind, sizes in _ARRAY.findall(result):
        width = re.search(r"\d+", kind)
        bits = int(width[0]) if width else 8
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        total += elements * max(bits, 8) // 8
    return total


def _started(kind: str, result: str) -> str:
    """The result of an asynchronous collective, whose ``-start`` shows operands and state as well:
    (operands, results), and for a permutation two counters more.
    """
    arrays = [match[0] for match in _ARRAY.finditer(result)]
    if kind == "all-reduce":
        return result
    if kind == "collective-permute":
        arrays = [array for array in arrays if array != "u32[]"]
    return " ".join(arrays[len(arrays) // 2 :])


def _received(operation: str, size: int, rest: str, devices: int) -> int:
    if operation == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        if pairs is None:
            raise ValueError(f"no source_target_pairs in {rest[:200]}")
        moving = sum(a != b for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0]))
        return size * moving // devices
    group = _group_size(rest, devices)
    return {
        "all-gather": size * (group - 1) // group,
        "reduce-scatter": size * (group - 1),
        "all-reduce": 2 * size * (group - 1) // group,
        "all-to-all": size * (group - 1) // group,
    }[operation]


def _group_size(rest: str, devices: int) -> int:
    """Devices of a group, from any of the three notations of replica groups."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", axes[2]))
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
    if tiled:
        return int(tiled[1])
    listed = re.search(r"replica_groups=\{(?:\{([\d,]*)\}|\})", rest)
    if listed:
        return len(listed[1].split(",")) if listed[1] else devices
    raise ValueError(f"replica groups in an unknown notation: {rest[:200]}")
