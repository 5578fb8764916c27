"""The command line: `plan <verb>`. Composition root; everything else is imported lazily,
so that `plan --help` answers at once and loads no solver."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

import click

from foreserve import __version__
from foreserve.models.errors import ForeserveError, InvalidInput

VERBS = {
    "demo": "foreserve.cli.demo:demo",
    "init": "foreserve.cli.inspect:init",
    "validate": "foreserve.cli.inspect:validate",
    "catalog": "foreserve.cli.catalog:catalog",
    "perf": "foreserve.cli.perf:perf",
    "models": "foreserve.cli.models:models",
    "trace": "foreserve.cli.trace:trace",
    "forecast": "foreserve.cli.forecast:forecast",
    "solve": "foreserve.cli.solve:solve",
    "explain": "foreserve.cli.explain:explain",
    "diff": "foreserve.cli.diff:diff",
    "regret": "foreserve.cli.regret:regret",
    "simulate": "foreserve.cli.simulate:simulate",
    "drift": "foreserve.cli.drift:drift",
    "compare": "foreserve.cli.compare:compare",
    "size": "foreserve.cli.size:size",
    "serve": "foreserve.cli.serve:serve",
    "status": "foreserve.cli.operate:status",
    "approve": "foreserve.cli.operate:approve",
    "reject": "foreserve.cli.operate:reject",
    "drain": "foreserve.cli.operate:drain",
    "stop": "foreserve.cli.operate:stop",
}

BESIDE = {("simulate", "validate"): "foreserve.cli.replay:validate"}
"""Words after a verb that make it another command: `simulate` takes a plan else."""

EXIT_FAILED, EXIT_INPUT, EXIT_NO_PLAN, EXIT_INTERRUPTED = 1, 2, 3, 130


class Verbs(click.Group):
    """Sub-commands by dotted name, imported when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(VERBS[cmd_name]) if cmd_name in VERBS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from foreserve.models.codec import did_you_mean

            hint = did_you_mean(args[0], list(VERBS))
            raise click.UsageError(f"no command {args[0]!r}: {hint}", ctx)
        if (words := tuple(args[:2])) in BESIDE:
            return " ".join(words), _command(BESIDE[words]), args[2:]
        return super().resolve_command(ctx, args)


def _command(name: str) -> click.Command:
    module, _, attribute = name.partition(":")
    command: click.Command = getattr(import_module(module), attribute)
    return command


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: plan demo --output out",
)
@click.version_option(__version__, prog_name="foreserve")
def cli() -> None:
    """Plan and run many LLMs on one shared GPU cluster."""


def main() -> None:
    """Run the command line and exit with the documented code."""
    as_json = "--json" in sys.argv
    try:
        # A command returns its exit code where 0 is not the whole story.
        code = cli.main(prog_name="plan", standalone_mode=False)
    except InvalidInput as error:
        _report([str(error), *map(str, error.also)], as_json)
        code = EXIT_INPUT
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "plan"
        _report([f"{error.format_message()} (see `{verb} --help`)"], as_json)
        code = EXIT_INPUT
    except click.ClickException as error:
        _report([error.format_message()], as_json)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _report(["interrupted"], as_json)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`plan ... | head`): end quietly, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (ForeserveError, OSError) as error:
        _report([str(error)], as_json)
        code = EXIT_FAILED
    sys.exit(code if isinstance(code, int) else 0)


def _report(lines: list[str], as_json: bool) -> None:
    for line in lines:
        click.echo(f"error: {line}", err=True)
    if as_json:
        click.echo(json.dumps({"error": {"message": lines[0], "all": lines}}))
