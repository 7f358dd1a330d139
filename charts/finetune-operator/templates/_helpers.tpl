{{/* Name of the program, for labels. */}}
{{- define "finetune.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{/* Name of the release's objects, and what their names begin with. Room for suffixes is left. */}}
{{- define "finetune.fullname" -}}
{{- $name := include "finetune.name" . -}}
{{- $release := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $release | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{/* The same for objects outside the release's namespace, where releases of other namespaces have theirs too. */}}
{{- define "finetune.clusterName" -}}
{{ include "finetune.fullname" . }}-{{ .Release.Namespace }}
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "finetune.selector" -}}
app.kubernetes.io/name: {{ include "finetune.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Image reference: (dict "image" .Values.image "root" .) */}}
{{- define "finetune.image" -}}
{{- $name := list (.root.Values.imageRegistry | trimSuffix "/") .image.repository | compact | join "/" -}}
{{- if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "finetune.serviceAccountName" -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.name is needed where serviceAccount.create is false: the account that gets the operator's rights" -}}
{{- end -}}
{{- .Values.serviceAccount.name | default (include "finetune.fullname" .) -}}
{{- end }}

{{- define "finetune.serviceHost" -}}{{ include "finetune.fullname" . }}.{{ .Release.Namespace }}.svc{{- end }}

{{- define "finetune.progressUrl" -}}
{{- .Values.progress.url | default (printf "https://%s:%v" (include "finetune.serviceHost" .) .Values.progress.port) -}}
{{- end }}

{{- define "finetune.tlsSecret" -}}
{{- .Values.tls.secretName | default (printf "%s-tls" (include "finetune.fullname" .)) -}}
{{- end }}

{{/* "true" if the operator makes its certificate itself. */}}
{{- define "finetune.makesCertificate" -}}
{{ not (or .Values.tls.secretName .Values.tls.certManager.enabled) }}
{{- end }}

{{/* Host names under which the progress server is reached, between commas; an address in progress.url comes beside them. */}}
{{- define "finetune.tlsNames" -}}
{{- $service := include "finetune.serviceHost" . -}}
{{- $host := get (urlParse (include "finetune.progressUrl" .)) "host" | splitList ":" | first -}}
{{- $names := list $service (printf "%s.cluster.local" $service) -}}
{{- regexMatch "^[0-9.]+$" $host | ternary $names (append $names $host) | uniq | join "," -}}
{{- end }}

{{/* Name of the Secret, or of the ConfigMap if the operator makes its certificate, in which ca.crt is found. */}}
{{- define "finetune.authorityName" -}}
{{- eq (include "finetune.makesCertificate" .) "true" | ternary (printf "%s-authority" (include "finetune.fullname" .)) (include "finetune.tlsSecret" .) -}}
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
    {{ eq (include "finetune.makesCertificate" .) "true" | ternary "configMap" "secret" }}: {name: {{ include "finetune.authorityName" . }}, key: ca.crt}
{{- end }}

{{/* Rules of checkov that the operator's image does not keep in a pod, each with its reason. `make chart-audit` runs checkov. */}}
{{- define "finetune.exceptions" -}}
checkov.io/skip1: CKV_K8S_11=a CPU limit would hold up the renewal of the leader's Lease; requests are set
checkov.io/skip2: CKV_K8S_15=tags are versions that never move, and a registry that is away must not stop a restart
checkov.io/skip3: CKV_K8S_38=its work is to ask the API server, under the rights that the chart lists
{{- if not .Values.image.digest }}
checkov.io/skip4: CKV_K8S_43=the value image.digest pins the image; the chart cannot know the digest in your registry
{{- end }}
{{- end }}

{{/* Annotations of an object of `helm test`, with its place in the order. */}}
{{- define "finetune.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
