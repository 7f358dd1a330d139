"""`finetune artifacts`: what a job made, listed and downloaded with every digest checked; jobs found in four ways."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune_api.judgement import Judgement
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import ArtifactType, JudgedRows
from finetune_devcluster.cluster import DevCluster
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.artifacts.store import ArtifactStore, LocalArtifact, Provenance
from finetune_trainer.storage.object_store import ignore_bytes

CRD = Path(__file__).parents[3] / "crds/finetune.dev_finetunejobs.yaml"
CRD_NAME = "crd/finetunejobs.finetune.dev"
OpenStore = Callable[..., ArtifactStore]


def finetune(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "finetune"
    settings = os.environ | environment
    command = [str(program), "artifacts", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=settings)


@pytest.fixture
def published(open_attempt: OpenStore, tmp_path: Path) -> tuple[ArtifactStore, Manifest]:
    """A result in S3: an adapter's folder and a GGUF file."""
    adapter = tmp_path / "adapter"
    (adapter / "sub").mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (adapter / "sub/empty.json").touch()
    gguf = tmp_path / "job-Q8_0.gguf"
    gguf.write_bytes(b"GGUF" * 1000)
    artifacts = [
        LocalArtifact(ArtifactType.ADAPTER, adapter, "safetensors", "F32"),
        LocalArtifact(ArtifactType.GGUF, gguf, "gguf", "Q8_0", loss=1.25, improvement_kept=0.97),
    ]
    store = open_attempt()
    judgement = Judgement(
        data=JudgedRows.EVALUATION, rows=8, tokens=99, base_loss=3.5, merged_loss=1.2, warnings=("Q8_0 lost 3%",)
    )
    provenance = Provenance(Resolved(dataset_digest="d" * 64), {"loss": 1.5}, judgement)
    return store, store.publish(artifacts, provenance, ignore_bytes)


def manifest_file(config: RunConfig, path: Path) -> Path:
    """The FineTuneJob that a run configuration came from."""
    sections = ("model", "dataset", "training", "output")
    spec = {name: section for name, section in config.to_wire().items() if name in sections}
    metadata = {"name": config.job.name, "namespace": config.job.namespace}
    job = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": spec}
    path.write_text(yaml.safe_dump(job))
    return path


def test_a_manifest_lists_and_downloads_what_was_published(
    published: tuple[ArtifactStore, Manifest], credentials: Path, tmp_path: Path
) -> None:
    store, manifest = published
    job = manifest_file(store.config, tmp_path / "job.yaml")
    listed = finetune(job, "--credentials", credentials)
    assert listed.returncode == 0, listed.stderr
    for artifact in manifest.artifacts:
        assert f"{artifact.sha256}  {artifact.uri}\n" in listed.stdout
    assert "loss 1.5" in listed.stdout
    (row,) = (line for line in listed.stdout.splitlines() if "Q8_0 " in line and "1.2500" in line)
    assert "97%" in row
    assert "loss on the same 8 evaluation rows; the base has 3.5000" in listed.stdout
    assert "warning: Q8_0 lost 3%" in listed.stdout
    assert "note:" not in listed.stderr

    target = tmp_path / "down"
    done = finetune(job, "--credentials", credentials, "--download", target)
    assert done.returncode == 0, done.stderr
    assert (target / "gguf/job-Q8_0.gguf").read_bytes() == b"GGUF" * 1000
    assert (target / "adapter/sub/empty.json").read_bytes() == b""
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=target, check=True, capture_output=True)
    secret = (credentials / "AWS_SECRET_ACCESS_KEY").read_text()
    assert secret not in listed.stdout + listed.stderr + done.stdout + done.stderr


def test_a_changed_object_is_not_delivered(
    published: tuple[ArtifactStore, Manifest], credentials: Path, tmp_path: Path
) -> None:
    store, manifest = published
    job, target = manifest_file(store.config, tmp_path / "job.yaml"), tmp_path / "down"
    changed = tmp_path / "changed"
    changed.write_bytes(b"GGUX" * 1000)
    store.object_store.put_file(manifest.artifacts[1].files[0].path, changed, ignore_bytes)
    assert finetune(job, "--credentials", credentials).returncode == 0, "its size is right: a list cannot see it"
    done = finetune(job, "--credentials", credentials, "--download", target)
    assert done.returncode == 20
    assert "job-Q8_0.gguf is not what the job made" in done.stderr
    assert not list((target / "gguf").glob("*"))
    only = finetune(job, "--credentials", credentials, "--download", target, "--type", "Adapter")
    assert only.returncode == 0, only.stderr


