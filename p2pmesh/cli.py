"""The command line: settings in, one command run, one sentence and an exit code out.

Exit codes: 0 done, 1 it did not work, 2 it was asked for wrongly. `--debug` shows tracebacks.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import click

from p2pmesh import __version__
from p2pmesh.commands.formatting import line
from p2pmesh.config import BY_NAME, Setting, resolve
from p2pmesh.errors import MeshError
from p2pmesh.home import Home
from p2pmesh.log import configure

ALL = tuple(BY_NAME)

# Name: (where its command is, which settings it takes as options). In the order of `--help`.
COMMANDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("p2pmesh.commands.demo:demo", ("model", "engine", "memory", "context", "slots")),
    "up": ("p2pmesh.commands.up:up", ALL),
    "join": ("p2pmesh.commands.join:join", ALL),
    "invite": ("p2pmesh.commands.invite:invite", ("home",)),
    "members": ("p2pmesh.commands.members:members", ("home",)),
    "admit": ("p2pmesh.commands.admit:admit", ("home",)),
    "grant": ("p2pmesh.commands.grant:grant", ("home",)),
    "revoke": ("p2pmesh.commands.revoke:revoke", ("home",)),
    "recover": ("p2pmesh.commands.recover:recover", ("home",)),
    "leave": ("p2pmesh.commands.leave:leave", ("home",)),
    "status": ("p2pmesh.commands.status:status", ("home",)),
    "models": ("p2pmesh.commands.models:models", ("home",)),
    "plan": ("p2pmesh.commands.plan:plan", ("home",)),
    "chat": ("p2pmesh.commands.chat:chat", ("home",)),
    "doctor": ("p2pmesh.commands.doctor:doctor", ALL),
    "engine": ("p2pmesh.commands.engine:engine", ("home", "engine")),
    "experts": ("p2pmesh.commands.experts:experts", ("home", "engine", "disk", "moe-quality")),
}


class LazyGroup(click.Group):
    """Imports a command's module when it is asked for: a quick one never loads a node."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """All names, in the order in which people need them."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's
        cmd_name: str,
    ) -> click.Command | None:
        """The command, with the options of the settings that it reads."""
        if cmd_name not in COMMANDS:
            return None
        where, names = COMMANDS[cmd_name]
        module, _, attribute = where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return with_settings(command, names)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="p2pmesh %(version)s")
def cli() -> None:
    """A peer-to-peer mesh of machines that serves language models, without a coordinator."""


def with_settings(command: click.Command, names: Iterable[str]) -> click.Command:
    """Give a command (of a group: each of its commands) options that make its `Settings`.

    Args:
        command: Finds the settings in click's `ctx.obj`.
        names: Which rows of the table it takes as options; the others come from elsewhere.
    """
    names = tuple(names)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            with_settings(inner, names)
        return command
    if getattr(command, "has_settings", False):
        return command
    assert command.callback is not None
    command.params += [_option(BY_NAME[name]) for name in names]
    command.params.append(
        click.Option(["--debug"], is_flag=True, help="Log everything and show tracebacks.")
    )
    command.callback = _resolving(command.callback, names)
    command.has_settings = True  # type: ignore[attr-defined]  # commands are module globals
    return command


def _option(setting: Setting) -> click.Option:
    if setting.flag:
        return click.Option(
            [f"--{setting.name}", f"setting_{setting.field}"],
            is_flag=True,
            flag_value="yes",
            type=str,
            default=None,
            help=setting.help,
        )
    return click.Option(
        [f"--{setting.name}", f"setting_{setting.field}"],
        metavar=setting.unit,
        multiple=setting.many,
        help=setting.help,
        default=None,
    )


def _resolving(callback: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def resolved(**params: Any) -> Any:
        options = {name: params.pop(f"setting_{BY_NAME[name].field}") for name in names}
        context = click.get_current_context()
        debug = context.meta["debug"] = params.pop("debug")
        # Never on standard output, where answers go. A node opens a file as well.
        configure(None, debug=debug)
        # Where the config file lies depends on --home: so once without the file.
        home = Home.of(resolve(options, os.environ))
        context.obj = resolve(options, os.environ, home.read_config())
        return callback(**params)

    return resolved


def main() -> NoReturn:
    """The program `p2pmesh`."""
    debug = "--debug" in sys.argv
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as exc:
        code = exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        code = exc.exit_code
    except click.ClickException as exc:
        code = _refuse(exc)
    except click.Abort:
        code = 130
    except SystemExit:
        code = 0  # only click raises it: whoever read the output has seen enough
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:  # noqa: BLE001 - the edge
        code = _report(exc, debug=debug)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(exc: click.ClickException) -> int:
    """Say in one sentence what is wrong with the command line; returns the exit code."""
    where = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else "p2pmesh"
    what = line(exc.format_message()).removesuffix(".")
    click.echo(f"p2pmesh: {what}; see {where} --help", err=True)
    return exc.exit_code


def _report(exc: BaseException, *, debug: bool) -> int:
    """Say in one sentence what ended the command; returns the exit code."""
    if debug:
        traceback.print_exception(exc)
    leaves = list(_leaves(exc))
    for leaf in leaves:
        if isinstance(leaf, MeshError):
            click.echo(f"p2pmesh: {line(leaf)}", err=True)
            return leaf.exit_code
    if all(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return 130
    if all(isinstance(leaf, BrokenPipeError) for leaf in leaves):
        return 0  # the same, out of a nursery
    what = line("; ".join(f"{type(leaf).__name__}: {leaf}" for leaf in leaves))
    click.echo(
        f"p2pmesh: this is a bug, please report it with what --debug shows: {what}", err=True
    )
    return 1


def _leaves(exc: BaseException) -> Iterable[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
