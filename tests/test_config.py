"""The table of settings: parsers, places and their order."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pmesh.config import (
    BY_NAME,
    HOST_CHARS_MAX,
    NAME_CHARS_MAX,
    SETTINGS,
    SIZE_BYTES_MAX,
    Address,
    Settings,
    parse_address,
    parse_join,
    parse_size,
    resolve,
    settings_table,
    variable,
)
from p2pmesh.errors import ConfigError
from p2pmesh.sharing import Sharing

DEFAULT = Address("127.0.0.1", 9338)

# A value for each setting, as text and as what comes out.
SAMPLES: dict[str, tuple[str, object]] = {
    "home": ("somewhere", Path("somewhere")),
    "name": ("kitchen-pc", "kitchen-pc"),
    "api": ("127.0.0.2:1", Address("127.0.0.2", 1)),
    "console": ("127.0.0.2:2", Address("127.0.0.2", 2)),
    "peer": ("127.0.0.2:3", Address("127.0.0.2", 3)),
    "join": ("anna:4", (Address("anna", 4),)),
    "mesh": ("our-house", "our-house"),
    "private": ("yes", True),
    "open": ("on", True),
    "recovery-code": ("yes", True),
    "no-discovery": ("true", True),
    "model": ("tiny", ("tiny",)),
    "engine": ("bin/llama-server", Path("bin/llama-server")),
    "moe": ("experts", Sharing.EXPERTS),
    "moe-quality": ("kl=0.5", 500_000),
    "memory": ("8GiB", 8 * 2**30),
    "disk": ("50GB", 50 * 10**9),
    "context": ("4096", 4096),
    "slots": ("2", 2),
    "split": ("3", 3),
    "hosts": ("AI.example.org", ("ai.example.org",)),
    "origins": ("https://ai.example.org:443/", ("https://ai.example.org",)),
}

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
hosts = names | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
addresses = st.builds(Address, hosts, st.integers(0, 65535))


# Addresses


@given(addresses)
@example(Address("fe80::1%eth0", 9338))
@example(Address("localhost", 0))
def test_an_address_that_is_shown_is_read_again(address: Address) -> None:
    assert parse_address(str(address)) == address
    assert parse_address(f"  {address}\n") == address
    assert parse_address(str(address), default=DEFAULT) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8080", Address("127.0.0.1", 8080)),
        (":8080", Address("127.0.0.1", 8080)),
        ("anna", Address("anna", 9338)),
        ("anna:", Address("anna", 9338)),
        ("0.0.0.0", Address("0.0.0.0", 9338)),
        ("::1", Address("::1", 9338)),
        ("[::1]", Address("::1", 9338)),
        ("[::1]:80", Address("::1", 80)),
        ("anna:00080", Address("anna", 80)),
        ("küche.local:1", Address("xn--kche-0ra.local", 1)),
    ],
)
def test_what_is_left_out_comes_from_the_default(text: str, address: Address) -> None:
    assert parse_address(text, default=DEFAULT) == address


@pytest.mark.parametrize("text", ["8080", ":8080", "anna", "anna:", "::1", "[::1]"])
def test_without_a_default_an_address_is_whole(text: str) -> None:
    with pytest.raises(ValueError, match="write HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":",
        "[]",
        "anna:-1",
        "anna:8O",
        "anna:٣",
        "anna:²",
        "anna:80:80",
        "1.2.3.4:80,5.6.7.8:80",
        "http://anna:80",
        "anna:80/v1",
        "an na:80",
        "an\0na:80",
        "an\nna:80",
        "[::1:80",
        "[::1]80",
        "[anna]x:80",
        "::1]:80",
        "fe80::1%a b",
        ".:80",
        "a..b:80",
        "☃\udcff:80",
        "a" * 64 + ":80",
        ".".join(["a" * 49] * 6) + ":80",
    ],
)
def test_what_is_no_address_is_said_with_an_example(text: str) -> None:
    for default in (None, DEFAULT):
        with pytest.raises(ValueError, match="is not an address: write"):
            parse_address(text, default=default)


@pytest.mark.parametrize("port", ["65536", "99999999", "9" * 5000])
def test_a_port_that_does_not_exist_is_said(port: str) -> None:
    with pytest.raises(ValueError, match=r"^port \d{1,20} does not exist: ports go up to 65535$"):
        parse_address(f"anna:{port}")


@given(st.text(max_size=80) | st.text(alphabet="a1:.[]%/ \0ü☃", max_size=20))
def test_junk_is_a_value_error_or_an_address_that_can_be_resolved(text: str) -> None:
    for default in (None, DEFAULT):
        try:
            address = parse_address(text, default=default)
        except ValueError as exc:
            assert str(exc)  # noqa: PT017 - any ValueError will do, with a sentence
            continue
        assert parse_address(str(address)) == address
        assert len(address.host) <= HOST_CHARS_MAX
        address.host.encode("ascii")
        try:
            flags = socket.AI_NUMERICHOST  # asks nobody
            socket.getaddrinfo(address.host, address.port, flags=flags)
        except OSError:
            pass  # a name, not a number; nothing else may come


# Sizes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("500", 500),
        ("500B", 500),
        ("1k", 2**10),
        ("1KB", 1000),
        ("1KiB", 2**10),
        ("1.5G", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        (" 8G ", 8 * 2**30),
        ("2TB", 2 * 10**12),
        ("2T", 2**41),
        ("0.001KB", 1),
        (str(2**53 + 1), 2**53 + 1),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@given(st.integers(1, SIZE_BYTES_MAX - 1))
def test_a_number_of_bytes_is_taken_exactly(size_bytes: int) -> None:
    if size_bytes < 10**18:
        assert parse_size(str(size_bytes)) == size_bytes
    if size_bytes % 2**10 == 0:
        assert parse_size(f"{size_bytes // 2**10}KiB") == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "G",
        "8GG",
        "8XB",
        "8iB",
        "-1",
        "+1",
        "1e3",
        "1_000",
        "nan",
        "inf",
        "٣G",
        "8,5G",
        "1G 1",
    ],
)
def test_what_is_no_size_is_said_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write it like 8GiB or 500MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "divergence"),
    [("kl=0", 0), ("kl=0.1", 100_000), (" kl=2.5 ", 2_500_000), ("kl=0.0000019", 1)],
)
def test_a_bound_of_quality_is_read_in_millionths(text: str, divergence: int) -> None:
    assert resolve({"moe-quality": text}, {}).moe_quality == divergence


@pytest.mark.parametrize(
    "text", ["0.1", "kl=", "kl=-1", "kl=1e3", "KL=0.1", "kl=nan", "ppl=3", "kl=99999", "kl=0,1"]
)
def test_what_is_no_bound_of_quality_is_said_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--moe-quality: .*write it like kl=0.10"):
        resolve({"moe-quality": text}, {})


def test_more_than_any_model_diverges_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than any model diverges"):
        resolve({"moe-quality": "kl=101"}, {})


def test_a_way_of_sharing_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="is not one of auto, experts, layers"):
        resolve({"moe": "Experts"}, {})


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0001", "1048576TiB", "999999999999999999T"])
def test_a_size_beyond_all_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size that a machine can have"):
        parse_size(text)


@given(st.text(max_size=40) | st.from_regex(r"[0-9.]{0,30} ?[KMGTIBkmgtib]{0,4}", fullmatch=True))
def test_a_size_is_a_value_error_or_within_bounds(text: str) -> None:
    try:
        size_bytes = parse_size(text)
    except ValueError as exc:
        assert repr(text) in str(exc)  # noqa: PT017 - any ValueError will do, with a sentence
    else:
        assert 0 < size_bytes < SIZE_BYTES_MAX


# The table


def test_every_setting_has_a_sample() -> None:
    assert SAMPLES.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", BY_NAME)
def test_defaults_in_the_table_are_those_of_the_class(name: str) -> None:
    setting = BY_NAME[name]
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    default = defaults[setting.field]
    if setting.default:
        assert setting.parse(setting.default) == default
    elif setting.flag:
        assert default is False
    else:
        assert default in (None, ())


@pytest.mark.parametrize("name", BY_NAME)
def test_option_before_variable_before_file_before_default(name: str) -> None:
    text, value = SAMPLES[name]
    junk = "\n"  # for no setting a value: whoever looked at it would say so
    option: list[str] | str = [text] if BY_NAME[name].many else text

    field = BY_NAME[name].field

    def get(settings: Settings) -> object:
        assert settings.given == {field}
        return getattr(settings, field)

    assert get(resolve({name: option}, {variable(name): junk})) == value
    if name == "home":
        assert get(resolve({}, {variable(name): text})) == value
        return
    in_file = f'{name} = "{text}"'
    assert get(resolve({name: option}, {}, f'{name} = "\\n"')) == value
    assert get(resolve({}, {variable(name): text}, f'{name} = "\\n"')) == value
    assert get(resolve({}, {}, in_file)) == value
    assert resolve({}, {}) == Settings()
    assert resolve({name: None}, {variable(name): ""}) == Settings()
    assert resolve({name: ()}, {}) == Settings()


@pytest.mark.parametrize("name", BY_NAME)
def test_an_empty_value_is_said_and_not_passed_over(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name}: "):
        resolve({name: [""] if BY_NAME[name].many else ""}, {})


@pytest.mark.parametrize("name", BY_NAME)
def test_a_wrong_value_is_said_with_its_place(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name}: .") as option:
        resolve({name: ["\n"] if BY_NAME[name].many else "\n"}, {})
    assert option.value.exit_code == 2
    with pytest.raises(ConfigError, match=rf"^{variable(name)}: ."):
        resolve({}, {variable(name): "\n"})
    if name != "home":
        with pytest.raises(ConfigError, match=rf"^config\.toml: {name}: ."):
            resolve({}, {}, f'{name} = "\\n"')


def test_what_may_be_repeated_adds_up() -> None:
    assert resolve({"model": ["a", "b"]}, {}).model == ("a", "b")
    assert resolve({}, {"P2PMESH_MODEL": "a,b"}).model == ("a", "b")
    assert resolve({}, {}, 'model = ["a", "b"]').model == ("a", "b")
    assert resolve({}, {}, 'model = "a"').model == ("a",)
    with pytest.raises(ConfigError, match="P2PMESH_JOIN: '' is not an address"):
        resolve({}, {"P2PMESH_JOIN": "anna:1,"})


def test_numbers_in_the_file_need_no_quotes() -> None:
    settings = resolve({}, {}, "slots = 2\nmemory = 1000\napi = 8080\n")
    assert (settings.slots, settings.memory) == (2, 1000)
    assert settings.api == Address("127.0.0.1", 8080)


@pytest.mark.parametrize("yes", ["yes", "on", "1", "True"])
@pytest.mark.parametrize("no", ["no", "off", "0", " FALSE "])
def test_flags_are_yes_or_no(yes: str, no: str) -> None:
    assert resolve({}, {"P2PMESH_PRIVATE": yes}).private is True
    assert resolve({}, {"P2PMESH_NO_DISCOVERY": no}).no_discovery is False
    with pytest.raises(ConfigError, match="P2PMESH_OPEN: 'perhaps' is neither yes nor no"):
        resolve({}, {"P2PMESH_OPEN": "perhaps"})


def test_a_flag_in_the_file_needs_no_quotes() -> None:
    settings = resolve({}, {}, "private = true\nno-discovery = false\nopen = 1\n")
    assert (settings.private, settings.no_discovery, settings.open) == (True, False, True)


def test_an_invitation_is_told_from_an_address() -> None:
    assert resolve({"join": ["p2pmesh1-MFRGG", "anna"]}, {}).join == (
        "p2pmesh1-MFRGG",
        Address("anna", 9338),
    )
    assert parse_join(" P2PMESH7-abc\n") == "P2PMESH7-abc"
    assert parse_join("p2pmesh-host:1") == Address("p2pmesh-host", 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('nmae = "x"', "config.toml: there is no setting 'nmae' for it; did you mean name?"),
        ('home = "x"', "config.toml: there is no setting 'home' for it"),
        ('hom = "x"', "config.toml: there is no setting 'hom' for it"),
        ("given = 1", "config.toml: there is no setting 'given' for it"),
        ("[node]\nname = 'x'", "config.toml: there is no setting 'node' for it"),
        ("slots = true", "config.toml: slots must be text or a number"),
        ("private = 1.5", "config.toml: private must be true or false"),
        ("slots = 1.5", "config.toml: slots must be text or a number"),
        ("model = []", "config.toml: model must be text or a number"),
        ("model = [1.5]", "config.toml: model must be text or a number"),
        ("api = [1, 2]", "config.toml: api takes one value"),
    ],
)
def test_what_the_file_may_not_say(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({}, {}, text)
    assert str(caught.value).startswith(sentence)
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_toml_is_said_with_the_line() -> None:
    with pytest.raises(ConfigError, match=r"^config\.toml is not valid TOML: .*line 2"):
        resolve({}, {}, "slots = 1\nslots\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("name", "x" * (NAME_CHARS_MAX + 1)),
        ("name", "a\nb"),
        ("name", "\udcff"),
        ("engine", "a\0b"),
        ("engine", "~no-such-user/llama-server"),
        ("slots", "0"),
        ("split", "1"),
        ("split", "9"),
        ("slots", "-1"),
        ("slots", "2147483648"),
        ("slots", "9" * 5000),
        ("slots", "²"),
        ("context", "4k"),
    ],
)
def test_values_that_cannot_be(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name}: "):
        resolve({name: text}, {})


def test_a_tilde_is_the_users_home() -> None:
    assert resolve({"engine": "~/llama-server"}, {}).engine == Path.home() / "llama-server"


def test_the_readmes_table_has_a_row_for_each_setting() -> None:
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [setting.name for setting in SETTINGS]
    assert all(row.count("|") == 5 for row in rows)
