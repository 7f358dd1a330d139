"""One line of text or one object of JSON for each record of a log, both without secrets.

An object has time (RFC 3339, UTC), level, logger and message; error, the traceback, where there is one; and the fields
that `context` holds then, such as the job that is being looked at.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum

from finetune_api.logs.redaction import redact


class LogFormat(StrEnum):
    """Form of a log's lines."""

    TEXT = "text"
    JSON = "json"


_CONTEXT: ContextVar[Mapping[str, str]] = ContextVar("log_context", default={})  # noqa: B039 (never changed in place)


@contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Add fields to every object that is logged inside, by this task or thread."""
    token = _CONTEXT.set({**_CONTEXT.get(), **fields})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def build_formatter(form: LogFormat, fields: Mapping[str, str] | None = None) -> logging.Formatter:
    """Returns the formatter of a log. `fields`: what every object says, such as the name of the pod."""
    return _JsonFormatter(fields or {}) if form is LogFormat.JSON else _TextFormatter()


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _JsonFormatter(logging.Formatter):
    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            said["error"] = redact(self.formatException(record.exc_info))
        return json.dumps({**said, **self._fields, **_CONTEXT.get()}, ensure_ascii=False)
