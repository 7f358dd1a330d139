"""Asks the API server who reads metrics, and whether they may: as kube-rbac-proxy and the kubelet do.

The right is `get` on the path /metrics, which is no resource: a ClusterRole with `nonResourceURLs: ["/metrics"]` gives
it, and Kubernetes' own monitoring roles have it already.
"""

from finetune_api.base import Json
from finetune_operator.cluster.cluster import Connection

METRICS_PATH = "/metrics"


class ScraperReview:
    """Reviews of tokens and of the right to read metrics. Methods raise ApiError or ApiUnavailableError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def find_user(self, token: str) -> Json | None:
        """Returns the user of a token, as TokenReview names it; None if the token is not valid."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        answer = await self._connection.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)

        status: Json = answer.get("status") or {}
        user: Json | None = status.get("user")
        return user if status.get("authenticated") else None

    async def may_read(self, user: Json) -> bool:
        """True if a user may read metrics."""
        spec = {
            "user": user.get("username"),
            "uid": user.get("uid"),
            "groups": user.get("groups"),
            "extra": user.get("extra"),
            "nonResourceAttributes": {"path": METRICS_PATH, "verb": "get"},
        }
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        answer = await self._connection.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
        return (answer.get("status") or {}).get("allowed") is True
