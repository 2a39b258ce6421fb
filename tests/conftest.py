"""Shared by every test: fixed seeds, poisoned memory, the device, and processes for the distributed tests."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a sum has the same bits in this process and in those it starts

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
os.environ.setdefault("TEARDOWN_CUPTI", "0")  # a second start of CUPTI beside CUDA graphs crashes

# Triton's interpreter is a switch of the whole process: TRITON_INTERPRET=1 pytest tests/triton
collect_ignore = [] if INTERPRETED or DEVICE == "cuda" else ["triton"]

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Memory from torch.empty is NaN in tests: a kernel that leaves part of its output unwritten fails loudly."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _rank_main(rank: int, ranks: int, folder: str, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    torch.save(fn(rank, ranks, *args), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(fn, ranks, *args): fn(rank, ranks, *args) in `ranks` gloo processes; returns their results in rank order.

    fn is a module-level function of the test file; it returns tensors, numbers, strings, and lists or dicts of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])

    def run(fn: Callable, ranks: int, *args) -> list:
        with tempfile.TemporaryDirectory() as folder:
            processes = [context.Process(target=_rank_main, args=(rank, ranks, folder, fn, args)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout=120)
                process.kill()
                process.join()
            codes = [process.exitcode for process in processes]
            assert codes == [0] * ranks, f"exit codes of the {ranks} ranks: {codes}"
            return [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]

    return run
