{{/* Our gRPC health service, asked from within: it answers on the pod's loopback alone.
     A GPU that has gone from the container comes back by a new container: so it is part of being
     alive. A node that its coordinator does not hear, or whose certificate ended, is alive and not
     ready; starting it anew would mend nothing. A coordinator short of disk space is not cut off from
     its nodes by that: it is ready while its roster is in order. */}}
{{- define "cloister.probes" -}}
{{- if eq .Values.role "node" }}
startupProbe:
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9094", live] }
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 90
livenessProbe:
  {{- if .Values.gpu.count }}
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9094", live, gpu] }
  {{- else }}
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9094", live] }
  {{- end }}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 4
readinessProbe:
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9094", ready] }
  periodSeconds: 30
  timeoutSeconds: 10
{{- else }}
startupProbe:
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9093", live] }
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 30
livenessProbe:
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9093", live] }
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 4
readinessProbe:
  exec: { command: [python, -m, deploy.probe, "127.0.0.1:9093", roster] }
  periodSeconds: 30
  timeoutSeconds: 10
{{- end }}
{{- end }}
