"""mp4 files: what is written is what is read, sizes, atomic writes, errors."""

import os

import av
import pytest
import torch

from dit_ops.video import Mp4Writer, iterate_mp4, read_mp4, write_mp4


def smooth_video(frames: int, height: int, width: int) -> torch.Tensor:
    """Slow colour waves: what a codec keeps well."""
    t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    return torch.stack([torch.sin(3 * x + 2 * t), torch.cos(2 * y - t), 1.6 * x * y - 0.8], dim=1)


def test_round_trip(tmp_path):
    video = smooth_video(7, 48, 64)
    write_mp4(tmp_path / "deep" / "a.mp4", video, fps=12.5)
    frames, fps = read_mp4(tmp_path / "deep" / "a.mp4")
    assert frames.shape == (7, 3, 48, 64) and frames.dtype == torch.float32 and fps == 12.5
    assert (frames - video).abs().mean() < 0.02
    assert torch.equal(torch.stack(list(iterate_mp4(tmp_path / "deep" / "a.mp4"))), frames)
    with av.open(str(tmp_path / "deep" / "a.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.colorspace) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize("colour", [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, 1), (0.3, 0.6, -0.2)])
def test_colours_survive(tmp_path, colour):
    write_mp4(tmp_path / "a.mp4", torch.tensor(colour).float().view(1, 3, 1, 1).expand(3, 3, 32, 32), fps=8)
    got = read_mp4(tmp_path / "a.mp4")[0].mean((0, 2, 3))
    assert (got - torch.tensor(colour)).abs().max() < 0.03


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (1, 1)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, height, width):
    video = smooth_video(2, height, width)
    write_mp4(tmp_path / "a.mp4", video, fps=8)
    frames, _ = read_mp4(tmp_path / "a.mp4")
    assert frames.shape == (2, 3, height + height % 2, width + width % 2)
    assert (frames[..., :height, :width] - video).abs().mean() < 0.05
    assert (frames[..., -1, :width] - video[..., height - 1, :]).abs().mean() < 0.05


def test_chunks_are_one_video_and_values_are_clipped(tmp_path):
    video = 3 * smooth_video(5, 32, 32)
    with Mp4Writer(tmp_path / "chunks.mp4", fps=8) as out:
        for chunk in video.split([2, 1, 2]):
            out.write(chunk)
        assert not (tmp_path / "chunks.mp4").exists()
    write_mp4(tmp_path / "whole.mp4", video.clamp(-1, 1).bfloat16().float(), fps=8)
    chunks, whole = (read_mp4(tmp_path / name)[0] for name in ("chunks.mp4", "whole.mp4"))
    assert len(chunks) == 5 and (chunks - whole).abs().mean() < 0.01


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    write_mp4(path, smooth_video(2, 16, 16), fps=8)
    old = path.read_bytes()
    with pytest.raises(KeyError), Mp4Writer(path, fps=8) as out:
        out.write(smooth_video(2, 16, 16))
        raise KeyError("the generator died")
    with pytest.raises(ValueError, match="at least one frame"), Mp4Writer(path, fps=8):
        pass
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (torch.zeros(2, 1, 8, 8), 8, r"frames must be \[F, 3, H, W\] with at least one frame, got \[2, 1, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), 8, "at least one frame"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8, "floating point in .* got torch.uint8"),
        (torch.full((2, 3, 8, 8), float("nan")), 8, "must be finite"),
        (torch.zeros(2, 3, 8, 8), 0, "fps must be positive, got 0"),
    ],
)
def test_write_errors(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "a.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_chunks_of_another_size(tmp_path):
    with (
        pytest.raises(ValueError, match=r"every chunk must be \[8, 8\] pixels, got \[8, 10\]"),
        Mp4Writer(tmp_path / "a.mp4", 8) as out,
    ):
        out.write(torch.zeros(1, 3, 8, 8))
        out.write(torch.zeros(1, 3, 8, 10))


def test_read_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_mp4(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(ValueError, match="not a video that FFmpeg can read"):
        read_mp4(tmp_path / "text.mp4")
