"""Alerts as Prometheus evaluates them: each fires on what it is for, stays silent otherwise, and has a section in the
runbook; and the dashboard asks for series that exist.

promtool loads the rules and runs time series through them.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.metrics.job_gauges import JOBS
from finetune_operator.metrics.series import REGISTRY
from finetune_test_programs.binaries import promtool_binary

CHECKOUT = Path(__file__).parents[2]
FILES = CHECKOUT / "charts/finetune-operator/files"
RULES = FILES / "alerts.yaml"
pytestmark = pytest.mark.cluster

Series = dict[str, str]
"""Values of each series at intervals of a minute, in promtool's notation: 0+3x5 is 0 3 6 9 12 15."""

CASES: dict[str, tuple[Series, Series, str]] = {
    "FineTuneOperatorDown": (
        {'finetune_leader{instance="a"}': "1x5 0x20", 'finetune_leader{instance="b"}': "0x25"},
        {'finetune_leader{instance="a"}': "1x5 0x20", 'finetune_leader{instance="b"}': "0x5 1x20"},
        "15m",
    ),
    "FineTuneOperatorStuck": (
        {'finetune_heartbeat_age_seconds{instance="a"}': "2x5 40x20", 'finetune_leader{instance="a"}': "1x25"},
        {'finetune_heartbeat_age_seconds{instance="a"}': "2x5 40x20", 'finetune_leader{instance="a"}': "0x25"},
        "15m",
    ),
    "FineTuneApiUnavailable": (
        {
            'finetune_api_requests_total{verb="GET",code="200"}': "0+80x40",
            'finetune_api_requests_total{verb="GET",code="503"}': "0+20x40",
        },
        {
            'finetune_api_requests_total{verb="GET",code="200"}': "0+80x40",
            'finetune_api_requests_total{verb="GET",code="503"}': "0+5x40",
            'finetune_api_requests_total{verb="GET",code="404"}': "0+50x40",
        },
        "30m",
    ),
    "FineTunePermissionLost": (
        {'finetune_api_requests_total{verb="POST",code="403"}': "0x5 0+2x30"},
        {
            'finetune_api_requests_total{verb="POST",code="403"}': "7x40",
            'finetune_api_requests_total{verb="POST",code="201"}': "0+2x40",
        },
        "25m",
    ),
    "FineTuneReconcileErrors": (
        {'finetune_reconcile_errors_total{reason="Defect"}': "0+6x40"},
        {
            'finetune_reconcile_errors_total{reason="Conflict"}': "0+60x40",
            'finetune_reconcile_errors_total{reason="Defect"}': "0+1x40",
        },
        "30m",
    ),
    "FineTuneJobsFail": (
        {
            'finetune_job_completions_total{result="Failed",reason="InvalidRow"}': "0x5 0+1x40",
            'finetune_job_completions_total{result="Succeeded",reason="Completed"}': "0x30 1x20",
        },
        {
            'finetune_job_completions_total{result="Failed",reason="InvalidRow"}': "0x5 0+1x40",
            'finetune_job_completions_total{result="Succeeded",reason="Completed"}': "0x5 0+2x40",
        },
        "40m",
    ),
    "FineTuneJobNeedsPerson": (
        {'finetune_jobs_waiting_for_person{reason="ImagePullFailed"}': "0x2 2x30"},
        {'finetune_jobs_waiting_for_person{reason="ImagePullFailed"}': "2x10 0x30"},
        "25m",
    ),
    "FineTuneJobsWaitTooLong": (
        {'finetune_oldest_job_age_seconds{phase="Queued"}': "21000+60x60"},
        {
            'finetune_oldest_job_age_seconds{phase="Queued"}': "0+60x60",
            'finetune_oldest_job_age_seconds{phase="Running"}': "90000+60x60",
        },
        "40m",
    ),
    "FineTuneRetries": (
        {'finetune_retries_total{reason="Evicted"}': "0+1x60"},
        {
            'finetune_retries_total{reason="Evicted"}': "0x30 5x30",
            'finetune_retries_total{reason="Error"}': "0x30 5x30",
        },
        "45m",
    ),
    "FineTuneReportsRefused": (
        {'finetune_progress_reports_total{code="401"}': "0+30x40"},
        {
            'finetune_progress_reports_total{code="202"}': "0+300x40",
            'finetune_progress_reports_total{code="410"}': "0+30x40",
        },
        "30m",
    ),
    "FineTuneCertificateExpires": (
        {"finetune_certificate_expiry_timestamp_seconds": "1000000x100"},
        {"finetune_certificate_expiry_timestamp_seconds": "10000000x100"},
        "90m",
    ),
}
"""By alert: series that fire it, series that do not, and the time of the look."""


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(RULES.read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(promtool_binary()), *arguments], capture_output=True, text=True, check=False)


def firing(folder: Path, alert: str, series: Series, at: str) -> bool:
    """True if an alert fires; promtool says so by what it got when nothing is expected."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": []}],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0 or f'alertname="{alert}"' in done.stderr + done.stdout, done.stderr
    return done.returncode != 0


def test_prometheus_takes_the_rules() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert done.returncode == 0, done.stderr


def test_every_alert_has_a_case_and_a_section_in_the_runbook() -> None:
    names = [rule["alert"] for rule in rules()]
    assert sorted(names) == sorted(CASES)
    sections = re.findall(r"^#+ (\w+)$", (CHECKOUT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert [name for name in names if name not in sections] == []


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_on_what_it_is_for_and_on_nothing_else(alert: str, tmp_path: Path) -> None:
    fires, silent, at = CASES[alert]
    assert firing(tmp_path, alert, fires, at)
    assert not firing(tmp_path, alert, silent, at)


def exported() -> set[str]:
    """Names of all series, as a scrape shows them."""
    names = {family.name for family in JOBS.collect()}
    for family in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def asked_for(expression: str) -> set[str]:
    return set(re.findall(r"finetune_\w+", expression))


def test_alerts_and_dashboard_ask_for_series_that_exist() -> None:
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [rule["expr"] for rule in rules()]
    assert len(panels) >= 20
    assert {name for each in expressions for name in asked_for(each)} - exported() == set()


def test_every_query_of_the_dashboard_can_be_parsed(tmp_path: Path) -> None:
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    recorded = [
        {"record": f"panel:{panel['id']}:{number}", "expr": target["expr"]}
        for panel in panels
        for number, target in enumerate(panel["targets"])
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stderr
