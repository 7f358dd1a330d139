"""Figures of the speed benchmark for people, made from its CSV files.

bars     the chart docs/speed.svg, drawn with matplotlib
tables   the table in README.md, and docs/benchmarks.md with every figure
gpus     the table of several GPUs, and the profile of their steps
labels   the names of systems and rows, and the runs that are shown
"""
