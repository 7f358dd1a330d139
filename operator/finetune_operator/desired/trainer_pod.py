"""The trainer's pod: passes the `restricted` Pod Security level, and can read nothing but what its job needs.

Every path reaches the trainer through its environment, so that the pod also runs where mounts are only folders. There
is no API token in the pod but one that is bound to the pod, and good for nothing but this job's progress endpoint.
"""

from finetune_api.base import Json
from finetune_api.job import ObjectMeta
from finetune_api.progress import token_audience
from finetune_api.spec.sources import Scheme, Source
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_operator.desired.names import TRAINER_CONTAINER, child_name
from finetune_operator.desired.run_config_map import RUN_CONFIG_KEY

CONFIG_DIR = "/etc/finetune"
WORK_DIR = "/workspace"
CREDENTIALS_DIR = "/var/run/finetune/credentials"
TOKEN_DIR = "/var/run/finetune/token"  # noqa: S105 (a folder's name)
TERMINATION_LOG = "/dev/termination-log"
TOKEN_SECONDS = 3600
USER_ID = 65532  # any number but 0: the image runs under every user

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN",)
HUB_KEYS = ("HF_TOKEN",)


def build_trainer_pod_spec(
    job: ObjectMeta, spec: FineTuneJobSpec, image: str, *, verb: str = "run", reports: bool = True
) -> Json:
    """`spec` of a pod that runs `finetune-trainer VERB` for `job`; it has a token only if it reports progress."""
    resources = spec.resources
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.run_policy.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_trainer(spec, image, verb, reports=reports)],
        "volumes": _volumes(job, spec, reports=reports),
    }
    optional = {
        "nodeSelector": dict(resources.node_selector),
        "tolerations": [toleration.to_wire() for toleration in resources.tolerations],
        "runtimeClassName": resources.runtime_class_name,
        "priorityClassName": resources.priority_class_name,
    }
    return pod | {field: value for field, value in optional.items() if value}


def _trainer(spec: FineTuneJobSpec, image: str, verb: str, *, reports: bool) -> Json:
    return {
        "name": TRAINER_CONTAINER,
        "image": image,
        "command": ["finetune-trainer", verb],
        "env": _environment(spec, reports=reports),
        "resources": _resources(spec),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",  # falling back to logs could put rows of data into the status
        "volumeMounts": _mounts(spec, reports=reports),
    }


def _environment(spec: FineTuneJobSpec, *, reports: bool) -> list[Json]:
    values = {
        "PYTHONSAFEPATH": "1",
        "FINETUNE_CONFIG": f"{CONFIG_DIR}/{RUN_CONFIG_KEY}",
        "FINETUNE_WORK_DIR": WORK_DIR,
        **({"FINETUNE_TOKEN_FILE": f"{TOKEN_DIR}/token"} if reports else {}),
        "FINETUNE_TERMINATION_LOG": TERMINATION_LOG,
        "HOME": WORK_DIR,
        "TMPDIR": WORK_DIR,
        "HF_HOME": f"{WORK_DIR}/huggingface",
        "TRITON_CACHE_DIR": f"{WORK_DIR}/triton",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": _threads(str(spec.resources.cpu)),
    }
    if _credential_sources(spec):
        values["FINETUNE_CREDENTIALS_DIR"] = CREDENTIALS_DIR
    for purpose in _claims(spec):
        values[f"FINETUNE_{purpose.upper()}_MOUNT"] = f"/mnt/{purpose}"
    attempt = {"name": "FINETUNE_ATTEMPT_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    return [attempt, *({"name": name, "value": value} for name, value in values.items())]


def _threads(cpu: str) -> str:
    """As many threads as cores were requested: with more, OpenMP's threads wait for each other (20 times slower was
    seen)."""
    cores = float(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)
    return str(max(1, int(cores)))


def _resources(spec: FineTuneJobSpec) -> Json:
    resources = spec.resources
    limits: Json = {"memory": str(resources.memory)}
    if resources.gpus:
        limits[resources.gpu_resource_name] = str(resources.gpus)
    if resources.ephemeral_storage is not None:
        limits["ephemeral-storage"] = str(resources.ephemeral_storage)
    return {"requests": {"cpu": str(resources.cpu)} | limits, "limits": limits}


def _mounts(spec: FineTuneJobSpec, *, reports: bool) -> list[Json]:
    mounts: list[Json] = [
        {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "workspace", "mountPath": WORK_DIR},
    ]
    if reports:
        mounts.append({"name": "token", "mountPath": TOKEN_DIR, "readOnly": True})
    if _credential_sources(spec):
        mounts.append({"name": "credentials", "mountPath": CREDENTIALS_DIR, "readOnly": True})
    mounts += [{"name": purpose, "mountPath": f"/mnt/{purpose}", "readOnly": True} for purpose in _claims(spec)]
    return mounts


def _volumes(job: ObjectMeta, spec: FineTuneJobSpec, *, reports: bool) -> list[Json]:
    storage = spec.resources.ephemeral_storage
    volumes: list[Json] = [
        {"name": "config", "configMap": {"name": child_name(job)}},
        {"name": "workspace", "emptyDir": {} if storage is None else {"sizeLimit": str(storage)}},
    ]
    if reports:
        token = {"audience": token_audience(job.uid), "expirationSeconds": TOKEN_SECONDS, "path": "token"}
        volumes.append({"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}})
    if sources := _credential_sources(spec):
        volumes.append({"name": "credentials", "projected": {"defaultMode": 0o440, "sources": sources}})
    for purpose, claim in _claims(spec).items():
        volumes.append({"name": purpose, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    return volumes


def _claims(spec: FineTuneJobSpec) -> dict[str, str]:
    """Claims by purpose. A claim may serve both."""
    sources = {"model": Source.parse(spec.model.source), "dataset": Source.parse(spec.dataset.source)}
    return {purpose: source.location for purpose, source in sources.items() if source.scheme is Scheme.PVC}


def _credential_sources(spec: FineTuneJobSpec) -> list[Json]:
    """Secrets as folders of one volume (output/, model/, dataset/, hub/). Only documented keys are taken, so a Secret
    that holds more does not end up in the pod; a missing Secret or key keeps the pod from starting."""
    hub = spec.output.hub
    users = (
        ("output", spec.output.s3.credentials, Scheme.S3),
        ("model", spec.model.credentials, Source.parse(spec.model.source).scheme),
        ("dataset", spec.dataset.credentials, Source.parse(spec.dataset.source).scheme),
        ("hub", hub.credentials if hub else None, Scheme.HUGGING_FACE),
    )
    sources: list[Json] = []
    for folder, credentials, scheme in users:
        if credentials is None or scheme not in (Scheme.S3, Scheme.HUGGING_FACE):
            continue
        required, optional = (S3_KEYS, S3_OPTIONAL_KEYS) if scheme is Scheme.S3 else (HUB_KEYS, ())
        sources.append({"secret": _items(credentials.secret_name, folder, required)})
        if optional:
            sources.append({"secret": _items(credentials.secret_name, folder, optional) | {"optional": True}})
    return sources


def _items(secret: str, folder: str, keys: tuple[str, ...]) -> Json:
    return {"name": secret, "items": [{"key": key, "path": f"{folder}/{key}"} for key in keys]}
