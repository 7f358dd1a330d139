"""The kernels run in Triton's interpreter here, on the CPU (fp32 and fp16: it gets bfloat16 wrong without a word).

Triton decides at decoration, so the switch is set while the modules are imported, and taken back: on a CPU the public
functions of the package use the references anyway.
"""

import os
from importlib import import_module

before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"
import_module("triton.experimental.gluon")  # which Triton imports at the first launch, and which looks again
for name in ("rms_norm", "gated_activation", "linear_cross_entropy"):
    import_module(f"finetune_kernels.{name}")
if before is None:
    del os.environ["TRITON_INTERPRET"]