def test_a_missing_object_shows_in_the_list(
    published: tuple[ArtifactStore, Manifest], credentials: Path, tmp_path: Path
) -> None:
    store, manifest = published
    store.object_store.delete([manifest.artifacts[1].files[0].path])
    done = finetune(manifest_file(store.config, tmp_path / "job.yaml"), "--credentials", credentials)
    assert done.returncode == 15
    assert "1 missing" in done.stdout


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/outside", "attempts/a/../../outside", "a\\..\\b", "attempts/a/./b"]
)
def test_a_manifest_that_names_a_path_outside_is_refused(
    published: tuple[ArtifactStore, Manifest], tmp_path: Path, path: str
) -> None:
    _, manifest = published
    artifact = manifest.artifacts[1]
    evil = artifact.model_copy(update={"files": (artifact.files[0].model_copy(update={"path": path}),)})
    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"GGUF" * 1000)
    (folder / "manifest.json").write_bytes(manifest.model_copy(update={"artifacts": (evil,)}).encode())
    done = finetune(folder, "--download", tmp_path / "down")
    assert done.returncode != 0
    assert "not a path inside a result" in done.stderr
    assert not list((tmp_path / "down").rglob("*"))


def test_an_address_and_a_finished_jobs_name_lead_to_the_same_result(
    published: tuple[ArtifactStore, Manifest], credentials: Path, tmp_path: Path
) -> None:
    store, manifest = published
    endpoint = str(store.config.output.s3.endpoint_url)
    words = ("--credentials", credentials, "--endpoint-url", endpoint)
    by_address = finetune(store.manifest_uri().removesuffix("manifest.json"), *words)
    assert manifest.artifacts[0].sha256 in by_address.stdout
    absent = finetune(store.manifest_uri().replace("/job/", "/absent/"), *words)
    assert absent.returncode == 20
    assert "has not finished, or its output is elsewhere" in absent.stderr
    changed = store.config.model_copy(update={"training": store.config.training.model_copy(update={"seed": 7})})
    other = finetune(manifest_file(changed, tmp_path / "other.yaml"), *words)
    assert "another version of the manifest" in other.stderr


@pytest.mark.cluster
def test_a_job_of_the_cluster_is_found_by_its_name(
    published: tuple[ArtifactStore, Manifest],
    credentials: Path,
    tmp_path: Path,
    dev_cluster: DevCluster,
    namespace: str,
) -> None:
    store, manifest = published
    dev_cluster.kubectl("apply", "--server-side", "-f", str(CRD))
    dev_cluster.wait_for_definition()
    job = yaml.safe_load(manifest_file(store.config, tmp_path / "job.yaml").read_text())
    job["metadata"]["namespace"] = namespace
    dev_cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump(job))
    where: dict[str, str] = {"KUBECONFIG": str(dev_cluster.kubeconfig)}
    running = finetune(f"{namespace}/job", "--credentials", credentials, **where)
    assert running.returncode == 20
    assert "has no result yet" in running.stderr

    # An administrator's template leads elsewhere than the default: only the status says where.
    elsewhere = yaml.safe_load(manifest_file(store.config, tmp_path / "job.yaml").read_text())
    elsewhere["spec"]["output"]["s3"]["prefix"] = "nothing/is/here"
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(elsewhere))
    status = f'{{"status": {{"phase": "Succeeded", "manifestUri": "{store.manifest_uri()}"}}}}'
    patch = ("--subresource", "status", "--type", "merge", "-p", status)
    dev_cluster.kubectl("patch", "finetunejob", "job", "-n", namespace, *patch)
    named = ("--credentials", credentials, "-n", namespace, "--kubeconfig", dev_cluster.kubeconfig)
    for words in ((f"{namespace}/job", *named[:2]), ("job", *named), (tmp_path / "elsewhere.yaml", *named)):
        done = finetune(*words, **where)
        assert done.returncode == 0, done.stderr
        assert manifest.artifacts[1].sha256 in done.stdout

    unknown = finetune(f"{namespace}/jub", **where)
    assert unknown.returncode == 3
    assert f"there is no file {namespace}/jub, and there is no job jub" in unknown.stderr
    assert "did you mean job?" in unknown.stderr


@pytest.mark.cluster
def test_a_manifest_that_the_cluster_does_not_know_is_looked_for_where_it_writes_by_default(
    published: tuple[ArtifactStore, Manifest], credentials: Path, tmp_path: Path, dev_cluster: DevCluster
) -> None:
    store, manifest = published
    job = manifest_file(store.config, tmp_path / "job.yaml")
    done = finetune(job, "--credentials", credentials, KUBECONFIG=str(dev_cluster.kubeconfig))
    assert done.returncode == 0, done.stderr
    assert manifest.artifacts[1].sha256 in done.stdout
    assert "where it writes by default" in done.stderr
