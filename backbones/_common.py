"""What the backbones share: a stock diffusers transformer, our branches beside it, strict loading, atomic saving."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import Self

from dit_ops.cache import KVCache
from dit_ops.camera import projective_cameras
from dit_ops.files import atomic_path, read_safetensors
from dit_ops.parallel import SequenceParallel
from dit_ops.rope import Rope3D

ADDITIONS = "dit_ops.json"  # what diffusers' config.json has no place for


class DiffusersBackbone(nn.Module):
    """Owns a stock diffusers transformer, whose weights run through our operators.

    A subclass sets `stock` (the diffusers class), `branches` (modules that diffusers lacks: None until `add_<branch>()`, kept
    in `<branch>.safetensors`) and `options` (constructor arguments beside the branches, kept in `dit_ops.json`); it builds
    `self.transformer` and one attribute of the same name for every branch and option, and defines `_flow`.
    """

    stock: Any
    branches: tuple[str, ...] = ("camera",)
    options: tuple[str, ...] = ("block_frames",)
    transformer: Any
    camera: nn.ModuleList | None
    rope: Rope3D
    _flow: Callable[..., Tensor]  # the model, with RoPE tables whose row start_frame is the first frame's
    offloaded: bool = False  # the blocks' weights are in host memory between their calls
    sequence_parallel: SequenceParallel | None = None

    @classmethod
    def from_config(cls, config: dict, **options: Any) -> Self:
        """A randomly initialised model from a diffusers config; an unknown key is an error. options: of the constructor."""
        known = cls.stock._get_init_keys(cls.stock) - {"self"}
        unknown = sorted(k for k in config if k not in known and not k.startswith("_"))
        if unknown:
            raise ValueError(f"{cls.__name__}: config has unknown keys {unknown}; known are {sorted(known)}")
        return cls(cls.stock.from_config(dict(config)), **options)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Self:
        """Reads a diffusers transformer folder (or a pipeline folder with `transformer/`), and our additions beside it.

        Strict: a missing, unexpected or misshapen tensor is a ValueError that lists the keys.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            path = path / "transformer"
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"no diffusers transformer at {path.parent}: expected config.json or transformer/config.json"
            )
        transformer, info = cls.stock.from_pretrained(path, torch_dtype=dtype, output_loading_info=True)
        problems = {kind: keys for kind, keys in info.items() if keys}
        if problems:
            raise ValueError(f"{path}: the weights do not fit {cls.stock.__name__}: {problems}")
        additions = read_additions(path / ADDITIONS)
        model = cls(transformer, **{name: additions[name] for name in cls.options if name in additions})
        for branch in cls.branches:
            if additions.get(branch):
                file = path / f"{branch}.safetensors"
                if not file.is_file():
                    raise FileNotFoundError(f"{path / ADDITIONS} announces {_a(branch)} branch, but {file.name} is missing")
                model.load_branch(branch, read_safetensors(file), file)
        return model.to(device) if device is not None else model

    @classmethod
    def from_state(cls, config: dict, state: dict[str, Tensor], branches: dict[str, dict[str, Tensor]], **options: Any) -> Self:
        """A model of renamed original weights: diffusers config and state dict, and the state dicts of our branches. Strict."""
        transformer = cls.stock.from_config(config)
        own = transformer.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(f"the weights do not fit the config: missing {missing}, unexpected {unexpected}")
        wrong = {k: (list(v.shape), list(own[k].shape)) for k, v in state.items() if v.shape != own[k].shape}
        if wrong:
            raise ValueError(f"the weights do not fit the config: shapes (of the file, of the config) differ for {wrong}")
        transformer.load_state_dict(state)
        model = cls(transformer, **options)
        for branch, weights in branches.items():
            if weights:
                model.load_branch(branch, weights, "the original weights")
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes what diffusers writes, beside it `<branch>.safetensors` of every branch there is, and `dit_ops.json`."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        there = {branch: getattr(self, branch) is not None for branch in self.branches}
        for branch in (name for name, is_there in there.items() if is_there):
            with atomic_path(path / f"{branch}.safetensors") as file:
                save_file({k: v.contiguous() for k, v in getattr(self, branch).state_dict().items()}, file)
        additions = {name: getattr(self, name) for name in self.options} | there
        with atomic_path(path / ADDITIONS) as file:
            file.write_text(json.dumps(additions, indent=2) + "\n")
        self.transformer.save_pretrained(path)

    def load_branch(self, branch: str, state: dict[str, Tensor], source: object) -> None:
        """Adds a branch and fills it, strictly."""
        getattr(self, f"add_{branch}")()
        module = getattr(self, branch)
        expected = {k: list(v.shape) for k, v in module.state_dict().items()}
        got = {k: list(v.shape) for k, v in state.items()}
        if expected != got:
            wrong = sorted(k for k in expected.keys() | got.keys() if expected.get(k) != got.get(k))
            raise ValueError(f"{source}: the {branch} branch does not fit, at {wrong}")
        module.load_state_dict(state)

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks, each with one layer of attention between frames."""
        raise NotImplementedError

    @property
    def patch(self) -> tuple[int, int]:
        """Latents per token, (height, width)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def latent_channels(self) -> int:
        return self.config.out_channels

    @property
    def takes_condition_latents(self) -> bool:
        """Known frames may be given beside the noisy ones, in channels of their own."""
        return self.config.in_channels > self.latent_channels

    def keep_known(self, x: Tensor, **conditions: Any) -> Tensor:
        """A result [B, F, Cz, h, w] with the frames that the conditions of these frames say are known."""
        return x

    def announce(
        self,
        cache: KVCache,
        start_frame: int,
        frames: int,
        height: int,
        width: int,
        *,
        viewmats: Tensor | None = None,
        Ks: Tensor | None = None,
    ) -> None:
        """Prepares `predict` of latents [B, frames, Cz, height, width]: the next chunk of a stream, or the last one again.

        viewmats [B, frames, 4, 4] and Ks [B, frames, 3, 3], where the model has a camera branch. All that differs from chunk to
        chunk, besides what `predict` is given, is in host integers and small tables of the cache, which are set here.
        """
        _check_cameras(viewmats, Ks, [*(() if viewmats is None else viewmats.shape[:1]), frames, 4, 4], self.camera is not None)
        H, W = token_grid(height, width, self.patch)
        P_inv = None if viewmats is None or Ks is None or cache.rotated else projective_cameras(viewmats, Ks)[1]
        cache.begin(start_frame, frames, H * W, rope=self.rope, size=(H, W), P_inv=P_inv, device=self.device)

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        cache: KVCache,
        keys_only: bool = False,
        **given: Any,
    ) -> Tensor:
        """`forward` of the announced chunk, with its other arguments, up to `cache.commit()`.

        keys_only: latents are clean, and only their keys and values are wanted in the cache; returns an empty tensor.
        All of it is work of the device at addresses that depend on `cache.phase` alone, so that a CUDA graph may hold it; but
        the first call with a text also stores the text's keys, and may wait for its length.
        """
        _check_keys_only(keys_only, cache)
        _check_video(latents, None, given.get("viewmats"), given.get("Ks"), cache, self.camera is not None)
        rope = cache.announced(latents.shape[1])
        return self._flow(latents, timestep, encoder_hidden_states, rope=rope, cache=cache, keys_only=keys_only, **given)

    def forward(
        self,
        latents: Tensor,  # [B, F, Cz, h, w]
        timestep: Tensor,  # [B] or [B, F], 0 … 1000
        encoder_hidden_states: Tensor,  # [B, T, C_text], as the condition side pads it
        *,
        clean_latents: Tensor | None = None,  # [B, F, Cz, h, w]: teacher forcing
        clean_timestep: Tensor | None = None,  # [B] or [B, F], zeros by default
        viewmats: Tensor | None = None,  # [B, F, 4, 4] world-to-camera
        Ks: Tensor | None = None,  # [B, F, 3, 3] normalised
        cache: KVCache | None = None,  # causal streaming: latents are the next chunk
        start_frame: int = 0,  # absolute index of the chunk's first frame
        keys_only: bool = False,  # streaming: see `predict`
        **conditions: Any,  # the model's own: see its `_flow`
    ) -> Tensor:
        """The flow `v = ε − x0` [B, F, Cz, h, w] of the noisy latents: teacher forcing, streaming, or else bidirectional.

        In streaming the chunk's keys and values are stored when gradients are off (see KVCache).
        """
        _check_keys_only(keys_only, cache)
        _check_video(latents, clean_latents, viewmats, Ks, cache, self.camera is not None)
        _, frames, _, height, width = latents.shape
        given = {"viewmats": viewmats, "Ks": Ks, **conditions}
        if cache is None:
            given |= {"clean_latents": clean_latents, "clean_timestep": clean_timestep, "start_frame": start_frame}
            rope = self.rope.tables(start_frame + frames, *token_grid(height, width, self.patch), latents.device)
            return self._flow(latents, timestep, encoder_hidden_states, rope=rope, **given)
        self.announce(cache, start_frame, frames, height, width, viewmats=viewmats, Ks=Ks)
        flow = self.predict(latents, timestep, encoder_hidden_states, cache=cache, keys_only=keys_only, **given)
        if not torch.is_grad_enabled():
            cache.commit()
        return flow


