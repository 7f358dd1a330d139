"""Posts progress reports to an operator, as the pods of trainers do."""

import json
import urllib.error
import urllib.request
from datetime import UTC, datetime
from typing import Any

from kubernetes import client

from finetune_api.progress import progress_path, token_audience
from finetune_test_operator.operator_process import OperatorProcess


class Reporter:
    """Posts reports as a pod would."""

    def __init__(self, operator: OperatorProcess, jobs: Any) -> None:
        self._operator = operator
        self._jobs = jobs
        self._core: Any = client.CoreV1Api(jobs.cluster.api_client())

    def token(self, pod: Any, audience: str) -> str:
        """A projected token of the pod, as the kubelet asks for it."""
        bound = {"apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid}
        spec = {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = self._core.create_namespaced_service_account_token("default", self._jobs.namespace, body)
        return str(answer.status.token)

    def own_token(self, pod: Any, name: str) -> str:
        return self.token(pod, token_audience(self._jobs.get(name)["metadata"]["uid"]))

    def post(self, name: str, token: str, sequence: int, stage: str = "Training", **run: Any) -> int:
        now = datetime.now(UTC).isoformat()
        body = {
            "trainerStatus": {
                "progressPercentage": 40,
                "estimatedRemainingSeconds": 75,
                "metrics": [{"name": "loss", "value": "1.5"}],
                "lastUpdatedTime": now,
            },
            "finetune": {"sequence": sequence, "stage": stage, "stages": [{"name": stage, "startTime": now}], **run},
        }
        return self.post_bytes(name, token, json.dumps(body).encode())

    def post_bytes(self, name: str, token: str, body: bytes) -> int:
        url = self._operator.progress_url + progress_path(self._jobs.namespace, name)
        request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}"}, method="POST")
        try:
            with urllib.request.urlopen(request, context=self._operator.tls(), timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
