"""Limits of the lists in reports: how many bad rows or findings each names; the rest is counted.

`status.preflight` only counts bad rows; its limits of warnings are part of the API (`finetune_api.preflight`).
"""

MAX_REPORT_ROWS = 100
"""Bad rows that preflight's report lists, each as a finding."""

MAX_EXAMPLE_ROWS = 5
"""Rows that one warning about many rows gives as examples."""

MAX_TABLE_FINDINGS = 20
"""Errors, and as many warnings, that a terminal's table shows; the HTML page folds away those beyond."""

MAX_MESSAGE_FINDINGS = 10
"""Findings in a pod's termination message, which becomes the condition's message."""

MAX_TRAINING_ERROR_ROWS = 10
"""Bad rows in the error of a training run, which has no report."""