def read_additions(file: Path) -> dict[str, Any]:
    """What `dit_ops.json` says; nothing for a stock model, which has none."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not a complete JSON file ({error})") from None


def zero_linears(like: list[nn.Linear]) -> nn.ModuleList:
    """One Linear of the same shape, device and dtype per given one, zero: adding its output changes nothing at first."""
    layers = [
        nn.Linear(w.shape[1], w.shape[0], device=w.device, dtype=w.dtype) for w in (projection.weight for projection in like)
    ]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.ModuleList(layers)


def norm_weight(norm: Any, x: Tensor) -> Tensor:
    """The weight that the operators read: offloading of single layers fetches it only when the layer itself is called."""
    if norm.weight.device != x.device:
        raise ValueError(f"a fused model needs its norm weights on {x.device}, got {norm.weight.device}: offload whole blocks")
    return norm.weight


def patchify(x: Tensor, conv: nn.Conv3d, mine: Callable[[Tensor], Tensor] = lambda tokens: tokens) -> Tensor:
    """The patch convolution (1, ph, pw) as one GEMM: `[B, F, Cz, h, w] → [B, L, C]`, patch vectors ordered (channel, y, x).

    mine: the tokens `[B, L, Cz·ph·pw]` of this rank
    """
    B, _, channels, height, width = x.shape
    _, ph, pw = conv.kernel_size
    if channels != conv.in_channels:
        raise ValueError(f"latents (with condition_latents) must have {conv.in_channels} channels, got {channels}")
    x = x.to(conv.weight.dtype).unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # [B, F, Cz, H, ph, W, pw]
    x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, channels * ph * pw)
    return nnf.linear(mine(x), conv.weight.flatten(1), conv.bias)


def token_grid(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Tokens of a frame of height × width latents."""
    ph, pw = patch
    if height % ph or width % pw:
        raise ValueError(f"latent height and width must be multiples of the patch {ph}×{pw}, got {height}×{width}")
    return height // ph, width // pw


