"""One attempt at a job: its surroundings, its progress and its end. Knows nothing of models and needs no torch.

run_context.py        what every stage of a run may need: configuration, settings, storage, progress, stop signal
settings.py           folders, mounts and identity of the attempt; the only reader of the environment
source_access.py      credentials, endpoint and mount for reading model and data
inputs.py             the identity of model and data, before anything trains
progress_tracker.py   the live state of the run, in memory
reporter.py           posts that state to the operator over HTTPS
stop_signal.py        SIGTERM and Ctrl-C, and a watchdog that ends the process in order
watchdog.py           ends a run that no longer gets on, with the stacks of all threads in the log
stacks.py             where the threads are, for that
energy.py             energy of the run's GPUs, as NVIDIA's driver counts it
machine.py            the CPU's bfloat16 and the free memory, for CPU runs
triton_cache.py       what the image has compiled for Triton, copied into the pod's cache
disk_needs.py         disk that a whole job needs, against what there is (pure)
outcome.py            the last word of a run: termination message and exit code
logging_setup.py      one log line per event on stderr
"""
