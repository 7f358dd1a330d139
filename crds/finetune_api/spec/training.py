"""The adapter and the training run."""

import math
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, Pattern, Rule
from finetune_api.vocabulary import AdapterVariant, MemoryMode, Optimizer, Parallelism, Precision, Scheduler

ALL_LINEAR = "all-linear"
MAX_DEFAULT_WARMUP = 5
UNSET_BATCH_SIZE = 2  # sequences that a missing batchSize stands for
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ModuleName = Annotated[
    str,
    Field(max_length=128),
    Pattern(r"^[A-Za-z0-9_.-]+$", "write the last part of the layer's name, such as q_proj, or all-linear alone"),
]
SamplePrompt = Annotated[str, Field(min_length=1, max_length=8192)]


class AdapterSpec(ApiModel):
    """The low-rank adapter; only its parameters are trained."""

    variant: AdapterVariant = AdapterVariant.LORA
    """Low-rank method: LoRA, RSLoRA (scaled by alpha over the square root of the rank, more stable at high ranks) or
    DoRA (also trains magnitudes, slower). Default LoRA."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the adapter matrices. Default 16; 8 to 64 is usual. A higher rank learns more and needs more memory."""

    expert_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Rank of the adapters on a mixture's experts, at most `rank`; each expert has its own. Default: rank over the
    experts that a token goes through, rounded up, so that a token passes as much adapter as in a dense model."""

    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """Numerator of the adapter's scale, which is alpha over rank, or over expertRank on experts. Default 16."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapter's inputs during training. Default 0, which is fastest."""

    target_modules: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=32)] = DEFAULT_TARGETS
    """Linear layers that get an adapter, by the last part of their name, or all-linear alone for every linear layer.
    Experts of a mixture count as layers of the same names. Default: the q, k, v, o, gate, up and down projections, or
    all linear layers of a model that has none of these in its attention (Pythia, Falcon)."""

    rules = (
        Rule(
            cel="!self.targetModules.exists(name, name == 'all-linear') || size(self.targetModules) == 1",
            holds=lambda spec: ALL_LINEAR not in spec.target_modules or len(spec.target_modules) == 1,
            message="spec.adapter.targetModules: all-linear already names every linear layer: write [all-linear] alone",
        ),
        Rule(
            cel="!has(self.expertRank) || self.expertRank <= self.rank",
            holds=lambda spec: spec.expert_rank is None or spec.expert_rank <= spec.rank,
            message="spec.adapter.expertRank must not be above spec.adapter.rank: raise rank, or leave expertRank out",
        ),
    )

    def rank_of_experts(self, chosen: int) -> int:
        """The rank of adapters on the experts of a mixture in which a token goes through `chosen` experts."""
        return self.expert_rank or -(-self.rank // max(1, chosen))

    def scale(self, rank: int) -> float:
        """The factor of B A for an adapter of that rank."""
        return self.alpha / (math.sqrt(rank) if self.variant is AdapterVariant.RSLORA else rank)


class EarlyStoppingSpec(ApiModel):
    """Condition that ends training before its last step."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of successive evaluations without a lower loss after which training stops. Default 3."""

    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Minimum decrease that counts as a lower loss, in nats per supervised token. Default 0."""


class SamplesSpec(ApiModel):
    """Sample answers that the model generates during training, for people to read. They go into samples.jsonl and the
    model card, and with output.hub to the Hub; status and logs never contain them."""

    prompts: Annotated[tuple[SamplePrompt, ...], Field(max_length=32)] = ()
    """Prompts: user messages, or beginnings of texts if the model has no chat template. Default: the beginnings of the
    first 4 evaluation rows."""

    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 128
    """Maximum length of an answer in tokens. Default 128."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature. Default 0: always the likeliest token, so that only training changes an answer."""


