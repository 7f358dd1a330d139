{{/* Environment of the operator, and of the test that looks at its installation. */}}
{{- define "finetune.environment" -}}
- {name: PYTHONSAFEPATH, value: "1"}
- {name: PYTHONUNBUFFERED, value: "1"}
- name: FINETUNE_LEASE_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- {name: FINETUNE_LEASE_NAME, value: {{ include "finetune.fullname" . | quote }}}
- name: FINETUNE_POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: FINETUNE_NAMESPACES, value: {{ join "," .Values.watchNamespaces | quote }}}
- {name: FINETUNE_DENIED_NAMESPACES, value: {{ include "finetune.deniedNamespaces" . | quote }}}
- {name: FINETUNE_ENDPOINT_HOSTS, value: {{ join "," .Values.endpoints.hosts | quote }}}
- {name: FINETUNE_ENDPOINT_PRIVATE, value: {{ .Values.endpoints.private | quote }}}
- {name: FINETUNE_ENDPOINT_LOOPBACK, value: {{ .Values.endpoints.loopback | quote }}}
- {name: FINETUNE_KUEUE, value: {{ .Values.kueue.enabled | quote }}}
- {name: FINETUNE_QUEUE_PREFLIGHT, value: {{ .Values.kueue.queuePreflight | quote }}}
- {name: FINETUNE_JOB_SETS, value: {{ .Values.jobSets.enabled | quote }}}
- name: FINETUNE_TRAINER_IMAGE
  value: {{ include "finetune.image" (dict "image" .Values.trainer.image "root" .) | quote }}
- {name: FINETUNE_RESULT_LOCATION, value: {{ .Values.resultLocation | quote }}}
- {name: FINETUNE_PROGRESS_URL, value: {{ include "finetune.progressUrl" . | quote }}}
- {name: FINETUNE_PROGRESS_PORT, value: {{ .Values.progress.port | quote }}}
- {name: FINETUNE_HEALTH_PORT, value: {{ .Values.health.port | quote }}}
- {name: FINETUNE_TLS_DIR, value: /etc/finetune/tls}
{{- if eq (include "finetune.makesCertificate" .) "true" }}
- {name: FINETUNE_TLS_SEED, value: /etc/finetune/authority/token}
- {name: FINETUNE_TLS_NAMES, value: {{ include "finetune.tlsNames" . | quote }}}
- {name: FINETUNE_AUTHORITY_CONFIG_MAP, value: {{ include "finetune.authorityName" . | quote }}}
{{- end }}
- {name: FINETUNE_SERVICE_ACCOUNT_DIR, value: /var/run/secrets/kubernetes.io/serviceaccount}
- {name: FINETUNE_PRICES, value: {{ toJson .Values.pricing | quote }}}
- {name: FINETUNE_POD_DEFAULTS, value: {{ toJson .Values.podDefaults | quote }}}
- {name: FINETUNE_ALLOWED_OVERRIDES, value: {{ toJson .Values.allowedOverrides | quote }}}
- {name: FINETUNE_MAX_GPUS_PER_NAMESPACE, value: {{ .Values.maxGpusPerNamespace | quote }}}
- {name: FINETUNE_LOG_LEVEL, value: {{ .Values.logLevel | quote }}}
- {name: FINETUNE_LOG_FORMAT, value: {{ .Values.logFormat | quote }}}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
