"""Bidirectional supervised fine-tuning: flow matching with one noise level for all frames (Wan, arXiv 2503.20314)."""

from dataclasses import dataclass

from torch import Tensor, nn

from dit_ops.conditions.arguments import process_condition
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import TimestepLaw, cameras, check_probability, draw_timesteps, drop_text, flow_loss
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class BidirectionalConfig:
    """text_dropout: share of samples trained on the negative prompt; weighted: FlowSchedule's bell over t, else 1.

    timesteps: "uniform" over the shifted schedule (Wan), or "logit_normal" before the shift (HunyuanVideo 1.5)
    """

    shift: float = 5.0
    text_dropout: float = 0.0
    weighted: bool = True
    timesteps: TimestepLaw = "uniform"

    def __post_init__(self):
        check_probability("bidirectional", "text_dropout", self.text_dropout)


class BidirectionalStage:
    """`w(t)·MSE(v(x_t, t), ε − x0)`, `x_t = (1 − σ)·x0 + σ·ε`, one t per sample.

    Timesteps stay in fp32: bf16 would leave 294 of the 1000.
    """

    config_class = BidirectionalConfig

    def __init__(self, config: BidirectionalConfig, backbones: dict[str, nn.Module], negative: dict[str, Tensor]):
        self.config = config
        self.roles = take_roles("bidirectional", backbones, trained=("generator",))
        self.negative = negative
        self.schedule = FlowSchedule(config.shift)

    def updates(self, step: int) -> list[str]:
        return ["generator"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w], condition: dict of [B, …], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        x0 = batch["latents"].float()
        t = draw_timesteps(self.schedule, self.config.timesteps, (len(x0),), draws).to(x0.device)  # [B]
        noise = draws.normal("noise", tuple(x0.shape), device=x0.device)
        condition = drop_text(batch["condition"], self.negative, self.config.text_dropout, draws)
        inputs, target = process_condition({"latents": x0, **condition}, noise, t, **cameras(batch))
        flow = self.roles["generator"](**inputs)
        return flow_loss(flow, target, self.schedule.training_weight(t) if self.config.weighted else None), {}
