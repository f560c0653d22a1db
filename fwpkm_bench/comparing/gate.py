"""Right before fast: each side against side A's reference, and then one side's outputs against the other's.

The first is at a small size, in float64 on the CPU: outputs, gradients and final state, with side A's
parameters and the tolerances of `measurement`. A float32 that misses is drawn once more, because two scores
that tie but for a rounding may be told apart differently; wrong is what misses twice.

The second is at the size that is timed, where the same parameters come out of the same seed: it finds what
breaks in large blocks alone. There a selected slot or two may differ for the same reason, hence `FLIPS`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fwpkm_bench.comparing.remote import Remote, SideError
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.measurement import HALF, INPUTS, LEAST, MOST, SLACK

FLIPS = 2e-3
DRAWS = 2
DOUBLE, SINGLE = "float64", "float32"
EXACT = (DOUBLE, SINGLE)

Outcome = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Checked:
    """One quantity of one side."""

    case: str
    side: str
    against: str
    what: str
    error: float  # |mine - expected| / |expected|, both in the Euclidean norm
    allowed: float
    draw: int  # 1, or 2 where the first inputs missed

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # NaN is not


class Gate:
    """Checks the two sides of a case; what the reference gives is computed once for the same settings."""

    def __init__(self, a: Side, folder: Path, timeout_s: float) -> None:
        self.a, self.folder, self.timeout_s = a, folder, timeout_s
        self._known: dict[str, tuple[int, Path, Outcome, dict[str, float]]] = {}

    def check(self, case: str, side: Side, request: dict[str, Any], seed: int) -> list[Checked]:
        """Hold ``side`` to the reference of side A with the settings of ``side``.

        Raises:
            SideError: a side fails.
        """
        found: list[Checked] = []
        for draw in range(1, DRAWS + 1):
            found = self._check_once(case, side, request, seed + INPUTS * (draw - 1), draw)
            (dtype,) = request["dtype"]
            if dtype not in EXACT or all(checked.right for checked in found):
                break
        return found

    def _check_once(
        self, case: str, side: Side, request: dict[str, Any], seed: int, draw: int
    ) -> list[Checked]:
        (dtype,) = request["dtype"]
        seed, parameters, expected, losses = self._oracle(side, request, seed)
        mine = self._outcome(side, request, parameters, dtype, request["device"], seed, draw=False)
        checks = []
        for what, wanted in sorted(expected.items(), key=_outputs_first):
            off = error(mine[what], wanted) if what in mine else float("inf")
            allowed = max(LEAST, SLACK * losses[what]) if dtype in EXACT else HALF
            checks.append(Checked(case, side.name, f"reference of {self.a.label}", what, off, allowed, draw))
        return checks

    def _oracle(
        self, side: Side, request: dict[str, Any], seed: int
    ) -> tuple[int, Path, Outcome, dict[str, float]]:
        """A seed, the parameters that go with it, what the reference of side A says with the settings of
        ``side``, and what it loses in float32.

        Inputs on which the reference itself goes astray in float32 hold a near tie, and would allow anything:
        the next seed's are taken.
        """
        reference = replace(self.a, settings=side.settings, backend="reference")
        key = repr((side.settings, request["layers"], request["size"], seed))
        if key not in self._known:
            for candidate in range(seed, seed + INPUTS):
                parameters = self.folder / f"parameters-{len(self._known)}"
                expected, rough = (
                    self._outcome(reference, request, parameters, kind, "cpu", candidate, draw=kind == DOUBLE)
                    for kind in EXACT
                )
                losses = {what: error(rough[what], expected[what]) for what in expected}
                if SLACK * max(losses.values()) <= MOST:
                    self._known[key] = candidate, parameters, expected, losses
                    break
            else:
                reason = f"its reference loses more than {MOST / SLACK:g} in float32, {INPUTS} times over"
                raise SideError(self.a, "unsupported", reason)
        return self._known[key]

    def _outcome(
        self,
        side: Side,
        request: dict[str, Any],
        parameters: Path,
        dtype: str,
        device: str,
        seed: int,
        *,
        draw: bool,
    ) -> Outcome:
        into = self.folder / "outcome"
        with Remote(side, request, self.timeout_s) as remote:
            remote.call(
                "outcome",
                into=str(into),
                parameters=str(parameters),
                dtype=dtype,
                device=device,
                seed=seed,
                draw=draw,
            )
        return load_file(into)


def compare_outputs(case: str, a: Side, b: Side, files: tuple[Path, Path], dtype: str) -> list[Checked]:
    """The outputs that both sides gave for the timed case, side B's against side A's, over the tokens that
    both read: how many a call decodes depends on their speed."""
    expected, mine = map(load_file, files)
    allowed = FLIPS if dtype in EXACT else HALF
    checks = []
    for what, wanted in expected.items():
        tokens = min(wanted.shape[1], mine[what].shape[1])
        off = error(mine[what][:, :tokens], wanted[:, :tokens])
        checks.append(Checked(case, b.name, a.label, f"{what}, as timed", off, allowed, 1))
    return checks


def _outputs_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return not item[0].startswith("output"), item[0]


def error(mine: NDArray[Any], expected: NDArray[Any]) -> float:
    """The relative error in the Euclidean norm; infinite where the shapes differ."""
    if mine.shape != expected.shape:
        return float("inf")
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(mine - expected)) / (size or 1.0)
