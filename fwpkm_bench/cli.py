"""The command line: click commands only; what is heavy is imported inside them."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fwpkm_bench import __version__
from fwpkm_bench.errors import UsageError

LONGEST_S = 7 * 24 * 3600
TRACEBACK = "FWPKM_BENCH_TRACEBACK"  # set: let internal errors through whole

SWEEP_EXAMPLES = """
\b
Examples:
  fwpkm-bench sweep --seq 4k..128k
  fwpkm-bench sweep --layers fwpkm,gdn --seq 1k..8k:1k --workloads recall
  fwpkm-bench sweep --layers fwpkm --set fwpkm.topk=4,8,16
  fwpkm-bench sweep sweeps/quick.toml --out /tmp/quick
"""


COMPARE_EXAMPLES = """
\b
Examples:
  fwpkm-bench compare HEAD                               what the working tree changes
  fwpkm-bench compare main my-branch --layers fwpkm --seq 4k,32k --modes prefill,train
  fwpkm-bench compare --a fwpkm.write_rule=authors --b fwpkm.write_rule=projected
  fwpkm-bench compare --layers fwpkm --a backend=eager --b backend=reference --seq 1k
  fwpkm-bench compare results/before results/after
"""

PROFILE_EXAMPLES = """
\b
Examples:
  fwpkm-bench profile fwpkm --seq 32k --mode train --size paper
  fwpkm-bench profile fwpkm-decode
  fwpkm-bench profile fwpkm --seq 4k --parts phases,host
