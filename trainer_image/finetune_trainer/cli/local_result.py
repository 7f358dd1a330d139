"""A result in a folder, as a person finds it: links to the newest attempt's files, and the commands that come next."""

from collections.abc import Sequence
from pathlib import Path

from finetune_api.outcome import Artifact
from finetune_api.vocabulary import ArtifactType


def link_newest(folder: Path, attempt_id: str) -> None:
    """Gives the parts of an attempt's result a place in the job's folder: `gguf` beside `attempts/ID/gguf`, and so on.

    Links of an older result are replaced. A file or folder of somebody else's is left alone.
    """
    attempt = Path("attempts") / attempt_id
    for old in folder.iterdir():
        if old.is_symlink() and old.readlink().parts[:1] == attempt.parts[:1]:
            old.unlink()

    for part in (folder / attempt).iterdir():
        link = folder / part.name
        if not link.exists():
            link.symlink_to(attempt / part.name)


def shown_path(uri: str, attempt_id: str) -> str:
    """Returns the short path of an artifact in a folder, where a link of `link_newest` leads to it."""
    short = Path(uri.replace(f"/attempts/{attempt_id}/", "/"))
    return str(short) if short.exists() and short.resolve() == Path(uri).resolve() else uri


def next_commands(folder: Path, name: str, artifacts: Sequence[Artifact], paths: Sequence[str]) -> list[str]:
    """Returns commands that use a result; `paths` are those of the artifacts."""
    commands = [f"finetune chat {folder}"]
    modelfiles = [
        path for artifact, path in zip(artifacts, paths, strict=True) if artifact.type == ArtifactType.MODELFILE
    ]
    if modelfiles:
        commands.append(f"ollama create {name} -f {modelfiles[0]}")
    return commands
