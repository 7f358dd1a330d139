"""Mistakes planted in the operator are noticed by fault plans."""

from pathlib import Path

import pytest
import yaml

from finetune_devcluster.cluster import DevCluster
from finetune_test_operator.faults.fleet import Fleet
from finetune_test_operator.faults.mutants import write_mutant
from finetune_test_operator.faults.plans import Lane, Plan

MUTANTS = yaml.safe_load(Path(__file__).with_name("mutants.yaml").read_text())


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_line_of_a_mistake_is_still_there(mistake: str, tmp_path: Path) -> None:
    mutant = MUTANTS[mistake]
    code = write_mutant(tmp_path / "code", mutant["file"], mutant["was"], mutant["is"])
    assert mutant["is"] in (code / "finetune_operator" / mutant["file"]).read_text()


@pytest.mark.cluster
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_the_operator_is_noticed(
    mistake: str, dev_cluster: DevCluster, tmp_path: Path, no_other_operator: None
) -> None:
    mutant = MUTANTS[mistake]
    code = write_mutant(tmp_path / "code", mutant["file"], mutant["was"], mutant["is"])
    number = list(MUTANTS).index(mistake)

    sizes = {Lane.REQUESTS: (1, 4), Lane.KILLS: (1, 3)}
    with Fleet.start(dev_cluster, tmp_path / "fleet", f"faults-mutant-{number}", sizes, code) as fleet:
        plans = {plan.name for plan in fleet.live_references(["passes"])}
        assert plans >= set(mutant["plans"]), "the plans are among those that the suite generates"
        results = fleet.run([Plan.parse(name) for name in mutant["plans"]])

    lost = {each.plan.name: each.failures for each in results if each.failures}
    print(mistake, lost, sep=": ")
    assert lost
