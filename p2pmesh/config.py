"""Every setting of a node, in one table.

From `SETTINGS` come the command line's options, the `P2PMESH_*` variables, the keys of
`config.toml`, `--help` and the README's table; a test compares them. A value is looked up in that
order (option, variable, file, default) and parsed by one function per kind, wherever it stands.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from p2pmesh.errors import ConfigError
from p2pmesh.sharing import DIVERGENCE_LIMIT, DIVERGENCE_MAX, MILLION, Sharing
from p2pmesh.web_policy import parse_host, parse_origin

ENV_PREFIX = "P2PMESH_"
CONFIG_FILE = "config.toml"
PORT_MAX = 65535
HOST_CHARS_MAX = 253  # as long as a name can be in DNS
NAME_CHARS_MAX = 64
SLOTS_MAX = 64  # each takes a thread of the engine; more only wait for each other
SPLIT_MAX = 8  # more stages never made one stream faster
SIZE_BYTES_MAX = 2**60  # far above any machine, and still a number that the wire format takes

_DIVERGENCE = re.compile(r"kl=(\d{1,4}(?:\.\d{1,9})?)", re.ASCII)
_SIZE = re.compile(
    r"(?P<number>\d{1,18}(\.\d{1,18})?)\s?(?P<unit>([KMGT](I?B)?|B)?)", re.ASCII | re.IGNORECASE
)
_INVITATION = re.compile(r"p2pmesh(-recovery)?[0-9]+-")  # or what is mistaken for one
_EXPONENT = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """A host (name or IP literal) and a TCP port; port 0 asks for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, default: Address | None = None) -> Address:
    """`HOST:PORT`, `[V6]:PORT`, and with a default also `HOST`, `:PORT` or `PORT`.

    A host that comes out of here can be given to the resolver: names from outside cannot make it
    raise anything but its own errors.

    Raises:
        ValueError: The sentence says what is wrong with `text`.
    """
    text = text.strip()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not an address: write [::1]:9338")
        port_text = rest[1:]
    elif text.count(":") > 1:
        host, port_text = text, ""
    elif text.isdigit():
        host, port_text = "", text
    else:
        host, _, port_text = text.partition(":")
    if default is not None and (host or port_text):
        host, port_text = host or default.host, port_text or str(default.port)
    if not re.fullmatch("[0-9]+", port_text) or not (host := _resolvable(host)):
        raise ValueError(f"{text!r} is not an address: write HOST:PORT, like 192.168.1.5:9338")
    port_text = port_text.lstrip("0") or "0"
    if len(port_text) > len(str(PORT_MAX)) or int(port_text) > PORT_MAX:
        raise ValueError(f"port {port_text[:20]} does not exist: ports go up to {PORT_MAX}")
    return Address(host, int(port_text))


def _resolvable(host: str) -> str:
    """The host as the resolver takes it, in ASCII; "" when it is none."""
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
        else:
            host = host.encode("idna").decode("ascii")
    except ValueError:
        return ""
    plain = host.isascii() and host.isprintable() and not set(host) & set(" /[]")
    return host if plain and len(host) <= HOST_CHARS_MAX else ""


def parse_size(text: str) -> int:
    """Bytes from `8GiB`, `8G`, `500MB` or a plain number of bytes.

    Raises:
        ValueError: The sentence says what is wrong with `text`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write it like 8GiB or 500MB")
    unit = match["unit"].upper()
    base = 1000 if unit.endswith("B") and "I" not in unit else 1024
    size_bytes = int(Fraction(match["number"]) * base ** _EXPONENT[unit.rstrip("IB")])
    if not 0 < size_bytes < SIZE_BYTES_MAX:
        raise ValueError(f"{text!r} is no size that a machine can have")
    return size_bytes


def _parse_name(text: str) -> str:
    name = text.strip()
    if not name or len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise ValueError(f"{text!r} is not a name: 1 to {NAME_CHARS_MAX} printable characters")
    return name


def _count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text.strip()) or not 0 < int(text) <= most:
            raise ValueError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return parse


def _parse_split(text: str) -> int:
    if not re.fullmatch("[0-9]{1,2}", text.strip()) or not 2 <= int(text) <= SPLIT_MAX:
        raise ValueError(f"{text!r} is not a number of nodes from 2 to {SPLIT_MAX}")
    return int(text)


def _parse_sharing(text: str) -> Sharing:
    if text.strip() not in set(Sharing):
        raise ValueError(f"{text!r} is not one of {', '.join(Sharing)}")
    return Sharing(text.strip())


def _parse_divergence(text: str) -> int:
    """Read how far shards may be from the whole model: `kl=0.10` -> 100000 millionths of a nat."""
    match = _DIVERGENCE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a largest divergence: write it like kl=0.10, in nats per token"
        )
    divergence = int(Fraction(match[1]) * MILLION)
    if divergence > DIVERGENCE_LIMIT:
        raise ValueError(f"{text!r} is more than any model diverges from another")
    return divergence


def _parse_path(text: str) -> Path:
    if not text.strip():
        raise ValueError("the path is empty")
    if "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:
        raise ValueError(f"there is no home directory for {text!r}") from exc


def _parse_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the value is empty")
    return text.strip()


def _parse_flag(text: str) -> bool:
    word = text.strip().lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is neither yes nor no")


def parse_join(text: str) -> Address | str:
    """An address, or an invitation as it was given: `identity/tokens.py` reads it.

    Raises:
        ValueError: The sentence says what is wrong with `text`.
    """
    if _INVITATION.match(text.strip().lower()):
        return text.strip()
    return parse_address(text, default=parse_address("127.0.0.1:9338"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table.

    Attributes:
        name: Also the option (`--name`), the variable (`P2PMESH_NAME`) and the key in the file.
        unit: What a value looks like; shown in `--help`.
        default: As a user would write it; "" when unset.
        parse: Turns text into the value, or raises ValueError with a sentence.
        help: One sentence.
        many: May be given several times (in a variable: separated by commas).
        flag: As an option it stands alone; elsewhere its value is yes or no.
    """

    name: str
    unit: str
    default: str
    parse: Callable[[str], Any]
    help: str
    many: bool = False
    flag: bool = False

    @property
    def field(self) -> str:
        """The attribute of `Settings`."""
        return self.name.replace("-", "_")


