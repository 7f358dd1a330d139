"""The trainer: from a run config to artifacts in S3, and the same workflow on a user's machine.

Begin with `pipeline`, which calls the six stages in order. No folder imports one above it:

    cli          every console command
    pipeline     the main path of a run
    follower     the path of a run's other pods, if it has several nodes
    stages       the six stages of the workflow, nothing else
    preflight    the checks on a CPU before a GPU is requested (no torch)
    documents    model card, loss plot, resolved.yaml
    training     what the training stage is made of: engine, losses, trainer, checkpoints' state
    export       merged weights, GGUF files and Modelfiles in one streaming pass
    job          settings, progress, outcome and stop signal of one run
    sources      models and data sets, from wherever they are
    artifacts    results, checkpoints and manifest
    model        what a model folder says of itself (no torch)
    chat         conversations to tokens with labels (no torch)
    data         files to rows to messages (no torch)
    distributed  the processes of a run on several GPUs and nodes: their shares, sums and comparisons
    storage      S3 and folders as object stores
    stopping     a request to stop, as every loop and transfer sees it
    signs_of_life  what shows that the run gets on, for its watchdog
    errors       TrainerError: a failure with its reason
"""
