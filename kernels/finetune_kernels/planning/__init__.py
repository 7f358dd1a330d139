"""Decides what fits on a GPU, from numbers alone: imports no torch, so preflight plans before a GPU is asked for.

family.py             the description of one model family: norms, projections, RoPE, MLP, factors
family_parts.py       what some families have in place of Llama's parts: latent attention, another mixer, experts
families.py           the families that the kernels know, a row each; layers ask it as well
fused_support.py      why the layers of a configuration are fused or not: preflight's answer and the layer builder's
expert_families.py    the mixtures of experts that the kernels know
activation_policy.py  what a layer saves for its backward pass
block_sizes.py        rows that go through the loss and the MLP at once: kernels and plan must agree on them
model_shape.py        the sizes of a model that memory and time depend on, and their formulas
parts/                sizes of what not every model or layer has: experts, latent attention, other mixers
fp16_shape.py         what fp16 changes in them
described_shape.py    the same of a model that is not loaded, counted from its configuration
loaded_weights.py     bytes of the weights as loaded, and what changes if some of them lie elsewhere
memory_plan.py        a policy for each layer, and whether dequantised weights are kept
streamed_weights.py   how many layers' weights may stream from host memory, and what is waited for them
rates.py              speeds of a machine, by which a plan prices its choices
micro_batch.py        sequences per pass
"""
