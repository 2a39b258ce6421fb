"""Model directories: `model_index.json` names the pipeline class, which is imported only when asked for.

<dir>/model_index.json   {"_class_name": …, "transformer": […], "condition": […], fields of Settings}
<dir>/transformer/       the backbone          <dir>/condition/   the condition
A stock diffusers directory of a known model loads too: its condition is its own vae, text encoders and tokenizers.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from dit_ops import conditions
from dit_ops.conditions import Condition
from dit_ops.files import atomic_folder
from dit_ops.float8 import to_float8
from dit_ops.offload import offload_blocks
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.settings import Settings
from dit_ops.registry import RECIPE, load_backbone

MODES = {"bidirectional": "BidirectionalPipeline", "autoregressive": "AutoregressivePipeline", "few_step": "FewStepPipeline"}
PIPELINES = {
    "BidirectionalPipeline": "dit_ops.pipelines.bidirectional:BidirectionalPipeline",
    "AutoregressivePipeline": "dit_ops.pipelines.autoregressive:AutoregressivePipeline",
    "FewStepPipeline": "dit_ops.pipelines.few_step:FewStepPipeline",
    "WanPipeline": "dit_ops.pipelines.bidirectional:BidirectionalPipeline",
    "WanImageToVideoPipeline": "dit_ops.pipelines.bidirectional:BidirectionalPipeline",
    "HunyuanVideo15Pipeline": "dit_ops.pipelines.bidirectional:BidirectionalPipeline",
    "HunyuanVideo15ImageToVideoPipeline": "dit_ops.pipelines.bidirectional:BidirectionalPipeline",
}


def register(class_name: str, target: str) -> None:
    """Adds a pipeline: the `_class_name` of its model directories and its class as "module:Class"."""
    PIPELINES[class_name] = target


def pipeline_class(class_name: str) -> type[Pipeline]:
    """Imports and returns the pipeline class of a `_class_name`."""
    if class_name not in PIPELINES:
        raise ValueError(f"unknown pipeline class {class_name!r}; known: {', '.join(PIPELINES)} ({RECIPE} says how to add one)")
    module, name = PIPELINES[class_name].split(":")
    return getattr(importlib.import_module(module), name)


def read_index(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"a model directory must hold model_index.json, {directory} does not")
    index = json.loads(path.read_text(encoding="utf-8"))
    if "_class_name" not in index:
        raise ValueError(f"{path}: _class_name is missing")
    return index


def load(
    directory: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    mode: str | None = None,
    condition: Condition | str | Path | None = None,
    offload: bool = False,
    float8: bool = False,
    vae_tiling: bool = False,
) -> Pipeline:
    """Loads a model directory as the pipeline that it names.

    device   None = the GPU if there is one        dtype   of the backbone; None = as stored
    mode     "bidirectional", "autoregressive" or "few_step" samples it in another way than the directory says
    condition   replaces the directory's own, which may be missing: a condition, or a directory that holds one
    offload     the transformer's blocks and the encoders live in host memory and visit the device (dit_ops/offload.py)
    float8      8-bit floats for the weights of the blocks (dit_ops/float8.py)    vae_tiling   the VAE works on tiles
    """
    directory = Path(directory)
    index = read_index(directory)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, such as torch.bfloat16, got {dtype!r}")
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    cls = pipeline_class(MODES[mode] if mode else index["_class_name"])
    pipeline_class(index["_class_name"])  # an unknown directory is an error in every mode
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    stock = STOCK.get(index["_class_name"])
    settings = stock(directory, index) if stock else own_settings(index)
    if condition is None:
        if not stock and "condition" not in index:
            raise ValueError(f"{directory} holds no condition (text encoder and codec): condition must be given")
        condition = directory if stock else directory / "condition"
    if isinstance(condition, str | Path):
        condition = conditions.load(condition)
    if offload:
        condition.offload = True
    condition = condition.to(device)
    if vae_tiling:
        condition.enable_tiling()
    small = offload or float8  # what is done in host memory before anything goes to the device
    backbone = load_backbone(directory / "transformer", device=None if small else device, dtype=dtype)
    backbone.eval().requires_grad_(False)
    if float8:
        to_float8(backbone, device)
    if offload:
        offload_blocks(backbone, device)
    return cls(backbone.to(device) if float8 and not offload else backbone, condition, settings)


def own_settings(index: dict[str, Any]) -> Settings:
    """Sampler defaults that our own directories keep as further keys of model_index.json."""
    components = {"transformer", "condition"}
    return Settings().override({k: v for k, v in index.items() if k not in components and not k.startswith("_")})


def wan_settings(directory: Path, index: dict[str, Any]) -> Settings:
    """Sampler defaults of a diffusers Wan directory: its scheduler's shift and solver, WanPipeline's guidance of 5.

    Wan 2.2 TI2V (a timestep per token): 121 pixel frames of 704×1280 at 24 frames per second.
    """
    if index.get("transformer_2", [None, None])[1] is not None or index.get("boundary_ratio") is not None:
        raise ValueError(f"{directory}: Wan 2.2 with two experts (transformer_2) is not supported, only one transformer is")
    scheduler = _component_config(directory, "scheduler/scheduler_config.json")
    unipc = scheduler.get("_class_name") == "UniPCMultistepScheduler"
    shift = scheduler.get("flow_shift" if unipc else "shift", 1.0)
    settings = Settings(num_steps=50, guidance=5.0, shift=shift, solver="unipc" if unipc else "euler")
    ti2v = {"frames": 31, "height": 704, "width": 1280, "fps": 24.0}
    return settings.override(ti2v if index.get("expand_timesteps") else {})


def hunyuan_video15_settings(directory: Path, index: dict[str, Any]) -> Settings:
    """Sampler defaults of a diffusers HunyuanVideo 1.5 directory: its shift, guidance and 16:9 size, 121 pixel frames."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    shift = _component_config(directory, "scheduler/scheduler_config.json").get("shift", 1.0)
    guider = _component_config(directory, "guider/guider_config.json")
    # the original formulation is cond + g·(cond − uncond) = uncond + (g + 1)·(cond − uncond)
    guidance = guider.get("guidance_scale", 6.0) + bool(guider.get("use_original_formulation"))
    target = _component_config(directory, "transformer/config.json").get("target_size", 640)
    height, width = HunyuanVideo15ImageProcessor().calculate_default_height_width(9, 16, target)
    return Settings(num_steps=50, guidance=guidance, shift=shift, frames=31, height=height, width=width, fps=24)


STOCK = {  # diffusers pipelines: what their directories say about sampling
    "WanPipeline": wan_settings,
    "WanImageToVideoPipeline": wan_settings,
    "HunyuanVideo15Pipeline": hunyuan_video15_settings,
    "HunyuanVideo15ImageToVideoPipeline": hunyuan_video15_settings,
}


def _component_config(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(directory: str | Path, mode: str, backbone: Any, condition: Any, settings: Settings) -> None:
    """Writes a model directory in one atomic step; an existing one is replaced."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    index = {
        "_class_name": MODES[mode],
        "transformer": ["dit_ops", type(backbone).__name__],
        "condition": ["dit_ops", type(condition).__name__],
        **settings.as_dict(),
    }
    with atomic_folder(directory) as folder:
        backbone.save_pretrained(folder / "transformer")
        condition.save_pretrained(folder / "condition")
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
