"""What is in the two images, and that it runs: as any user of group 0, without a shell, a compiler and ldconfig."""

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from finetune_images.build import IMAGES, bytes_of
from finetune_images.local_store import CHECKOUT, buildah, mounted

pytestmark = pytest.mark.images

SHELLS = ("sh", "bash", "dash", "busybox")
TOOLS = ("gcc", "cc", "ld", "ldconfig", "apt-get", "dpkg", "pip", "pip3")
CALLS_CUDA = """
from triton.backends.nvidia.driver import CudaUtils
print(CudaUtils().get_device_properties)
"""


@pytest.fixture(scope="module")
def roots() -> Iterator[dict[str, Path]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(mounted(image.tag)) for name, image in IMAGES.items()}


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_in(root: Path, *command: str, user: int = 31_337, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in an image's file system as a user of group 0, with the kernel's /dev and /proc."""
    mounts = (f"mount --bind /dev {root}/dev", f"mount -t proc proc {root}/proc")
    script = "; ".join((*mounts, f'exec /usr/sbin/chroot --userspec={user}:0 {root} "$@"'))
    values = {"PATH": f"{os.environ['PATH']}:/opt/finetune/bin", "HOME": "/tmp", "PYTHONSAFEPATH": "1"} | environment
    return subprocess.run(
        ["unshare", "--mount", "bash", "-ec", script, "bash", *command],
        env=values, capture_output=True, text=True, check=False)  # fmt: skip


def programs(root: Path) -> set[str]:
    """Names of everything executable."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.name for path in files if path.stat().st_mode & stat.S_IXUSR}


def test_no_image_has_more_bytes_than_it_may(roots: dict[str, Path], image: str) -> None:
    assert bytes_of(roots[image]) <= IMAGES[image].largest_bytes


def test_no_image_has_a_shell_a_compiler_or_a_package_manager(roots: dict[str, Path], image: str) -> None:
    assert "python3.11" in programs(roots[image])
    assert not programs(roots[image]) & {*SHELLS, *TOOLS}
    assert not list(roots[image].rglob("Python.h"))
    assert not (roots[image] / "opt/finetune/lib/python3.11/site-packages/pip").exists()


def test_group_0_may_read_everything(roots: dict[str, Path], image: str) -> None:
    closed = [
        path for path in roots[image].rglob("*") if not path.is_symlink() and not path.stat().st_mode & stat.S_IRGRP
    ]
    assert closed == []
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in roots[image].rglob("*")}
    assert owners == {(0, 0)}


