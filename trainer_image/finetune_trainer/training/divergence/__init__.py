"""Signs that a run has diverged or learned nothing: no result and no checkpoint of such a run is ever stored.

step_watch.py          loss and gradient norm of every step, read without a wait for the GPU
loss_scale.py          loss scaling for fp16: a step whose gradient overflows is left out
loss_history.py        a loss that stays far above the run's own best
trained_adapter.py     the adapter before it is exported: numbers only, and changed by training
checkpoint_files.py    the files of a checkpoint, before they are stored and after they are read
checkpoint_content.py  damage of a checkpoint that was read: files that cannot be loaded or do not fit the model
"""
