"""What this machine's processors can do, read from the system without loading torch: it takes seconds to import."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
# NVIDIA's driver, NVIDIA under WSL, AMD's driver.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def read_cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags; empty where the system does not tell."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def has_bf16() -> bool:
    """Say whether the CPU multiplies bf16 matrices itself; without that bf16 is slower than fp32."""
    return bool(BF16_FLAGS & read_cpu_flags())


def may_have_gpu() -> bool:
    """Say whether a GPU's driver is there. Without one torch need not be asked; with one, it has the last word."""
    return any(device.exists() for device in GPU_DEVICES)
