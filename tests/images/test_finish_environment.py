"""What a build step leaves is the same whenever it ran."""

import os
from pathlib import Path

import pytest

from finetune_test_kernels.compiled_models import IMAGE_BUILD


def test_all_files_have_the_time_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line tables of compiled kernels carry their sources' times: two builds of one source had two digests by them."""
    monkeypatch.syspath_prepend(IMAGE_BUILD)
    from finish_environment import TIME, set_times

    module = tmp_path / "lib/package/module.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("")
    os.utime(outside, (1, 1))
    (tmp_path / "lib/link").symlink_to(outside)

    set_times(tmp_path)

    assert {path.lstat().st_mtime for path in [tmp_path, *tmp_path.rglob("*")]} == {TIME}
    assert outside.stat().st_mtime == 1, "what a link leads to is not the image's"
