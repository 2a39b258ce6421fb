"""Which networks a stage trains and which it only reads."""

from torch import nn


def take_roles(
    stage: str, backbones: dict[str, nn.Module], trained: tuple[str, ...], frozen: tuple[str, ...] = ()
) -> dict[str, nn.Module]:
    """The stage's networks by role, with requires_grad set; the backbones must be exactly these roles, else ValueError."""
    expected = (*trained, *frozen)
    if set(backbones) != set(expected):
        raise ValueError(f"{stage}: backbones must be for the roles {sorted(expected)}, got {sorted(backbones)}")
    for role in expected:
        backbones[role].requires_grad_(role in trained)
    return {role: backbones[role] for role in expected}
