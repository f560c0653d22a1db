"""``compare``; its work is in ``fwpkm_bench.comparing``."""

import signal
from pathlib import Path
from typing import Any

import click

from fwpkm_bench.commands.options import interrupt_on, names, numbers, seconds

EXAMPLES = """
\b
Examples:
  fwpkm-bench compare HEAD                               what the working tree changes
  fwpkm-bench compare main my-branch --layers fwpkm --seq 4k,32k --modes prefill,train
  fwpkm-bench compare --a fwpkm.write_rule=authors --b fwpkm.write_rule=projected
  fwpkm-bench compare --layers fwpkm --a backend=eager --b backend=reference --seq 1k
  fwpkm-bench compare results/before results/after
"""


@click.command(epilog=EXAMPLES)
@click.argument("base", required=False)
@click.argument("head", required=False)
@click.option(
    "--layers", "--layer", callback=names, metavar="NAMES", help="Which layers (default: those that differ)."
)
@click.option("--seq", default="4k", metavar="LENGTHS", help="As in sweep (default 4k).")
@click.option(
    "--modes", "--mode", callback=names, default="prefill", help="prefill (default), train, decode."
)
@click.option(
    "--batch", callback=numbers, default="1", metavar="N[,N...]", help="Sequences at a time (default 1)."
)
@click.option("--dtype", callback=names, default="float32", metavar="NAMES", help="As in sweep.")
@click.option("--device", default="cpu", help="cpu (default) or cuda.")
@click.option("--size", default="", help="laptop (default on a CPU) or paper (default on a GPU).")
@click.option(
    "--backend", callback=names, default="best", metavar="NAME", help="Of both sides (default best)."
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of both sides.")
@click.option(
    "--a", multiple=True, metavar="NAME=VALUE", help="A setting of side A, or backend=NAME; repeatable."
)
@click.option("--b", multiple=True, metavar="NAME=VALUE", help="The same of side B.")
@click.option(
    "--threshold", default=0.05, type=click.FloatRange(0.001, 10), help="What counts (default 0.05: 5%)."
)
@click.option("--budget", callback=seconds, default="60s", help="Of timing, a case: 60s (default), 5m.")
@click.option("--timeout", callback=seconds, default="15m", help="For a side to answer (default 15m).")
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

    interrupt_on(signal.SIGTERM)
    asked = command.Options(seq=parse_lengths(seq), budget_s=budget, timeout_s=timeout, **options)
    return command.run(base, head, asked)
