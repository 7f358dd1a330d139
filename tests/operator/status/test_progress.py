"""Progress as people read it."""

import pytest

from finetune_operator.status.progress import format_duration

DURATIONS = [(None, None), (0, "0s"), (59, "59s"), (60, "1m00s"), (3599, "59m59s"), (11100, "3h05m"), (187200, "2d04h")]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_durations_for_people(seconds: int | None, text: str | None) -> None:
    assert format_duration(seconds) == text
