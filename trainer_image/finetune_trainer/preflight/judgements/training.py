"""Judges the training that a job plans: warnings about runs that would learn little, too much, or something else. Pure.

Every warning has its figures and says what to write instead. docs/warnings.md lists them with a manifest that provokes
each; docs/decisions/preflight.md says where the thresholds come from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

from finetune_api.run_config import RunConfig
from finetune_api.spec.training import UNSET_BATCH_SIZE, resolve_warmup
from finetune_api.vocabulary import DatasetFormat
from finetune_trainer.preflight.report import Finding
from finetune_trainer.preflight.steps import RunLength

MIN_STEPS = 30
MIN_ROWS = 100
MAX_EPOCHS = 5
USUAL_EPOCHS = 3
MIN_RATE, USUAL_RATE, MAX_RATE = 1e-5, 2e-4, 1e-3
REPEATED = 0.01
"""Share of evaluation rows that also train from which on their loss says too little."""

SOURCE = "spec.dataset.source"
TRAINING = "spec.training"


@dataclass(frozen=True)
class EvaluationOverlap:
    """Evaluation rows that are trained on as well."""

    rows: int
    """Rows to evaluate on."""
    repeated: int
    """Those of them that train, too; for a share of the rows, about as many."""


@dataclass(frozen=True)
class PlannedTraining:
    """All that is known of the training before it begins."""

    config: RunConfig
    size: RunLength
    layout: DatasetFormat | None
    has_template: bool
    """True if rows are rendered by a chat template, whoever wrote it."""
    base_model: str | None = None
    """Sign that the model was never trained on conversations; None without one."""
    trains_markers: bool = False
    """True if the job brings tokens of the chat template, whose rows train."""
    overlap: EvaluationOverlap | None = None

    @property
    def data(self) -> str:
        """The data in numbers: 80 rows, packed into 3 sequences."""
        packed = f", packed into {count(self.size.sequences, 'sequence')}" if self.config.dataset.packing else ""
        return count(self.size.rows, "row") + packed

    @property
    def step(self) -> str:
        """A step in numbers: 8 sequences (batchSize 2 x gradientAccumulation 4)."""
        training = self.config.training
        factors = f"batchSize {training.batch_size or UNSET_BATCH_SIZE} x gradientAccumulation"
        return f"{count(training.sequences_per_step(), 'sequence')} ({factors} {training.gradient_accumulation})"


def judge_training(plan: PlannedTraining) -> Iterator[Finding]:
    """Yields the warnings about a planned training."""
    for judge in JUDGEMENTS:
        yield from judge(plan)


def few_steps(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns of a run that ends before it has learned much."""
    steps, training = plan.size.steps, plan.config.training
    if steps >= MIN_STEPS:
        return

    field, remedy = f"{TRAINING}.epochs", f"write {_more_steps(plan)}"
    if training.max_steps is not None:
        field, remedy = f"{TRAINING}.maxSteps", f"leave maxSteps out, and {remedy}"
        if plan.size.epochs * MIN_STEPS / steps <= MAX_EPOCHS:
            remedy = f"write maxSteps: {MIN_STEPS} or more"
    message = (
        f"only {count(steps, 'optimiser step')}: {plan.data}, and a step takes {plan.step}; fewer than {MIN_STEPS} "
        f"change a model little; {remedy}"
    )
    yield Finding.warning(field, message)


def _more_steps(plan: PlannedTraining) -> str:
    """Changes that make MIN_STEPS in at most MAX_EPOCHS, the smallest change first."""
    size, per_step = plan.size, plan.config.training.sequences_per_step()
    unpacked, smallest = "spec.dataset.packing: false", "batchSize: 1, gradientAccumulation: 1"
    choices = [("", size.sequences, per_step)]
    if plan.config.dataset.packing:
        choices.append((unpacked, size.rows, per_step))
    choices.append((f"{unpacked}, {smallest}" if plan.config.dataset.packing else smallest, size.rows, 1))

    for change, sequences, per in choices:
        steps = ceil(sequences / per)
        epochs = ceil(MIN_STEPS / steps)
        if epochs <= MAX_EPOCHS:
            written = ", ".join(part for part in (change, f"epochs: {epochs}" if epochs > 1 else "") if part)
            return f"{written or 'epochs: 1'}, which makes {steps * epochs} steps"
    return f"epochs: {MAX_EPOCHS} and add rows"


