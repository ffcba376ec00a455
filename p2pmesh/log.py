"""Logging set-up: structlog to a rotating file, and to standard error when asked.

Only shells log; cores return what happened. Event names are `noun_verb`, the rest are fields.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog

from p2pmesh.errors import LocalError

LOG_BYTES_MAX = 5 * 2**20  # per file: a week of a busy node, and still opens in any editor
LOG_FILES = 3


def configure(path: Path | None, *, debug: bool) -> None:
    """Send log events to `path` (rotated), and with `debug` also to standard error.

    Args:
        path: The log file; its directory exists. None: no file.
        debug: Log everything, and on standard error too.

    Raises:
        LocalError: The file cannot be written.
    """
    handlers: list[logging.Handler] = []
    if path is not None:
        handlers.append(_file_handler(path))
    if debug:
        handlers.append(logging.StreamHandler(sys.stderr))
    root = logging.getLogger()
    root.handlers = handlers or [logging.NullHandler()]
    level = logging.DEBUG if debug else logging.INFO
    root.setLevel(level)
    logging.raiseExceptions = debug  # a full disk is no reason to fill a terminal with tracebacks
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        # Renders exceptions itself; structlog.stdlib's logger lets logging add them once more.
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )


def _file_handler(path: Path) -> logging.Handler:
    try:
        return logging.handlers.RotatingFileHandler(
            path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES, encoding="utf-8"
        )
    except OSError as exc:
        raise LocalError(
            f"Cannot write {path} ({exc.strerror}); choose another place with --home"
        ) from exc
