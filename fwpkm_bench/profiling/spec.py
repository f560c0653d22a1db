"""A profile is data too: one case, and which parts to look at it in."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwpkm_bench import catalog, spec
from fwpkm_bench.errors import UsageError, choose
from fwpkm_bench.ranges import format_length
from fwpkm_bench.spec import Case, Sweep, Value

PARTS = ("phases", "trace", "host", "memory", "kernels")
ON_REQUEST = ("ncu", "nsys")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was asked for; `case` is what that comes to.

    ``parts`` empty: all of `PARTS` that apply.
    """

    name: str = ""
    layer: str = "fwpkm"
    seq: tuple[int, ...] = (32 * 1024,)
    mode: str = "prefill"
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = spec.BEST
    size: str = ""
    seed: int = 0
    budget_s: float = 10.0
    timeout_s: float = 900.0
    parts: tuple[str, ...] = ("",)
    settings: dict[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(filter(None, self.parts)))
        for part in self.parts:
            choose("part of a profile", part, (*PARTS, *ON_REQUEST))
        if len(self.seq) != 1:
            lengths = ", ".join(map(format_length, self.seq))
            raise UsageError(f"a profile is of one length, got {lengths}; write --seq 32k")
        for name, values in self.settings.items():
            if len(values) != 1:
                raise UsageError(f"a profile is of one case; give {name} one value, not {len(values)}")

    def chosen_parts(self, case: Case) -> tuple[str, ...]:
        """The parts to run: Triton's compile report only where its kernels run, or where asked for."""
        usual = [part for part in PARTS if part != "kernels" or case.backend == "triton"]
        asked = self.parts or usual
        if self.parts and set(self.parts) <= set(ON_REQUEST):
            asked = [*usual, *self.parts]
        return tuple(dict.fromkeys(sorted(asked, key=(*PARTS, *ON_REQUEST).index)))


def case_of(profile: Profile) -> Case:
    """The one case of ``profile``.

    Raises:
        UsageError: a layer, mode, backend or setting that is not there.
    """
    sweep = Sweep(
        name=profile.name,
        seq=profile.seq,
        layers=(profile.layer,),
        workloads=("throughput",),
        modes=(profile.mode,),
        batch=(profile.batch,),
        dtype=(profile.dtype,),
        device=profile.device,
        backend=(profile.backend,),
        size=profile.size,
        seeds=(profile.seed,),
        budget_s=profile.budget_s,
        timeout_s=profile.timeout_s,
        settings=profile.settings,
    )
    (case,) = spec.cases(sweep)
    return case


def folder_name(profile: Profile, case: Case) -> str:
    """``profile-fwpkm-train-32k-eager``, or the profile's own name."""
    if profile.name:
        return f"profile-{profile.name}"
    layer = Path(case.layer.rpartition(":")[0]).stem if catalog.is_file(case.layer) else case.layer
    parts = (layer.replace(":", "-"), case.mode, format_length(case.seq), case.backend)
    return "-".join(("profile", *parts))


def fields_of(target: str) -> dict[str, Any]:
    """The fields of a `Profile` that ``target`` sets: a layer, a file, or a profile of the package.

    Raises:
        UsageError: it is none of them.
    """
    if catalog.is_file(target):
        return {"layer": target}
    files = catalog.profile_files()
    if target.endswith(".toml") or "/" in target:
        return spec.from_toml(Path(target), Profile)
    if target in files:
        return spec.from_toml(files[target], Profile)
    layers = [*catalog.layer_names(), *catalog.peer_names()]
    return {"layer": choose("layer or profile", target, (*layers, *files))}
