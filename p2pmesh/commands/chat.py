"""`p2pmesh chat`: talk with a model of the mesh through this node's API."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import click

from p2pmesh.commands.formatting import clean, line
from p2pmesh.config import Address, Settings
from p2pmesh.control import HOST, dial, error_message, find_node, server_events
from p2pmesh.errors import ConfigError, EngineError, LocalError
from p2pmesh.home import Home

PATH = "/v1/chat/completions"
SERVED_BY = "X-P2PMesh-Served-By"
SILENCE_S = 600.0  # a large model may load, and read a long question, before its first word
ERROR_BYTES_MAX = 64 * 1024

Message = dict[str, str]


@dataclass(slots=True, kw_only=True)
class Answer:
    """The part of the answer that came back so far.

    Attributes:
        model: As the engine calls it.
        served_by: The node and shard that answered.
        finish_reason: Why the model ended; "" while it has not.
    """

    model: str = ""
    served_by: str = ""
    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


@click.command()
@click.argument("message", nargs=-1)
@click.option("--model", default="auto", show_default=True, help="Which model; see /v1/models.")
@click.option("--system", metavar="TEXT", help="What the model is to keep to throughout.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as one line of JSON.")
@click.pass_obj
def chat(
    settings: Settings, message: tuple[str, ...], *, model: str, system: str | None, as_json: bool
) -> None:
    """Ask MESSAGE, or what comes in through a pipe; without either, have a conversation.

    Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    text = " ".join(message)
    if not text and not sys.stdin.isatty():
        text = sys.stdin.read()
        if not text.strip():
            raise ConfigError("There is nothing to ask: give a message, or pipe one in")
    if not text and as_json:
        raise ConfigError("--json needs a message: p2pmesh chat --json MESSAGE")
    conversation = _Conversation(find_node(Home.of(settings)).run.api, model, system)
    if not text:
        conversation.hold()
    elif as_json:
        answer = conversation.ask(text, show=False)
        click.echo(json.dumps(_as_object(answer), ensure_ascii=False))
    else:
        conversation.ask(text, show=True)


class _Conversation:
    """Messages so far, asked one after the other."""

    def __init__(self, api: Address, model: str, system: str | None) -> None:
        self._api = api
        self._model = model
        self._messages: list[Message] = []
        if system:
            self._messages.append({"role": "system", "content": system})

    def hold(self) -> None:
        """Ask what the user types, until the end of input."""
        click.echo("Ctrl-C ends an answer, Ctrl-D the conversation.", err=True)
        while True:
            try:
                text = input("> ")
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo()
                continue
            if text.strip():
                self._ask_kindly(text)

    def ask(self, text: str, *, show: bool) -> Answer:
        """Ask and wait for the answer.

        Args:
            text: The user's message.
            show: Print the answer while it comes, and who gave it.

        Raises:
            MeshError: It was refused or broke off; the message is taken back.
        """
        self._messages.append({"role": "user", "content": text})
        answer = Answer()
        try:
            request = {
                "model": self._model,
                "messages": self._messages,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            with closing(answer_parts(self._api, request, answer)) as parts:
                for part in parts:
                    if show:
                        click.echo(clean(part), nl=False)
        except Exception:
            self._messages.pop()
            raise
        finally:
            if show and answer.text:
                click.echo()
            # An answer that the user cut short stays: the next question may be about it.
            if answer.text and self._messages and self._messages[-1]["role"] == "user":
                self._messages.append({"role": "assistant", "content": answer.text})
        if show:
            click.echo(click.style(f"— {_who(answer)}", dim=True), err=True)
        return answer

    def _ask_kindly(self, text: str) -> None:
        """Ask; what goes wrong is told, and the conversation goes on."""
        try:
            self.ask(text, show=True)
        except KeyboardInterrupt:
            click.echo(click.style("— stopped", dim=True), err=True)
        except (ConfigError, EngineError, LocalError) as exc:
            click.echo(str(exc), err=True)


def answer_parts(
    api: Address, request: dict[str, Any], answer: Answer
) -> Generator[str, None, None]:
    """Send a streaming request; yields the text as it comes and keeps `answer` up to date.

    Raises:
        ConfigError: The mesh has no such model, or cannot take such a request.
        EngineError: The mesh refused it for now, or the answer broke off.
        LocalError: This node's API does not answer.
    """
    with closing(dial(api, SILENCE_S)) as connection:
        try:
            headers = {"Host": HOST, "Content-Type": "application/json"}
            connection.request("POST", PATH, json.dumps(request).encode(), headers)
            with connection.getresponse() as response:
                if response.status != HTTPStatus.OK:
                    raise _refusal(response.status, response.read(ERROR_BYTES_MAX))
                answer.served_by = unquote(response.getheader(SERVED_BY) or "")
                for _, data in server_events(response):
                    if data == "[DONE]":
                        return
                    yield from _read_event(data, answer)
        except TimeoutError as exc:
            raise EngineError(f"Nothing came for {SILENCE_S:.0f} s; see p2pmesh status") from exc
        except OSError as exc:
            if answer.served_by:
                raise _broken_off() from exc
            raise LocalError(
                f"This node's API does not answer on {api} ({exc.strerror or exc}); "
                "see p2pmesh doctor"
            ) from exc
        except http.client.HTTPException as exc:
            raise _broken_off() from exc
    if not answer.finish_reason:
        raise _broken_off()


def _read_event(data: str, answer: Answer) -> Iterator[str]:
    try:
        event = json.loads(data)
        if "error" in event:
            raise EngineError(line(event["error"]["message"]))
        answer.model = event.get("model") or answer.model
        answer.usage = event.get("usage") or answer.usage
        for choice in event["choices"]:
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            text = choice["delta"].get("content")
            if text:
                answer.text += text
                yield text
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise EngineError(f"The engine sent what is no chat answer: {line(data)[:200]}") from exc


def _refusal(status: int, body: bytes) -> ConfigError | EngineError:
    text = line(error_message(body)) or f"The API answered HTTP {status}"
    usage = status < HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.TOO_MANY_REQUESTS
    return ConfigError(text) if usage else EngineError(text)


def _broken_off() -> EngineError:
    return EngineError("The answer broke off; ask again, or see p2pmesh status")


def _who(answer: Answer) -> str:
    return line(f"{answer.model} on {answer.served_by}" if answer.served_by else answer.model)


def _as_object(answer: Answer) -> dict[str, Any]:
    return {
        "model": answer.model,
        "served_by": answer.served_by,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
    }
