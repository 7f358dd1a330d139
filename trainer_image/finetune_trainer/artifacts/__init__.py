"""What a job makes and how it gets to storage: `ArtifactStore` (results), `CheckpointStore` (resuming), and the S3
and folder storage below them.

Layout, below `RunConfig.output_prefix()`:

    attempts/<attempt id>/{adapter,merged,gguf}/...   written by one pod only: the attempt's id is the fence
    manifest.json                                     the only commit point: written last, conditionally; names every
    file checkpoints/<key>/step-00000020/...               with a manifest of its own, written last
"""
