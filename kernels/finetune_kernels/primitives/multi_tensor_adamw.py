"""AdamW over many parameters in one launch, on master weights in fp32.

An adapter is hundreds of small tensors, and an optimiser that goes through them one by one spends 25-40 ms of a step
launching kernels that run for microseconds. Here the parameters of a group are views of one vector (one for each type
and device), and another vector holds their values in fp32. An optimiser for single tensors updates that one at once,
and the parameters are its values rounded to their own type. Every parameter begins at a multiple of the quantisation
block, so that an 8-bit state is the one it would have alone. Only tensors below 4,096 elements differ there:
bitsandbytes leaves their states in fp32, and here they are 8-bit (int8), too.

The fp32 gradient exists between the clipping and the end of a step only: then no activations are in memory.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022; Loshchilov and Hutter, "Decoupled Weight
Decay Regularization", 2019. The one launch is the idea of apex's and PyTorch's multi-tensor optimisers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from finetune_kernels.primitives.master_weights import master_weight, set_master_weight

BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit states."""
Inner = Callable[[list[dict[str, Any]]], Any]
"""Makes an optimiser of parameter groups, such as bitsandbytes' AdamW8bit."""


class _Vector:
    """Parameters of one type and device as views of one vector, and their master weights as views of another."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._sizes = [-(-parameter.numel() // BLOCK) * BLOCK for parameter in parameters]

        self._rounded = parameters[0].new_zeros(sum(self._sizes))
        in_fp32 = self._rounded.dtype is torch.float32
        self.master = torch.nn.Parameter(self._rounded if in_fp32 else torch.zeros_like(self._rounded).float())

        views = zip(self._views(self._rounded), self._views(self.master.data), strict=True)
        for parameter, (rounded, master) in zip(parameters, views, strict=True):
            master.copy_(master_weight(parameter).detach())
            rounded.copy_(master)
            parameter.data = rounded
            if not in_fp32:
                set_master_weight(parameter, master)

    def _views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Returns each parameter's part of `whole`, in the parameter's shape and without the padding."""
        parts = torch.split(whole, self._sizes)
        return [
            part[: parameter.numel()].view(parameter.shape)
            for part, parameter in zip(parts, self._parameters, strict=True)
        ]

    def gather(self) -> torch.Tensor:
        """Returns all gradients as one fp32 vector, which `master.grad` then is, too; the gradient of a parameter
        without one is zero."""
        self.master.grad = torch.zeros_like(self.master)
        places, found = [], []
        for parameter, place in zip(self._parameters, self._views(self.master.grad), strict=True):
            if parameter.grad is not None:
                places.append(place)
                found.append(parameter.grad)

        if found:
            torch._foreach_copy_(places, found)
        return self.master.grad

    def round(self) -> None:
        """Gives the parameters their updated values, and lets go of the gradient."""
        self.drop_gradient()
        if self._rounded.dtype is not torch.float32:
            self._rounded.copy_(self.master.data)

    def drop_gradient(self) -> None:
        """Lets go of the gradient."""
        self.master.grad = None

    def check(self) -> None:
        """Raises RuntimeError if a parameter was given other memory, which an update would not reach."""
        first, size = self._rounded.data_ptr(), self._rounded.element_size()
        for parameter, length in zip(self._parameters, self._sizes, strict=True):
            if parameter.data_ptr() != first:
                raise RuntimeError("a parameter was moved after its optimiser had been made")
            first += length * size


class MultiTensorAdamW(torch.optim.Optimizer):
    """AdamW of any make for parameters that keep their memory.

    Parameters that have master weights start from these.
    """

    def __init__(
        self,
        params: Iterable[Any],
        inner: Inner,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """`inner` makes the optimiser that updates the master weights."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._vectors: list[_Vector] = []
        self._groups: list[dict[str, Any]] = []  # of each vector

        for group in self.param_groups:
            for kind in dict.fromkeys(map(_kind, group["params"])):
                self._vectors.append(_Vector([part for part in group["params"] if _kind(part) == kind]))
                self._groups.append(group)

        self._inner = inner([{"params": [vector.master]} for vector in self._vectors])
        self._gathered = False

    def clip_gradients(
        self, max_norm: float, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None, loss_scale: float = 1.0
    ) -> torch.Tensor:
        """Scales the gradients that `step` will use to a common norm of at most `max_norm`.

        Of several processes, `reduce` makes each vector of gradients (fp32) the sum over all, in place, before the
        norm is taken. `loss_scale`: what the loss was multiplied by, and the gradients are divided by. Returns the norm
        before clipping (fp32 scalar): infinity or NaN if any gradient is. The parameters' own gradients are left
        unchanged.
        """
        parts = [vector.gather() for vector in self._vectors]
        if reduce is not None:
            for part in parts:
                reduce(part)
        self._gathered = True

        norms = [torch.linalg.vector_norm(part).to(parts[0].device) for part in parts]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms)) / loss_scale

        for part in parts:
            part.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(part.device) / loss_scale)
        return norm

    def drop_gradients(self) -> None:
        """Leaves a step out: lets go of what `clip_gradients` has gathered."""
        self._gathered = False
        for vector in self._vectors:
            vector.drop_gradient()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters from their gradients, or from those that `clip_gradients` has scaled.

        `closure` is not supported.
        """
        assert closure is None
        for vector, group, inner in zip(self._vectors, self._groups, self._inner.param_groups, strict=True):
            vector.check()
            if not self._gathered:
                vector.gather()
            inner.update({name: group[name] for name in self.defaults})

        self._gathered = False
        self._inner.step()
        for vector in self._vectors:
            vector.round()

    def state_dict(self) -> dict[str, Any]:
        """Returns the groups' settings and the vectors' states; master weights are saved with the parameters."""
        groups = [{name: group[name] for name in group if name != "params"} for group in self.param_groups]
        return {"param_groups": groups, "vectors": self._inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`; raises ValueError if it is the state of other parameters."""
        self._inner.load_state_dict(state_dict["vectors"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)


def _kind(parameter: torch.nn.Parameter) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device
