#!/usr/bin/env bash
# Let a machine that has PyTorch, but no registry to install this project from, run what needs a GPU: the tests marked
# `gpu` and the benchmarks.
#
#   tests/support/gpu_machine.sh SITE
#
# SITE: a folder with the packages that the machine lacks, as `pip install --target` fills it (bitsandbytes, trl,
# datasets, gguf, pydantic, boto3, pytest-asyncio). They come first on the path of every process, with this checkout.
set -euo pipefail
[[ $# == 1 && -d $1 ]] || { echo "usage: $0 SITE, a folder of packages" >&2; exit 2; }
here=$(cd "$(dirname "$0")/../.." && pwd) site=$(cd "$1" && pwd)

# Processes of a run have no PYTHONPATH, so a file of Python's own names the folders.
{
  echo "import sys; sys.path[:0] = ['$site']"
  for folder in crds operator trainer_image kernels tests/support trainer_image/benchmarks; do echo "$here/$folder"; done
} >"$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/finetune_operator.pth"

# Reports name the project's version.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")
mkdir -p "$site/finetune_operator-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: finetune-operator\nVersion: %s\n' "$version" >"$site/finetune_operator-$version.dist-info/METADATA"
echo "ready: python3 -P -m pytest -m gpu; python3 -P -m speed.run"
