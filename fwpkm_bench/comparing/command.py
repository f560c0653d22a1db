"""What ``fwpkm-bench compare`` does with its arguments."""

import itertools
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from fwpkm_bench import catalog, spec
from fwpkm_bench.compare import Plan, compare, requests
from fwpkm_bench.comparing import results
from fwpkm_bench.comparing.compared import NOTHING_WORSE, Compared, summed_up
from fwpkm_bench.comparing.duel import Rules
from fwpkm_bench.comparing.remote import USAGE, Remote, SideError
from fwpkm_bench.comparing.runs import compare_runs, differences, unmatched
from fwpkm_bench.comparing.sides import Side, changed_layers, export, find_repository
from fwpkm_bench.errors import UsageError, choose
from fwpkm_bench.measure.environment import describe
from fwpkm_bench.run import check_device
from fwpkm_bench.spec import Sweep
from fwpkm_bench.store import RUN

LONGEST_NAME = 80
HARMLESS = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, apart from what is compared."""

    layers: tuple[str, ...] | None
    modes: tuple[str, ...]
    seq: tuple[int, ...]
    batch: tuple[int, ...]
    dtype: tuple[str, ...]
    device: str
    size: str
    backend: tuple[str, ...]
    settings: tuple[str, ...]
    a: tuple[str, ...]
    b: tuple[str, ...]
    threshold: float
    budget_s: float
    timeout_s: float
    seed: int
    profile: bool
    out: Path | None


def run(base: str | None, head: str | None, options: Options) -> int:
    """Compare, write and print; returns the exit code.

    Raises:
        UsageError: before anything is measured or written.
    """
    a, b = (None if name is None else run_folder(name) for name in (base, head))
    if a is not None and b is not None:
        return _runs(a, b, options)
    if a is not None or b is not None:
        raise UsageError("a run folder is compared with another one: fwpkm-bench compare RUN_A RUN_B")
    return _sides(base, head, options)


def run_folder(name: str) -> Path | None:
    """The run folder called ``name``, a path or a name under results/; None where there is none."""
    return next((p for p in (Path(name), Path("results") / name) if (p / RUN).is_file()), None)


def _runs(a: Path, b: Path, options: Options) -> int:
    if options.a or options.b or options.layers or options.settings or options.profile:
        raise UsageError("two run folders are compared as they are; only --threshold and --out apply")
    found = compare_runs(a, b, options.threshold)
    warnings = ["Measured apart: a drift of the machine between the two runs is not excluded."]
    warnings += [f"Different {line}" for line in differences(a, b)]
    if left_out := unmatched(a, b):
        warnings.append(f"{left_out} cases are in one of the two runs alone.")
    out = _out(options, str(a), str(b))
    results.prepare(out)
    return _deliver(found, out, options, ({"label": str(a)}, {"label": str(b)}), warnings)


def _sides(base: str | None, head: str | None, options: Options) -> int:
    check_device(options.device)
    if base is None and not (options.a or options.b):
        raise UsageError(
            "name what to compare: a git ref (HEAD against the working tree: fwpkm-bench compare HEAD), "
            "two run folders, or settings (--a fwpkm.topk=8 --b fwpkm.topk=16)"
        )
    with tempfile.TemporaryDirectory(prefix="fwpkm-bench-") as temporary:
        if base is None:
            a, b = Side("A", _said(options.a)), Side("B", _said(options.b))
        else:
            repository = find_repository()
            a = export(repository, base, "A", Path(temporary))
            b = export(repository, head, "B", Path(temporary))
        layers = options.layers or _layers_to_compare(a, b, options)
        if not layers:
            click.echo("no file of a layer differs between the two; name --layers to compare all the same")
            return NOTHING_WORSE
        if a.repository is not None:
            layers = tuple(_from_root(layer, a.repository) for layer in layers)
        a, b = _with_changes(a, options.a, options), _with_changes(b, options.b, options)
        asked = requests(
            layers,
            options.modes,
            options.seq,
            options.batch,
            options.dtype,
            device=options.device,
            size=options.size,
            backend=options.backend,
            seeds=(options.seed,),
        )
        out = _out(options, a.label, b.label)
        _refuse_what_no_side_has(a, b, asked, options)
        results.prepare(out)
        rules = Rules(options.threshold, options.budget_s, options.timeout_s)
        plan = Plan(a, b, asked, rules, options.seed, options.profile)
        found = compare(plan, lambda line: click.echo(line, err=True))
        return _deliver(found, out, options, (a.describe(), b.describe()), [])


def _refuse_what_no_side_has(a: Side, b: Side, asked: list[dict[str, Any]], options: Options) -> None:
    """What one side lacks is a result; what both lack, or was asked of that side by name, a mistake."""
    Sweep(device=options.device, size=options.size, seq=options.seq, batch=options.batch, dtype=options.dtype)
    modes = catalog.load_workload("throughput").MODES
    for mode in options.modes:
        choose("mode", mode, modes)
    first = {request["layers"]: request for request in reversed(asked)}
    for request in first.values():
        refused = []
        for side in (a, b):
            try:
                Remote(side, request, options.timeout_s).stop()
            except SideError as error:
                if error.status == USAGE:
                    refused.append(error.reason)
                if error.status == USAGE and (options.a if side is a else options.b):
                    raise UsageError(error.reason) from None
        if len(refused) == 2:
            raise UsageError(refused[0])


def _said(changes: tuple[str, ...]) -> str:
    return " ".join(changes) or "as it is"


def _layers_to_compare(a: Side, b: Side, options: Options) -> tuple[str, ...]:
    """Those with settings of a side's own, or else those whose files differ."""
    texts = itertools.chain(options.a, options.b, options.settings)
    named = {text.partition("=")[0].rpartition(".")[0] for text in texts} - {""}
    if named:
        return tuple(sorted(named))
    if a.root is None:
        raise UsageError("name --layers: what differs is a backend, which every layer may have")
    return tuple(changed_layers(a, b, catalog.layer_names()))


