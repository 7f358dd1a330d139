"""Decides about a finished result that lies where a job writes: taken, replaced, or refused with the name of its owner.

Namespace and name say whose a result is: a job that was deleted and created again has another UID, and is the same job.
A result is taken only if it was made from the same specification, model and data.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import OnExisting
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.errors import TrainerError


@dataclass(frozen=True)
class Inputs:
    """Identity of what a job trains on."""

    model_version: str
    """`FetchedSource.version`."""
    dataset_digest: str
    evaluation_digest: str | None = None
    """None for a job without an evaluation source."""

    def changed_since(self, manifest: Manifest) -> list[str]:
        """Names what differs from the inputs of a result."""
        pairs = {
            "model": (self.model_version, manifest.model_version),
            "data": (self.dataset_digest, manifest.dataset_digest),
            "evaluation data": (self.evaluation_digest, manifest.evaluation_digest),
        }
        return [name for name, (now, then) in pairs.items() if now != then]


ReadInputs = Callable[[], Inputs | None]
"""Reads the identity of the inputs, which may need a download of the data; None if it cannot be known."""


def takes_existing(manifest: Manifest, config: RunConfig, where: str, read_inputs: ReadInputs) -> bool:
    """True if a job takes the result of `manifest`, at `where`, for its own; False if its own may replace it.

    `read_inputs` is called only if everything else is the same. Raises TrainerError (OutputExists) for a result that
    may be neither taken nor replaced.
    """
    # Of this very job, an earlier attempt: it committed, and died before it could say so.
    if manifest.job.uid == config.job.uid:
        return True

    made = f"made {manifest.created:%Y-%m-%d %H:%M} UTC"
    owner = manifest.job.path
    if owner != config.job.path:
        message = f"{where} holds the result of another job, {owner}, {made}: this job neither takes nor replaces it"
        raise TrainerError(FailureReason.OUTPUT_EXISTS, message)

    policy = config.output.s3.on_existing
    if policy is OnExisting.OVERWRITE:
        return False

    # A result that lacks an export may be completed by a job that trains the same: it resumes from the last step.
    is_same = manifest.spec_digest == config.spec_digest() and not manifest.failed_exports
    if policy is OnExisting.FAIL or not (is_same or manifest.lacks_exports_of(config)):
        made_by = "another specification" if policy is OnExisting.REUSE else "an earlier job"
        raise TrainerError(FailureReason.OUTPUT_EXISTS, f"{where} holds a finished result of {made_by}, {made}")

    inputs = read_inputs()
    if inputs is not None and (changed := inputs.changed_since(manifest)):
        message = f"{where} holds a finished result of the same specification, but the {' and the '.join(changed)} "
        message += f"{'has' if changed == ['model'] else 'have'} changed since it was {made}"
        raise TrainerError(FailureReason.OUTPUT_EXISTS, message)
    return is_same
