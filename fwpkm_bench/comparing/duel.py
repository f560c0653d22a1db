"""Two sides, timed in turns: A B C C B A, each side a process of its own, C a second one of side A.

All three processes stay for the rounds of an invocation, one at work and two waiting, and are then started
afresh, because where a process finds its memory makes it a few percent faster or slower for life. So does
whether it was the first, second or third to be started: the sides take turns at that too.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwpkm_bench.comparing.remote import Remote
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.comparing.verdicts import AGAIN, LEAST_INVOCATIONS, Speed, Turn, speed

TURN_S = 0.25  # a turn is as many calls as this takes, after one untimed, and counts as their median
MOST_CALLS = 100
LEAST_ROUNDS, MOST_ROUNDS = 2, 12  # of an invocation, if the budget has room for them
TIGHT = 1.0  # of the threshold: an interval that narrow ends the duel


@dataclass
class Fought:
    """What a duel gave, so far as it came."""

    turns: list[Turn] = field(default_factory=list)
    starts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by side, what `Bench.start` said
    seconds: float = 0.0


@dataclass(frozen=True)
class Rules:
    """Of a duel: it ends when the interval is narrow against ``threshold``, or ``budget_s`` is spent."""

    threshold: float = 0.05
    budget_s: float = 60.0
    timeout_s: float = 900.0


def fight(
    fought: Fought,
    a: Side,
    b: Side,
    request: dict[str, Any],
    rules: Rules,
    *,
    outputs: dict[str, Path],
    check: Callable[[], bool],
    show: Callable[[int, Speed], None],
) -> None:
    """Time both sides, adding to ``fought``; the first calls' outputs go to the files ``outputs``. ``check``
    looks at the first invocation, in which nothing is timed, and may end it.

    Raises:
        SideError: a side fails; ``fought`` has what came before.
    """
    sides = {"A": a, "B": b, AGAIN: a}
    chance = random.Random()
    began = time.monotonic()

    def start(stack: ExitStack, order: Iterable[str], into: dict[str, Path]) -> dict[str, Remote]:
        remotes: dict[str, Remote] = {}
        for name in order:
            remotes[name] = stack.enter_context(Remote(sides[name], request, rules.timeout_s))
            said = remotes[name].call("start", into=str(into.get(name, "")))
            fought.starts.setdefault(name, []).append(said)
        return remotes

    with ExitStack() as stack:  # a rehearsal: what it writes disturbs, and so does what is new to the machine
        start(stack, sides, outputs)
    if not check():
        return
    for invocation, order in enumerate(starting_orders(list(sides), chance), 1):
        started = time.monotonic()
        with ExitStack() as stack:
            remotes = start(stack, order, {})
            setup_s = time.monotonic() - started
            left_s = rules.budget_s - (time.monotonic() - began)
            missing = max(1, LEAST_INVOCATIONS + 1 - invocation)  # this one and those that must follow
            affordable_s = (left_s - (missing - 1) * setup_s) / missing
            _play(fought, invocation, remotes, chance, setup_s=setup_s, affordable_s=affordable_s)
        fought.seconds = time.monotonic() - began
        said = speed(fought.turns, rules.threshold)
        show(invocation, said)
        tight = max(said.time.spread, said.noise.spread) < TIGHT * rules.threshold
        spent = fought.seconds * (invocation + 2) / (invocation + 1) > rules.budget_s  # by one more
        if spent or (tight and invocation >= LEAST_INVOCATIONS):
            return


def starting_orders(names: list[str], chance: random.Random) -> Iterator[list[str]]:
    """Orders in which to start the sides, without end: in every three, each side comes once in each place;
    the next three are mirrored, so that none always follows the same other."""
    ring = chance.sample(names, len(names))
    while True:
        for first in range(len(ring)):
            yield ring[first:] + ring[:first]
        ring.reverse()


def _play(
    fought: Fought,
    invocation: int,
    remotes: dict[str, Remote],
    chance: random.Random,
    *,
    setup_s: float,
    affordable_s: float,
) -> None:
    """Rounds for as long as it took to set up, one at the least, each in a new order, there and back."""
    call_s = max(starts[-1]["call_ms"] for starts in fought.starts.values()) / 1e3
    calls = max(1, min(MOST_CALLS, math.ceil(TURN_S / call_s)))
    round_s = 2 * len(remotes) * calls * call_s
    wanted = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(setup_s / round_s)))
    for number in range(max(1, min(wanted, int(affordable_s / round_s)))):
        order = chance.sample(list(remotes), len(remotes))
        if number == 0 and calls > 1:  # the first turn after setting up is slower by up to 10%
            remotes[order[0]].call("turn", calls=calls, warm=False)
        for name in (*order, *reversed(order)):
            samples = remotes[name].call("turn", calls=calls, warm=calls > 1)
            fought.turns.append(Turn(name, invocation, number, statistics.median(samples)))
