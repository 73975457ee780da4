#!/usr/bin/env bash
# Installs the project in an image that brings torch and Transformer Engine (launch/Dockerfile, launch/apptainer.def).
# Neither is replaced: they are built for each other, and for the image's CUDA.
#
#   launch/install_in_image.sh FOLDER    FOLDER: the source, with pyproject.toml
set -euo pipefail
source=$1
# megatron-core 0.16.1 goes with Transformer Engine 2.9 to 2.11 (docs/guide/installation.md)
megatron_core=${MEGATRON_CORE:-0.16.1}

versions() {
    python3 -c "
from importlib.metadata import PackageNotFoundError, version
for name in ('torch', 'transformer-engine', 'triton'):
    try:
        print(f'{name}=={version(name)}')
    except PackageNotFoundError:
        pass"
}

kept=$(mktemp)
versions >"$kept"
grep -q '^torch==' "$kept" || { echo "install_in_image.sh: the image has no torch; use NVIDIA's PyTorch image" >&2; exit 2; }
# the image's own constraints too, if it has any
image_constraints=${PIP_CONSTRAINT:-}
PIP_CONSTRAINT="$kept${image_constraints:+ $image_constraints}" \
    python3 -m pip install --no-cache-dir "${source}[data,hf,logging]" "megatron-core==$megatron_core"
if ! diff "$kept" <(versions) >&2; then
    echo "install_in_image.sh: pip has replaced a package of the image" >&2
    exit 1
fi
rm "$kept"
