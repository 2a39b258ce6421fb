"""The shape of the tree, checked: links, names, which layer may import which, and what an import may cost."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "backbones", "training", "pipelines", "bench")  # code at the top level, reached as dit_ops.<folder>

# A module imports from its own layer and from those above it in this list, never from one below. Names stand for packages too.
LAYERS = (
    ("kernels",),
    ("__init__", "_library", "ops", "fuse", "testing"),
    (
        *("layout", "parallel", "masks", "camera", "actions", "rope", "ring", "cache", "flow"),
        *("draws", "files", "rooms", "video", "conditions"),
    ),
    ("backbones", "registry", "offload", "float8"),
    ("pipelines",),
    ("training",),
    (
        *("cli", "cli_generate", "preview", "convert", "__main__", "demo", "report", "evaluate", "doctor", "memory"),
        *("bench", "play"),
    ),
)


def modules() -> dict[str, Path]:
    """Module name -> file, for the package and the folders linked into it."""
    found = {}
    for file in sorted(ROOT.glob("dit_ops/**/*.py")) + [
        f for folder in FOLDERS for f in sorted(ROOT.glob(f"{folder}/**/*.py"))
    ]:
        parts = list(file.relative_to(ROOT).with_suffix("").parts)
        if parts[0] in FOLDERS:
            parts.insert(0, "dit_ops")
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file.resolve()
    return found


MODULES = modules()


def layer(module: str) -> int:
    name = (module.split(".") + ["__init__"])[1]
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{module} is in no layer: add {name!r} to LAYERS in tests/test_layout.py"
    return found[0]


def imports(module: str) -> set[str]:
    """Every module that `module` imports, inside functions too; ours by their full names, others by their first name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full}
    return {name if name.split(".")[0] == "dit_ops" else name.split(".")[0] for name in found}


@pytest.mark.parametrize("folder", [*FOLDERS, "configs"])
def test_folder_is_linked_into_the_package(folder):
    assert os.readlink(ROOT / "dit_ops" / folder) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_checkout_shadows_no_installed_package(folder):
    """diffusers and transformers probe for `kernels`; a namespace loses to it, a regular package in the cwd would win."""
    spec = PathFinder.find_spec(folder, [str(ROOT)])
    assert spec is None or spec.origin is None


def test_linked_module_is_the_file_in_the_folder():
    assert Path(find_spec("dit_ops.kernels.adaln").origin).resolve() == ROOT / "kernels/adaln.py"


def test_every_op_has_its_files():
    ops = {file.stem for file in ROOT.glob("dit_ops/ops/[!_]*.py")}
    kernels = {file.stem for file in ROOT.glob("kernels/[!_]*.py")}
    native = {file.stem for kind in ("*.cpp", "*.cu") for file in ROOT.glob(f"csrc/{kind}") if "bindings" not in file.stem}
    assert "adaln" in kernels & native
    assert kernels <= ops, f"kernels/ without an op: {kernels - ops}"
    assert native <= ops, f"csrc/ without an op: {native - ops}"
    wanted = {f"tests/test_{op}.py" for op in ops} | {f"bench/bench_{op}.py" for op in kernels | native}
    assert {file for file in wanted if not (ROOT / file).exists()} == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = layer(module)
    ours = {name for name in imports(module) if name.split(".")[0] == "dit_ops"}
    assert {name for name in ours if layer(name) > own} == set()
    assert not imports(module) & set(FOLDERS), "import it as dit_ops.<folder>"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dit_ops.kernels")])
def test_kernel_files_import_torch_and_triton_only(module):
    outside = {name for name in imports(module) if not name.startswith("dit_ops.kernels.")}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "triton"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dit_ops.ops")])
def test_an_op_knows_no_model(module):
    assert not imports(module) & {"diffusers", "transformers", "accelerate"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("dit_ops.backbones.")])
def test_a_backbone_imports_no_other_backbone(module):
    """Files of one model share its name: wan.py may import wan_original.py, and never hunyuan_video15.py."""
    model = module.split(".")[2].split("_")[0]
    others = {name for name in imports(module) if name.startswith("dit_ops.backbones.")}
    assert {name for name in others if not name.split(".")[2].startswith((model, "_"))} == set()


def run_python(code: str, *args: str, cwd: Path = ROOT, path: Path = ROOT) -> str:
    env = os.environ | {"PYTHONPATH": str(path), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None  # from here on, `import triton` raises\n"


def test_importing_anything_needs_no_triton_and_no_driver():
    names = [name for name in MODULES if not name.startswith("dit_ops.kernels.") and name != "dit_ops.__main__"]
    code = "import importlib, torch\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    run_python(WITHOUT_TRITON + code + "assert not torch.cuda.is_initialized()", *names)


def test_importing_the_package_is_cheap():
    """The ops alone: no model library and no video library is loaded."""
    run_python("import sys, dit_ops\nassert not {'diffusers', 'transformers', 'av', 'triton'} & set(sys.modules)")


def test_wheel_holds_real_files_and_works_without_a_compiled_library(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    left_out = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "build", "dist", "out", "tests", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "src", symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "..", "."]
    subprocess.run(command, cwd=tmp_path / "src", env=os.environ | {"DIT_OPS_BUILD": "none"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    configs = {f"dit_ops/{file.relative_to(ROOT)}" for file in ROOT.glob("configs/*/*.yaml")}
    code = {f"dit_ops/{str(file.relative_to(ROOT)).removeprefix('dit_ops/')}" for file in MODULES.values()}
    assert configs | code | {"dit_ops/py.typed", "dit_ops/play/page.html"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dit_ops"}
    use = "import torch, dit_ops; print(dit_ops.__file__, *dit_ops.adaln(torch.ones(1, 2, 8)).shape)"
    printed = run_python(WITHOUT_TRITON + use, cwd=tmp_path, path=tmp_path / "site").split()
    assert printed == [str(tmp_path / "site/dit_ops/__init__.py"), "1", "2", "8"]


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize(
    "command",
    [["check", "--output-format=concise"], ["format", "--check", "-q", "--output-format=concise"]],
    ids=["check", "format"],
)
def test_ruff_is_silent(command):
    """No print, no broad except, no star import, no unused name: the rules are in pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