def resolve_warmup(written: int | None, steps: int) -> int:
    """Return the warm-up of a run of `steps`: what is written if the run is longer, else a tenth of it, at most
    MAX_DEFAULT_WARMUP."""
    if written is not None and written < steps:
        return written
    return min(MAX_DEFAULT_WARMUP, steps // 10)


class TrainingSpec(ApiModel):
    """The training run."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Number of passes over the data. Default 1 if maxSteps is not set."""

    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Number of optimiser steps, instead of epochs. Default: epochs decide."""

    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Sequences per GPU in one forward pass. Default: chosen by the memory plan. A step then has 2 x
    gradientAccumulation sequences, split into the fastest number of passes; status.resolved shows it."""

    gradient_accumulation: Annotated[int, Field(ge=1, le=4096)] = 4
    """Forward passes per optimiser step. Default 4. Sequences per step are batchSize x gradientAccumulation, where
    a missing batchSize counts as 2."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. Default 0.0002, which is usual for LoRA."""

    scheduler: Scheduler = Scheduler.LINEAR
    """Decay of the learning rate after warm-up: Linear, Cosine or Constant. Default Linear."""

    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Steps before the learning rate reaches its peak; the first step has a rate above 0, too. A number that is not
    below the run's steps is replaced by the default, and preflight says so. Default: a tenth of the run, at most 5."""

    optimizer: Optimizer = Optimizer.ADAMW_8BIT
    """Optimiser: AdamW8bit (a quarter of the state's memory), PagedAdamW8bit (the state may move to host memory) or
    AdamW (32-bit state). Default AdamW8bit."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Weight decay of the adapter. Default 0.01."""

    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it. Default 1."""

    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None = None
    """Strength of the noise added to embeddings during training (NEFTune); 5 is usual. Default: none."""

    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 3407
    """Seed of initialisation, shuffling and the evaluation split. Default 3407."""

    precision: Precision = Precision.AUTO
    """Compute type: Auto, BF16, FP16, FP32 or FP8. Default Auto: BF16 on Ampere and later and on CPUs that multiply
    it (AVX512-BF16, AMX), FP16 on older GPUs, FP32 on other CPUs. FP8 multiplies by the frozen weights in FP8, on
    Hopper, Ada and later: about 40 % faster at 8B, less exact. What GPU memory has no room for is decoded from NF4 to
    FP8 in each pass. The first batch, and one after 20, 200, 400 and so on steps, is computed in both; if the loss
    changes by more than 1 %, the gradient's norm by more than 2 %, or the gradients' cosine is below 0.99, the job goes
    on in BF16. status.resolved and an Event show it."""

    memory: MemoryMode = MemoryMode.FASTEST
    """Use of GPU memory: Fastest stores all activations that fit, Balanced stores fewer, Smallest keeps layer inputs
    and NF4 weights in host memory and streams them a layer ahead. If memory runs out, training continues with the next
    smaller mode. Default Fastest."""

    parallelism: Parallelism = Parallelism.AUTO
    """Placement of the base model on several GPUs: Replicated (all of it on each), Sharded (an equal part on each, and
    each layer gathered while the one before computes) or Auto, which shards a base that does not fit on each. Default
    Auto. Sharded needs NF4 weights and excludes FP8, DoRA and mixtures of experts. status.resolved shows it."""

    logging_steps: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Steps between two loss values in the log and in status.progress. Default 1."""

    evaluation_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Steps between two evaluations (if spec.dataset.evaluation is set) and between two sets of samples. Default: at
    the end only."""

    early_stopping: EarlyStoppingSpec | None = None
    """Stop when the evaluation loss no longer falls, and export the best adapter. Default: train to the end."""

    keep_best: bool = False
    """Export the adapter with the lowest evaluation loss instead of the last one; always so with earlyStopping.
    Default false."""

    samples: SamplesSpec | None = None
    """Answers to fixed prompts, generated at the start, every evaluationSteps and at the end. Default: no samples."""

    checkpoint_steps: Annotated[int, Field(ge=1, le=10_000_000)] = 100
    """Steps between two checkpoints in S3. Default 100. A job that is stopped writes one as well, and resumes from the
    latest."""

    rules = (
        Rule(
            cel="!(has(self.epochs) && has(self.maxSteps))",
            holds=lambda spec: spec.epochs is None or spec.max_steps is None,
            message="spec.training.epochs and spec.training.maxSteps exclude each other: write one of them",
        ),
        Rule(
            cel="self.precision != 'FP8' || self.parallelism != 'Sharded'",
            holds=lambda spec: spec.precision is not Precision.FP8 or spec.parallelism is not Parallelism.SHARDED,
            message="spec.training.parallelism: FP8 keeps all weights on each GPU: write Auto or Replicated, or BF16",
        ),
    )

    def sequences_per_step(self) -> int:
        """Sequences per optimiser step, whatever the number in one forward pass."""
        return (self.batch_size or UNSET_BATCH_SIZE) * self.gradient_accumulation

    def keeps_best(self) -> bool:
        """Return True if the adapter with the lowest evaluation loss is exported."""
        return self.keep_best or self.early_stopping is not None

    def resolved_epochs(self) -> float | None:
        """Epochs to train, or None if maxSteps decides."""
        return None if self.max_steps is not None else (self.epochs or 1.0)