"""


class OneLineErrors(click.Group):
    """Every mistake of the user's is one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            click.echo(f"fwpkm-bench: {error}", err=True)
            ctx.exit(2)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            result = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.ClickException as error:
            click.echo(f"fwpkm-bench: {error.format_message()} (see fwpkm-bench --help)", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(130)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            click.echo(
                f"fwpkm-bench: internal error, please report it: {what} ({TRACEBACK}=1 shows where)", err=True
            )
            sys.exit(70)
        sys.exit(result if isinstance(result, int) else 0)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fwpkm-bench")
def main() -> None:
    """What each kind of sequence memory costs, and what it can recall.

    Softmax attention, linear attention, the gated delta rule, product key memory and fast-weight
    product key memory, measured side by side: tokens a second, memory and recall.
    """


def _names(_ctx: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(v.strip() for v in value.split(",") if v.strip())


def _numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    names = _names(ctx, option, value)
    if names is None:
        return None
    bad = [n for n in names if not (n.isascii() and n.isdecimal() and int(n) < 2**63)]
    if bad:
        raise UsageError(f"--{option.name} takes whole numbers such as 1,8; {bad[0]!r} is none")
    return tuple(int(n) for n in names)


def _seconds(_ctx: click.Context, option: click.Parameter, value: str) -> float:
    """``90``, ``90s`` or ``1.5m`` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|)", value.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < seconds <= LONGEST_S:
        raise UsageError(f"--{option.name} takes a time such as 90s or 5m, above 0; {value!r} is none")
    return seconds


@main.command(epilog=SWEEP_EXAMPLES)
@click.argument("file", required=False)
@click.option(
    "--seq", metavar="LENGTHS", help="4k..128k (doubling, the default), 4k,16k, 1k..8k:1k, 4k..1m*4."
)
@click.option(
    "--layers", "--layer", callback=_names, metavar="NAMES", help="Which layers, or path/to/file.py:Class."
)
@click.option("--workloads", callback=_names, metavar="NAMES", help="throughput, recall (default: both).")
@click.option(
    "--modes", callback=_names, metavar="NAMES", help="Of throughput: prefill (default), train, decode."
)
@click.option("--batch", callback=_numbers, metavar="N[,N...]", help="Sequences at a time (default 1).")
@click.option(
    "--dtype", callback=_names, metavar="NAMES", help="float32 (default), bfloat16, float16, float64."
)
@click.option("--device", help="cpu (default) or cuda.")
@click.option(
    "--backend",
    callback=_names,
    metavar="NAMES",
    help="Implementations: best (each layer's, the default), eager, reference.",
)
@click.option("--size", help="laptop (default on a CPU) or paper (default on a GPU).")
@click.option("--seeds", callback=_numbers, metavar="N[,N...]", help="One case for each (default 0).")
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
    _interrupt_on(signal.SIGTERM)
    try:
        with Display() as display:
            runner.run(asked, out, command, display.show, retry=retry, profile=profile)
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; {out} is whole. To finish it: {command}", err=True)
        sys.exit(130)
    frame = _report(out)
    failed = frame[frame["status"] != "ok"]
    if len(failed):
        counts = ", ".join(f"{n} {status}" for status, n in failed["status"].value_counts().items())
        click.echo(
            f"{len(failed)} of {len(frame)} cases failed ({counts}); --retry runs them again", err=True
        )
    sys.exit(1 if len(failed) == len(frame) else 0)


def _interrupt_on(number: int) -> None:
    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(number, interrupt)


def _report(out: Path) -> Any:
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


@main.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
def show(run_folder: Path) -> None:
    """Print the table of a run folder, finished or not."""
    from fwpkm_bench import report, tables

    report.print_summary(tables.summary(tables.table(_existing_run(run_folder))))


@main.command("plot")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
def plot_command(run_folder: Path) -> None:
    """Derive the tables of a run folder again, and draw its pictures and report."""
    _report(_existing_run(run_folder))


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


@main.command("list")
def list_command() -> None:
    """List layers, workloads, the sweeps that come with the package, and other people's layers."""
    from fwpkm_bench import catalog

    groups: dict[str, Callable[[], Any]] = {
        "layers": catalog.layer_names,
        "workloads": catalog.workload_names,
        "sweeps": catalog.sweep_files,
        "profiles": catalog.profile_files,
    }
    for title, names in groups.items():
        click.echo(f"{title:<10} {' '.join(names())}")
    for number, name in enumerate(catalog.peer_names()):
        said = catalog.peer_absence(name) or "installed"
        click.echo(f"{'' if number else 'peers':<10} {name:<22} {said}")


@main.command()
@click.option("--device", default="cpu", help="cpu (default) or cuda.")
@click.option("--layers", "--layer", callback=_names, metavar="NAMES", help="Which layers (default: all).")
@click.option("--backend", callback=_names, metavar="NAMES", help="Which backends (default: all).")
@click.option(
    "--variants",
    callback=_names,
    metavar="NAMES",
    help="Of the settings: plain (default on a CPU, where interpreted kernels take their time), all (default "
    "on a GPU), or some of shared, projected, drop, dot, top-1, two-heads, narrow, many-subkeys, bfloat16.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the inputs (default: a fresh one).")
def verify(
    device: str,
    layers: tuple[str, ...] | None,
    backend: tuple[str, ...] | None,
    variants: tuple[str, ...] | None,
    seed: int | None,
) -> int:
    """Hold every backend of every layer to its reference on a device: outputs, gradients, states.

    A miss is looked at once more, with fresh inputs, and told as "second draw": where two scores nearly tie,
    float32 may rightly choose another slot than float64.

    Each backend runs in a process of its own; one that dies, or fails, is told, and the rest goes on.

    Exits with 1 where one is wrong or fails, and with 4 where none could be checked.
    """
    import secrets

    from fwpkm_bench import catalog, parity, report
    from fwpkm_bench import verify as verification
    from fwpkm_bench.errors import choose
    from fwpkm_bench.run import check_device

    check_device(device)
    if device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 would interpret the kernels, not run them on the GPU; unset it")
    chosen = layers or tuple(catalog.layer_names())
    for name in chosen:
        catalog.check_layer(name)
    known = [v.name for v in parity.VARIANTS]
    named = variants or (("all",) if device == "cuda" else ("plain",))
    names = tuple(known) if named == ("all",) else tuple(choose("variant", n, known) for n in named)
    seed = secrets.randbelow(2**31) if seed is None else seed
    checks = verification.verify(chosen, backend or (), device, seed, names)
    report.print_checks(checks, seed)
    if any(check.status in ("wrong", "failed") for check in checks):
        return 1
    return 0 if any(check.status == "ok" for check in checks) else 4


@main.command(epilog=COMPARE_EXAMPLES)
@click.argument("base", required=False)
@click.argument("head", required=False)
@click.option(
    "--layers", "--layer", callback=_names, metavar="NAMES", help="Which layers (default: those that differ)."
)
@click.option("--seq", default="4k", metavar="LENGTHS", help="As in sweep (default 4k).")
@click.option(
    "--modes", "--mode", callback=_names, default="prefill", help="prefill (default), train, decode."
)
@click.option(
    "--batch", callback=_numbers, default="1", metavar="N[,N...]", help="Sequences at a time (default 1)."
)
@click.option("--dtype", callback=_names, default="float32", metavar="NAMES", help="As in sweep.")
@click.option("--device", default="cpu", help="cpu (default) or cuda.")
@click.option("--size", default="", help="laptop (default on a CPU) or paper (default on a GPU).")
@click.option(
    "--backend", callback=_names, default="best", metavar="NAME", help="Of both sides (default best)."
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of both sides.")
@click.option(
    "--a", multiple=True, metavar="NAME=VALUE", help="A setting of side A, or backend=NAME; repeatable."
)
@click.option("--b", multiple=True, metavar="NAME=VALUE", help="The same of side B.")
@click.option(
    "--threshold", default=0.05, type=click.FloatRange(0.001, 10), help="What counts (default 0.05: 5%)."
)
@click.option("--budget", callback=_seconds, default="60s", help="Of timing, a case: 60s (default), 5m.")
@click.option("--timeout", callback=_seconds, default="15m", help="For a side to answer (default 15m).")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="Of inputs and parameters (default 0).")
@click.option("--profile", is_flag=True, help="Of what got slower, show which phase.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder for tables, page and picture.")
def compare(
    base: str | None, head: str | None, seq: str, budget: float, timeout: float, **options: Any
) -> int:
    """Learn whether a change is right and whether it truly helped.

    BASE and HEAD are git refs (HEAD: the working tree, if not named) or two run folders; or name neither,
    and give --a and --b. First the results of both sides are checked; then the sides are timed in turns, in
    processes of their own, until the interval is tight or the budget is spent.

    Exits with 0 where nothing is worse, 1 for a regression, 3 for wrong results, 4 where a side could not be
    measured.
    """
    from fwpkm_bench.comparing import command
    from fwpkm_bench.ranges import parse_lengths

    _interrupt_on(signal.SIGTERM)
    asked = command.Options(seq=parse_lengths(seq), budget_s=budget, timeout_s=timeout, **options)
    return command.run(base, head, asked)


@main.command("kernels")
@click.option(
    "--layers", "--layer", callback=_names, metavar="NAMES", help="Which layers (default: fwpkm,pkm)."
)
@click.option(
    "--capability", default=90, type=click.IntRange(75, 121), help="Of the GPU (default 90, Hopper)."
)
def kernels_command(layers: tuple[str, ...] | None, capability: int) -> None:
    """Compile the Triton kernels for a GPU, here or not: registers, spills, shared memory."""
    from fwpkm_bench import catalog, report
    from fwpkm_bench.measure import compiled

    chosen = list(layers or ("fwpkm", "pkm"))
    for name in chosen:
        catalog.check_layer(name)
        if "triton" not in catalog.load_layer(name).backends:
            raise UsageError(f"{name} has no backend triton; fwpkm and pkm have")
    report.print_kernels(compiled.report(chosen, capability), capability)


@main.command(epilog=PROFILE_EXAMPLES)
@click.argument("target", metavar="LAYER|PROFILE")
@click.option("--seq", metavar="LENGTH", help="Tokens (default 32k); in decode the context.")
@click.option("--mode", help="prefill (default), train or decode.")
@click.option("--backend", help="Implementation: best (default), eager, triton, reference ...")
@click.option("--batch", type=int, metavar="N", help="Sequences at a time (default 1).")
@click.option("--dtype", help="float32 (default), bfloat16, float16 or float64.")
@click.option("--device", help="cpu (default) or cuda.")
@click.option("--size", help="laptop (default on a CPU) or paper (default on a GPU).")
@click.option("--seed", type=int, metavar="N", help="Of parameters and inputs (default 0).")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting; repeatable.")
@click.option("--parts", callback=_names, metavar="NAMES", help="Which parts (default: all that apply).")
@click.option("--ncu", is_flag=True, help="Also Nsight Compute, on one more call, where it is on the path.")
@click.option("--nsys", is_flag=True, help="Also Nsight Systems, in the same way.")
@click.option("--budget", "budget_s", type=float, metavar="SECONDS", help="For timing phases (default 10).")
@click.option("--timeout", "timeout_s", type=float, metavar="SECONDS", help="End a part after this.")
@click.option("--name", help="Name of the folder under results/.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder itself.")
@click.option("--dry-run", is_flag=True, help="Say what would run, and run nothing.")
def profile(target: str, **flags: Any) -> int:
    """Where the time and the memory of one case go: phases, trace, host, memory, kernels.

    LAYER is a layer's name or path/to/file.py:Class; PROFILE a profile in TOML, or the name of one that comes
    with the package (see list), over which flags win. Exits with 1 where no part could be delivered.
    """
    from fwpkm_bench.profiling.command import profile_command

    _interrupt_on(signal.SIGTERM)
    return profile_command(target, shlex.join(["fwpkm-bench", *sys.argv[1:]]), **flags)


@main.command()
def doctor() -> None:
    """Say what is installed, which devices are there, and which backends can run, or why not."""
    from fwpkm_bench import report

    report.print_doctor()
