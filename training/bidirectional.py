"""Bidirectional supervised fine-tuning: flow matching with one noise level for all frames (Wan, arXiv 2503.20314)."""

from dataclasses import dataclass

from torch import Tensor, nn

from dit_ops import add_noise
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.training.flow_matching import check_probability, drop_text, flow_loss
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class BidirectionalConfig:
    """text_dropout: share of samples trained on the negative text; weighted: FlowSchedule's bell over t, else 1."""

    shift: float = 5.0
    text_dropout: float = 0.0
    weighted: bool = True

    def __post_init__(self):
        check_probability("bidirectional", "text_dropout", self.text_dropout)


class BidirectionalStage:
    """`w(t)·MSE(v(x_t, t), ε − x0)`, `x_t = (1 − σ)·x0 + σ·ε`, t uniform over the shifted schedule, one per sample.

    Timesteps stay in fp32: bf16 would leave 294 of the 1000.
    """

    config_class = BidirectionalConfig

    def __init__(self, config: BidirectionalConfig, backbones: dict[str, nn.Module], negative_text: Tensor):
        self.config = config
        self.roles = take_roles("bidirectional", backbones, trained=("generator",))
        self.negative_text = negative_text
        self.schedule = FlowSchedule(config.shift)

    def updates(self, step: int) -> list[str]:
        return ["generator"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        """batch: latents [B, F, Cz, h, w], text [B, T, Dt], viewmats [B, F, 4, 4], Ks [B, F, 3, 3]."""
        x0 = batch["latents"].float()
        i = draws.integers("timestep", 0, self.schedule.num_steps, (len(x0),))
        t = self.schedule.timesteps[i].to(x0.device)  # [B]
        noise = draws.normal("noise", tuple(x0.shape), device=x0.device)
        text = drop_text(batch["text"], self.negative_text, self.config.text_dropout, draws)
        x_t = add_noise(x0, noise, t / 1000)
        flow = self.roles["generator"](x_t, t, text, viewmats=batch.get("viewmats"), Ks=batch.get("Ks"))
        return flow_loss(flow, x0, noise, self.schedule.training_weight(t) if self.config.weighted else None), {}
