"""The loop that every training stage runs on: optimizers per role, accumulation, clipping, EMA, exact resume, metrics.

A stage says which roles to update at a step and what their loss is; the engine does the rest, on one process or on the ranks of
a mesh (data × sequence) that a stage knows nothing of. Every random number of a step comes from Draws(seed, step, update,
micro batch), every batch from its running number: a resumed run repeats and skips nothing, on any number of ranks.
"""

import json
import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from dit_ops import conditions, ema_update_
from dit_ops.draws import Draws
from dit_ops.training import checkpoint
from dit_ops.training.config import RunConfig, config_dict, differences, save_config, stage_class
from dit_ops.training.data import LatentDataset, collate, to_device
from dit_ops.training.gradients import average_gradients, clip_gradients, grad_norm, reduce_in_backward
from dit_ops.training.lora import save_lora
from dit_ops.training.meters import Meters, peak_flops, video_tokens
from dit_ops.training.metrics import MEASURED, MetricsLog
from dit_ops.training.networks import add_adapters, average, load_backbones, merged
from dit_ops.training.optim import optimizers
from dit_ops.training.parallelize import gathered, parallelize, skeleton
from dit_ops.training.random_state import seed_all
from dit_ops.training.ranks import device_of, process_group, ranks_of
from dit_ops.training.sampler import BatchSampler, bucket_keys

logger = logging.getLogger(__name__)

# (generator, step, folder for its files) → values for the metrics
Validate = Callable[[nn.Module, int, Path], dict[str, float] | None]


