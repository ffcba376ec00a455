"""The edge of the program: settings in; one sentence and an exit code out, never a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import pytest
import structlog
import trio

from p2pmesh import __version__, cli
from p2pmesh.config import BY_NAME, SETTINGS, Address, Settings, variable
from p2pmesh.errors import ConfigError, LinkError, LocalError, MeshError, PeerError

BUG = "p2pmesh: this is a bug, please report it with what --debug shows: "


@dataclass(frozen=True)
class Outcome:
    code: object
    out: str
    err: str


Run = Callable[..., Outcome]


class Probe:
    """Stands for every command: keeps what it was given, or fails as it is told to."""

    def __init__(self) -> None:
        self.settings: Settings | None = None
        self.debug: object = None
        self.act: Callable[[], object] = lambda: None

    def __call__(self, ctx: click.Context) -> None:
        self.settings, self.debug = ctx.obj, ctx.meta["debug"]
        self.act()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Probe]:
    """Three commands beside the real ones, and a home without a config file."""
    probe = Probe()
    module = ModuleType("probing")
    group = click.Group("many", help="Do one of many.")
    group.add_command(_command("one", probe))
    vars(module).update(all=_command("all", probe), few=_command("few", probe), many=group)
    monkeypatch.setitem(sys.modules, "probing", module)
    commands = {
        "all": ("probing:all", cli.ALL),
        "few": ("probing:few", ("home",)),
        "many": ("probing:many", ("home", "slots")),
    }
    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, **commands})
    for name in BY_NAME:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv("P2PMESH_HOME", str(tmp_path))
    handlers, level = logging.root.handlers, logging.root.level
    yield probe
    structlog.reset_defaults()
    logging.root.handlers = handlers
    logging.root.setLevel(level)


def _command(name: str, probe: Probe) -> click.Command:
    @click.command(name)
    @click.pass_context
    def command(ctx: click.Context) -> None:
        """Do what the test wants."""
        probe(ctx)

    return command


@pytest.fixture
def run(probe: Probe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The program, in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["p2pmesh", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        sys.stdout.flush()
        said = capfd.readouterr()
        return Outcome(caught.value.code, said.out, said.err)

    return run


def raising(exc: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise exc

    return act


# Settings


def test_a_command_gets_its_settings(run: Run, probe: Probe, tmp_path: Path) -> None:
    assert run("all") == Outcome(0, "", "")
    assert probe.settings == Settings(home=tmp_path, given=frozenset({"home"}))
    assert probe.debug is False
    run("all", "--debug", "--slots=2", "--model", "a", "--model=b")
    assert probe.settings == Settings(
        home=tmp_path, slots=2, model=("a", "b"), given=frozenset({"home", "slots", "model"})
    )
    assert probe.debug is True


def test_option_before_variable_before_file_before_default(
    run: Run, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slots(*arguments: str) -> int:
        assert run("all", *arguments) == Outcome(0, "", "")
        assert probe.settings is not None
        return probe.settings.slots

    assert slots() == 4
    (tmp_path / "config.toml").write_text("slots = 5\napi = 8080\n", "utf-8")
    assert slots() == 5
    monkeypatch.setenv("P2PMESH_SLOTS", "6")
    assert slots() == 6
    assert slots("--slots=7") == 7
    assert probe.settings is not None
    assert probe.settings.api == Address("127.0.0.1", 8080)
    assert probe.settings.given == {"home", "slots", "api"}


def test_what_an_option_overrides_is_not_looked_at(
    run: Run, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PMESH_MEMORY", "plenty")
    (tmp_path / "config.toml").write_text("memory = 'plenty'", "utf-8")
    assert run("all", "--memory=8GiB") == Outcome(0, "", "")
    assert probe.settings is not None
    assert probe.settings.memory == 8 * 2**30


def test_the_config_file_is_that_of_the_named_home(run: Run, probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("slots = 5", "utf-8")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.toml").write_text("slots = 6", "utf-8")
    run("few")
    assert probe.settings is not None
    assert probe.settings.slots == 5
    run("few", "--home", str(other))
    assert (probe.settings.home, probe.settings.slots) == (other, 6)


def test_a_command_takes_only_the_options_that_it_reads(run: Run) -> None:
    outcome = run("few", "--slots=2")
    assert outcome.code == 2
    assert "No such option" in outcome.err
    shown = run("few", "-h").out
    assert "--home DIR" in shown
    assert "--debug" in shown
    assert "--slots" not in shown


def test_commands_of_a_group_take_them_too(run: Run, probe: Probe) -> None:
    for _ in range(2):  # the second time, the group has its options already
        assert run("many", "one", "--slots=3") == Outcome(0, "", "")
        assert probe.settings is not None
        assert probe.settings.slots == 3
    assert run("many", "one", "-h").out.count("--slots") == 1


@pytest.mark.parametrize("name", [one.name for one in SETTINGS if not one.flag])
def test_a_wrong_option_is_one_sentence_that_names_it(run: Run, name: str) -> None:
    outcome = run("all", f"--{name}", "")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"p2pmesh: --{name}: ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("name", [one.name for one in SETTINGS if one.flag])
def test_a_flag_stands_alone(run: Run, probe: Probe, name: str) -> None:
    assert run("all", f"--{name}") == Outcome(0, "", "")
    assert probe.settings is not None
    assert getattr(probe.settings, BY_NAME[name].field) is True
    assert run("all", f"--{name}=yes").code == 2


def test_a_wrong_variable_is_one_sentence_that_names_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PMESH_API", "anna:99999")
    sentence = "p2pmesh: P2PMESH_API: port 99999 does not exist: ports go up to 65535\n"
    assert run("all") == Outcome(2, "", sentence)


def test_an_unknown_key_in_the_file_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("solts = 5", "utf-8")
    sentence = "p2pmesh: config.toml: there is no setting 'solts' for it; did you mean slots?\n"
    assert run("few") == Outcome(2, "", sentence)


def test_a_config_file_that_cannot_be_read_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    outcome = run("all")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"p2pmesh: Cannot read {tmp_path / 'config.toml'} (")


@pytest.mark.parametrize(("debug", "logged"), [([], 0), (["--debug"], 1)])
def test_what_is_logged_never_gets_among_the_answers(
    run: Run, probe: Probe, debug: list[str], logged: int
) -> None:
    probe.act = lambda: structlog.get_logger("p2pmesh.models").warning("model_skipped")
    outcome = run("all", *debug)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.count("model_skipped") == logged


# What goes wrong


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (ConfigError("wrong"), 2),
        (LocalError("wrong"), 1),
        (LinkError("wrong"), 1),
        (ExceptionGroup("", [LocalError("wrong")]), 1),
        (ExceptionGroup("", [ExceptionGroup("", [ConfigError("wrong")])]), 2),
        (BaseExceptionGroup("", [KeyboardInterrupt(), ConfigError("wrong")]), 2),
    ],
)
def test_an_error_is_its_sentence_and_exit_code(
    run: Run, probe: Probe, exc: BaseException, code: int
) -> None:
    probe.act = raising(exc)
    assert run("all") == Outcome(code, "", "p2pmesh: wrong\n")


def test_an_error_out_of_nested_nurseries_is_its_sentence(run: Run, probe: Probe) -> None:
    async def fail() -> None:
        try:
            raise OSError("reset")
        except OSError as exc:
            raise PeerError("the peer broke the rules") from exc

    async def outer() -> None:
        async with trio.open_nursery() as nursery, trio.open_nursery() as inner:
            nursery.start_soon(trio.sleep_forever)
            inner.start_soon(fail)

    probe.act = lambda: trio.run(outer)
    assert run("all") == Outcome(1, "", "p2pmesh: the peer broke the rules\n")


@pytest.mark.parametrize(
    ("exc", "what"),
    [
        (KeyError("lost"), "KeyError: 'lost'"),
        (ValueError("of\n  two lines"), "ValueError: of two lines"),
        (
            ExceptionGroup("", [TypeError("a"), OSError(5, "b")]),
            "TypeError: a; OSError: [Errno 5] b",
        ),
        (AssertionError(), "AssertionError:"),
    ],
)
def test_a_bug_is_one_sentence_that_says_so(
    run: Run, probe: Probe, exc: BaseException, what: str
) -> None:
    probe.act = raising(exc)
    assert run("all") == Outcome(1, "", f"{BUG}{what}\n")


@pytest.mark.parametrize("kind", [PeerError, KeyError])
def test_an_error_steers_no_terminal(run: Run, probe: Probe, kind: type[Exception]) -> None:
    probe.act = raising(kind("\x1b[2J\u202eno\nentry" + "x" * 10_000))
    outcome = run("all")
    assert outcome.err.count("\n") == 1
    assert outcome.err.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("exc", "end"),
    [
        (KeyError("lost"), f"{BUG}KeyError: 'lost'\n"),
        (LocalError("wrong"), "p2pmesh: wrong\n"),
        (ExceptionGroup("", [LocalError("wrong")]), "p2pmesh: wrong\n"),
    ],
)
def test_debug_shows_the_traceback_before_the_sentence(
    run: Run, probe: Probe, exc: BaseException, end: str
) -> None:
    probe.act = raising(exc)
    outcome = run("all", "--debug")
    assert (outcome.code, outcome.out) == (1, "")
    assert "Traceback (most recent call last)" in outcome.err
    assert outcome.err.endswith(end)


@pytest.mark.parametrize(
    "exc",
    [
        KeyboardInterrupt(),
        BaseExceptionGroup("", [KeyboardInterrupt()]),
        BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt()])]),
    ],
)
def test_an_interrupt_is_130_without_words(run: Run, probe: Probe, exc: BaseException) -> None:
    probe.act = raising(exc)
    outcome = run("all")
    assert (outcome.code, outcome.out, outcome.err.strip()) == (130, "", "")


def test_a_reader_that_has_seen_enough_hides_no_other_error(run: Run, probe: Probe) -> None:
    probe.act = raising(ExceptionGroup("", [BrokenPipeError(32, "x"), LocalError("wrong")]))
    assert run("all") == Outcome(1, "", "p2pmesh: wrong\n")


# What is asked for wrongly, and what is asked for rightly


@pytest.mark.parametrize(
    "arguments",
    [
        ["bogus"],
        ["--bogus"],
        ["--debug"],
        ["all", "--bogus"],
        ["all", "--slots"],
        ["all", "extra"],
        ["many", "bogus"],
        ["up", "--api"],
        ["engine", "bogus"],
        ["status", "--slots=1"],
    ],
)
def test_a_wrong_usage_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("p2pmesh: ")
    assert outcome.err.count("\n") == 1
    assert "--help" in outcome.err


def test_no_command_shows_the_commands(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "p2pmesh" in outcome.err
    assert all(f"\n  {name} " in outcome.err for name in cli.COMMANDS)


def test_help_lists_the_commands_in_the_order_of_the_table(run: Run) -> None:
    outcome = run("-h")
    assert (outcome.code, outcome.err) == (0, "")
    places = [outcome.out.index(f"\n  {name} ") for name in cli.COMMANDS]
    assert places == sorted(places)
    assert run("--help") == outcome


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_its_settings(run: Run, name: str) -> None:
    # Not -h: click keeps what a command's first use was, and other tests use these without it.
    outcome = run(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    if "Commands:" not in outcome.out:
        assert all(f"--{setting} " in outcome.out for setting in cli.COMMANDS[name][1])
        assert "--debug" in outcome.out


def test_the_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"p2pmesh {__version__}\n", "")


@pytest.mark.parametrize("exc", MeshError.__subclasses__())
def test_exit_codes_are_1_and_2(exc: type[MeshError]) -> None:
    assert exc.exit_code == (2 if exc is ConfigError else 1)
