"""A mixture of MLPs over frozen weights, with a gate or without, with a low-rank adapter for each expert.

    out[t] = sum over the k experts e of token t of  w[t, e] (D_e act(G_e x[t] + bias) + bias)
    G_e = W_e + s B_e A_e,   D_e likewise;     act: see `Activation`

Shapes: x [T, H], w and the experts' indices [T, k], gate and up [E, 2 F, H], down [E, H, F], A [E, r, in],
B [E, out, r]. Rows are sorted by expert once, [S] of them with S = T k; an expert may have none.

Saved for backward: x, the rows' order, and gate and up [S, 2 F]. The activation and the adapters' inner products are
computed again, and frozen weights are decoded again. The gradient of w needs no further product: it is
<act, D_e^T dy>, which backward has on its way. Where a family scales the expert's input (Llama 4), w multiplies x
instead of the output.

Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; Hu et al., "LoRA", 2021.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional

from finetune_kernels.ops import adapted_activation, gated_activation, plain_activation
from finetune_kernels.ops.plain_activation import PlainKind
from finetune_kernels.primitives.expert_projection import ExpertAdapter, Projection, Rows
from finetune_kernels.primitives.grouped import token_sums


@dataclass(frozen=True)
class Activation:
    """The function between the products, of gate and up as they lie in a row of 2 F, or of up alone."""

    kind: Literal["silu", "gelu_tanh", "clamped", "relu2"]
    """`clamped` is gpt-oss's: (u + 1) g sigmoid(alpha g), g at most and u within the limit; `relu2` has no gate."""
    interleaved: bool = False
    """True if gate and up alternate; else gate's half comes first."""
    alpha: float = 1.0
    limit: float = float("inf")

    @property
    def is_gated(self) -> bool:
        """True if a gate stands beside up."""
        return self.kind != "relu2"

    def halves(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """y [S, 2 F] -> gate and up [S, F] each."""
        if self.interleaved:
            return y[:, ::2], y[:, 1::2]
        gate, up = y.chunk(2, dim=1)
        return gate, up

    def reference(self, y: torch.Tensor) -> torch.Tensor:
        """y [S, 2 F] -> [S, F] by the formula, for autograd."""
        if self.kind == "relu2":
            return functional.relu(y).square()
        gate, up = self.halves(y)
        if self.kind != "clamped":
            return gated_activation.reference(gate, up, self.kind).to(y.dtype)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y [S, 2 F] -> [S, F]: by the kernel where there is one, else by the formula."""
        if not y.is_cuda or self.kind == "clamped" or self.interleaved:
            return self.reference(y)
        if self.kind == "relu2":
            return plain_activation.forward(y, PlainKind(self.kind), None)
        return adapted_activation.forward(y, self.kind, (None, None))

    def backward(self, d_act: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of y [S, 2 F]; may overwrite `d_act` [S, F]."""
        if not y.is_cuda or self.kind == "clamped" or self.interleaved:
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.reference(leaf), leaf, d_act)
            return gradient
        if self.kind == "relu2":
            return plain_activation.backward(d_act, y, PlainKind(self.kind), None, None)
        return adapted_activation.backward(d_act, y, self.kind, (None, None), None)


