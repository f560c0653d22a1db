"""What is there and whether it is right: ``list``, ``doctor``, ``verify`` and ``kernels``."""

import os
from collections.abc import Callable
from typing import Any

import click

from fwpkm_bench.commands.options import names
from fwpkm_bench.errors import UsageError


@click.command("list")
def list_command() -> None:
    """List layers, workloads, the sweeps that come with the package, and other people's layers."""
    from fwpkm_bench import catalog

    groups: dict[str, Callable[[], Any]] = {
        "layers": catalog.layer_names,
        "workloads": catalog.workload_names,
        "sweeps": catalog.sweep_files,
        "profiles": catalog.profile_files,
    }
    for title, known in groups.items():
        click.echo(f"{title:<10} {' '.join(known())}")
    for number, name in enumerate(catalog.peer_names()):
        said = catalog.peer_absence(name) or "installed"
        click.echo(f"{'' if number else 'peers':<10} {name:<22} {said}")


@click.command()
@click.option("--device", default="cpu", help="cpu (default) or cuda.")
@click.option("--layers", "--layer", callback=names, metavar="NAMES", help="Which layers (default: all).")
@click.option("--backend", callback=names, metavar="NAMES", help="Which backends (default: all).")
@click.option(
    "--variants",
    callback=names,
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


@click.command("kernels")
@click.option(
    "--layers", "--layer", callback=names, metavar="NAMES", help="Which layers (default: fwpkm,pkm)."
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


@click.command()
def doctor() -> None:
    """Say what is installed, which devices are there, and which backends can run, or why not."""
    from fwpkm_bench import report

    report.print_doctor()
