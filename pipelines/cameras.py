"""The cameras of a request, latent frame by latent frame: known from the start, or decided while the frames before stream."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dit_ops.actions import action_labels
from dit_ops.camera import Trajectory, intrinsics_matrix
from dit_ops.pipelines.transfer import to_device

Cameras = tuple[Tensor, Tensor]  # viewmats [F, 4, 4] and Ks [F, 3, 3], or both with a leading B
Piece = str | Sequence[str]  # a pose string, or one per prompt that describe equally many frames


class CameraPath:
    """Cameras of B prompts on a device, fp32 whatever the model's dtype, and the action labels between them.

    viewmats [B, F, 4, 4], Ks [B, F, 3, 3]: the frames that are known
    pieces   poses of the frames after them, read only as far as `ready` is asked for; frames before the latest `of` are dropped
    """

    def __init__(self, viewmats: Tensor, Ks: Tensor, device: torch.device, pieces: Iterator[Piece] | None = None) -> None:
        self.viewmats, self.Ks = to_device(viewmats.float(), device), to_device(Ks.float(), device)
        self.actions = to_device(action_labels(viewmats), device)  # [B, F]
        self.start, self.frames = 0, viewmats.shape[1]  # frames [start, frames) are held
        self.pieces = pieces
        self._latest = viewmats[:, -1:]
        self._paths = [Trajectory() for _ in viewmats]

    @classmethod
    def from_pieces(cls, pieces: Iterator[Piece], B: int, intrinsics: Sequence[float], device: torch.device) -> "CameraPath":
        """The first frame is the identity; all frames have the same intrinsics."""
        return cls(torch.eye(4).expand(B, 1, 4, 4), intrinsics_matrix(*intrinsics).expand(B, 1, 3, 3), device, pieces)

    def ready(self, frames: int) -> int:
        """Reads poses until `frames` frames are known or the pieces end; returns how many of them are known."""
        while self.frames < frames and self.pieces is not None:
            piece = next(self.pieces, None)
            if piece is None:
                self.pieces = None
            else:
                self._extend(piece)
        return min(self.frames, frames)

    def of(self, first: int, last: int) -> Cameras:
        """viewmats [B, last − first, 4, 4] and Ks of frames [first, last)."""
        if self.pieces is not None and first > self.start:
            done, self.start = first - self.start, first
            self.viewmats, self.Ks = self.viewmats[:, done:].clone(), self.Ks[:, done:].clone()
            self.actions = self.actions[:, done:].clone()
        at = slice(first - self.start, last - self.start)
        return self.viewmats[:, at], self.Ks[:, at]

    def actions_of(self, first: int, last: int) -> Tensor:
        """Action labels [B, last − first] of frames that `of` has given."""
        return self.actions[:, first - self.start : last - self.start]

    def _extend(self, piece: Piece) -> None:
        texts = [piece] * len(self._paths) if isinstance(piece, str) else list(piece)
        if len(texts) != len(self._paths):
            raise ValueError(f"pose must give one pose string, or one per prompt ({len(self._paths)}), got {len(texts)}")
        poses = [path.extend(text) for path, text in zip(self._paths, texts, strict=True)]
        if len({len(p) for p in poses}) > 1:
            raise ValueError(f"pose strings of one piece must have equal counts, got {', '.join(map(repr, texts))}")
        new = torch.stack(poses)
        if new.shape[1]:
            labels = action_labels(torch.cat([self._latest, new], dim=1))[:, 1:]
            self.viewmats = torch.cat([self.viewmats, to_device(new.float(), self.viewmats.device)], dim=1)
            self.Ks = torch.cat([self.Ks, self.Ks[:, -1:].expand(-1, new.shape[1], -1, -1)], dim=1)
            self.actions = torch.cat([self.actions, to_device(labels, self.actions.device)], dim=1)
            self._latest, self.frames = new[:, -1:], self.frames + new.shape[1]
