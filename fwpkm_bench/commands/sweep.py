"""``sweep``, and what is done with the run folder that it leaves: ``show`` and ``plot``."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click

from fwpkm_bench.commands.options import interrupt_on, names, numbers
from fwpkm_bench.errors import UsageError

EXAMPLES = """
\b
Examples:
  fwpkm-bench sweep --seq 4k..128k
  fwpkm-bench sweep --layers fwpkm,gdn --seq 1k..8k:1k --workloads recall
  fwpkm-bench sweep --layers fwpkm --set fwpkm.topk=4,8,16
  fwpkm-bench sweep sweeps/quick.toml --out /tmp/quick
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", required=False)
@click.option(
    "--seq", metavar="LENGTHS", help="4k..128k (doubling, the default), 4k,16k, 1k..8k:1k, 4k..1m*4."
)
@click.option(
    "--layers", "--layer", callback=names, metavar="NAMES", help="Which layers, or path/to/file.py:Class."
)
@click.option("--workloads", callback=names, metavar="NAMES", help="throughput, recall (default: both).")
@click.option(
    "--modes", callback=names, metavar="NAMES", help="Of throughput: prefill (default), train, decode."
)
@click.option("--batch", callback=numbers, metavar="N[,N...]", help="Sequences at a time (default 1).")
@click.option(
    "--dtype", callback=names, metavar="NAMES", help="float32 (default), bfloat16, float16, float64."
)
@click.option("--device", help="cpu (default) or cuda.")
@click.option(
    "--backend",
    callback=names,
    metavar="NAMES",
    help="Implementations: best (each layer's, the default), eager, reference.",
)
@click.option("--size", help="laptop (default on a CPU) or paper (default on a GPU).")
@click.option("--seeds", callback=numbers, metavar="N[,N...]", help="One case for each (default 0).")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUES", help="Sweep over a setting; repeatable."
)
@click.option(
    "--budget", "budget_s", type=float, metavar="SECONDS", help="Timing budget of a case (default 10)."
)
@click.option(
    "--timeout", "timeout_s", type=float, metavar="SECONDS", help="End a case after this (default 900)."
)
@click.option("--name", help="Name of the run folder under results/.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder itself.")
@click.option("--retry", is_flag=True, help="When going on with a run: the cases that failed, once more.")
@click.option("--profile", is_flag=True, help="Keep the phases of each timed case too (phases.csv).")
@click.option("--dry-run", is_flag=True, help="Say what would run, and run nothing.")
def sweep(
    file: str | None,
    seq: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    retry: bool,
    profile: bool,
    **flags: Any,
) -> None:
    """Measure layers over sequence lengths; running it again finishes what is missing.

    FILE is a sweep in TOML, or the name of one that comes with the package (see list); flags win over it.
    """
    from fwpkm_bench import run as runner
    from fwpkm_bench import spec
    from fwpkm_bench.ranges import parse_lengths

    fields = spec.from_toml(_sweep_file(file)) if file else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if seq is not None:
        fields["seq"] = parse_lengths(seq)
    if settings:
        fields["settings"] = fields.get("settings", {}) | spec.parse_settings(settings)
    asked = spec.Sweep(**fields)
    if out is not None and not str(out).strip("."):
        raise UsageError("--out must name a folder, such as results/mine")
    out = out or Path("results") / asked.folder_name
    if dry_run:
        planned = runner.plan(asked)
        for case in planned:
            click.echo(case.case_id)
        click.echo(f"{len(planned)} cases, to {out}; nothing was run")
        return
    _run_sweep(asked, out, retry, profile)


def _sweep_file(name: str) -> Path:
    from fwpkm_bench import catalog
    from fwpkm_bench.errors import choose

    if name.endswith(".toml") or "/" in name:
        return Path(name)
    files = catalog.sweep_files()
    return files[choose("sweep", name, files)]


def _run_sweep(asked: Any, out: Path, retry: bool, profile: bool) -> None:
    from fwpkm_bench import run as runner
    from fwpkm_bench.display import Display

    command = shlex.join(["fwpkm-bench", *sys.argv[1:]])
    interrupt_on(signal.SIGTERM)
    try:
        with Display() as display:
            runner.run(asked, out, command, display.show, retry=retry, profile=profile)
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; {out} is whole. To finish it: {command}", err=True)
        sys.exit(130)
    frame = report_run(out)
    failed = frame[frame["status"] != "ok"]
    if len(failed):
        counts = ", ".join(f"{n} {status}" for status, n in failed["status"].value_counts().items())
        click.echo(
            f"{len(failed)} of {len(frame)} cases failed ({counts}); --retry runs them again", err=True
        )
    sys.exit(1 if len(failed) == len(frame) else 0)


def report_run(out: Path) -> Any:
    """Draw, write and print what a run folder holds; returns the rows."""
    from fwpkm_bench import plot, report, tables

    frame, short = tables.write_tables(out)
    drawn = plot.draw_all(frame, short, out / "plots")
    report.write(out, frame, short)
    report.print_summary(short)
    click.echo(f"table    {out / 'summary.csv'}")
    for picture in drawn:
        if picture.stem.startswith("overview"):
            click.echo(f"picture  {picture}")
    click.echo(f"report   {out / 'report.html'}")
    return frame


@click.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
def show(run_folder: Path) -> None:
    """Print the table of a run folder, finished or not."""
    from fwpkm_bench import report, tables

    report.print_summary(tables.summary(tables.table(_existing_run(run_folder))))


@click.command("plot")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
def plot_command(run_folder: Path) -> None:
    """Derive the tables of a run folder again, and draw its pictures and report."""
    report_run(_existing_run(run_folder))


def _existing_run(path: Path) -> Path:
    """``path``, or the run of that name under results/."""
    from fwpkm_bench.errors import choose
    from fwpkm_bench.store import RUN

    if (path / RUN).is_file():
        return path
    root = Path("results")
    runs = sorted(str(p.parent.relative_to(root)) for p in root.rglob(RUN)) if root.is_dir() else []
    if not runs:
        raise UsageError(f"{path} is no run folder (no {RUN} in it); run fwpkm-bench sweep first")
    return root / choose("run", str(path), runs)
