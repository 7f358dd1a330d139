{{- define "finetune.name" -}}finetune-operator{{- end }}

{{- define "finetune.labels" -}}
app.kubernetes.io/name: {{ include "finetune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: {{ include "finetune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Image reference: (dict "image" .Values.image "version" .Chart.AppVersion) */}}
{{- define "finetune.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .version }}
{{- end -}}
{{- end }}

{{- define "finetune.serviceHost" -}}{{ include "finetune.name" . }}.{{ .Release.Namespace }}.svc{{- end }}

{{- define "finetune.progressUrl" -}}
{{- .Values.progress.url | default (printf "https://%s:%v" (include "finetune.serviceHost" .) .Values.progress.port) -}}
{{- end }}

{{- define "finetune.tlsSecret" -}}
{{- .Values.tls.secretName | default (printf "%s-tls" (include "finetune.name" .)) -}}
{{- end }}

{{/* Whoever lists namespaces has chosen them; else those of Kubernetes and of the operator are left alone. */}}
{{- define "finetune.deniedNamespaces" -}}
{{- if not .Values.watchNamespaces -}}
{{ append .Values.deniedNamespaces .Release.Namespace | uniq | join "," }}
{{- end -}}
{{- end }}

{{/* How Prometheus reads metrics: over TLS, as whoever it is to the API server. */}}
{{- define "finetune.scrape" -}}
path: /metrics
scheme: https
interval: {{ .Values.metrics.interval }}
{{- if .Values.metrics.tokenSecret.name }}
authorization:
  credentials: {{- toYaml .Values.metrics.tokenSecret | nindent 4 }}
{{- else }}
bearerTokenFile: /var/run/secrets/kubernetes.io/serviceaccount/token
{{- end }}
tlsConfig:
  serverName: {{ include "finetune.serviceHost" . }}
  ca:
    secret: {name: {{ include "finetune.tlsSecret" . }}, key: ca.crt}
{{- end }}
