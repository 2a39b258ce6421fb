"""Compiles Triton kernels for GPUs that are not here, and counts what the compiler made of them.

with offline_driver(90):
    kernel = adaln_fwd_kernel.warmup(torch.bfloat16, ..., 1536, BC=2048, grid=(1,), num_warps=8)  # a dtype is a pointer
report(kernel)  # {'registers': 40, 'stack': 0, 'shared': 32, 'warps': 8, 'LDG.E.128': 9, ...}
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # cuobjdump and nvdisasm come with Triton
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDG.E.128", "STG.E.128", "LDL", "STL")


class OfflineDriver(DriverBase):
    """Answers what `JITFunction.warmup` asks of a driver; nothing can be launched on it."""

    def __init__(self, capability: int):
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """An index no GPU has: Triton keeps one target and one cache of compiled kernels per device."""
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self):
        raise RuntimeError("the offline driver compiles only")

    def get_device_interface(self):
        raise RuntimeError("the offline driver compiles only")

    def get_empty_cache_for_benchmark(self):
        raise RuntimeError("the offline driver compiles only")

    def clear_cache(self, cache) -> None:
        pass


@contextmanager
def offline_driver(capability: int) -> Iterator[None]:
    """Inside the block `kernel.warmup` compiles for sm_<capability>: 80, 90 or 100."""
    before = triton.runtime.driver._active  # the property `active` raises where there is no GPU
    triton.runtime.driver.set_active(OfflineDriver(capability))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


def report(kernel) -> dict[str, int]:
    """Registers, stack (bytes spilled per thread), shared memory, warps and SASS instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "nvdisasm", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage.stdout}{usage.stderr}")
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", sass)) for name in INSTRUCTIONS}
    resources = {"registers": int(found[1]), "stack": int(found[2])}
    return resources | {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps} | counts
