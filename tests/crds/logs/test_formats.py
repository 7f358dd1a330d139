"""Lines of a log: text for people, one object a line for machines, and no secret in either."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from finetune_api.logs.formats import LogFormat, build_formatter, log_context

CANARY = "hf_c4n4ryS3cretValue0123456789"


class Log:
    """A logger whose lines a test reads."""

    def __init__(self, form: LogFormat) -> None:
        self._stream = io.StringIO()
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(build_formatter(form, {"pod": "operator-1"}))
        self.logger = logging.Logger("test")
        self.logger.addHandler(handler)

    def lines(self) -> list[str]:
        return self._stream.getvalue().splitlines()


@pytest.fixture(params=list(LogFormat))
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    return Log(request.param)


def fail(secret: str) -> None:
    raise ValueError(f"the server said: token={secret}")


def test_no_secret_is_in_a_line_its_arguments_or_a_traceback(log: Log) -> None:
    log.logger.info("used %s", CANARY)
    log.logger.info(f"used {CANARY}")
    try:
        fail(CANARY)
    except ValueError:
        log.logger.exception("failed")
    text = "\n".join(log.lines())
    assert CANARY not in text
    assert "the server said" in text


def test_an_object_has_time_level_logger_message_and_context() -> None:
    log = Log(LogFormat.JSON)
    with log_context(namespace="team", job="bot"), log_context(job_uid="1"):
        log.logger.warning('a "quoted"\nmessage of %d', 7)
    log.logger.info("outside")

    inside, outside = map(json.loads, log.lines())
    assert inside.pop("time").endswith("+00:00")
    assert inside == {
        "level": "WARNING",
        "logger": "test",
        "message": 'a "quoted"\nmessage of 7',
        "pod": "operator-1",
        "namespace": "team",
        "job": "bot",
        "job_uid": "1",
    }
    assert "job" not in outside


def test_a_traceback_is_one_field_of_one_line() -> None:
    log = Log(LogFormat.JSON)
    try:
        fail("x")
    except ValueError:
        log.logger.exception("failed")
    (line,) = map(json.loads, log.lines())
    assert line["message"] == "failed"
    assert line["error"].startswith("Traceback")
