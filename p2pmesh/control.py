"""Talks to the node that runs on this machine: the client of the control API.

Synchronous and standard library only, so that a command answers at once. Finds the node by its
`run.json`, believes it only when its process lives and its console answers with the same id.
What it reads comes from another process, perhaps of another version: checked, never trusted.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil

from p2pmesh.config import Address, parse_address
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.home import Home

NO_NODE = "No node is running here: p2pmesh up"
ANSWER_TIMEOUT_S = 5.0  # a node that answers its own machine later than this is stuck
ORDER_TIMEOUT_S = 25.0  # an order may wait for a node elsewhere, and for nobody there
SILENCE_S = 40.0  # the event stream says something each 15 s
ANSWER_BYTES_MAX = 64 * 2**20  # the status of some hundred thousand nodes
# Names and wildcard addresses are not always what the node lets in; this always is.
HOST = "localhost"

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what nodes listen on


class NoNodeError(LocalError):
    """No node runs in this home, or not any more. The user starts one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """How to reach the running node, as it wrote it into `run.json`.

    It holds more, for other programs; this is what commands need.

    Attributes:
        token: Lets its holder change the node.
    """

    pid: int
    api: Address
    console: Address
    peer: Address
    token: str = field(repr=False)
    id: str
    name: str


class Control:
    """The running node, as found by `find_node`."""

    def __init__(self, run: RunFile) -> None:
        self.run = run

    def status(self) -> dict[str, Any]:
        """The whole status, see the control API.

        Raises:
            LocalError: The node does not answer as a node.
        """
        return _object(self._ask("GET", "/api/status"))

    def stop(self) -> None:
        """Begin the node's graceful shutdown; raises as `status`."""
        self._ask("POST", "/api/stop")

    def order(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Have the node carry out an order, see `node/orders.py`.

        Raises:
            ConfigError: A value cannot be used.
            LocalError: The node cannot do it, or may not.
        """
        return _object(self._ask("POST", f"/api/orders/{name}", values))

    def events(self) -> Iterator[dict[str, Any]]:
        """The status now and after each change, until the node ends; raises as `status`."""
        with closing(dial(self.run.console, SILENCE_S)) as connection:
            try:
                connection.request("GET", "/api/events", headers={"Host": HOST})
                with connection.getresponse() as response:
                    if response.status != HTTPStatus.OK:
                        raise self._refused(response.status, response.read(ANSWER_BYTES_MAX))
                    for name, data in server_events(response):
                        if name == "snapshot":
                            yield _object(data)
            except (OSError, http.client.HTTPException) as exc:
                raise LocalError(f"The connection to the node was lost ({_why(exc)})") from exc

    def _ask(self, method: str, path: str, values: dict[str, Any] | None = None) -> str:
        headers = {"Host": HOST, "Authorization": f"Bearer {self.run.token}"}
        said = None if values is None else json.dumps(values)
        timeout_s = ANSWER_TIMEOUT_S if values is None else ORDER_TIMEOUT_S
        with closing(dial(self.run.console, timeout_s)) as connection:
            try:
                connection.request(method, path, body=said, headers=headers)
                with connection.getresponse() as response:
                    body = response.read(ANSWER_BYTES_MAX)
            except (OSError, http.client.HTTPException) as exc:
                raise LocalError(
                    f"The node (process {self.run.pid}) does not answer on {self.run.console} "
                    f"({_why(exc)}); if that lasts, end the process and start it again"
                ) from exc
        if values is not None and response.status == HTTPStatus.BAD_REQUEST:
            raise ConfigError(error_message(body) or "the node cannot use that")
        if values is not None and response.status == HTTPStatus.CONFLICT:
            raise LocalError(error_message(body) or "the node cannot do that")
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise self._refused(response.status, body)
        return body.decode("utf-8", "replace")

    def _refused(self, status: int, body: bytes) -> LocalError:
        text = error_message(body) or f"HTTP {status}"
        return LocalError(f"The node on {self.run.console} refused: {text}")


def find_node(home: Home) -> Control:
    """The node that runs in this home.

    Raises:
        NoNodeError: There is none.
        LocalError: There is a process, but it does not answer as this node.
    """
    run = read_run_file(home.run_file)
    if not psutil.pid_exists(run.pid):
        raise NoNodeError(NO_NODE)
    control = Control(run)
    node = control.status().get("node")
    if not isinstance(node, dict) or node.get("id") != run.id:
        # The process id and the port were given to others since.
        raise NoNodeError(NO_NODE)
    return control


def read_run_file(path: Path) -> RunFile:
    """Read what the running node wrote about itself.

    Raises:
        NoNodeError: There is no such file.
        LocalError: It cannot be read or is damaged.
    """
    try:
        fields = json.loads(path.read_text("utf-8"))
        return RunFile(
            pid=int(fields["pid"]),
            api=parse_address(fields["api"]),
            console=parse_address(fields["console"]),
            peer=parse_address(fields["peer"]),
            token=str(fields["token"]),
            id=str(fields["id"]),
            name=str(fields["name"]),
        )
    except FileNotFoundError as exc:
        raise NoNodeError(NO_NODE) from exc
    except OSError as exc:
        raise LocalError(f"Cannot read {path} ({exc.strerror}); whose is it?") from exc
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as exc:
        raise LocalError(f"{path} is damaged; stop the node, delete it, start again") from exc


def dial(address: Address, timeout_s: float) -> http.client.HTTPConnection:
    """A connection, not yet open, to an address that a node of this machine listens on."""
    host = _WILDCARDS.get(address.host, address.host)
    return http.client.HTTPConnection(host, address.port, timeout=timeout_s)


def server_events(response: http.client.HTTPResponse) -> Iterator[tuple[str, str]]:
    """The events of a stream as (name, data), until it ends; raises as reading does."""
    name, data = "message", list[str]()
    while line := response.readline(ANSWER_BYTES_MAX):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            if data:
                yield name, "\n".join(data)
            name, data = "message", []
            continue
        key, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if key == "event":
            name = value
        elif key == "data":
            data.append(value)


def error_message(body: bytes) -> str:
    """Return the message of a JSON error answer, here and in OpenAI's API; "" without one."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise LocalError("The node's answer is cut off; is another program on its port?") from exc
    if not isinstance(value, dict):
        raise LocalError("The node's answer is not a status; is another program on its port?")
    return value


def _why(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    if not isinstance(exc, OSError):
        return type(exc).__name__
    return exc.strerror or str(exc)
