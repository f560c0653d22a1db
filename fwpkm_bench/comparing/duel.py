"""Two sides, timed in turns: A B C C B A, each side a process of its own, C a second one of side A.

All three processes stay for the rounds of an invocation, one at work and two waiting, and are then started
afresh, because where a process finds its memory makes it a few percent faster or slower for life.
"""

import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwpkm_bench.comparing.remote import Remote
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.comparing.verdicts import AGAIN, LEAST_INVOCATIONS, Speed, Turn, speed

TURN_S = 0.1  # a turn is as many calls as this takes, and counts as their median
MOST_CALLS = 100
MOST_ROUNDS = 12  # of an invocation
TIGHT = 0.5  # of the threshold: an interval that narrow ends the duel


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
    looks at the first invocation before anything is timed, and may end it.

    Raises:
        SideError: a side fails; ``fought`` has what came before.
    """
    sides = {"A": a, "B": b, AGAIN: a}
    chance = random.Random(0)
    began = time.monotonic()
    invocation = 0
    while True:
        started = time.monotonic()
        with ExitStack() as stack:
            remotes: dict[str, Remote] = {}
            for name in chance.sample(list(sides), len(sides)):
                remotes[name] = stack.enter_context(Remote(sides[name], request, rules.timeout_s))
                into = "" if invocation else str(outputs[name])
                fought.starts.setdefault(name, []).append(remotes[name].call("start", into=into))
            if invocation == 0 and not check():
                return
            setup_s = time.monotonic() - started
            left_s = rules.budget_s - (time.monotonic() - began)
            missing = max(1, LEAST_INVOCATIONS - invocation)  # this one and those that must follow
            affordable_s = (left_s - (missing - 1) * setup_s) / missing
            _rounds(fought.turns, invocation, remotes, _call_s(fought), chance, min(setup_s, affordable_s))
        invocation += 1
        fought.seconds = time.monotonic() - began
        said = speed(fought.turns, rules.threshold)
        show(invocation, said)
        tight = max(said.time.spread, said.noise.spread) < TIGHT * rules.threshold
        if invocation >= LEAST_INVOCATIONS and tight:
            return
        if fought.seconds + fought.seconds / invocation > rules.budget_s:
            return


def _call_s(fought: Fought) -> float:
    """What the slowest side takes for a call."""
    return max(starts[-1]["call_ms"] for starts in fought.starts.values()) / 1e3


def _rounds(
    turns: list[Turn],
    invocation: int,
    remotes: dict[str, Remote],
    call_s: float,
    chance: random.Random,
    seconds: float,
) -> None:
    """Rounds for about ``seconds``, but one at least, in a new order each, there and back."""
    calls = max(1, min(MOST_CALLS, math.ceil(TURN_S / call_s)))
    round_s = 2 * len(remotes) * calls * call_s
    for number in range(max(1, min(MOST_ROUNDS, round(seconds / round_s)))):
        order = chance.sample(list(remotes), len(remotes))
        for name in (*order, *reversed(order)):
            samples = sorted(remotes[name].call("turn", calls=calls))
            turns.append(Turn(name, invocation, number, samples[len(samples) // 2]))