def _check_video(
    latents: Tensor,
    clean_latents: Tensor | None,
    viewmats: Tensor | None,
    Ks: Tensor | None,
    cache: object,
    has_camera: bool,
) -> None:
    """The arguments that every backbone's forward has, before anything is computed."""
    if latents.dim() != 5:
        raise ValueError(f"latents must be [B, F, Cz, h, w], got {list(latents.shape)}")
    B, frames = latents.shape[:2]
    if clean_latents is not None and clean_latents.shape != latents.shape:
        raise ValueError(f"clean_latents must be {list(latents.shape)} as latents, got {list(clean_latents.shape)}")
    if clean_latents is not None and cache is not None:
        raise ValueError("clean_latents (teacher forcing) and cache (streaming) exclude each other, got both")
    _check_cameras(viewmats, Ks, [B, frames, 4, 4], has_camera)


def _check_cameras(viewmats: Tensor | None, Ks: Tensor | None, shape: list[int], has_camera: bool) -> None:
    if (viewmats is None) != (Ks is None):
        raise ValueError("viewmats and Ks come together, got only one of them")
    if viewmats is not None and not has_camera:
        raise ValueError("viewmats were given, but this model has no camera branch (add_camera() makes one)")
    if viewmats is None and has_camera:
        raise ValueError("this model has a camera branch and needs viewmats and Ks, got none")
    if viewmats is not None and list(viewmats.shape) != shape:
        raise ValueError(f"viewmats must be [B, F, 4, 4] = {shape}, got {list(viewmats.shape)}")


def _check_keys_only(keys_only: bool, cache: object) -> None:
    if keys_only and (cache is None or torch.is_grad_enabled()):
        how = "without cache" if cache is None else "with gradient"
        raise ValueError(f"keys_only is for streaming without gradient: it must be False in a call {how}, got True")


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
