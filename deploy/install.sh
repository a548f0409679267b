#!/usr/bin/env bash
# The image's packages, in the versions of the lock: called by Dockerfile, with TORCH and TORCH_INDEX.
set -euo pipefail
lock=requirements.txt
if [ "$TORCH" = cpu ] && [ -n "$TORCH_INDEX" ]; then
    # The same versions, built without CUDA. The lock has the hashes of PyPI's files, so these two are trusted by address and version.
    for name in torch torchvision; do
        version=$(sed -nE "s/^$name==([^ ;]+).*/\1/p" $lock)+cpu
        python -m pip download --quiet --no-deps --only-binary :all: --index-url "$TORCH_INDEX" --dest wheels "$name==$version"
        sed -i "/^$name==/,/[^\\\\]\$/d" $lock
        echo "$name==$version --hash=sha256:$(sha256sum wheels/"$name"-*.whl | cut -d ' ' -f 1)" >> $lock
    done
    export PIP_FIND_LINKS=$PWD/wheels
fi
scripts/pip_locked.sh setuptools --requirement extras.txt
rm -rf wheels
if [ "$TORCH" = cpu ] && [ -z "$TORCH_INDEX" ]; then
    # PyPI's PyTorch has CUDA, and most of it is needed to import it at all. This is not: the compiler of kernels, and cuDNN's engines.
    python -m pip uninstall --yes --quiet triton
    find "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/cudnn/lib -name 'libcudnn_*' -delete
fi