def test_every_module_is_compiled_and_never_checked_by_time(roots: dict[str, Path], image: str) -> None:
    modules = list((roots[image] / "opt/finetune/lib/python3.11/site-packages").rglob("*.py"))
    compiled = [path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc" for path in modules]
    missing = [path for path in compiled if not path.exists()]
    assert len(missing) < 0.02 * len(modules), missing[:5]  # some packages ship files that are no Python 3.11
    assert not [path for path in compiled if path.exists() and path.read_bytes()[4:8] != b"\x01\x00\x00\x00"]


def test_labels_and_user_are_in_the_image(image: str) -> None:
    def asked(template: str) -> str:
        return buildah("inspect", "--type=image", "--format", template, IMAGES[image].tag, capture=True)

    assert asked("{{.OCIv1.Config.User}}") == "65532:0"
    labels = asked("{{.OCIv1.Config.Labels}}")
    assert f"org.opencontainers.image.title:{IMAGES[image].name}" in labels
    assert ("dev.finetune.nvidia-driver:>=580" in labels) == (image == "trainer")


def test_the_bill_of_materials_has_every_locked_package_and_debians(image: str) -> None:
    text = IMAGES[image].sbom.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    found = {component["purl"].split("?")[0] for component in document["components"]}
    lock = (CHECKOUT / f"constraints-{image}.txt").read_text()
    locked = {f"pkg:pypi/{name}@{version}" for name, version in re.findall(r"^([a-z0-9-]+)==([^ ]+)", lock, re.M)}
    assert locked <= found
    assert [purl for purl in found if purl.startswith("pkg:deb/debian/libc6@")]
    assert not [purl for purl in found if purl.startswith(("pkg:pypi/pip@", "pkg:pypi/pytest@"))]


def test_every_module_of_the_operator_imports_as_a_random_user(roots: dict[str, Path]) -> None:
    code = """
import importlib, pkgutil, ssl, finetune_operator
for found in pkgutil.walk_packages(finetune_operator.__path__, "finetune_operator."):
    importlib.import_module(found.name)
print(len(ssl.create_default_context().get_ca_certs()) > 100)
"""
    done = run_in(roots["operator"], "/opt/finetune/bin/python", "-c", code)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_everything_that_the_trainer_uses_imports_as_a_random_user(roots: dict[str, Path]) -> None:
    names = (
        "torch, triton, bitsandbytes, transformers, peft, trl, datasets, numba, gguf, awscrt, finetune_trainer.pipeline"
    )
    code = f"import {names}; print(torch.__version__)"
    done = run_in(roots["trainer"], "/opt/finetune/bin/python", "-c", code)
    assert done.stdout.strip().endswith("+cu130"), done.stderr[-2000:]
    assert run_in(roots["trainer"], "/opt/finetune/bin/finetune-trainer").stderr.startswith("usage: ")


@pytest.fixture
def stand_in_driver(roots: dict[str, Path], tmp_path: Path) -> Path:
    """A libcuda.so.1 that has every function of CUDA's driver which Triton's module calls; each returns 0."""
    (module,) = (roots["trainer"] / "opt/finetune/triton-cache").glob("*/cuda_utils.*.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    ).stdout
    source = "".join(f"int {name}() {{ return 0; }}\n" for name in re.findall(r"U (cu[A-Z]\w+)", symbols))
    (tmp_path / "cuda.c").write_text(source)
    library = roots["trainer"] / "tmp/driver/libcuda.so.1"
    library.parent.mkdir(exist_ok=True)
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, tmp_path / "cuda.c"], check=True)
    return Path("/tmp/driver")


def test_triton_finds_its_driver_module_without_a_compiler(roots: dict[str, Path], stand_in_driver: Path) -> None:
    environment = {"LD_LIBRARY_PATH": str(stand_in_driver), "TRITON_LIBCUDA_PATH": str(stand_in_driver)}
    cache = "/opt/finetune/triton-cache"
    done = run_in(roots["trainer"], "/opt/finetune/bin/python", "-c", CALLS_CUDA, TRITON_CACHE_DIR=cache, **environment)
    assert done.stdout.startswith("<built-in function get_device_properties"), done.stderr[-2000:]


def test_without_the_seed_triton_would_need_a_compiler(roots: dict[str, Path], stand_in_driver: Path) -> None:
    environment = {"LD_LIBRARY_PATH": str(stand_in_driver), "TRITON_LIBCUDA_PATH": str(stand_in_driver)}
    cache = "/tmp/empty"
    done = run_in(roots["trainer"], "/opt/finetune/bin/python", "-c", CALLS_CUDA, TRITON_CACHE_DIR=cache, **environment)
    assert "Failed to find C compiler" in done.stderr


FINDS_KERNELS = """
import sys
from pathlib import Path
sys.path.insert(0, "/tmp/image_build")
import compile_kernels
models = {name: compile_kernels.MODELS[name] for name in ("Llama 3.1 8B", "Gemma 3 4B")}
done = compile_kernels.compile_for(int(sys.argv[1]), Path(sys.argv[2]), models)
print(len(done.compiled), len(done.found))
"""


@pytest.mark.parametrize("capability", ["86", "90"])
def test_kernels_of_usual_models_are_compiled_already(roots: dict[str, Path], capability: str) -> None:
    root = roots["trainer"]
    shutil.copytree(CHECKOUT / "trainer_image/image_build", root / "tmp/image_build", dirs_exist_ok=True)
    cache = "/opt/finetune/triton-cache"
    done = run_in(root, "/opt/finetune/bin/python", "-c", FINDS_KERNELS, capability, cache)
    compiled, found = map(int, done.stdout.split()[-2:])
    assert (compiled, found > 20) == (0, True), done.stderr[-2000:]
