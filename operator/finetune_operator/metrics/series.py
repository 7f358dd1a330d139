"""Every series that is counted as things happen. `docs/metrics.md` is generated from them.

Labels are bounded: a verb, an HTTP status, a stage, a reason of ours. No label names a job, a namespace or a user, so a
million jobs make no more series than ten.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and nothing here needs them
REGISTRY = CollectorRegistry(auto_describe=True)

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGE_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 48 * 3600, 7 * 24 * 3600)

# The operator itself.
BUILD_INFO = Gauge(
    "finetune_build_info",
    "Version of the operator and of Python; the value is 1.",
    ["version", "python"],
    registry=REGISTRY,
)
LEADER = Gauge("finetune_leader", "1 on the replica that leads, 0 on the others.", registry=REGISTRY)
HEARTBEAT_AGE = Gauge(
    "finetune_heartbeat_age_seconds",
    "Seconds since a worker last took the heartbeat from the queue; it grows on replicas that do not lead.",
    registry=REGISTRY,
)
QUEUED_LOOKS = Gauge("finetune_work_queue_depth", "Jobs that are to be looked at, now or later.", registry=REGISTRY)
CERTIFICATE_EXPIRY = Gauge(
    "finetune_certificate_expiry_timestamp_seconds",
    "Unix time at which the progress server's certificate expires.",
    registry=REGISTRY,
)

# Reconciles.
RECONCILE_SECONDS = Histogram(
    "finetune_reconcile_duration_seconds",
    "Time of one look at a job, with its writes.",
    buckets=_REQUEST_SECONDS,
    registry=REGISTRY,
)
RECONCILE_ERRORS = Counter(
    "finetune_reconcile_errors_total",
    "Looks that ended with an error, and are made again.",
    ["reason"],
    registry=REGISTRY,
)
LISTS = Counter(
    "finetune_lists_total", "Lists of all jobs, which make good for lost events.", ["result"], registry=REGISTRY
)
RELISTED_CHANGES = Counter(
    "finetune_relisted_changes_total",
    "Jobs that had changed since the list before; each is looked at once more.",
    registry=REGISTRY,
)
WATCH_EVENTS = Counter("finetune_watch_events_total", "Events of the watches.", ["stream"], registry=REGISTRY)
WATCH_TIME = Gauge(
    "finetune_watch_last_event_timestamp_seconds",
    "Unix time of the newest event of a watch; 0 before the first.",
    ["stream"],
    registry=REGISTRY,
)

# Requests to the API server.
API_REQUESTS = Counter(
    "finetune_api_requests_total",
    "Requests to the API server; code is 0 if there was no answer.",
    ["verb", "code"],
    registry=REGISTRY,
)
API_SECONDS = Histogram(
    "finetune_api_request_duration_seconds",
    "Time until the API server had answered.",
    ["verb"],
    buckets=_REQUEST_SECONDS,
    registry=REGISTRY,
)

# Reports of trainers.
REPORTS = Counter(
    "finetune_progress_reports_total", "Progress reports, by HTTP status of the answer.", ["code"], registry=REGISTRY
)
CONNECTIONS = Gauge("finetune_report_connections", "Open connections to the progress server.", registry=REGISTRY)
REFUSED_CONNECTIONS = Counter(
    "finetune_report_connections_refused_total",
    "Connections that were closed at once, as there were too many.",
    registry=REGISTRY,
)

# Jobs, as this replica wrote their statuses.
COMPLETIONS = Counter(
    "finetune_job_completions_total",
    "Jobs whose end this replica has written: Succeeded, Reused or Failed, with the reason.",
    ["result", "reason"],
    registry=REGISTRY,
)
JOB_SECONDS = Histogram(
    "finetune_job_duration_seconds",
    "Time from the creation of a job to its end.",
    ["result"],
    buckets=_STAGE_SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "finetune_stage_duration_seconds",
    "Time of a stage, of those that have ended.",
    ["stage"],
    buckets=_STAGE_SECONDS,
    registry=REGISTRY,
)
RETRIES = Counter(
    "finetune_retries_total",
    "Pods that came after another of the same job, by why that ended.",
    ["reason"],
    registry=REGISTRY,
)
LOST_STEPS = Counter(
    "finetune_lost_steps_total", "Steps that were reported and had to be trained again.", registry=REGISTRY
)
UPLOADED_BYTES = Counter(
    "finetune_artifact_bytes_total", "Bytes of the artifacts of jobs that succeeded.", ["type"], registry=REGISTRY
)

# What jobs cost, counted at their end.
GPU_SECONDS = Counter(
    "finetune_gpu_seconds_total", "GPU-seconds of jobs that have ended, by result.", ["result"], registry=REGISTRY
)
WAITING_SECONDS = Histogram(
    "finetune_job_waiting_seconds",
    "Time that a job wanted to run and had no pod on a node.",
    buckets=_STAGE_SECONDS,
    registry=REGISTRY,
)
ENERGY_JOULES = Counter(
    "finetune_energy_joules_total",
    "Energy of the GPUs of jobs that have ended, as far as their pods measured it.",
    ["result"],
    registry=REGISTRY,
)
COST = Counter(
    "finetune_cost_total",
    "Cost of jobs that have ended, by the administrator's prices.",
    ["currency"],
    registry=REGISTRY,
)
ESTIMATE_RATIO = Histogram(
    "finetune_gpu_seconds_estimate_ratio",
    "GPU time of jobs that succeeded, over preflight's estimate.",
    buckets=(0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2, 4, 10),
    registry=REGISTRY,
)