def _address(default: str) -> Callable[[str], Address]:
    return lambda text: parse_address(text, default=parse_address(default))


SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="home",
        unit="DIR",
        default="",
        parse=_parse_path,
        help="Where this node keeps everything it writes (default: the system's data folder).",
    ),
    Setting(
        name="name",
        unit="NAME",
        default="",
        parse=_parse_name,
        help="What people call this node (default: the host name).",
    ),
    Setting(
        name="api",
        unit="HOST:PORT",
        default="127.0.0.1:9337",
        parse=_address("127.0.0.1:9337"),
        help="Where the OpenAI-compatible API listens; port 0 picks a free one.",
    ),
    Setting(
        name="console",
        unit="HOST:PORT",
        default="127.0.0.1:3131",
        parse=_address("127.0.0.1:3131"),
        help="Where the web console listens; port 0 picks a free one.",
    ),
    Setting(
        name="peer",
        unit="HOST:PORT",
        default="[::]:9338",
        parse=_address("[::]:9338"),
        help="Where other nodes reach this one, [::] on IPv4 and IPv6; port 0 picks a free one.",
    ),
    Setting(
        name="join",
        unit="TOKEN",
        default="",
        parse=parse_join,
        help="An invitation to a mesh, or HOST:PORT of a member (default: this node's last mesh, "
        "else an open one that is heard on this network, else a new one).",
        many=True,
    ),
    Setting(
        name="mesh",
        unit="NAME",
        default="",
        parse=_parse_name,
        help="The open mesh of this network to join, or what a new one is called.",
    ),
    Setting(
        name="private",
        unit="",
        default="",
        parse=_parse_flag,
        help="Let only those join whom somebody invites.",
        flag=True,
    ),
    Setting(
        name="open",
        unit="",
        default="",
        parse=_parse_flag,
        help="Let anybody on this network join, also where the mesh was not founded.",
        flag=True,
    ),
    Setting(
        name="recovery-code",
        unit="",
        default="",
        parse=_parse_flag,
        help="Found a mesh and tell the code by which a member becomes an admin.",
        flag=True,
    ),
    Setting(
        name="no-discovery",
        unit="",
        default="",
        parse=_parse_flag,
        help="Neither announce the mesh nor listen for others on this network.",
        flag=True,
    ),
    Setting(
        name="model",
        unit="MODEL",
        default="",
        parse=_parse_text,
        help="A model for the mesh to serve: a GGUF file or the name of one found here.",
        many=True,
    ),
    Setting(
        name="engine",
        unit="PATH",
        default="",
        parse=_parse_path,
        help="The llama-server to use (default: the installed one, $PATH, the embedded one).",
    ),
    Setting(
        name="memory",
        unit="SIZE",
        default="",
        parse=parse_size,
        help="Memory for models, taken exactly, like 8GiB (default: most of what is free).",
    ),
    Setting(
        name="disk",
        unit="SIZE",
        default="",
        parse=parse_size,
        help="Disk for the expert shards that are made here (default: half of what is free).",
    ),
    Setting(
        name="context",
        unit="TOKENS",
        default="",
        parse=_count(2**31 - 1),
        help="Context that requests share (default: the model's own, at most 32768).",
    ),
    Setting(
        name="slots",
        unit="COUNT",
        default="4",
        parse=_count(SLOTS_MAX),
        help="Requests that one engine works on at the same time.",
    ),
    Setting(
        name="split",
        unit="COUNT",
        default="",
        parse=_parse_split,
        help="Nodes that share each --model as one pipeline, this one with its first layers.",
    ),
    Setting(
        name="moe",
        unit="WAY",
        default="auto",
        parse=_parse_sharing,
        help="How a model of experts that fits on no node is shared: experts, layers, or auto.",
    ),
    Setting(
        name="moe-quality",
        unit="BOUND",
        default="kl=0.10",
        parse=_parse_divergence,
        help="How far the answers of expert shards may be from those of the whole model.",
    ),
    Setting(
        name="hosts",
        unit="NAME",
        default="",
        parse=parse_host,
        help="A public name of this node, of a reverse proxy say, that API and console answer to.",
        many=True,
    ),
    Setting(
        name="origins",
        unit="ORIGIN",
        default="",
        parse=parse_origin,
        help="Origin of web pages, like https://ai.example.org, for the API or a proxied console.",
        many=True,
    ),
)

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A node's settings, parsed. `given` names those that do not come from the defaults."""

    home: Path | None = None
    name: str | None = None
    api: Address = Address("127.0.0.1", 9337)
    console: Address = Address("127.0.0.1", 3131)
    peer: Address = Address("::", 9338)  # all of IPv4 and IPv6: peers come from other machines
    join: tuple[Address | str, ...] = ()
    mesh: str | None = None
    private: bool = False
    open: bool = False
    recovery_code: bool = False
    no_discovery: bool = False
    model: tuple[str, ...] = ()
    engine: Path | None = None
    memory: int | None = None
    disk: int | None = None
    context: int | None = None
    slots: int = 4
    split: int | None = None
    moe: Sharing = Sharing.AUTO
    moe_quality: int = DIVERGENCE_MAX
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()


