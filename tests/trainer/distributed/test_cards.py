"""The GPU of a process: chosen once, from what the run may see."""

import os
from pathlib import Path

import pytest

from finetune_trainer.distributed.cards import ALL, VISIBLE, all_cards, check_cards, see_one_card
from finetune_trainer.errors import TrainerError


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ALL, VISIBLE):
        monkeypatch.setenv(variable, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(variable)


def test_the_device_files_count_where_no_variable_names_cards(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert all_cards(tmp_path) == ["0", "1"]  # as CUDA numbers them


def test_each_rank_has_a_card_of_its_own_also_after_rank_0_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "3,GPU-a,7")
    see_one_card(0)
    assert all_cards() == ["3", "GPU-a", "7"]
    see_one_card(1)
    assert os.environ[VISIBLE] == "GPU-a"


def test_one_card_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "MIG-1")
    see_one_card(0)
    assert all_cards() == ["MIG-1"]


def test_fewer_cards_than_the_job_asks_for_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    check_cards(2)
    with pytest.raises(TrainerError, match=r"gpus is 4, but 2 CUDA devices are visible: .* write gpus: 2"):
        check_cards(4)
