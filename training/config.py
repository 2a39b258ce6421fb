"""Run configuration: one YAML file per stage → one RunConfig. Unknown keys and wrong types are errors that name the key."""

import dataclasses
import difflib
import importlib
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from dit_ops.pipelines.settings import Settings
from dit_ops.training.lora import check_lora

# a stage class has `config_class`, the dataclass of the file's `options:` section
STAGES = {
    "bidirectional": "dit_ops.training.bidirectional:BidirectionalStage",
    "teacher_forcing": "dit_ops.training.teacher_forcing:TeacherForcingStage",
    "ode_sampling": "dit_ops.training.ode_sampling:ODESampling",
    "causal_ode": "dit_ops.training.causal_ode:CausalODEStage",
    "consistency": "dit_ops.training.consistency:ConsistencyStage",
    "dmd": "dit_ops.training.dmd:DMDStage",
}


def stage_class(name: str) -> Any:
    """The class of a stage, imported only now."""
    if name not in STAGES:
        raise ValueError(f"stage must be one of {sorted(STAGES)}, got {name!r}{_nearest(name, STAGES)}")
    module, _, attribute = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass
class DataConfig:
    path: str  # a folder of latent shards with index.jsonl
    batch_size: int = 1  # samples of one micro batch
    split: str | None = None  # only the samples of this split
    condition: str | None = None  # condition side of the exported model, linked, where the data set holds none of its own

    def __post_init__(self):
        _at_least("batch_size", self.batch_size, 1)


@dataclass
class LoraConfig:
    """Adapters instead of the weights of the trained networks; branches of ours (camera, action) are trained whole."""

    rank: int
    alpha: int | None = None  # None = rank
    targets: list[str] = field(default_factory=lambda: ["attention", "ffn"])

    def __post_init__(self):
        check_lora(self.rank, self.targets)


@dataclass
class ModelConfig:
    config: dict[str, Any] | None = None  # the diffusers transformer config of a generator trained from scratch
    camera: bool = True
    block_frames: int | None = None  # latent frames of a causal block; None = as the loaded model has it
    class_name: str = "WanTransformer3DModel"  # of `config`: the backbone that runs it
    lora: LoraConfig | None = None  # None = all weights are trained
    options: dict[str, Any] = field(default_factory=dict)  # of the backbones, such as text_timestep of HunyuanVideo15Backbone


@dataclass
class RoleOptimConfig:
    """What one role has otherwise than `optim`; None = as there."""

    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None


@dataclass
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"  # muon: for matrices; everything else is AdamW's
    lr: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95  # muon's
    roles: dict[str, RoleOptimConfig] = field(default_factory=dict)

    def of(self, role: str) -> dict[str, Any]:
        """lr, betas, eps and weight_decay of a role."""
        values = {name: getattr(self, name) for name in ("lr", "betas", "eps", "weight_decay")}
        override = self.roles.get(role, RoleOptimConfig())
        return values | {name: value for name, value in vars(override).items() if value is not None}


@dataclass
class ScheduleConfig:
    """Learning rate factor: linear from 1/warmup_steps to 1, then constant, or half a cosine towards `final` at the run's end.

    With the cosine a stopped run goes on exactly, but a finished one cannot be extended without a jump of the rate.
    """

    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    final: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (from 0) in a run of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class EMAConfig:
    """fp32 average of the generator's parameters; up to `start_step` it is a plain copy of them."""

    decay: float | None = None  # None = no average
    start_step: int = 0
    export: bool = True  # the model directory gets the average, not the raw parameters
    roles: list[str] = field(default_factory=lambda: ["generator"])

    def __post_init__(self):
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def at(self, step: int) -> float:
        return self.decay if self.decay is not None and step >= self.start_step else 0.0