def _with_changes(side: Side, changes: tuple[str, ...], options: Options) -> Side:
    """``side`` with ``backend=...`` and ``layer.setting=...``, each of one value."""
    backends = [text.partition("=")[2] for text in changes if text.startswith("backend=")]
    if len(backends) > 1 or len(options.backend) != 1:
        raise UsageError("a side has one backend; compare two with --a backend=NAME --b backend=NAME")
    settings = spec.parse_settings(options.settings)
    settings |= spec.parse_settings(text for text in changes if not text.startswith("backend="))
    for name, values in settings.items():
        if len(values) != 1:
            raise UsageError(f"{name} has {len(values)} values; a side has one")
    label = side.label
    if side.root is not None and changes:
        label += f" with {' '.join(changes)}"
    if side.repository is not None:
        parts = ((*full.rpartition("."), values) for full, values in settings.items())
        settings = {f"{_from_root(owner, side.repository)}.{name}": v for owner, _, name, v in parts}
    return replace(side, label=label, backend=backends[0] if backends else None, settings=settings)


def _from_root(layer: str, repository: Path) -> str:
    """A layer's file as seen from the repository, where each side has its own copy; absolute outside."""
    if not catalog.is_file(layer):
        return layer
    path, colon, rest = layer.rpartition(":")
    full = Path(path).resolve()
    return f"{full.relative_to(repository) if full.is_relative_to(repository) else full}{colon}{rest}"


def _out(options: Options, a: str, b: str) -> Path:
    if options.out is not None:
        return options.out
    names = (HARMLESS.sub("-", label).strip("-")[:LONGEST_NAME] for label in (a, b))
    return Path("results") / "compare" / "--".join(names)


def _deliver(
    found: Compared,
    out: Path,
    options: Options,
    sides: tuple[dict[str, Any], dict[str, Any]],
    warnings: list[str],
) -> int:
    about = {
        "command": shlex.join(["fwpkm-bench", *sys.argv[1:]]),
        "a": sides[0],
        "b": sides[1],
        "threshold": options.threshold,
        "budget_s": options.budget_s,
        "warnings": warnings,
        "environment": describe(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    results.write(out, found, about)
    results.print_table(found)
    for warning in warnings:
        click.echo(warning)
    click.echo(f"tables   {', '.join(sorted(str(path) for path in out.glob('*.csv')))}")
    click.echo(f"report   {out / 'compare.md'}")
    click.echo(summed_up(found))
    return found.exit_code
