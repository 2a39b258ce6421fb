"""Other libraries' functions that compute what one of our ops computes, or a named part of it."""

import importlib.util

from torch import Tensor

from dit_ops.bench.runs import Peer


def _peer(module: str, fn, forward_only: bool = False) -> Peer:
    if importlib.util.find_spec(module) is None:
        return Peer(None, f"{module} is not installed")
    return Peer(fn, forward_only=forward_only)


def adaln_rms() -> dict[str, Peer]:
    """RMS norm with modulation; QuACK has the norm alone, which reads and writes the same tokens and no table."""

    def liger(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

        return LigerModulatedRMSNormFunction.apply(x, None, scale, shift, 1e-6, 0.0, "gemma", False)

    def quack(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        from quack import rmsnorm

        weight = scale.detach()[0, 0].contiguous()
        return rmsnorm(x.flatten(0, 1), weight, eps=1e-6).view_as(x)

    return {
        "Liger modulated_rms_norm": _peer("liger_kernel", liger),
        "QuACK rmsnorm, no modulation": _peer("quack", quack, forward_only=True),
    }


def flow_matching(x: Tensor, guidance: float) -> dict[str, dict[str, Peer]]:
    """Op -> diffusers' scheduler; it takes one noise level per step or sample, and guidance is not its part."""
    name = "diffusers FlowMatchEulerDiscreteScheduler"
    if importlib.util.find_spec("diffusers") is None:
        missing = Peer(None, "diffusers is not installed")
        return {"cfg_euler_step": {name: missing}, "add_noise": {name: missing}}
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4, device=x.device)

    def step(cond: Tensor, uncond: Tensor) -> Tensor:
        scheduler._step_index = 1
        flow = uncond + guidance * (cond - uncond)
        return scheduler.step(flow, scheduler.timesteps[1], x, return_dict=False)[0]

    def add_noise(x0: Tensor, noise: Tensor) -> Tensor:
        scheduler._step_index = 1
        return scheduler.scale_noise(x0, scheduler.timesteps[1:2].expand(len(x0)), noise)

    steps = {"cfg_euler_step": step, "add_noise": add_noise}
    return {op: {name: Peer(fn, forward_only=True)} for op, fn in steps.items()}


def qk_norm_rope(grid: tuple[int, int, int], N: int, D: int, packed: Tensor) -> dict[str, Peer]:
    """FlashInfer's kernel reads packed q, k, v [B, L, 3 N D] and copies v too; its norm spans all heads."""
    F, H, W = grid
    size = D - 4 * (D // 6), 2 * (D // 6), 2 * (D // 6)

    def flashinfer(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor):
        from flashinfer.norm import fused_qk_rmsnorm_rope

        return fused_qk_rmsnorm_rope(
            packed, q_weight.detach().to(packed.dtype), k_weight.detach().to(packed.dtype),
            ppf=F, pph=H, ppw=W, num_frame_channels=size[0], num_height_channels=size[1], num_width_channels=size[2],
            num_heads_q=N, num_heads_k=N, num_heads_v=N, head_dim=D,
        )  # fmt: skip

    return {"FlashInfer fused_qk_rmsnorm_rope, copies v": _peer("flashinfer", flashinfer, forward_only=True)}
