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
LEAST_ROUNDS, MOST_ROUNDS = 3, 12  # of an invocation
TIGHT = 0.5  # of the threshold: an interval that narrow ends the duel
SECONDS = 1e-3  # a millisecond


@dataclass
class Fought:
    """What a duel gave."""

    turns: list[Turn] = field(default_factory=list)
    starts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by side, what `Bench.start` said
    seconds: float = 0.0


def fight(
    a: Side,
    b: Side,
    request: dict[str, Any],
    *,
    outputs: tuple[Path, Path],
    budget_s: float,
    threshold: float,
    timeout_s: float,
    check: Callable[[Fought], bool],
    show: Callable[[int, Speed], None],
) -> Fought:
    """Time both sides until the interval is tight or ``budget_s`` is spent; the first calls' outputs go to
    the files ``outputs``. ``check`` looks at the first invocation before anything is timed, and may end it.

    Raises:
        SideError: a side fails.
    """
    fought = Fought()
    sides = {"A": a, "B": b, AGAIN: a}
    files = {"A": str(outputs[0]), "B": str(outputs[1])}
    chance = random.Random(0)
    began = time.monotonic()
    invocation = 0
    while True:
        started = time.monotonic()
        with ExitStack() as stack:
            remotes: dict[str, Remote] = {}
            for name in chance.sample(list(sides), len(sides)):
                remotes[name] = stack.enter_context(Remote(sides[name], request, timeout_s))
                into = "" if invocation else files.get(name, "")
                fought.starts.setdefault(name, []).append(remotes[name].call("start", into=into))
            if invocation == 0 and not check(fought):
                break
            setup_s = time.monotonic() - started
            left_s = budget_s - (time.monotonic() - began)
            _rounds(fought, invocation, remotes, chance, setup_s=setup_s, left_s=left_s)
        invocation += 1
        fought.seconds = time.monotonic() - began
        said = speed(fought.turns, threshold)
        show(invocation, said)
        tight = max(said.time.spread, said.noise.spread) < TIGHT * threshold
        if invocation >= LEAST_INVOCATIONS and tight:
            break
        if fought.seconds + fought.seconds / invocation > budget_s:
            break
    return fought


def _rounds(
    fought: Fought,
    invocation: int,
    remotes: dict[str, Remote],
    chance: random.Random,
    *,
    setup_s: float,
    left_s: float,
) -> None:
    """Rounds for about as long as it took to set up, in a new order each, there and back."""
    call_s = max(starts[-1]["call_ms"] for starts in fought.starts.values()) * SECONDS
    calls = max(1, min(MOST_CALLS, math.ceil(TURN_S / call_s)))
    round_s = 2 * len(remotes) * calls * call_s
    wanted = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(setup_s / round_s)))
    affordable = max(1, int(left_s / round_s))
    for number in range(min(wanted, affordable)):
        order = chance.sample(list(remotes), len(remotes))
        for name in (*order, *reversed(order)):
            samples = sorted(remotes[name].call("turn", calls=calls))
            fought.turns.append(Turn(name, invocation, number, samples[len(samples) // 2]))