class Stage(Protocol):
    """Constructed as Stage(options, backbones, negative). Frozen roles have no parameter that requires a gradient.

    Optional: `config_class`, the dataclass of its options; `needs_ema = True`: the engine sets `ema`, a dict role → module;
    `on_step_end(role)` after an update of the role; `run(config, *, resume, progress)` replaces the engine.
    """

    roles: dict[str, nn.Module]

    def updates(self, step: int) -> list[str]:
        """Roles to update at this step, in order; each update has its own batches."""
        ...

    def loss(self, role: str, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Scalar loss of one micro batch, and metrics."""
        ...


def run(config: RunConfig, *, resume: bool = True, progress: bool = True, validate: Validate | None = None) -> Path:
    """Trains the stage of a config and returns the exported model directory (ode_sampling: the data set).

    resume   go on from the newest checkpoint in config.output; False: a run that is already there is an error
    KeyboardInterrupt (Ctrl-C or SIGTERM): the state was saved, the same call goes on
    """
    cls = stage_class(config.stage)
    if hasattr(cls, "run"):
        return cls.run(config, resume=resume, progress=progress)
    with process_group(config):
        dataset = LatentDataset(config.data.path, config.data.split)
        if config.data.condition is not None:
            conditions.load(config.data.condition)  # what the export will link: an error now, not after the training
        backbones = load_backbones(config)
        stage = cls(config.options, backbones, to_device(dataset.negative, device_of(config)))
        engine = Engine(config, stage, dataset, Path(config.output), progress=progress, validate=validate)
        engine.train(resume=resume)
        return engine.export()


SHOWN = [f"{MEASURED}{name}" for name in ("step_seconds", "tokens_per_second", "mfu", "peak_memory_gb")]


class Engine:
    """Trains the roles of a stage; `step` counts the finished steps."""

    def __init__(
        self,
        config: RunConfig,
        stage: Any,
        dataset: Any,
        output: Path,
        *,
        progress: bool = True,
        validate: Validate | None = None,
    ):
        self.config, self.stage, self.dataset, self.output = config, stage, dataset, Path(output)
        self.device, self.ranks = device_of(config), ranks_of(config)
        self.progress, self.validate = progress and checkpoint.is_writer(), validate
        self.step = 0
        self.updates = 0  # of all roles
        samples = config.data.batch_size * config.grad_accumulation * self.ranks.data
        self.sampler = BatchSampler(bucket_keys(dataset), samples, config.seed)
        self.checkpoints = self.output / "checkpoints"
        trained = {role for role, module in stage.roles.items() if trainable(module)}
        if not trained:
            raise ValueError(f"stage {config.stage!r} has nothing to train in its roles {sorted(stage.roles)}")
        for role in config.optim.roles:
            if role not in trained:
                raise ValueError(f"optim.roles.{role}: this stage trains the roles {sorted(trained)}")
        add_adapters({role: stage.roles[role] for role in trained}, config)
        self.frozen = {role: {n for n, p in stage.roles[role].named_parameters() if not p.requires_grad} for role in trained}
        self.ema = self._make_ema(trained)
        self._plain = skeleton(stage.roles["generator"]) if config.parallel.fsdp != "none" else None
        self.meters = Meters(self.device, config.peak_flops or peak_flops(self.device, config.precision))
        for module in {id(m): m for m in (*stage.roles.values(), *self.ema.values())}.values():
            parallelize(module, config, self.ranks, self.device)
            self.meters.watch(module, self.ranks.sequence)
        self.parameters = {role: trainable(stage.roles[role]) for role in stage.roles if role in trained}
        for role, module in stage.roles.items():
            module.train(role in trained)
        made = lambda role: optimizers(
            self.parameters[role].values(), config.optim.name, config.optim.momentum, **config.optim.of(role)
        )
        self.optimizers = {role: made(role) for role in self.parameters}
        self.metrics = MetricsLog(self.output, tensorboard=config.tensorboard)
        self._stop = False
        self._saved = -1  # step of the newest checkpoint, written or being written
        self._saving: checkpoint.Save | None = None
        in_background = config.checkpoint.background and self.ranks.world > 1
        self._save_group = dist.new_group(backend="gloo") if in_background else None

    def _make_ema(self, trained: set[str]) -> dict[str, nn.Module]:
        needed = getattr(self.stage, "needs_ema", False)
        if self.config.ema.decay is None:
            if needed:
                raise ValueError(f"stage {self.config.stage!r} needs an average of its generator: set ema.decay")
            return {}
        unknown = set(self.config.ema.roles) - trained
        if unknown:
            raise ValueError(f"ema.roles: this stage trains the roles {sorted(trained)}, got {sorted(unknown)}")
        ema = {role: average(self.stage.roles[role], self.config) for role in self.config.ema.roles}
        if needed:
            self.stage.ema = ema
        return ema

    def train(self, *, resume: bool = True) -> int:
        """Runs to config.steps and returns the step reached; Ctrl-C or SIGTERM saves and raises KeyboardInterrupt."""
        self._begin(resume)
        config = self.config
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes a flow in place
        bar = tqdm(total=config.steps, initial=self.step, desc=config.stage, unit="step", disable=not self.progress)
        with bar, self._signals():
            while self.step < config.steps and not self._stop:
                self.meters.begin()
                for index, role in enumerate(self.stage.updates(self.step)):
                    self._update(role, index)
                self.step += 1
                for name, value in self.meters.take().items():
                    self.metrics.add(MEASURED + name, value)
                self._agree()
                self._end_step(bar)
        self._save()
        self._finish_save()
        if self.metrics.pending:
            self.metrics.write(self.step)
        self.metrics.close()
        if self.step < config.steps:
            raise KeyboardInterrupt(f"stopped after step {self.step}; run the same command again to go on from there")
        return self.step

    def _update(self, role: str, index: int) -> None:
        """One optimizer step on the mean gradient of `grad_accumulation` micro batches on each data rank."""
        config, parameters, phase = self.config, self.parameters[role].values(), self.meters.phase
        module, rates, values = self.stage.roles[role], config.optim.of(role), []
        lr = rates["lr"] * config.schedule.factor(self.step, config.steps)
        for optimizer in self.optimizers[role]:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        samples = self.sampler.indices(self.updates)
        self.updates += 1
        for micro in range(config.grad_accumulation):
            number = micro * self.ranks.data + self.ranks.data_rank
            draws = Draws(config.seed).at(self.step, index, number)
            seed_all(draws)
            with phase("data"):
                size = config.data.batch_size
                batch = to_device(collate([self.dataset[i] for i in samples[number * size :][:size]]), self.device)
                self.meters.tokens += video_tokens(module, batch["latents"]) * self.ranks.data
            reduce_in_backward(module, micro == config.grad_accumulation - 1, config.parallel.accumulate)
            with phase("forward"), self._precision():
                loss, metrics = self.stage.loss(role, batch, draws)
            with phase("backward"):
                (loss / config.grad_accumulation).backward()
            values += [(f"{name}/{role}", value) for name, value in {"loss": loss, **metrics}.items()]
        with phase("optimizer"):
            average_gradients(parameters, self.ranks.world)
            norm = grad_norm(parameters)
            skipped = config.skip_norm is not None and not float(norm) <= config.skip_norm
            if not skipped:
                if config.clip_norm is not None:
                    clip_gradients(parameters, config.clip_norm, norm)
                for optimizer in self.optimizers[role]:
                    optimizer.step()
            for optimizer in self.optimizers[role]:
                optimizer.zero_grad(set_to_none=True)
            if role in self.ema:
                self._update_ema(role)
        if hasattr(self.stage, "on_step_end"):
            self.stage.on_step_end(role)
        for name, value in values if not skipped else ():
            self.metrics.add(name, value)
        if not skipped:
            self.metrics.add(f"grad_norm/{role}", norm)
        if config.skip_norm is not None:
            self.metrics.add(f"skipped/{role}", float(skipped))
        self.metrics.add(f"lr/{role}", lr)

    def _precision(self) -> torch.autocast:
        """bf16 compute over fp32 parameters: FSDP gathers them in bf16, else autocast rounds them where they are used.

        A cast that was cached in the forward would be missing when selective checkpointing runs it again.
        """
        config = self.config
        enabled = config.precision == "bf16" and config.parallel.fsdp == "none"
        cached = config.activation_checkpointing != "selective"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=cached)

    def _update_ema(self, role: str) -> None:
        shadow, source = self.ema[role], self.stage.roles[role]
        pairs = zip(shadow.parameters(), source.parameters(), strict=True)
        shadows, sources = zip(*((to, p.detach()) for to, p in pairs if p.requires_grad), strict=True)
        ema_update_(list(shadows), list(sources), self.config.ema.at(self.step))
        for to, value in zip(shadow.buffers(), source.buffers(), strict=True):
            to.copy_(value)

    def _agree(self) -> None:
        """All ranks stop after the same step, and finish a checkpoint when all have written theirs."""
        flags = torch.tensor([self._stop, self._saving is not None and not self._saving.written.done()], dtype=torch.int32)
        if self.ranks.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, writing = flags.tolist()
        self._stop = bool(stop)
        if not writing:
            self._finish_save()

    def _end_step(self, bar: tqdm) -> None:
        config = self.config
        due = lambda every: every > 0 and self.step % every == 0
        if self.validate and due(config.validate.every):
            self._validate(self.validate)
        if self.step % config.log_every == 0:
            self.metrics.check_finite(self.step)
            line = self.metrics.write(self.step)
            shown = {n.removeprefix(MEASURED): f"{v:.4g}" for n, v in line.items() if n.startswith("loss/") or n in SHOWN}
            bar.set_postfix(shown, refresh=False)
        bar.update()
        if due(config.checkpoint.every):
            self._save()

    def exported_model(self) -> nn.Module:
        """The generator as it leaves the run: its average, where there is one and ema.export asks for it."""
        return self.ema["generator"] if "generator" in self.ema and self.config.ema.export else self.stage.roles["generator"]

    def _validate(self, validate: Validate) -> None:
        model = self.exported_model()
        training = model.training
        folder = self.output / "validation" / f"step-{self.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        model.eval()
        with torch.no_grad():
            for name, value in (validate(model, self.step, folder) or {}).items():
                self.metrics.add(f"validate/{name}", value)
        model.train(training)

    def export(self) -> Path:
        """<output>/model: the trained generator, the condition side of the data set, and the sampler that fits both.

        With model.lora <output>/lora, too: the adapters, which are merged into the model. Collective; a sharded generator is
        gathered in rank 0's host memory.
        """
        config, dataset = self.config, self.dataset
        stage = {key: getattr(config.options, key, None) for key in ("shift", "denoising_steps")}
        video = {key: dataset.entries[0].get(key) for key in ("frames", "height", "width", "fps")}
        given = Path(config.data.condition) if config.data.condition else None
        model: Any = self.exported_model()
        if self._plain is not None:
            model = gathered(model, self._plain)
        if config.model.lora is not None and checkpoint.is_writer():
            save_lora(model, self.output / "lora")
            model = merged(model)
        return checkpoint.export_model(
            self.output / "model",
            model,
            stage=config.stage,
            sampler=stage | video | {"intrinsics": dataset.intrinsics} | config.sampler,
            condition=dataset.condition_directory or given,
        )

    def state(self) -> dict[str, Any]:
        """The live tensors of the run: saved as they are, filled in place on a resume. What LoRA freezes is not of the run."""
        of_run = lambda role, module: {k: v for k, v in module.state_dict().items() if k not in self.frozen[role]}
        return {
            "model": {role: of_run(role, self.stage.roles[role]) for role in self.parameters},
            "optimizer": {
                role: {name: dict(o.state[p]) for name, p in values.items() for o in self.optimizers[role] if p in o.state}
                for role, values in self.parameters.items()
            },
            "ema": {role: of_run(role, module) for role, module in self.ema.items()},
        }

    def _save(self) -> None:
        """Starts a checkpoint of this step; where nothing trains on meanwhile, it is written at once."""
        self._finish_save()
        if self.step == self._saved:
            return
        self.metrics.check_finite(self.step)
        meta = {
            "step": self.step,
            "updates": self.updates,
            "metrics": self.metrics.state(),
            "config": config_dict(self.config),
        }
        given = self.checkpoints, self.step, self.state(), meta, self.config.checkpoint.keep
        if self.config.checkpoint.background and self.step < self.config.steps and not self._stop:
            self._saving = checkpoint.start_checkpoint(*given, self._save_group)
        else:
            checkpoint.save_checkpoint(*given)
        self._saved = self.step

    def _finish_save(self) -> None:
        if self._saving is not None:
            self._saving.finish()
            self._saving = None

    def _begin(self, resume: bool) -> None:
        """A new run, or the newest checkpoint's."""
        steps = checkpoint.agreed(checkpoint.checkpoint_steps(self.checkpoints))
        if steps and not resume:
            raise FileExistsError(f"{self.output} holds a run of {steps[-1]} steps: resume it, or choose another output")
        self.output.mkdir(parents=True, exist_ok=True)
        if steps:
            self._load(checkpoint.checkpoint_path(self.checkpoints, steps[-1]))
        else:
            self.metrics.start()
        if checkpoint.is_writer():
            checkpoint.clean_partial(self.checkpoints)
            save_config(self.config, self.output / "config.yaml")

    def _load(self, path: Path) -> None:
        meta = checkpoint.load_meta(path)
        changed = differences(meta["config"], json.loads(json.dumps(config_dict(self.config))))
        fixed = ("stage", "model") if self.config.model.lora is None else ("stage", "model", "init")
        other = [text for key, text in changed.items() if key.split(".")[0] in fixed]
        if other:
            raise ValueError(f"{path} belongs to another run: {', '.join(other)}")
        if changed.keys() - {"steps"}:
            logger.warning("going on from %s with changed settings: %s", path, ", ".join(changed.values()))
        if meta["step"] > self.config.steps:
            raise ValueError(f"{path} is past the {self.config.steps} steps that were asked for")
        checkpoint.load_checkpoint(path, self.state())
        self.step, self.updates = meta["step"], meta["updates"]
        self._saved = self.step
        self.metrics.start(meta["metrics"])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C ends it at once."""

        def stop(number: int, _frame: Any) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt("stopped within a step; the last checkpoint stays")
            self._stop = True

        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(number, stop) for number in numbers]
        except ValueError:  # not in the main thread: whoever runs this thread handles signals
            before = []
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=False):
                signal.signal(number, handler)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
