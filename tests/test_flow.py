from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit_ops.flow import FlowSchedule, per_frame

GOLDEN = Path(__file__).with_name("golden") / "cases.safetensors"


@pytest.mark.parametrize("shift", [3, 5, 8])
def test_schedule_matches_golden(shift):
    cases, schedule = load_file(GOLDEN), FlowSchedule(shift)
    torch.testing.assert_close(schedule.sigmas, cases[f"sched.shift{shift}.sigmas"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        schedule.training_weight(schedule.timesteps), cases[f"sched.shift{shift}.weights"], atol=1e-4, rtol=0
    )


def test_sampling_and_few_step():
    schedule = FlowSchedule(5)
    torch.testing.assert_close(1000 * schedule.sampling(48)[:-1], load_file(GOLDEN)["sched.ode48.timesteps"], atol=1e-3, rtol=0)
    assert schedule.sampling(48)[-1] == 0 and schedule.sampling(48)[0] == 1
    few = schedule.few_step([1000, 750, 500, 250])
    torch.testing.assert_close(few, torch.tensor([1000, 937.5, 833.3333, 625]), atol=1e-4, rtol=0)
    torch.testing.assert_close(few, 1000 * schedule.sampling(4)[:-1])


def test_training_weight_is_zero_at_pure_noise_and_one_on_average():
    schedule = FlowSchedule(5)
    weight = schedule.training_weight(schedule.timesteps)
    assert weight[0].abs() < 1e-6
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_errors():
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        FlowSchedule(0)
    with pytest.raises(ValueError, match="steps must fall strictly"):
        FlowSchedule(5).few_step([500, 750])
    with pytest.raises(ValueError, match=r"\[B\] or \[B, F\] with F = 3, got \[2, 4\]"):
        per_frame(torch.zeros(2, 4), 3)
