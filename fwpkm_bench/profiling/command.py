"""The body of ``fwpkm-bench profile``."""

import sys
from pathlib import Path
from typing import Any

from fwpkm_bench import spec
from fwpkm_bench.display import duration
from fwpkm_bench.errors import UsageError
from fwpkm_bench.profiling import run as runner
from fwpkm_bench.profiling.folder import PHASES, read_table
from fwpkm_bench.profiling.page import print_phases
from fwpkm_bench.profiling.spec import Profile, case_of, fields_of, folder_name
from fwpkm_bench.ranges import parse_lengths
from fwpkm_bench.run import check_device


def profile_command(
    target: str,
    command: str,
    *,
    seq: str | None,
    settings: tuple[str, ...],
    parts: tuple[str, ...] | None,
    out: Path | None,
    dry_run: bool,
    ncu: bool,
    nsys: bool,
    **flags: Any,
) -> int:
    """Profile ``target``; flags win over what a file of it says. Returns the exit code."""
    fields = fields_of(target) | {name: value for name, value in flags.items() if value is not None}
    if seq is not None:
        fields["seq"] = parse_lengths(seq)
    if settings:
        fields["settings"] = fields.get("settings", {}) | spec.parse_settings(settings)
    asked = tuple(name for name, wanted in (("ncu", ncu), ("nsys", nsys)) if wanted)
    if parts is not None or asked:
        fields["parts"] = (*(fields.get("parts", ()) if parts is None else parts), *asked)
    profile = Profile(**fields)
    case = case_of(profile)
    if out is not None and not str(out).strip("."):
        raise UsageError("--out must name a folder, such as results/mine")
    out = out or Path("results") / folder_name(profile, case)
    if dry_run:
        print(f"{case.case_id}: {', '.join(profile.chosen_parts(case))}, to {out}; nothing was run")
        return 0
    check_device(case.device)
    try:
        outcomes = runner.run(profile, case, out, command, show)
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130
    delivered = [outcome["part"] for outcome in outcomes if outcome["status"] == "ok"]
    if not delivered:
        print(f"nothing could be delivered, and nothing was written to {out}", file=sys.stderr)
        return 1
    if "phases" in delivered:
        print_phases(read_table(out / PHASES))
    for path in sorted(out.iterdir()):
        print(path)
    return 0


def show(outcome: runner.Outcome) -> None:
    """One line a part, as it ends."""
    said = outcome["reason"] or duration(outcome["elapsed_s"])
    print(f"{outcome['part']:<8} {outcome['status']:<12} {said}", file=sys.stderr, flush=True)
