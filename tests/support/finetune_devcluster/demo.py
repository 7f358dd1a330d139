"""`make demo`: the main job on this machine, with nothing imitated but the container engine.

Starts a Kubernetes control plane, an S3 server and a node, installs the operator with helm, makes a tiny model and chat
data, applies a FineTuneJob, shows its checks and its training, lists what arrived in S3, and lets llama.cpp speak from
the GGUF file.
"""

import argparse
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, watch
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.table import Table

from finetune_devcluster.inputs import BUCKET, put_inputs
from finetune_devcluster.platform import CHECKOUT, Platform, is_terminal
from finetune_test_programs.binaries import helm_binary, kube_binary
from finetune_test_programs.generation import generate

NAMESPACE = "team-support"
ROWS = 400
DEADLINE_SECONDS = 600
SAMPLE = CHECKOUT / "crds/samples/cpu-tiny.yaml"

console = Console(highlight=False, record=True)


class Clock:
    """Prints each step with the time since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        console.print(f"[bold cyan]{time.monotonic() - self._start:6.1f} s[/]  {line}")


def manifest(platform: Platform) -> dict[str, Any]:
    """The sample as it is, with this machine's S3 address."""
    job: dict[str, Any] = yaml.safe_load(SAMPLE.read_text())
    job["metadata"]["namespace"] = NAMESPACE
    job["spec"]["output"]["s3"]["endpointURL"] = platform.store.endpoint_url
    return job


def rows(platform: Platform, name: str) -> Iterator[dict[str, Any]]:
    """Every state of the job from its watch, until it is terminal."""
    api = client.CustomObjectsApi(platform.cluster.api_client())
    watcher: Any = watch.Watch  # which has no types

    stream = watcher().stream(
        api.list_namespaced_custom_object,
        "finetune.dev",
        "v1alpha1",
        NAMESPACE,
        "finetunejobs",
        field_selector=f"metadata.name={name}",
        timeout_seconds=DEADLINE_SECONDS,
    )

    for event in stream:
        yield event["object"]
        if is_terminal(event["object"]):
            return
    raise TimeoutError(f"the job was not finished after {DEADLINE_SECONDS} s")


def follow(platform: Platform, name: str) -> dict[str, Any]:
    """Show the job as `kubectl get finetunejobs -w` does, one line for each visible change."""
    line = "        {:<13}{:<10}{:<24}{:<11}{:<9}{}"
    console.print(line.format("PHASE", "PROGRESS", "STAGE", "STEP", "LOSS", "ETA"), style="bold")
    shown, has_shown_preflight = "", False

    job: dict[str, Any] = {}
    for job in rows(platform, name):
        status = job.get("status", {})
        progress = status.get("progress", {})
        stages = status.get("stages", [])
        step = f"{progress['step']}/{progress.get('totalSteps', '?')}" if "step" in progress else ""

        text = line.format(
            status.get("phase", ""),
            progress.get("completion", ""),
            stages[-1]["name"] if stages and "endTime" not in stages[-1] else "",
            step,
            progress.get("loss", ""),
            progress.get("eta", ""),
        )

        if text != shown:
            console.print(text)
            shown = text
        if not has_shown_preflight and "result" in status.get("preflight", {}):
            show_preflight(status["preflight"])
            has_shown_preflight = True
    return job


def show_preflight(preflight: dict[str, Any]) -> None:
    """Show the findings of preflight, which come before the trainer's pod."""
    lengths = preflight.get("tokens", {})
    tokens = ", ".join(f"{name} {lengths.get(name)}" for name in ("p50", "p95", "max"))
    rows, bad, steps = (preflight.get(name) for name in ("rows", "badRows", "steps"))
    share = preflight.get("supervisedShare", 0)
    console.print(f"        preflight: {preflight['result']}; {rows} rows, {bad} bad; {steps} steps", style="green")
    console.print(f"        tokens:    {tokens}; {share:.0%} with loss", style="green")
    console.print(f"        report:    {preflight.get('reportUri')}", style="green")


