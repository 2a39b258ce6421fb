"""metrics.jsonl and TensorBoard: one line per logged step, each value the mean since the line before it and over all ranks."""

import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_ops.files import atomic_path
from dit_ops.training.checkpoint import is_writer

logger = logging.getLogger(__name__)
MEASURED = "speed/"  # names of values that no two runs have in common


class MetricsLog:
    """Values wait on their device until a line is due, so that logging rarely stops a GPU. All ranks add the same names."""

    def __init__(self, output: Path, *, tensorboard: bool):
        self.path = output / "metrics.jsonl"
        self.logged = 0  # step of the last line
        self.pending: dict[str, list[float]] = {}  # means over all ranks
        self._own: list[tuple[str, float | Tensor]] = []  # of this rank, later than what is pending
        self._folder = output / "tensorboard" if tensorboard and is_writer() else None
        self._board: Any = None
        if self._folder and importlib.util.find_spec("tensorboard") is None:
            logger.warning("TensorBoard is not installed (pip install tensorboard); the metrics are in %s only", self.path)
            self._folder = None

    def add(self, name: str, value: float | Tensor) -> None:
        self._own.append((name, value.detach() if isinstance(value, Tensor) else value))

    def state(self) -> dict[str, Any]:
        """JSON; to be saved with a checkpoint. Collective."""
        self._reduce()
        return {"logged": self.logged, "pending": self.pending}

    def start(self, state: dict[str, Any] | None = None) -> None:
        """Begins a new file, or goes on from a saved state: later lines, and a line cut short by a kill, are dropped."""
        self.logged = state["logged"] if state else 0
        self.pending, self._own = dict(state["pending"]) if state else {}, []
        if not is_writer():
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.logged]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))
        if self._folder:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._folder, purge_step=self.logged + 1)

    def check_finite(self, step: int) -> None:
        """FloatingPointError, on all ranks, if a pending loss or gradient norm of one is NaN or infinite. Collective."""
        self._reduce()
        for name, values in self.pending.items():
            if name.startswith(("loss/", "grad_norm/")) and not all(map(math.isfinite, values)):
                raise FloatingPointError(f"{name} is not finite in the steps up to {step}: {values}; this state was not saved")

    def write(self, step: int) -> dict[str, float]:
        """One line of the means of what is pending. Collective."""
        self._reduce()
        line = {name: sum(values) / len(values) for name, values in self.pending.items()}
        self.pending, self.logged = {}, step
        if is_writer():
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | line) + "\n")
            if self._board:
                for name, value in line.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()
        return line

    def close(self) -> None:
        if self._board:
            self._board.close()

    def _reduce(self) -> None:
        """What this rank added since the last time, as means over all ranks, joins what is pending."""
        values = [float(value) for _, value in self._own]
        if dist.is_initialized() and dist.get_world_size() > 1 and values:
            mean = torch.tensor(values, dtype=torch.float64)
            dist.all_reduce(mean)
            values = (mean / dist.get_world_size()).tolist()
        for (name, _), value in zip(self._own, values, strict=True):
            self.pending.setdefault(name, []).append(value)
        self._own = []
