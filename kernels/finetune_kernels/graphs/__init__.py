"""CUDA graphs of decoder layers: the host launches one graph in place of a layer's hundred kernels.

recorder.py           records what a function launches, and launches it again
recorded_function.py  an autograd function whose tensors stay at the same addresses
pass_shape.py         the sizes of a pass, or of all packs that one recording takes
host_pace.py          whether the GPU waits for the host
trial.py              whether recorded passes take less time, by the GPU's clock
layer_graphs.py       which passes are recorded: of a shape that comes again and again, where the GPU waits and has room
"""
