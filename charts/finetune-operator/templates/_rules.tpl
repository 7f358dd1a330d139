{{/* GENERATED from operator/finetune_operator/cluster/access.py by `make generate`. Do not edit. */}}
{{- define "finetune.rules" -}}
# Jobs are read and watched, never changed.
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch]
# The status is written with server-side apply.
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
# Children name their job as an owner that blocks deletion; some API servers require this for it.
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
# Preflight and training are Jobs. Their suspension, deadline and ttl are patched.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch]
# An immutable ConfigMap carries the resolved job to its pods.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create]
# Pods of a job on several nodes find each other by a headless Service.
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
# Pods of a job on several nodes are reached by each other only.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
# Exit codes and termination messages are read from pods.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# A trainer that has fallen silent is evicted, so that another one goes on.
- apiGroups: [""]
  resources: [pods/eviction]
  verbs: [create]
# Each transition is posted as an Event; Events of a stuck pod name the reason.
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
{{- end }}
{{- define "finetune.queueRules" -}}
# What a queue says of a job stands in its Workload, by which it is suspended too.
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list, watch, patch]
# A queue that does not exist is reported before anything runs.
- apiGroups: [kueue.x-k8s.io]
  resources: [localqueues]
  verbs: [get]
# Jobs show their place in the line.
- apiGroups: [visibility.kueue.x-k8s.io]
  resources: [localqueues/pendingworkloads]
  verbs: [get]
{{- end }}
{{- define "finetune.jobSetRules" -}}
# A JobSet makes the Job of a job that asks for one. Its suspension and ttl are patched.
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [get, create, patch]
{{- end }}
{{- define "finetune.ownRules" -}}
# The Lease says which replica leads.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "finetune.fullname" . }}]
  verbs: [get, update]
# Kubernetes cannot restrict creation to a name.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
{{- end }}
{{- define "finetune.authorityRules" -}}
# The progress server's authority is shown to Prometheus.
- apiGroups: [""]
  resources: [configmaps]
  resourceNames: [{{ include "finetune.fullname" . }}-authority]
  verbs: [patch]
{{- end }}
{{- define "finetune.clusterRules" -}}
# The API server says which pod a progress report's token belongs to, and whose token reads metrics.
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
# The API server says who may read metrics.
- apiGroups: [authorization.k8s.io]
  resources: [subjectaccessreviews]
  verbs: [create]
{{- end }}
