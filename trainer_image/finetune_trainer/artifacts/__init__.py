"""Results and checkpoints of a job, on the way to storage and back.

store        results: uploaded, then committed with one conditional write
manifest     manifest.json: every file of a result with size and SHA-256
existing     a finished result that is there already: taken, replaced or refused
checkpoints  checkpoints: saved, pruned and restored
failed_exports  what to say of a result that lacks an export
download     a committed result on this disk, every file verified
hub_push     the same files in a repository of the Hugging Face Hub

Layout below `RunConfig.output_prefix`:

    attempts/<attempt>/{adapter,merged,gguf}/...      written by one pod only: <attempt> is <job's UID>.<pod's UID>
    manifest.json                                     the only commit point: written last, names every file
    checkpoints/<key>/step-00000020/...               one checkpoint, with an index of its own, written last
"""
