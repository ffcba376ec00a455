"""Logging set-up: structlog to a rotating file, and to standard error when asked.

Only shells log; cores return what happened. Event names are `noun_verb`, the rest are fields.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from pathlib import Path

import structlog

LOG_BYTES_MAX = 5 * 2**20  # per file: a week of a busy node, and still opens in any editor
LOG_FILES = 3


def configure(path: Path | None, *, debug: bool) -> None:
    """Send log events to `path` (rotated), and with `debug` also to standard error.

    Args:
        path: The log file; its directory exists. None: no file.
        debug: Log everything, and on standard error too.
    """
    handlers: list[logging.Handler] = []
    if path is not None:
        handlers.append(
            logging.handlers.RotatingFileHandler(
                path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES, encoding="utf-8"
            )
        )
    if debug:
        handlers.append(logging.StreamHandler(sys.stderr))
    root = logging.getLogger()
    root.handlers = handlers or [logging.NullHandler()]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
