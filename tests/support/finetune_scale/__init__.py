"""Thousands of FineTuneJobs on a development cluster: what they cost the operator and the API server.

run.py        `make scale`: the phases of a run, and its row of figures
load.py       creates the jobs, at a steady rate
nodes.py      plays the kubelets of all pods, and notes when each pod changed
sightings.py  watches FineTuneJobs, and notes when each status changed
reporters.py  posts progress for the jobs that train, as trainers do
costs.py      requests of the operator, its memory and its processor time
api.py        requests and watches, many at once
chart.py      draws docs/scale.svg from the figures
"""
