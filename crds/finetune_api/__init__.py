"""What a fine-tuning job IS: the resource, and the two typed hand-overs between operator and trainer.

Read in this order: `spec.py` (what the user writes), `status.py` (what the operator answers), `run_config.py`
(operator to trainer), `progress.py` and `outcome.py` (trainer to operator), `failures.py` (the shared table of
reasons and exit codes). `definition.py` turns the models into the CustomResourceDefinition.
"""

from typing import Final, Literal

GROUP: Final = "finetune.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final[Literal["finetune.dev/v1alpha1"]] = "finetune.dev/v1alpha1"
KIND: Final = "FineTuneJob"
PLURAL: Final = "finetunejobs"
