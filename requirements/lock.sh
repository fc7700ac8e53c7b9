#!/usr/bin/env bash
# Resolve requirements.txt into full, hashed locks:
#   cpu-torch.lock  torch alone: it may come from PyTorch's own index
#   cpu.lock        the rest of the CPU stack
#   gpu.lock        the GPU stack, wheels only
#   gpu-source.lock what is compiled on the GPU machine, against the torch installed before it
# Needs network; run it as `make lock` after editing requirements.txt.
set -euo pipefail
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check uv==0.13.9

# Transformer Engine's PyTorch extension has no wheel, and its source cannot say what it needs
# without CUDA: these are the needs its setup.py declares.
cat >"$work/uv.toml" <<'TOML'
[[dependency-metadata]]
name = "transformer-engine-torch"
version = "2.12.0"
requires-dist = ["torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect"]
TOML

# requirements.txt holds two stacks: keep the lines whose marker holds for `extra`.
stack() {
    python3 - "$1" <<'PY' >"$work/$1.in"
import re, sys
for number, line in enumerate(open("../requirements.txt"), 1):
    requirement, _, marker = line.split("#")[0].partition(";")
    wanted = re.fullmatch(r'\s*(?:extra (==|!=) "cpu")?\s*', marker)
    if wanted is None:
        sys.exit(f"requirements.txt line {number}: the marker {marker.strip()!r} is neither of the two stacks")
    if requirement.strip() and wanted[1] in (None, "==" if sys.argv[1] == "cpu" else "!="):
        print(requirement.strip())
PY
}

compile() { # STACK PYTHON_VERSION: the whole lock on standard output
    stack "$1"
    "$work/venv/bin/uv" pip compile -q --config-file "$work/uv.toml" --universal --python-version "$2" \
        --find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" \
        --generate-hashes --no-header --no-annotate "$work/$1.in"
}
# Split a lock: the entries of the named packages, or (with !) all others.
entries() { awk -v names=" ${1#!} " -v invert="$([[ $1 == !* ]] && echo 1 || echo 0)" '
    /^[a-z0-9]/ { split($1, p, "=="); keep = (index(names, " " p[1] " ") > 0) != invert } keep'; }

# Not needed on a CPU: PyPI's torchvision, torchaudio and torchcodec are CUDA builds that break
# `import transformers` beside a CPU torch; triton (a gigabyte) is named by xgrammar, and vLLM's CPU
# path runs without it.
echo "cpu"
compile cpu 3.11 >"$work/cpu.lock"
entries "torch" <"$work/cpu.lock" >cpu-torch.lock
entries "!torch torchvision torchaudio torchcodec triton" <"$work/cpu.lock" >cpu.lock
echo "gpu"
compile gpu 3.11 >"$work/gpu.lock"
entries "transformer-engine-torch" <"$work/gpu.lock" >gpu-source.lock
entries "!transformer-engine-torch" <"$work/gpu.lock" >gpu.lock
wc -l ./*.lock
