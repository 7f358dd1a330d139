"""A job as a cluster has it, for the verbs that also work without one: asked with the user's kubeconfig and rights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.job import FineTuneJob
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from finetune_client.connection import Cluster


@dataclass(frozen=True)
class ClusterChoice:
    """The cluster and the namespace that a user means; None is what kubectl would take."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None

    @property
    def is_named(self) -> bool:
        """True if the user asks for a cluster by an option."""
        return any((self.kubeconfig, self.context, self.namespace))


class ClusterJobError(TrainerError):
    """The cluster has no such job, or could not be asked; the exit code is that of the commands for a cluster."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(FailureReason.INVALID_CONFIGURATION, message)
        self.code = code

    @property
    def exit_code(self) -> ExitCode | int:  # type: ignore[override]  # docs/client.md lists these codes
        """Exit code of the process."""
        return self.code


def get_cluster_job(name: str, choice: ClusterChoice) -> FineTuneJob:
    """Returns a job of the cluster. Raises ClusterJobError."""
    try:
        from finetune_client.errors import ClientError
    except ModuleNotFoundError as error:
        raise _missing_package(error) from None

    try:
        cluster = _open(choice)
        return FineTuneJob.from_object(cluster.get_job(name))
    except ClientError as error:
        raise ClusterJobError(error.message, int(error.code)) from None
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        message = f"job {name} has a field that this version of finetune does not know ({field}): install a newer one"
        raise ClusterJobError(message, 1) from None


def has_cluster(choice: ClusterChoice) -> bool:
    """True if there is a cluster to ask: the user names one, or has a kubeconfig, or this is a pod."""
    try:
        from finetune_client.connection import is_configured
    except ModuleNotFoundError:
        return choice.is_named
    return choice.is_named or is_configured()


def _open(choice: ClusterChoice) -> "Cluster":
    try:
        from finetune_client.connection import Cluster
    except ModuleNotFoundError as error:
        raise _missing_package(error) from None
    return Cluster.open(choice.kubeconfig, choice.context, choice.namespace)


def _missing_package(error: ModuleNotFoundError) -> ClusterJobError:
    message = f"package {error.name} is missing to ask the cluster: pip install 'finetune-operator[client]'"
    return ClusterJobError(message, 2)
