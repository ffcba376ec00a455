"""The files of a node, and how they are written.

Everything lies under one directory (`--home`, `P2PMESH_HOME`, else the system's data folder); the
cache is beside it in the system's cache folder unless a home was named. Files are replaced
whole: written, synced, renamed, so that a crash leaves the old or the new and never a half.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

from p2pmesh.config import CONFIG_FILE, Settings
from p2pmesh.errors import ConfigError, LocalError

PRIVATE_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Home:
    """The directories of one node.

    Attributes:
        root: Keys, epoch, address book, logs: what must survive.
        cache: What can be made again: engines, digests.
    """

    root: Path
    cache: Path

    @classmethod
    def at(cls, root: Path | None) -> Home:
        """The home below `root`, or the system's folders when None."""
        if root is not None:
            root = root.absolute()
            return cls(root, root / "cache")
        return cls(
            platformdirs.user_data_path("p2pmesh", appauthor=False),
            platformdirs.user_cache_path("p2pmesh", appauthor=False),
        )

    @classmethod
    def of(cls, settings: Settings) -> Home:
        """The home that the settings name."""
        return cls.at(settings.home)

    @property
    def node_key(self) -> Path:
        """The node's private key."""
        return self.root / "node.key"

    @property
    def mesh_file(self) -> Path:
        """Which mesh this node belongs to, and its credential there."""
        return self.root / "mesh.json"

    @property
    def statements_file(self) -> Path:
        """The statements of trust that stand in that mesh."""
        return self.root / "statements.json"

    @property
    def members_file(self) -> Path:
        """Who was seen as a member of the mesh."""
        return self.root / "members.json"

    @property
    def networks_file(self) -> Path:
        """The networks on which each mesh may be announced."""
        return self.root / "networks.json"

    @property
    def invitations_file(self) -> Path:
        """Who has used the invitations that this node made."""
        return self.root / "invitations.json"

    @property
    def epoch_file(self) -> Path:
        """The last epoch under which this node published."""
        return self.root / "epoch"

    @property
    def peers_file(self) -> Path:
        """The address book."""
        return self.root / "peers.json"

    @property
    def memory_speed_file(self) -> Path:
        """How fast this machine reads its memory."""
        return self.root / "memory-speed.json"

    @property
    def run_file(self) -> Path:
        """How to reach the running node: addresses and the control token."""
        return self.root / "run.json"

    @property
    def config_file(self) -> Path:
        """The user's settings."""
        return self.root / CONFIG_FILE

    @property
    def logs(self) -> Path:
        """Log files of the node and its engines."""
        return self.root / "logs"

    @property
    def models(self) -> Path:
        """GGUF files that the user or the mesh put here."""
        return self.root / "models"

    @property
    def rankings(self) -> Path:
        """Rankings of the experts of models, each named by its digest."""
        return self.root / "rankings"

    @property
    def engine(self) -> Path:
        """Engines that `p2pmesh engine install` built."""
        return self.cache / "engine"

    @property
    def shards(self) -> Path:
        """Expert shards that were made of models; none is lost that cannot be made again."""
        return self.cache / "shards"

    def create(self) -> None:
        """Make the directories.

        Raises:
            LocalError: The system does not allow it.
        """
        for path in (self.root, self.cache, self.logs):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise LocalError(
                    f"Cannot create {path} ({exc.strerror}); choose another place with --home"
                ) from exc

    def read_config(self) -> str:
        """The text of the config file, "" when there is none.

        Raises:
            ConfigError: It cannot be read, or the home is no directory.
        """
        try:
            return self.config_file.read_text("utf-8-sig")  # some editors begin with a mark
        except FileNotFoundError:
            return ""
        except NotADirectoryError as exc:
            raise ConfigError(
                f"{self.root} is no directory; choose another place with --home"
            ) from exc
        except OSError as exc:
            raise ConfigError(
                f"Cannot read {self.config_file} ({exc.strerror}); choose another place with --home"
            ) from exc
        except UnicodeDecodeError as exc:
            raise ConfigError(
                f"{self.config_file} is not UTF-8 text; save it as such, or delete it"
            ) from exc

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold this home for one node; a second one is told so.

        Raises:
            LocalError: Another node has it.
        """
        return locked(
            self.root / "lock",
            f"A node is running in {self.root} already; start a second one with its own --home DIR",
        )


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock for one process, without waiting for it.

    The lock is the system's and ends with the process, however it ends.

    Args:
        path: Its file, which is made and stays; its directory must exist.
        taken: What to say when another process has it.

    Raises:
        LocalError: Another process has it, or the file cannot be written.
    """
    try:
        file = path.open("ab")
    except OSError as exc:
        raise LocalError(
            f"Cannot write {path} ({exc.strerror}); choose another place with --home"
        ) from exc
    with file:
        if not _try_lock(file):
            raise LocalError(taken)
        yield


def _try_lock(file: Any) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def read_json(path: Path) -> Any:
    """The value in a file of this home.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`, durably: afterwards it holds the old bytes or the new ones.

    Args:
        path: The file; its directory must exist.
        data: The whole new content.
        mode: Permission bits of the file.

    Raises:
        LocalError: Disk full, no permission; the old file is untouched.
    """
    with replacing(path, mode) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(
    path: Path, mode: int = 0o644, *, advice: str = "make room, or choose another --home"
) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path`, durably, when the block ends.

    A block that raises leaves the old file, or none, and nothing beside it.

    Args:
        path: The file; its directory must exist.
        mode: Permission bits of the file.
        advice: What the user can do when the system does not let it be written.

    Raises:
        LocalError: Disk full, no permission; the old file is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(mode)
            Path(temporary).replace(path)
            _sync_directory(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise LocalError(f"Cannot write {path} ({exc.strerror}); {advice}") from exc


def _sync_directory(path: Path) -> None:
    """Make a rename in it durable; Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
