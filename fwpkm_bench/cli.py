"""The command line: the group of the commands, and how a mistake of the user's ends."""

import os
import sys
from typing import Any

import click

from fwpkm_bench import __version__
from fwpkm_bench.commands import check, compare, profile, sweep
from fwpkm_bench.errors import UsageError

TRACEBACK = "FWPKM_BENCH_TRACEBACK"  # set: let internal errors through whole


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


for command in (
    *(sweep.sweep, sweep.show, sweep.plot_command),
    *(compare.compare, profile.profile),
    *(check.list_command, check.verify, check.kernels_command, check.doctor),
):
    main.add_command(command)
