"""A rank that no longer runs: the others' wait ends in CollectiveTimeout, with the stacks of all of them."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.failures import ExitCode
from finetune_api.outcome import Outcome
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.run_config import RunConfig
from finetune_test_models.ranks.processes import other_ranks
from finetune_test_servers.s3_server import S3Server
from finetune_trainer.job.settings import CPU_RANKS

Builder = Callable[..., RunConfig]
LIMIT = 25  # seconds; importing torch is silent for nearly as long on a busy machine
PROGRAM = """
import sys
from finetune_trainer.cli.pod import main
sys.argv[1:] = ["run"]
main()
"""


@pytest.mark.stalls
def test_a_frozen_rank_is_told_from_a_stalled_run(
    run_config: Builder, bucket: str, credentials: Path, s3_server: S3Server, tmp_path: Path
) -> None:
    training = {"maxSteps": 400, "checkpointSteps": 2, "batchSize": 1, "gradientAccumulation": 2, "loggingSteps": 1}
    output = {"s3": {"bucket": bucket, "prefix": "out", "endpointURL": s3_server.endpoint_url}}
    stall = {"stall": StallLimit(seconds=LIMIT, adapts=False), "output_prefix": "out/default/tiny"}
    config = run_config(training=training, output=output, dataset={"packing": False}).model_copy(update=stall)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/output").symlink_to(credentials)

    termination = tmp_path / "termination"
    environment = os.environ | {
        CPU_RANKS: "2",
        "FINETUNE_CONFIG": str(tmp_path / "config.yaml"),
        "FINETUNE_WORK_DIR": str(tmp_path / "work"),
        "FINETUNE_ATTEMPT_ID": "attempt-1",
        "FINETUNE_CREDENTIALS_DIR": str(tmp_path / "secrets"),
        "FINETUNE_TERMINATION_LOG": str(termination),
    }
    command = [sys.executable, "-P", "-c", PROGRAM]
    trainer = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert trainer.stderr is not None
    lines, frozen = [], []
    with trainer.stderr as log:
        for line in log:
            lines.append(line)
            if "checkpoint of step 4 is stored" in line:
                frozen = other_ranks(trainer.pid)
                os.kill(frozen[0], signal.SIGSTOP)

    code, text = trainer.wait(), "".join(lines)
    assert len(frozen) == 1, text[-3000:]
    assert code == ExitCode.STALLED, text[-3000:]
    outcome = Outcome.decode(termination.read_text())
    assert outcome.reason == "CollectiveTimeout"
    assert "for another rank: the log has all ranks' stacks" in outcome.message
    assert outcome.checkpoint_step is not None
    assert outcome.checkpoint_step >= 4
    assert re.search(r"gather_numbers|all_reduce|all_gather", text), "rank 0's stack shows what it waits in"
    assert not Path(f"/proc/{frozen[0]}").exists()
