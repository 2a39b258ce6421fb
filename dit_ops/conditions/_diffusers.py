"""Frozen components of a diffusers model directory, loaded at first use."""

import importlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from dit_ops.conditions.arguments import TwoSteps

LIBRARIES = ("transformers", "diffusers")


class DiffusersComponents(TwoSteps):
    """Components named by model_index.json; using one that the directory lacks is a ValueError.

    text_dtype: of text and image encoders, None: as stored; the VAE runs in vae_dtype
    offload: the encoders' weights stay in host memory and are copied to the device for the length of an encode_text or
    encode_image; with tiling, what a stream's waiting tiles remember waits there, too
    A subclass says in `classes` which components it knows, and of which class they must be (None: any).
    """

    classes: ClassVar[dict[str, str | None]]
    temporal_stride: int

    def __init__(
        self,
        directory: str | Path,
        *,
        text_dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.directory = Path(directory)
        index = self.directory / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{self.directory} is not a diffusers model directory: it has no model_index.json")
        entries = json.loads(index.read_text(encoding="utf-8"))
        self._index = {name: tuple(entries[name]) for name in self.classes if entries.get(name) and entries[name][1]}
        for name, (library, found) in self._index.items():
            if self.classes[name] not in (None, found):
                raise ValueError(f"{index}: {name} must be {self.classes[name]} but is {found}")
            if library not in LIBRARIES:
                raise ValueError(f"{index}: {name} must be of {' or '.join(LIBRARIES)} but is of {library!r}")
        self._text_dtype, self._vae_dtype = text_dtype, vae_dtype
        self._loaded: dict[str, Any] = {}
        self._lock = threading.RLock()  # loading patches torch's initialisers; offload and a VAE keep state on the module
        self._offload = False
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> Self:
        """Options as of the class; loads no weights yet."""
        return cls(directory, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the component folders (they are frozen) and name them in a model_index.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {"_class_name": type(self).__name__}
        for name, entry in self._index.items():
            shutil.copytree(self.directory / name, directory / name, dirs_exist_ok=True)
            index[name] = list(entry)
        (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def offload(self) -> bool:
        return self._offload

    @offload.setter
    def offload(self, value: bool) -> None:
        self._offload = value
        self.to(self.device)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        for name, component in self._loaded.items():
            if isinstance(component, torch.nn.Module):
                component.to(self._home(name))
        return self

    def _home(self, name: str) -> torch.device:
        """Where a component's weights lie between calls."""
        return torch.device("cpu") if self._offload and name != "vae" else self.device

    @contextmanager
    def on_device(self, name: str) -> Iterator[Any]:
        """An encoder, on the device for the length of a with block.

        Weights are frozen: their host tensors are kept and put back, nothing is copied from the device.
        """
        encoder = self.component(name)
        if not self._offload:
            yield encoder
            return
        with self._lock:
            tensors = [(tensor, tensor.data) for tensor in (*encoder.parameters(), *encoder.buffers())]
            try:
                for tensor, host in tensors:
                    tensor.data = host.to(self.device)
                yield encoder
            finally:
                for tensor, host in tensors:
                    tensor.data = host

    def enable_tiling(self, **tiles: int) -> None:
        """The VAE works on overlapping tiles, one after the other, and blends them: less memory, nearly the same pixels.

        tiles: as of the VAE's own enable_tiling in diffusers, such as tile_sample_min_height in pixels. Loads the VAE.
        """
        self.component("vae").enable_tiling(**tiles)

    def _on_host(self) -> bool:
        """Does what waiting tiles of a stream remember lie in host memory?"""
        vae = self.component("vae")
        return self._offload and vae.use_tiling and vae.device.type != "cpu"

    def _config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        path = self.directory / name / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def component(self, name: str) -> Any:
        """A component, loaded now if it was not. ValueError: the directory has none."""
        with self._lock:
            if name not in self._loaded:
                if name not in self._index or not (self.directory / name).is_dir():
                    raise ValueError(
                        f"{self.directory} has no {name}: its model_index.json and a folder {name}/ must provide one"
                    )
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> Any:
        library, class_name = self._index[name]
        cls = getattr(importlib.import_module(library), "AutoTokenizer" if name.startswith("tokenizer") else class_name)
        folder = self.directory / name
        if not issubclass(cls, torch.nn.Module):
            return cls.from_pretrained(folder, local_files_only=True)
        if library == "diffusers":
            model = cls.from_pretrained(folder, torch_dtype=self._vae_dtype, local_files_only=True)
            model.use_slicing = True  # one video at a time: same result, a batch's memory less
        else:
            model = cls.from_pretrained(folder, dtype=self._text_dtype or "auto", local_files_only=True)
        return model.eval().requires_grad_(False).to(self._home(name))

    def latent_frames(self, pixel_frames: int) -> int:
        """1 + (Fp - 1) / stride: the first pixel frame has a latent frame of its own. ValueError: not a whole number."""
        if pixel_frames < 1 or (pixel_frames - 1) % self.temporal_stride:
            raise ValueError(f"pixel frames must be 1 + a multiple of {self.temporal_stride} but are {pixel_frames}")
        return 1 + (pixel_frames - 1) // self.temporal_stride

    def pixel_frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.temporal_stride

    def check_pixel(self, pixel: torch.Tensor, stride: int) -> None:
        if pixel.dim() != 5 or pixel.shape[2] != 3 or any(n % stride for n in pixel.shape[3:]):
            multiple = f"H and W multiples of {stride}"
            raise ValueError(f"pixel must have shape [B, Fp, 3, H, W] with {multiple} but got {list(pixel.shape)}")
        self.latent_frames(pixel.shape[1])
