"""Training speed and memory of this project beside its peers, on a machine with a GPU (`make bench`).

run           the benchmark: measures systems in turn, appends to results.csv
schedule      order of the measurements, and their expected time
children      measurements in processes of their own
measure       one measurement, inside its process
ranks         a measurement of several processes, one a GPU
systems       each system's trainer: this project, Unsloth, Liger, plain HF + TRL
token_rows    rows of random tokens, packed or of the full length
models/       models of random weights: written as checkpoints, or drawn on the device
rows          the shapes (model, length, batch) and the systems
step_times    times of steps, and the figures made of them
step_profile  GPU time of one step by kernel and category
loss_curve    losses of one run with and without our kernels
results       results.csv: reading, writing, newest runs
report        tables on the terminal
chart         writes docs/speed.svg, docs/benchmarks.md and README.md's figures
several/      training on several GPUs, for several_gpus.py
cards/        smaller cards, emulated: the longest sequence, the default plan on each
charts/       the chart and the tables themselves
"""