@dataclass
class ParallelConfig:
    """How the processes of torchrun share a run; gradients are averaged over all of them (docs/distributed.md)."""

    data: int | None = None  # groups with batches of their own; None = processes / sequence
    sequence: int = 1  # neighbouring ranks that share one video (Ulysses)
    fsdp: Literal["none", "full", "hybrid"] = "none"  # parameters and optimizer state sharded over all ranks, or per replica
    replicas: int | None = None  # of hybrid: copies of the model; None = one per node
    cpu_offload: bool = False  # shards, gradients and optimizer state wait in host memory
    accumulate: Literal["local", "sharded"] = (
        "local"  # between micro batches: whole gradients, one reduction per update, or shards
    )

    def __post_init__(self):
        _at_least("sequence", self.sequence, 1)
        for name in ("data", "replicas"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.replicas is not None and self.fsdp != "hybrid":
            raise ValueError(f"replicas belongs to fsdp 'hybrid', got fsdp {self.fsdp!r}")
        for name, default in (("cpu_offload", False), ("accumulate", "local")):
            if getattr(self, name) != default and self.fsdp == "none":
                raise ValueError(f"{name} needs fsdp 'full' or 'hybrid', got {getattr(self, name)!r} with fsdp 'none'")


@dataclass
class CheckpointConfig:
    every: int = 1000  # 0 = only at the end
    keep: int = 2
    background: bool = False  # write while training goes on; costs a copy of the state in host memory

    def __post_init__(self):
        _at_least("every", self.every, 0)
        _at_least("keep", self.keep, 1)


@dataclass
class ValidateConfig:
    every: int = 0  # 0 = never
    prompts: list[str] = field(default_factory=list)
    poses: list[str] = field(default_factory=list)  # one pose string per prompt
    seed: int = 0

    def __post_init__(self):
        _at_least("every", self.every, 0)
        if len(self.poses) != len(self.prompts):
            raise ValueError(f"poses must be one per prompt, got {len(self.poses)} poses and {len(self.prompts)} prompts")


@dataclass
class RunConfig:
    stage: str
    output: str
    steps: int
    data: DataConfig
    options: Any = None  # the stage's own dataclass
    init: dict[str, str] = field(default_factory=dict)  # role → model directory (of an earlier stage or a diffusers pipeline)
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the compute; parameters and optimizer state are fp32
    activation_checkpointing: Literal["none", "selective", "full"] = (
        "none"  # recompute blocks in backward; selective: not attention
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    grad_accumulation: int = 1  # micro batches per update and data rank; the gradient is the mean over all of them
    clip_norm: float | None = None
    skip_norm: float | None = None  # an update whose gradient norm is above this, or not finite, is left out
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    sampler: dict[str, Any] = field(default_factory=dict)  # what the exported model's pipeline settings shall be by default
    log_every: int = 1
    peak_flops: float | None = None  # of one device, for the MFU; None = known for the usual GPUs in bf16
    tensorboard: bool = True

    def __post_init__(self):
        for name in ("steps", "grad_accumulation", "log_every"):
            _at_least(name, getattr(self, name), 1)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A YAML file plus overrides such as "optim.lr=1e-4" (the value is YAML too)."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a mapping of config keys, got {type(raw).__name__}")
    origins = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise ValueError(f"override {override!r}: expected key=value, for example optim.lr=1e-4")
        *parents, last = key.strip().split(".")
        node = raw
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {parent!r} is not a section")
        node[last] = yaml.safe_load(value)
        origins[key.strip()] = f"override {override!r}"
    return parse_config(raw, lambda key: next((o for k, o in origins.items() if f"{key}.".startswith(f"{k}.")), str(path)))


def parse_config(raw: dict[str, Any], origin: Callable[[str], str] = lambda key: "config") -> RunConfig:
    """origin(dotted key) says in errors where a value came from."""
    config = _build(RunConfig, {key: value for key, value in raw.items() if key != "options"}, "", origin)
    try:
        options_class = stage_class(config.stage).config_class
    except ValueError as error:
        raise ValueError(f"{origin('stage')}: {error}") from error
    config.options = _build(options_class, raw.get("options") or {}, "options", origin)
    settings = _build(Settings, config.sampler, "sampler", origin)
    config.sampler = {name: getattr(settings, name) for name in config.sampler}
    return config


def config_dict(config: Any) -> dict[str, Any]:
    """Plain lists, dicts and numbers: what YAML and JSON write, and parse_config reads back."""
    return dataclasses.asdict(config, dict_factory=lambda items: {key: _plain(value) for key, value in items})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def save_config(config: RunConfig, path: Path) -> None:
    path.write_text(yaml.safe_dump(config_dict(config), sort_keys=False, allow_unicode=True))


def differences(old: Any, new: Any, at: str = "") -> dict[str, str]:
    """dotted key → "key old → new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return {k: v for key in keys for k, v in differences(old.get(key), new.get(key), f"{at}.{key}".lstrip(".")).items()}
    return {} if old == new else {at: f"{at} {old!r} → {new!r}"}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _build(cls: Any, raw: Any, at: str, origin: Callable[[str], str]) -> Any:
    """A dataclass from a mapping; `at` is the dotted key of the mapping."""
    if not isinstance(raw, dict):
        raise ValueError(f"{origin(at)}: {at} expects a section with {cls.__name__}'s keys, got {raw!r}")
    dotted = lambda key: f"{at}.{key}" if at else str(key)
    hints = get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in raw:
        if key not in known:
            close = _nearest(dotted(key), map(dotted, known)) or _nearest(dotted(key), _all_keys(RunConfig))
            raise ValueError(f"{origin(dotted(key))}: unknown key {dotted(key)!r}{close or f'; valid keys: {sorted(known)}'}")
    for name, f in known.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{origin(at)}: {dotted(name)} is required")
    values = {key: _coerce(hints[key], value, dotted(key), origin) for key, value in raw.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{origin(at)}: {at + ': ' if at else ''}{error}") from error


def _all_keys(cls: Any, at: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys += [f"{at}{name}"] + (_all_keys(hint, f"{at}{name}.") if dataclasses.is_dataclass(hint) else [])
    return keys


def _coerce(hint: Any, value: Any, at: str, origin: Callable[[str], str]) -> Any:
    """value as `hint`; numbers may be strings, since YAML 1.1 reads 1e-4 as one."""
    kind, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, at, origin)
    if kind in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return _coerce(inner, value, at, origin)
    if kind is Literal and value in args:
        return value
    if kind is dict and isinstance(value, dict):
        return {str(key): _coerce(args[1], v, f"{at}.{key}", origin) for key, v in value.items()}
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        inner = args if kind is tuple and ... not in args else (args[0],) * len(value)
        if len(inner) == len(value):
            return kind(_coerce(h, v, f"{at}[{i}]", origin) for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if hint in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is not None and (hint is float or number.is_integer()):
            return hint(value if isinstance(value, int) else number)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    expected = f"one of {list(args)}" if kind is Literal else getattr(hint, "__name__", str(hint)) if not args else str(hint)
    raise ValueError(f"{origin(at)}: {at} expects {expected}, got {value!r} ({type(value).__name__})")
