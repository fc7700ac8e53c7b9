#!/usr/bin/env bash
# Resolve the requirements into full, hashed locks:
#   cpu-torch.lock           torch alone: it may come from PyTorch's own index
#   cpu.lock                 the rest of the CPU stack
#   gpu.lock                 the GPU stack, wheels only
#   transformer-engine.lock  what is compiled on the GPU machine, against the torch installed before it
# Needs network; run it as `make lock` after editing requirements.txt or requirements/*.txt.
set -euo pipefail
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Transformer Engine's PyTorch extension has no wheel, and its source cannot say what it needs
# without CUDA: these are the needs its setup.py declares.
cat >"$work/uv.toml" <<'TOML'
[[dependency-metadata]]
name = "transformer-engine-torch"
version = "2.12.0"
requires-dist = ["torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect"]
TOML

compile() { # REQUIREMENTS...: the whole lock on standard output
    ../.venv/bin/uv pip compile -q --config-file "$work/uv.toml" --universal --python-version 3.11 \
        --generate-hashes --no-header --no-annotate --no-emit-find-links "$@"
}
# The entries of a lock for the named packages, or (with !) for all others.
entries() { awk -v names=" ${1#!} " -v invert="$([[ $1 == !* ]] && echo 1 || echo 0)" '
    /^[a-z0-9]/ { split($1, p, "=="); keep = (index(names, " " p[1] " ") > 0) != invert } keep'; }

# The locks are installed without following dependencies, so the empty wheels of unneeded/ can stay out.
echo "cpu"
compile cpu.txt dev.txt --find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}" >"$work/cpu.lock"
entries "torch" <"$work/cpu.lock" >cpu-torch.lock
entries "!torch torchvision torchaudio torchcodec triton llm llama-cpp-python" <"$work/cpu.lock" >cpu.lock
echo "gpu"
compile ../requirements.txt transformer-engine.txt dev.txt >"$work/gpu.lock"
entries "transformer-engine-torch" <"$work/gpu.lock" >transformer-engine.lock
entries "!transformer-engine-torch llm llama-cpp-python" <"$work/gpu.lock" >gpu.lock
wc -l ./*.lock
