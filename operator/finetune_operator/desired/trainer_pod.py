"""The trainer's pod. It passes the `restricted` Pod Security level, and can read only what its job needs.

Every path reaches the trainer through an environment variable, so that the pod also runs where mounts are plain
folders. The only API token in the pod is bound to the pod and is accepted only by this job's progress endpoint.
"""

from finetune_api.base import Json
from finetune_api.gpus import GPU_ALLOCATOR
from finetune_api.progress import token_audience
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.vocabulary import TRAINER_CONTAINER
from finetune_operator.desired.names import peers_name
from finetune_operator.desired.peers import PORT_NAME, RENDEZVOUS_PORT, rendezvous_address
from finetune_operator.desired.pod_options import option_mounts, option_variables, option_volumes, pod_options
from finetune_operator.desired.pod_plan import PodPlan
from finetune_operator.desired.run_config_map import RUN_CONFIG_KEY

CONFIG_VOLUME = "config"
CONFIG_DIR = "/etc/finetune"
WORK_DIR = "/workspace"
CREDENTIALS_DIR = "/var/run/finetune/credentials"
TOKEN_DIR = "/var/run/finetune/token"  # noqa: S105 (a folder's name)
TERMINATION_LOG = "/dev/termination-log"
TOKEN_SECONDS = 3600
USER_ID = 65532  # any number but 0: the image runs under every user


def build_pod_spec(plan: PodPlan) -> Json:
    """Builds the `spec` of the pod that runs `finetune-trainer COMMAND`."""
    resources = plan.spec.resources
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.spec.run_policy.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(plan)],
        "volumes": _volumes(plan),
    }

    # Fields that the job leaves empty are not in the manifest at all.
    optional = {
        "nodeSelector": dict(resources.node_selector),
        "tolerations": [toleration.to_wire() for toleration in resources.tolerations],
        "runtimeClassName": resources.runtime_class_name,
        "priorityClassName": resources.priority_class_name,
        "schedulerName": plan.spec.scheduling.scheduler_name,
        "subdomain": peers_name(plan.job) if plan.nodes > 1 else None,
        **pod_options(plan),
    }
    return pod | {field: value for field, value in optional.items() if value}


def _container(plan: PodPlan) -> Json:
    pod = plan.spec.pod
    return {
        "name": TRAINER_CONTAINER,
        "image": plan.image,
        **({"imagePullPolicy": pod.image_pull_policy} if pod.image_pull_policy else {}),
        "command": ["finetune-trainer", plan.command],
        "env": _environment(plan),
        **({"ports": [{"name": PORT_NAME, "containerPort": RENDEZVOUS_PORT}]} if plan.nodes > 1 else {}),
        "resources": _resources(plan.spec),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",  # falling back to logs could put rows of data into the status
        "volumeMounts": _mounts(plan),
    }


def _environment(plan: PodPlan) -> list[Json]:
    values = {
        "PYTHONSAFEPATH": "1",
        "FINETUNE_CONFIG": f"{CONFIG_DIR}/{RUN_CONFIG_KEY}",
        "FINETUNE_WORK_DIR": WORK_DIR,
        **({"FINETUNE_TOKEN_FILE": f"{TOKEN_DIR}/token"} if plan.reports_progress else {}),
        "FINETUNE_TERMINATION_LOG": TERMINATION_LOG,
        # The root filesystem is read-only, so every cache goes to the workspace.
        "HOME": WORK_DIR,
        "TMPDIR": WORK_DIR,
        "HF_HOME": f"{WORK_DIR}/huggingface",
        "TRITON_CACHE_DIR": f"{WORK_DIR}/triton",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **GPU_ALLOCATOR,
        "OMP_NUM_THREADS": _threads(str(plan.spec.resources.cpu)),
    }

    values |= option_variables(plan.spec.pod)
    if plan.credentials:
        values["FINETUNE_CREDENTIALS_DIR"] = CREDENTIALS_DIR
    if plan.nodes > 1:
        values["FINETUNE_RENDEZVOUS"] = rendezvous_address(plan.job, plan.job_name)
    for purpose in plan.claims:
        values[f"FINETUNE_{purpose.upper()}_MOUNT"] = f"/mnt/{purpose}"

    attempt = {"name": "FINETUNE_ATTEMPT_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    return [attempt, *({"name": name, "value": value} for name, value in values.items())]


def _threads(cpu: str) -> str:
    """Number of OpenMP threads: one for each requested core. With more threads than cores they wait for each other;
    20 times slower was measured."""
    cores = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return str(max(1, int(cores)))


def _resources(spec: FineTuneJobSpec) -> Json:
    resources = spec.resources

    limits: Json = {"memory": str(resources.memory)}
    if resources.gpus:
        limits[resources.gpu_resource_name] = str(resources.gpus)
    if resources.ephemeral_storage is not None:
        limits["ephemeral-storage"] = str(resources.ephemeral_storage)

    # Memory, GPUs and disk are limited to what is requested; CPU is not limited.
    return {"requests": {"cpu": str(resources.cpu)} | limits, "limits": limits}


def _needs_shared_memory(plan: PodPlan) -> bool:
    return plan.spec.resources.gpus > 1 or (plan.nodes > 1 and plan.spec.resources.gpus > 0)


def _mounts(plan: PodPlan) -> list[Json]:
    mounts: list[Json] = [
        {"name": CONFIG_VOLUME, "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "workspace", "mountPath": WORK_DIR},
    ]

    if _needs_shared_memory(plan):
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108 (NCCL's; a container has 64 MiB)
    if plan.reports_progress:
        mounts.append({"name": "token", "mountPath": TOKEN_DIR, "readOnly": True})
    if plan.credentials:
        mounts.append({"name": "credentials", "mountPath": CREDENTIALS_DIR, "readOnly": True})
    mounts += [{"name": purpose, "mountPath": f"/mnt/{purpose}", "readOnly": True} for purpose in plan.claims]

    return mounts + option_mounts(plan.spec.pod)


def _volumes(plan: PodPlan) -> list[Json]:
    storage = plan.spec.resources.ephemeral_storage
    volumes: list[Json] = [
        {"name": CONFIG_VOLUME, "configMap": {"name": plan.config_map}},
        {"name": "workspace", "emptyDir": {} if storage is None else {"sizeLimit": str(storage)}},
    ]

    if _needs_shared_memory(plan):
        # It counts towards the pod's memory limit, which bounds it.
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    if plan.reports_progress:
        audience = token_audience(plan.job.uid)
        token = {"audience": audience, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
        volumes.append({"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}})
    if plan.credentials:
        volumes.append({"name": "credentials", "projected": {"defaultMode": 0o440, "sources": plan.credentials}})
    for purpose, claim in plan.claims.items():
        volumes.append({"name": purpose, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})

    return volumes + option_volumes(plan.spec.pod)