assert {one.name for one in fields(Settings)} == {*(s.field for s in SETTINGS), "given"}, (
    "table and class differ"
)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper().replace("-", "_")


def resolve(
    options: Mapping[str, str | Sequence[str] | None],
    environ: Mapping[str, str],
    file_text: str = "",
) -> Settings:
    """Settings from the command line, the environment and the text of a `config.toml`.

    Args:
        options: By setting name; None or () where the option was not used.
        environ: The environment variables.
        file_text: What the config file holds; "" when there is none.

    Raises:
        ConfigError: A value or key cannot be used; names where it stands.
    """
    in_file = _read_toml(file_text)
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        option = options.get(setting.name)
        if option is not None and option != ():
            where, raw = f"--{setting.name}", [option] if isinstance(option, str) else list(option)
        elif text := environ.get(variable(setting.name)):
            where, raw = variable(setting.name), text.split(",") if setting.many else [text]
        elif setting.name in in_file:
            where, raw = f"{CONFIG_FILE}: {setting.name}", in_file[setting.name]
        else:
            continue
        parsed = [_parse(setting, where, text) for text in raw]
        values[setting.field] = tuple(parsed) if setting.many else parsed[-1]
    return Settings(**values, given=frozenset(values))


def _parse(setting: Setting, where: str, text: str) -> Any:
    try:
        return setting.parse(text)
    except ValueError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def _read_toml(text: str) -> dict[str, list[str]]:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{CONFIG_FILE} is not valid TOML: {exc}") from exc
    found: dict[str, list[str]] = {}
    for key, value in table.items():
        if key not in BY_NAME or key == "home":
            close = difflib.get_close_matches(key, BY_NAME, n=1)
            hint = f"; did you mean {close[0]}?" if close and close[0] != "home" else ""
            raise ConfigError(f"{CONFIG_FILE}: there is no setting {key!r} for it{hint}")
        many = value if isinstance(value, list) else [value]
        takes = (str, int, bool) if BY_NAME[key].flag else (str, int)
        if not many or not all(type(item) in takes for item in many):
            what = "true or false" if BY_NAME[key].flag else "text or a number"
            raise ConfigError(f"{CONFIG_FILE}: {key} must be {what}")
        if len(many) > 1 and not BY_NAME[key].many:
            raise ConfigError(f"{CONFIG_FILE}: {key} takes one value")
        found[key] = [str(item) for item in many]
    return found


def settings_table() -> str:
    """The table of settings as the README shows it, in Markdown."""
    rows = ["| setting | value | default | what it does |", "| --- | --- | --- | --- |"]
    for setting in SETTINGS:
        unit = "yes or no" if setting.flag else setting.unit
        unit = f"{unit}, repeatable" if setting.many else unit
        default = f"`{setting.default}`" if setting.default else ""
        rows.append(f"| `{setting.name}` | {unit} | {default} | {setting.help} |")
    return "\n".join(rows)