def show_result(platform: Platform, job: dict[str, Any]) -> str:
    """Status and S3 listing as tables. Returns the URI of the GGUF file."""
    status = job["status"]
    artifacts = Table("type", "quantization", "bytes", "sha256", "uri", title="status.artifacts", title_justify="left")
    for artifact in status["artifacts"]:
        artifacts.add_row(
            artifact["type"],
            artifact.get("quantization", ""),
            f"{artifact['bytes']:,}",
            artifact["sha256"][:12] + "…",
            artifact["uri"],
        )
    console.print(artifacts)

    prefix = status["resultLocation"].removeprefix(f"s3://{BUCKET}/")
    objects = platform.store.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    sizes = {entry["Key"].removeprefix(prefix): entry["Size"] for entry in objects}
    console.print(listing(f"s3://{BUCKET}/{prefix}", sizes))
    return next(str(artifact["uri"]) for artifact in status["artifacts"] if artifact["type"] == "GGUF")


def listing(title: str, sizes: dict[str, int]) -> Table:
    """The objects below a prefix, one line a folder; checkpoints are one folder."""
    folders: dict[str, list[int]] = {}
    for key, size in sizes.items():
        folder = (
            key if "/" not in key else key.split("/")[0] if key.startswith("checkpoints/") else key.rpartition("/")[0]
        )
        folders.setdefault(folder, []).append(size)

    table = Table("object or folder", "files", "bytes", title=title, title_justify="left")
    for folder, found in folders.items():
        table.add_row(folder, str(len(found)), f"{sum(found):,}")
    return table


def speak(platform: Platform, uri: str, work: Path) -> None:
    """Load the uploaded GGUF file with llama.cpp and continue a conversation."""
    path = work / "model.gguf"
    platform.store.client().download_file(BUCKET, uri.removeprefix(f"s3://{BUCKET}/"), str(path))
    prompt = [{"role": "user", "content": "Hello, how are you?"}]
    console.print(f"        user:      {prompt[0]['content']}")
    console.print(f"        assistant: {generate(path, prompt, tokens=48)!r}", markup=False)
    console.print(
        "        (a two-layer model with random weights: it has learned to chat, not to make sense)", style="dim"
    )


def run(work: Path) -> int:
    """The whole demo; returns the exit status."""
    clock = Clock()
    for binary in (kube_binary, helm_binary):
        clock.say(f"using {binary().name}")

    clock = Clock()
    with Platform.start(clock.say) as platform:
        clock.say("making a tiny model and chat data, and putting both into S3")
        put_inputs(platform.store, work, rows=ROWS)
        platform.create_namespace(NAMESPACE)

        job = manifest(platform)
        clock.say(f"kubectl apply -f {SAMPLE.relative_to(CHECKOUT)}, with this machine's S3 address")
        console.print(SAMPLE.read_text().rstrip(), style="dim", markup=False)
        platform.cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(job))

        done = follow(platform, job["metadata"]["name"])
        if done["status"]["phase"] != "Succeeded":
            clock.say(f"[red]failed:[/] {done['status'].get('failure')}")
            console.print(platform.trainer_log(NAMESPACE, job["metadata"]["name"]), markup=False)
            return 1

        clock.say("done; the job left behind:")
        uri = show_result(platform, done)
        clock.say("llama.cpp speaks from the uploaded file:")
        speak(platform, uri, work)
        clock.say("stopping everything")
    return 0


def save_picture(path: Path) -> None:
    """Write everything that was shown as an SVG in the terminal's own colours, without fonts from elsewhere."""
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(path), title="make demo", code_format=template, clear=False)


def main() -> int:
    """Run the demo; SIGTERM and Ctrl-C clean up like a normal end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also write what was shown to an SVG file")
    picture = parser.parse_args().picture
    if picture is not None:
        console.width = 112

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="finetune-demo-") as work:
        try:
            code = run(Path(work))
        except KeyboardInterrupt:
            console.print("interrupted: everything is stopped")
            return 130

    if picture is not None:
        save_picture(picture)
    return code


if __name__ == "__main__":
    sys.exit(main())
