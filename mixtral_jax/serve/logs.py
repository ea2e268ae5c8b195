"""One line per request, for people or as JSON; texts of prompts only where asked for."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

NAME = "mixtral_jax.serve"
_FIELDS = "fields"  # the attribute of a record that holds them


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "timestamp": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            "target": record.name,
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class PlainLines(logging.Formatter):
    """A record as one line for people."""

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback where there is one."""
        fields = getattr(record, _FIELDS, {})
        shown = "".join(f" {name}={_plain(value)}" for name, value in fields.items())
        head, newline, trace = super().format(record).partition("\n")
        return head + shown + newline + trace


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return json.dumps(text) if any(c.isspace() or not c.isprintable() for c in text) else text


def configure(*, as_json: bool, stream: Any = None) -> None:
    """Sends the server's log, and uvicorn's, to ``stream`` (stderr unless given)."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    for name in (NAME, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.setLevel(logging.INFO)
        logger.propagate = name == "uvicorn.error"
    # What uvicorn says about a hostile request is counted, not logged line by line.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def event(message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Logs a message with fields beside it."""
    logging.getLogger(NAME).log(level, message, extra={_FIELDS: fields})
