"""Judges which weights train and which are in NF4: warns where it is less than half, and says what to write. Pure."""

from collections.abc import Iterator

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import Quantization
from finetune_kernels.planning.memory_plan import MARGIN
from finetune_trainer.model.coverage import ENOUGH
from finetune_trainer.model.planned_weights import PlannedWeights
from finetune_trainer.preflight.report import Finding
from finetune_trainer.storage.sizes import format_size

TARGETS = "spec.adapter.targetModules"
QUANTIZATION = "spec.model.quantization"
SOURCE = "spec.model.source"
WORTHWHILE = 0.05
"""Share of the weights that another setting must add to be recommended."""
NAMED = 8
"""Layers that a warning names."""


def judge_coverage(planned: PlannedWeights, config: RunConfig) -> Iterator[Finding]:
    """Warnings about weights that get no adapter, or that NF4 leaves in 16 bits."""
    coverage = planned.coverage
    if coverage.adapted_share < ENOUGH:
        lacking = f", none of them {', '.join(planned.missing)}" if planned.missing else ""
        message = f"only {coverage.adapted_share:.1%} of the layers' weights get an adapter{lacking}"
        yield Finding.warning(TARGETS, f"{message}: {_remedy(planned)}")

    if config.model.quantization is Quantization.NF4 and coverage.quantized_share < ENOUGH:
        message = f"only {coverage.quantized_share:.1%} of the layers' weights will be in NF4"
        if coverage.stacked:
            message += (
                f": bitsandbytes leaves {format_size(coverage.stacked_bytes)} of experts in 3-D tensors in 16 bits; "
                "write None, which trains faster and takes little more memory, or take a model without experts"
            )
        else:
            message += ": the others are no linear layers, and stay in 16 bits"
        yield Finding.warning(QUANTIZATION, message)


def judge_weight_memory(planned: PlannedWeights, config: RunConfig) -> Iterator[Finding]:
    """An error or a warning if the weights alone fill the GPU: for models whose other memory no plan knows."""
    gpu, need = config.gpu, planned.loaded_bytes
    if gpu is None or gpu.memory_bytes is None or need <= MARGIN * gpu.memory_bytes:
        return

    stacked = planned.coverage.stacked_bytes
    experts = f", {format_size(stacked)} of them experts in 16 bits," if stacked else ""
    message = (
        f"the weights alone take {format_size(need)}{experts} of the {format_size(gpu.memory_bytes)} of {gpu.name}"
    )
    if need > gpu.memory_bytes:
        remedy = "take a larger GPU or a smaller model"
        yield Finding.error(SOURCE, f"{message}: {remedy}", FailureReason.CUDA_OUT_OF_MEMORY)
    else:
        yield Finding.warning(SOURCE, f"{message}, so memory may run out")


def _remedy(planned: PlannedWeights) -> str:
    """Advice on what to write instead, or the reason why nothing helps."""
    now, all_linear = planned.coverage.adapted_share, planned.with_all_linear.adapted_share
    if all_linear >= now + WORTHWHILE:
        names = ", ".join(planned.left_out[:NAMED]) + (", ..." if len(planned.left_out) > NAMED else "")
        return f"write [all-linear] for {all_linear:.1%}, or add some of {names}"

    if planned.coverage.stacked:
        return (
            f"{format_size(planned.coverage.stacked_bytes)} are experts in 3-D tensors, which no adapter trains, so "
            "the model learns style and format rather than knowledge; for more, take a model without experts"
        )
    return "the others are no linear layers, which no adapter trains"
