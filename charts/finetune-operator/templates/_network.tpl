{{/* Pods of jobs, in any namespace: preflight and training. */}}
{{- define "finetune.trainers" -}}
matchLabels: {app.kubernetes.io/managed-by: finetune-operator}
matchExpressions: [{key: app.kubernetes.io/component, operator: In, values: [preflight, trainer]}]
{{- end }}

{{/* Addresses that give out credentials or lead into the node, as in finetune_api.spec.endpoints. */}}
{{- define "finetune.metadata4" -}}
- 169.254.0.0/16
- 100.100.100.200/32
- 168.63.129.16/32
- 192.0.0.192/32
{{- end }}
{{- define "finetune.metadata6" -}}
- fe80::/10
- fd00:ec2::/32
- fd20:ce::254/128
{{- end }}

{{/* DNS, wherever it is answered: in the cluster, or on the node. */}}
{{- define "finetune.dnsEgress" -}}
- ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- end }}

{{/* Labels of the pod of `helm test`: not those of the operator's pods, or the Service would lead to it. */}}
{{- define "finetune.testLabels" -}}
app.kubernetes.io/name: {{ include "finetune.name" . }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
