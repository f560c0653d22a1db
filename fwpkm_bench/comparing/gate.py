"""Right before fast: each side against side A's reference, and then one side's outputs against the other's.

The first is at a small size, in float32 (a backend that computes in half precision alone: in that), against
float64 on the CPU: outputs, gradients and final state, with side A's parameters and the tolerances of
`measurement`. A float32 that misses is drawn once more, because two scores that tie but for a rounding may be
told apart differently; wrong is what misses twice.

The second is at the size and in the type that are timed, where the same parameters come out of the same seed:
it finds what breaks in large blocks alone. Each token is looked at; a few may differ for the same reason.
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

DRAWS = 2
REFERENCE_TYPES = ("float64", "float32")  # of the oracle, and of what it may lose
TOKEN = 1e-3  # how far a token's output as timed may be off; float32 sums in another order stay below
HALF_TOKEN = 0.25  # in half precision one slot of a few chosen otherwise moves a token by so much
FLIPS, FLIPS_IN = 2, 2000  # tokens that may be further off: two, and one in so many
HALF_FLIPS_IN = 50  # near ties are as much more common as the numbers are coarser

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
    """Checks the sides of all cases; what does not hang on length, mode and batch is checked once."""

    def __init__(self, a: Side, folder: Path, timeout_s: float) -> None:
        self.a, self.folder, self.timeout_s = a, folder, timeout_s
        self._references: dict[str, tuple[int, Path, Outcome, dict[str, float]]] = {}
        self._checked: dict[str, list[Checked]] = {}

    def check(self, case: str, side: Side, request: dict[str, Any], seed: int) -> list[Checked]:
        """Hold ``side`` to the reference of side A with the settings of ``side``.

        Raises:
            SideError: a side fails.
        """
        same = ("layers", "size", "device", "backend", "dtype")
        key = repr((side.name, [request[name] for name in same], seed))
        if key not in self._checked:
            for draw in range(1, DRAWS + 1):
                found = self._check_once(case, side, request, seed + INPUTS * (draw - 1), draw)
                if all(checked.right for checked in found):
                    break
            self._checked[key] = found
        return [replace(checked, case=case) for checked in self._checked[key]]

    def _check_once(
        self, case: str, side: Side, request: dict[str, Any], seed: int, draw: int
    ) -> list[Checked]:
        seed, parameters, expected, losses = self._reference(side, request, seed)
        said, mine = self._outcome(side, request, parameters, request["device"], seed)
        checks = []
        for what, wanted in sorted(expected.items(), key=_outputs_first):
            off = error(mine[what], wanted) if what in mine else float("inf")
            allowed = max(LEAST, SLACK * losses[what]) if said["exact"] else HALF
            checks.append(
                Checked(case, side.name, f"the reference of {self.a.label}", what, off, allowed, draw)
            )
        return checks

    def _reference(
        self, side: Side, request: dict[str, Any], seed: int
    ) -> tuple[int, Path, Outcome, dict[str, float]]:
        """A seed, the parameters that go with it, what the reference of side A says with the settings of
        ``side``, and what it loses in float32.

        Inputs on which the reference itself goes astray in float32 hold a near tie, and would allow anything:
        the next seed's are taken.
        """
        reference = replace(self.a, settings=side.settings, backend="reference")
        asked = request | {"dtype": ("float32",), "device": "cpu"}
        key = repr((side.settings, request["layers"], request["size"], seed))
        if key not in self._references:
            for candidate in range(seed, seed + INPUTS):
                parameters = self.folder / f"parameters-{len(self._references)}"
                (_, expected), (_, rough) = (
                    self._outcome(reference, asked, parameters, "cpu", candidate, dtype)
                    for dtype in REFERENCE_TYPES
                )
                losses = {what: error(rough[what], expected[what]) for what in expected}
                if SLACK * max(losses.values()) <= MOST:
                    self._references[key] = candidate, parameters, expected, losses
                    break
            else:
                reason = f"its reference loses more than {MOST / SLACK:g} in float32, {INPUTS} times over"
                raise SideError(self.a, "unsupported", reason)
        return self._references[key]

    def _outcome(
        self,
        side: Side,
        request: dict[str, Any],
        parameters: Path,
        device: str,
        seed: int,
        dtype: str = "",
    ) -> tuple[dict[str, Any], Outcome]:
        """What `Bench.outcome` says and writes; the oracle draws the parameters, in float64 first."""
        into = self.folder / "outcome"
        with Remote(side, request, self.timeout_s) as remote:
            said = remote.call(
                "outcome",
                into=str(into),
                parameters=str(parameters),
                dtype=dtype,
                device=device,
                seed=seed,
                draw=dtype == REFERENCE_TYPES[0],
            )
        return said, load_file(into)


def compare_outputs(
    case: str, a: Side, b: Side, files: tuple[Path, Path], dtype: str, mode: str
) -> list[Checked]:
    """What both sides gave for the timed case, side B's against side A's: the largest error of a token, but
    for the few that may be off. How many tokens a call decodes depends on its speed: those of both count."""
    expected, mine = map(load_file, files)
    exact = dtype in ("float32", "float64")
    checks = []
    for what, wanted in expected.items():
        got = mine[what]
        if mode == "decode":
            tokens = min(wanted.shape[1], got.shape[1])
            wanted, got = wanted[:, :tokens], got[:, :tokens]
        off = _token_error(got, wanted, FLIPS_IN if exact else HALF_FLIPS_IN)
        allowed = TOKEN if exact else HALF_TOKEN
        checks.append(Checked(case, b.name, a.label, f"{what}, as timed", off, allowed, 1))
    return checks


def error(mine: NDArray[Any], expected: NDArray[Any]) -> float:
    """The relative error in the Euclidean norm; infinite where the shapes differ."""
    if mine.shape != expected.shape:
        return float("inf")
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(mine - expected)) / (size or 1.0)


def _token_error(mine: NDArray[Any], expected: NDArray[Any], flips_in: int) -> float:
    """The largest relative error of a token of ``[B, T, D]`` but for two, and one in ``flips_in``."""
    if mine.shape != expected.shape:
        return float("inf")
    tokens = expected.shape[0] * expected.shape[1]
    sizes = np.linalg.norm(expected, axis=-1).ravel()
    errors = np.linalg.norm(mine - expected, axis=-1).ravel() / np.maximum(sizes, np.median(sizes) or 1.0)
    left_out = min(tokens - 1, FLIPS + tokens // flips_in)
    return float("nan") if np.isnan(errors).any() else float(np.sort(errors)[tokens - 1 - left_out])


def _outputs_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return not item[0].startswith("output"), item[0]
