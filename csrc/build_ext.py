"""What setup.py compiles: one stable-ABI library per device, loadable by every torch from 2.11 on.

DIT_OPS_BUILD = auto (default: what this machine can build; says what is missing)
              | cpu  (an error if it cannot be built)
              | cuda (both libraries; with a CPU-only torch a cross-build for machines that have a GPU)
              | none
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STABLE_ABI = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11: nothing newer is used
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", *STABLE_ABI]
NVCC_FLAGS = ["-O3", "-lineinfo", "--threads", "2", "-DUSE_CUDA", *STABLE_ABI]
CROSS_ARCHS = "8.0;9.0a;10.0a"
MODES = ("auto", "cpu", "cuda", "none")


def extensions() -> tuple[list, dict]:
    """(ext_modules, cmdclass) for setuptools.setup; both empty where nothing can or shall be built."""
    mode = os.environ.get("DIT_OPS_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"DIT_OPS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return [], {}

    missing = _missing_for_cpu()
    if missing:
        return _without(f"the compiled operators: {missing}", fatal=mode != "auto")
    import torch
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def _check_cuda_version(self, *args, **kwargs) -> None:
            """Only the major version matters to a stable-ABI library: _missing_for_cuda compares it."""

    modules = [_module(cpp_extension, "dit_ops._C_cpu", _sources("*.cpp"), {"cxx": CXX_FLAGS})]
    cuda_home = _cuda_home()
    missing = _missing_for_cuda(torch, cuda_home, mode)
    if missing is None:
        modules.append(_cuda_module(torch, cpp_extension, cuda_home))
    elif mode != "cpu":
        _without(f"dit_ops._C_cuda: {missing}", fatal=mode == "cuda")
    _say("building " + ", ".join(f"{m.name} from {len(m.sources)} files" for m in modules))
    return modules, {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}


def _missing_for_cpu() -> str | None:
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable here (install torch first, then pass --no-build-isolation to pip)"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (Debian: apt install g++; or set CXX)"
    return None


def _missing_for_cuda(torch, cuda_home: str | None, mode: str) -> str | None:
    if not _sources("*.cu"):
        return "csrc/ holds no .cu file"
    if torch.version.cuda is None and mode != "cuda":
        return f"torch {torch.__version__} is a CPU build (DIT_OPS_BUILD=cuda cross-builds)"
    if cuda_home is None:
        return "nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda"
    release = _nvcc_release(cuda_home)
    if torch.version.cuda is not None and release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc in {cuda_home} is CUDA {release}, but torch was built with CUDA {torch.version.cuda} (majors must agree)"
    return None


def _cuda_home() -> str | None:
    on_path = shutil.which("nvcc")
    candidates = (os.environ.get("CUDA_HOME"), on_path and str(Path(on_path).resolve().parents[1]), "/usr/local/cuda")
    return next(
        (c for c in candidates if c and Path(c, "bin/nvcc").exists() and Path(c, "include/cuda_runtime.h").exists()), None
    )


def _nvcc_release(cuda_home: str) -> str:
    text = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def _cuda_module(torch, cpp_extension, cuda_home: str):
    cpp_extension.CUDA_HOME = cuda_home
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        archs = f"{major}.{minor}" + ("a" if major >= 9 else "")
    else:
        archs = CROSS_ARCHS
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)
    torch_cuda = str(Path(torch.__file__).parent / "lib") if torch.version.cuda else _stub_torch_cuda()
    flags = {"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS}
    module = _module(cpp_extension, "dit_ops._C_cuda", [*_sources("*.cu"), "csrc/bindings_cuda.cpp"], flags)
    module.include_dirs.append(f"{cuda_home}/include")
    module.library_dirs += [f"{cuda_home}/lib64", torch_cuda]
    module.libraries.append("cudart")
    module.extra_link_args += ["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"]
    return module


def _stub_torch_cuda() -> str:
    """A CPU-only torch has no libtorch_cuda.so to link: an empty library of that name stands in for the linker."""
    folder = ROOT / "build/stubs"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libtorch_cuda.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", str(library)]
    subprocess.run(command, check=True)
    return str(folder)


def _module(cpp_extension, name: str, sources: list[str], flags: dict):
    return cpp_extension.CppExtension(name, sources, include_dirs=["csrc"], extra_compile_args=flags, py_limited_api=True)


def _sources(pattern: str) -> list[str]:
    return sorted(f"csrc/{p.name}" for p in (ROOT / "csrc").glob(pattern) if p.name != "bindings_cuda.cpp")


def _without(what: str, fatal: bool) -> tuple[list, dict]:
    if fatal:
        raise SystemExit(f"dit_ops build: cannot build {what}")
    _say(f"building without {what}")
    return [], {}


def _say(line: str) -> None:
    print(f"dit_ops build: {line}", file=sys.stderr)
