"""``profile``; its work is in ``fwpkm_bench.profiling``."""

import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click

from fwpkm_bench.commands.options import interrupt_on, names

EXAMPLES = """
\b
Examples:
  fwpkm-bench profile fwpkm --seq 32k --mode train --size paper
  fwpkm-bench profile fwpkm-decode
  fwpkm-bench profile fwpkm --seq 4k --parts phases,host
"""


@click.command(epilog=EXAMPLES)
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
@click.option("--parts", callback=names, metavar="NAMES", help="Which parts (default: all that apply).")
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

    interrupt_on(signal.SIGTERM)
    return profile_command(target, shlex.join(["fwpkm-bench", *sys.argv[1:]]), **flags)
