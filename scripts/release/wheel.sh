#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the wheel from what is compiled, and tags it for the oldest glibc whose symbols suffice.
#
#   scripts/release/wheel.sh FOLDER        needs `make venv`, or PYTHON=another with the extra [dev]
#
# torch's libraries are torch's to bring: they are in the process before ours are opened.
set -euo pipefail
python=$(command -v "${PYTHON:-.venv/bin/python}")
PATH=$(dirname "$python"):$PATH
mkdir -p "$1"
folder=$(mktemp -d "$1/untagged.XXXXXX")
trap 'rm -rf "$folder"' EXIT
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$(dirname "$0")/../.."
"$python" -m auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir "$1" "$folder"/*.whl