def tiny_data(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns of too few examples to learn more than a form of answer."""
    if plan.size.rows < MIN_ROWS and plan.layout is not DatasetFormat.TEXT:
        message = (
            f"{count(plan.size.rows, 'row')} to train on: below {MIN_ROWS}, a model learns the form of the answers at "
            "best, and soon these rows by heart; add rows"
        )
        yield Finding.warning(SOURCE, message)


def batch_larger_than_data(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns where one step would take more sequences than there are."""
    sequences, per_step = plan.size.sequences, plan.config.training.sequences_per_step()
    if per_step <= sequences:
        return

    remedy = f"write batchSize: 1 and gradientAccumulation: {sequences} or less"
    if plan.config.dataset.packing and plan.size.rows >= per_step:
        remedy = f"write spec.dataset.packing: false, which makes {plan.size.rows} sequences"
    message = f"every step is a whole epoch: {plan.data}, and a step takes {plan.step}; {remedy}"
    yield Finding.warning(f"{TRAINING}.gradientAccumulation", message)


def epochs_of_max_steps(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns where maxSteps repeats the data more often than is usual."""
    if plan.config.training.max_steps is None or plan.size.epochs <= MAX_EPOCHS:
        return

    fewer = ceil(plan.size.steps * USUAL_EPOCHS / plan.size.epochs)
    instead = f"epochs: {USUAL_EPOCHS}, which makes {fewer} steps" if fewer >= MIN_STEPS else _more_steps(plan)
    message = (
        f"maxSteps: {plan.size.steps} is {plan.size.epochs:.3g} epochs: {plan.data}, and a step takes {plan.step}; "
        f"more than {MAX_EPOCHS} learn rows by heart; leave it out, and write {instead}"
    )
    yield Finding.warning(f"{TRAINING}.maxSteps", message)


def repeated_evaluation_rows(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns where the evaluation measures what was learned by heart."""
    overlap, evaluation = plan.overlap, plan.config.dataset.evaluation
    if overlap is None or evaluation is None or overlap.repeated <= REPEATED * overlap.rows:
        return

    about, remedy = "", f"remove them from {SOURCE} or from the evaluation"
    if evaluation.fraction is not None:
        about, remedy = "about ", f"remove the rows of {SOURCE} that repeat an earlier one"
    message = (
        f"{about}{overlap.repeated} of {overlap.rows} evaluation rows are trained on as well, so the evaluation loss "
        f"is too low, and the best step is chosen by it; {remedy}"
    )
    yield Finding.warning("spec.dataset.evaluation", message)


def unusual_learning_rate(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns of a learning rate that LoRA seldom learns with."""
    rate = plan.config.training.learning_rate
    if MIN_RATE <= rate <= MAX_RATE:
        return

    effect = f"above {MAX_RATE:g}, LoRA often diverges, and the model forgets what it could do"
    if rate < MIN_RATE:
        effect = f"below {MIN_RATE:g}, the rates of full fine-tuning, LoRA learns little in a usual number of steps"
    times, than = (rate / USUAL_RATE, "higher") if rate > USUAL_RATE else (USUAL_RATE / rate, "lower")
    message = (
        f"learningRate: {rate:g} is {times:,.3g} times {than} than the usual {USUAL_RATE:g}: {effect}; write "
        f"{USUAL_RATE:g}, or 1e-4 for a large model"
    )
    yield Finding.warning(f"{TRAINING}.learningRate", message)


def long_warm_up(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns of a warm-up that leaves little of the run, or that is not used because it is longer than the run."""
    written, steps = plan.config.training.warmup_steps, plan.size.steps
    if written is None or 2 * written <= steps:
        return

    used = resolve_warmup(written, steps)
    effect = f"only the last {count(steps - written, 'step')} have the full rate"
    if used != written:
        effect = f"it is not shorter than the run, so the warm-up is {count(used, 'step')}"
    message = (
        f"warmupSteps: {written} of {count(steps, 'step')}: {effect}; leave it out for a tenth of the run, at most 5 "
        "steps"
    )
    yield Finding.warning(f"{TRAINING}.warmupSteps", message)


def nothing_logged(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns where the run ends before its first loss is shown."""
    every, steps = plan.config.training.logging_steps, plan.size.steps
    if every > steps:
        message = f"loggingSteps: {every} is more than the run's {count(steps, 'step')}: no loss is shown; write 1"
        yield Finding.warning(f"{TRAINING}.loggingSteps", message)


def early_stopping_without_effect(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns where the run ends before it could stop early."""
    training, steps = plan.config.training, plan.size.steps
    if training.early_stopping is None or training.evaluation_steps is None:
        return

    evaluations, needed = steps // training.evaluation_steps, training.early_stopping.patience + 1
    if evaluations < needed:
        message = (
            f"the run cannot stop early: {count(steps, 'step')} with evaluationSteps: {training.evaluation_steps} have "
            f"{count(evaluations, 'evaluation')}, and patience: {training.early_stopping.patience} needs {needed}; "
            f"write evaluationSteps: {max(1, steps // (2 * needed))}"
        )
        yield Finding.warning(f"{TRAINING}.earlyStopping", message)


def chat_on_a_base_model(plan: PlannedTraining) -> Iterator[Finding]:
    """Warns where a model has to learn the chat format itself."""
    is_chat = plan.has_template and plan.layout not in (None, DatasetFormat.TEXT)
    if plan.base_model is None or not is_chat or plan.trains_markers:
        return

    message = (
        f"the rows are conversations, but this looks like a base model ({plan.base_model}): it must learn the chat "
        "format as well, and LoRA trains no embeddings of control tokens; take the family's instruction-tuned model, "
        "or see in spec.training.samples whether answers end"
    )
    yield Finding.warning("spec.model.source", message)


def count(number: int, thing: str) -> str:
    """A number of things: 1 step, 2,000 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


JUDGEMENTS: tuple[Callable[[PlannedTraining], Iterator[Finding]], ...] = (
    few_steps,
    batch_larger_than_data,
    epochs_of_max_steps,
    tiny_data,
    repeated_evaluation_rows,
    unusual_learning_rate,
    long_warm_up,
    nothing_logged,
    early_stopping_without_effect,
    chat_on_a_base_model,
)
"""In the order in which they are said: what spoils the whole run comes first."""
