"""python tools/check_cuda.py: compiles every csrc/*.cu for each architecture and prints what its kernels use; 1 if one spills.

Needs nvcc, not a GPU. Instruction counts need Triton, whose wheel brings nvdisasm.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90a", "100a")
ENTRY = re.compile(r"Compiling entry function '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def nvcc() -> str | None:
    """The compiler in CUDA_HOME, on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).exists()), None)


def compile_kernels(source: Path, arch: str) -> dict[str, dict[str, int]]:
    """Kernel name -> registers, stack, spill and shared bytes, and 128-bit loads and stores. RuntimeError: nvcc's message."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(cubin)]
        command = [str(nvcc()), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", *target, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        kernels = parse_ptxas(done.stderr)
        for name, counts in instruction_counts(cubin).items():
            if name in kernels:
                kernels[name] |= counts
    return {short_name(name): used for name, used in kernels.items()}


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    kernels: dict[str, dict[str, int]] = {}
    used: dict[str, int] = {}
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            used = kernels.setdefault(entry[1], {})
        elif stack := STACK.search(line):
            used |= {"stack": int(stack[1]), "spill": int(stack[2]) + int(stack[3])}
        elif registers := REGISTERS.search(line):
            shared = SHARED.search(line)
            used |= {"registers": int(registers[1]), "shared": int(shared[1]) if shared else 0}
    return kernels


def instruction_counts(cubin: Path) -> dict[str, dict[str, int]]:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return {}
    disassembler = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
    sass = subprocess.run([disassembler, cubin], capture_output=True, text=True, check=True).stdout
    counts = {}
    for section in sass.split(".section\t.text.")[1:]:
        name = section.split(",", 1)[0]
        counts[name] = {op: len(re.findall(rf"\b{re.escape(op)}\b", section)) for op in ("LDG.E.128", "STG.E.128")}
    return counts


def short_name(mangled: str) -> str:
    """adaln_fwd_kernel<float, float, 1, 256> instead of its mangled or full name."""
    if shutil.which("c++filt") is None:
        return mangled
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return full.removeprefix("void ").removeprefix("dit::").split("(")[0]


def main() -> int:
    if nvcc() is None:
        print("nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda")
        return 1
    jobs = [(source, arch) for source in sorted((ROOT / "csrc").glob("*.cu")) for arch in ARCHS]
    spills = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), kernels in zip(jobs, pool.map(lambda job: compile_kernels(*job), jobs), strict=True):
            for name, used in kernels.items():
                spills += used["spill"]
                print(f"{source.name} sm_{arch} {name}: {used}")
    return int(spills > 0)


if __name__ == "__main__":
    sys.exit(main())
