"""Master weights: the fp32 values of parameters that compute in 16 bits.

An update of a parameter in bfloat16 is lost where it is below half of the last bit, 0.2 % of the value: with learning
rates of 1e-4 that is most of them. So an optimiser updates fp32 values, and the parameter is these values rounded.
Whoever saves a parameter saves its master weights.

Source: Micikevicius et al., "Mixed Precision Training", 2018.
"""

import torch

_NAME = "_master_weight"


def master_weight(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the fp32 values that `parameter` is rounded from; the parameter itself where there are none."""
    found = getattr(parameter, _NAME, None)
    return parameter if found is None else found


def set_master_weight(parameter: torch.nn.Parameter, master: torch.Tensor) -> None:
    """Makes `master` (fp32, the parameter's shape and device) the values that `parameter` is rounded from."""
    assert master.shape == parameter.shape
    setattr(parameter, _NAME, master)


def split_off_master(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Rounds a parameter to `dtype`; what it held before are its master weights."""
    set_master_weight(parameter, parameter.data.float())
    parameter.data = parameter.data.to(dtype)
