"""The trainer's container in a pod of several nodes, on a machine where all pods have one address.

    python -P -m finetune_test_models.ranks.node_pod COMMAND ... [FAULT]

COMMAND: as in the pod's manifest. The names of the pods in TEST_HOSTS (a comma between two) are this machine; a pod
whose name is not in it has no address. FAULT: a trainer of `run.FAULTS`, for every process of this pod, or HangingLoad:
its first process never gets its base model.
"""

import os
import socket
import sys
import threading
from typing import Any
from unittest import mock

resolve = socket.getaddrinfo


def resolve_pods(host: Any, *arguments: Any, **options: Any) -> Any:
    """`socket.getaddrinfo`, as the cluster's DNS would answer for pods."""
    if isinstance(host, str) and ".nodes-" in host:
        if host not in os.environ["TEST_HOSTS"].split(","):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        host = "127.0.0.1"
    return resolve(host, *arguments, **options)


if __name__ == "__main__":
    socket.getaddrinfo = resolve_pods
    from finetune_trainer.cli.pod import main

    program, command, *faults = sys.argv[1:]
    assert program == "finetune-trainer"
    if faults == ["HangingLoad"]:
        from finetune_trainer import follower

        mock.patch.object(follower, "load_base", side_effect=lambda *_, **__: threading.Event().wait()).start()
    elif faults:
        from finetune_test_models.ranks.run import TRAINERS
        from finetune_trainer.stages import training

        mock.patch.object(training, "QloraTrainer", TRAINERS[faults[0]]).start()
    sys.argv[1:] = [command]
    main()
