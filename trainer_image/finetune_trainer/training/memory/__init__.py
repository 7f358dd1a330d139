"""Memory of the processes of a run: what each may use, and passes for which it may run out.

room.py          memory that every process has, so that all of them plan alike
loaded_shape.py  sizes of the loaded model with its adapter
calibration.py   the machine's speeds, measured at the start, by which plans price their choices
recorded_passes.py  layers as CUDA graphs, where memory has room for one more pass
tried_pass.py    one pass, and whether memory ran out for it: on any rank, where they share the base
"""