@dataclass(frozen=True)
class Mixture:
    """The frozen parts and settings of a layer's experts."""

    experts: int
    gate_up: Projection
    down: Projection
    activation: Activation
    scales_input: bool = False
    """True if the router's weights multiply the experts' input, as in Llama 4."""

    def split(self, parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parameters of gate and up, and those of the down projection."""
        first = 2 * len(self.gate_up.scales)
        return parameters[:first], parameters[first:]

    def wide_adapters(self, parameters: list[torch.Tensor], dtype: torch.dtype) -> list[ExpertAdapter]:
        """The adapters of gate and up, in `dtype`."""
        return self.gate_up.adapters(self.split(parameters)[0], dtype)

    def down_adapters(self, parameters: list[torch.Tensor], dtype: torch.dtype) -> list[ExpertAdapter]:
        """The adapters of the down projection, in `dtype`."""
        return self.down.adapters(self.split(parameters)[1], dtype)


class Routes(NamedTuple):
    """The router's choice for each token."""

    weights: torch.Tensor
    """[T, k]"""
    rows: Rows

    def inputs(self, x: torch.Tensor, *, scaled: bool) -> torch.Tensor:
        """x [T, H] -> the rows that go into the experts [S, H], times their weights if `scaled`."""
        found = x[self.tokens]
        return (found * self.row_weights).to(found.dtype) if scaled else found

    @property
    def tokens(self) -> torch.Tensor:
        """Token of each row, int64 [S]."""
        return self.rows.order // self.weights.shape[1]

    @property
    def row_weights(self) -> torch.Tensor:
        """Weight of each row [S, 1]."""
        return self.weights.flatten()[self.rows.order].unsqueeze(1)


def forward(
    x: torch.Tensor, routes: Routes, settings: Mixture, parameters: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [T, H], and gate and up [S, 2 F]."""
    y = widen(x, routes, settings, parameters)
    return narrow(y, routes, settings, parameters), y


def widen(x: torch.Tensor, routes: Routes, settings: Mixture, parameters: list[torch.Tensor]) -> torch.Tensor:
    """x [T, H] -> gate and up [S, 2 F] of the experts that each token goes to."""
    adapters = settings.wide_adapters(parameters, x.dtype)
    return settings.gate_up.forward(routes.inputs(x, scaled=settings.scales_input), adapters, routes.rows)


def narrow(y: torch.Tensor, routes: Routes, settings: Mixture, parameters: list[torch.Tensor]) -> torch.Tensor:
    """Gate and up [S, 2 F] -> the sums of the experts' outputs [T, H]."""
    adapters = settings.down_adapters(parameters, y.dtype)
    z = settings.down.forward(settings.activation.forward(y), adapters, routes.rows)  # [S, H]
    return _combine(z, routes, weighted=not settings.scales_input)


def backward(
    dout: torch.Tensor, x: torch.Tensor, routes: Routes, y: torch.Tensor, settings: Mixture,
    parameters: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Returns the gradients of x [T, H], the weights [T, k] and the adapters; `dout` is [T, H]."""
    gate_up, down = settings.wide_adapters(parameters, x.dtype), settings.down_adapters(parameters, x.dtype)
    rows, tokens = routes.rows, routes.tokens

    # Down projection: the gradient of its input without the weights first, of which their own gradient is made.
    act, dz = settings.activation.forward(y), dout[tokens]  # [S, F], [S, H]
    d_act, d_inner = settings.down.backward(dz, down, rows)
    row_weights = None
    if not settings.scales_input:
        row_weights = routes.row_weights.squeeze(1)
        d_weights = _weigh(d_act, act, dz, routes, settings.down.bias)
    d_down = settings.down.gradients(dz, act, d_inner, down, rows, row_weights)
    del dz, act

    # Activation, gate and up.
    dy = settings.activation.backward(d_act, y)
    d_inputs, d_xa = settings.gate_up.backward(dy, gate_up, rows)
    inputs = routes.inputs(x, scaled=settings.scales_input)
    d_gate_up = settings.gate_up.gradients(dy, inputs, d_xa, gate_up, rows)
    if settings.scales_input:
        d_weight = (d_inputs * x[tokens]).sum(1, dtype=routes.weights.dtype)
        d_weights = d_weight[rows.places].view(routes.weights.shape)
        d_inputs = (d_inputs * routes.row_weights).to(d_inputs.dtype)

    d_factors = [part.to(parameters[0].dtype) for part in (*d_gate_up, *d_down)]
    return _combine(d_inputs, routes, weighted=False), d_weights, d_factors


class ExpertMlpFunction(torch.autograd.Function):
    """Autograd around the products; saves what the module's text says."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, settings: Mixture,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """See `expert_mlp`."""
        rows = Rows.sort(index, settings.experts)
        out, y = forward(x, Routes(weights, rows), settings, list(parameters))
        ctx.save_for_backward(x, weights, *rows, y, *parameters)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of x, the weights and the adapters."""
        x, weights, order, ends, experts, places, y, *parameters = ctx.saved_tensors
        routes = Routes(weights, Rows(order, ends, experts, places))
        dx, d_weights, gradients = backward(dout, x, routes, y, ctx.settings, parameters)
        return dx, d_weights, None, None, *gradients


def expert_mlp(
    x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, settings: Mixture, parameters: list[torch.Tensor]
) -> torch.Tensor:
    """x [T, H], weights and index [T, k] -> [T, H]; `parameters`: A and B of each adapter, gate and up first."""
    return ExpertMlpFunction.apply(x, weights, index, settings, *parameters)  # type: ignore[no-untyped-call, no-any-return]


def reference(
    x: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, settings: Mixture, parameters: list[torch.Tensor]
) -> torch.Tensor:
    """Returns the same by the formula, expert by expert and by PyTorch's autograd."""
    first, second = settings.split(parameters)
    out = torch.zeros_like(x)
    for expert in range(settings.experts):
        token, place = torch.where(index == expert)
        if not token.numel():
            continue

        w = weights[token, place].unsqueeze(1)
        rows = x[token] * w if settings.scales_input else x[token]
        y = settings.activation.reference(_reference_linear(rows, settings.gate_up, expert, first))
        z = _reference_linear(y, settings.down, expert, second)
        out = out.index_add(0, token, (z if settings.scales_input else z * w).to(out.dtype))
    return out


def _reference_linear(x: torch.Tensor, layer: Projection, expert: int, parameters: list[torch.Tensor]) -> torch.Tensor:
    w = layer.weight(x.dtype)[expert].clone()
    for number, (scale, outputs) in enumerate(zip(layer.scales, layer.outputs, strict=True)):
        a, b = parameters[2 * number][expert], parameters[2 * number + 1][expert]
        change = torch.zeros_like(w)
        change[outputs] = scale * b @ a
        w = w + change
    return functional.linear(x, w, None if layer.bias is None else layer.bias[expert].to(x.dtype))


def _weigh(
    d_act: torch.Tensor, act: torch.Tensor, dz: torch.Tensor, routes: Routes, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns the gradient of the weights [T, k], and multiplies d_act [S, F] by them."""
    weigh = token_sums.weigh if dz.is_cuda else token_sums.reference_weigh
    shift = () if bias is None else (dz, bias, routes.rows.experts)
    return weigh(d_act, act, routes.weights, routes.rows.order, shift)


def _combine(z: torch.Tensor, routes: Routes, *, weighted: bool) -> torch.Tensor:
    """Sums the rows [S, H] of each token, times their weights if `weighted`, in fp32 or wider: [T, H]."""
    combine = token_sums.combine if z.is_cuda else token_sums.reference
    weights = routes.weights if weighted else None
    return combine(z, routes.rows.places.view(routes.weights.shape), weights)
