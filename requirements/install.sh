#!/usr/bin/env bash
# Set up .venv with the pinned stack and the bundled model; `make install` calls this.
#   GPU=0|1   choose the stack (default: the one installed before, or 1 if an NVIDIA driver answers)
#   TE=0      leave Transformer Engine out of the GPU stack (kept by later calls, too)
#   PYTHON    the interpreter to build on (default python3; 3.11 or newer)
# A second run reuses what is there. A step that fails says so and stops.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
stamp=$VENV/.stack # "STACK TE LOCKS": what is installed, and the choice that later calls keep
read -r had_stack had_te _ 2>/dev/null <$stamp || had_stack="" had_te=""
case $had_stack in
    cpu) GPU=${GPU:-0} ;;
    gpu) GPU=${GPU:-1} ;;
    *) GPU=${GPU:-$(nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)} ;;
esac
TE=${TE:-${had_te:-1}}
STEP=""

say() { STEP="$*" && printf '\033[1m%s\033[0m\n' "==> $*" >&2; }
fail() { printf '%s\n' "install: ${STEP:-set-up} failed: $*" >&2 && exit 1; }
pip() { "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps --no-compile "$@"; }

case $GPU in
    0) stack=cpu locks="requirements/cpu-torch.lock requirements/cpu.lock" ;;
    1) stack=gpu locks="requirements/gpu.lock requirements/transformer-engine.lock" ;;
    *) fail "GPU must be 0 or 1, not '$GPU'" ;;
esac

command -v "$PYTHON" >/dev/null || fail "'$PYTHON' not found; install Python 3.11 or newer"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1)"

# What is installed is named by its stack and the locks it came from.
wanted="$stack $TE $(cat $locks | sha256sum | cut -c1-16)"
if [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
if [ -n "$had_stack" ] && [ "$had_stack" != $stack ]; then
    say "replacing the $had_stack stack by the $stack stack"
    rm -rf $VENV
fi

# Two things that pip cannot bring: Debian's Python comes without venv, and vLLM's CPU kernels load libnuma.
missing=""
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing="python3-venv"
[ $stack = gpu ] || "$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing="$missing libnuma1"
if [ -n "$missing" ]; then
    say "system packages:" $missing
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
        fail "they are not installed; on Debian: sudo apt-get install" $missing
    { apt-get -q update && apt-get -qy install --no-install-recommends $missing; } >&2 || fail "see apt-get's message above"
fi

if ! [ -x $VENV/bin/pip ]; then
    say "virtual environment in $VENV"
    "$PYTHON" -m venv $VENV || fail "$PYTHON -m venv $VENV: see its message above"
fi
echo "$stack $TE incomplete" >$stamp # an interrupted run starts again, on the same stack

if [ $stack = cpu ]; then
    # The default index may have the CPU build; PyTorch's own index is asked only when it does not,
    # and for torch alone. Its hash is known for Python 3.11.
    say "PyTorch for CPUs (190 MB)"
    torch=(--require-hashes -r requirements/cpu-torch.lock)
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
        torch=("$(cut -d' ' -f1 requirements/cpu-torch.lock | head -n 1)")
    pip -q "${torch[@]}" 2>/dev/null || pip --index-url https://download.pytorch.org/whl/cpu "${torch[@]}" >&2 ||
        fail "torch for CPUs is neither on the default index nor on PyTorch's; is the network up?"
    say "vLLM for CPUs and the rest (170 packages, 600 MB)"
    pip --require-hashes -r requirements/cpu.lock >&2 || fail "see pip's message above"
else
    say "PyTorch, vLLM and the rest for GPUs (220 packages, about 6 GB)"
    pip --require-hashes -r requirements/gpu.lock >&2 || fail "see pip's message above"
fi

say "the bundled model, SmolLM2-135M-Instruct"
"$VENV/bin/python" -m common.models || fail "the bundled model could not be converted"

if [ "$stack $TE" = "gpu 1" ]; then
    say "Transformer Engine's PyTorch extension (compiled, a few minutes)"
    command -v "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" >/dev/null || command -v nvcc >/dev/null ||
        fail "no CUDA compiler (nvcc): install CUDA 13.0 or set CUDA_HOME; or 'make install TE=0' goes without (only fp8_quant.py uses it)"
    NVTE_PYTORCH_FORCE_BUILD=TRUE pip --no-build-isolation --require-hashes -r requirements/transformer-engine.lock >&2 ||
        fail "compiler messages above; 'make install TE=0' goes without (only fp8_quant.py uses it)"
fi

echo "$wanted" >$stamp
say "ready: the $stack stack is in $VENV"
