"""What a job makes and how it gets to storage: `ArtifactStore` (results), `CheckpointStore` (resuming), and the S3
and folder storage below them.

Layout, below `RunConfig.output_prefix()`:

    attempts/<attempt id>/{adapter,merged,gguf}/...   written by one pod only: the attempt's id is the fence
    manifest.json                                     the only commit point: written last, names every file
    checkpoints/<key>/step-00000020/...               one checkpoint, with an index of its own, written last
"""
