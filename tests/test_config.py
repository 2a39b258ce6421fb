"""Run configurations: what a file may say, and what is said about a wrong one."""

from pathlib import Path

import pytest
import yaml

from dit_ops.training.bidirectional import BidirectionalConfig
from dit_ops.training.config import STAGES, RunConfig, config_dict, load_config, parse_config, save_config, stage_class

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = ("rooms-tiny", "rooms-gpu", "wan-1.3b", "hunyuan-video15")
MINIMAL = {"stage": "bidirectional", "output": "out", "steps": 10, "data": {"path": "rooms"}}


@pytest.fixture
def write(tmp_path):
    def write(**values) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | values))
        return path

    return write


def test_a_file_becomes_typed_values(write):
    path = write(optim={"lr": "1e-4", "betas": [0, 0.999], "roles": {"fake_score": {"lr": 4e-7}}}, options={"shift": 3})
    config = load_config(path)
    assert config.optim.lr == 1e-4 and config.optim.betas == (0.0, 0.999) and isinstance(config.optim.betas[0], float)
    assert config.options == BidirectionalConfig(shift=3.0) and isinstance(config.options.shift, float)
    assert config.optim.of("generator")["lr"] == 1e-4 and config.optim.of("fake_score")["lr"] == 4e-7
    assert config.optim.of("fake_score")["weight_decay"] == config.optim.weight_decay


def test_overrides_win_and_make_sections(write):
    overrides = ["optim.lr=1e-4", "ema.decay=0.9", "init.generator=a/model", "clip_norm=null", "options.text_dropout=.1"]
    config = load_config(write(clip_norm=10.0), overrides)
    assert (config.optim.lr, config.ema.decay, config.init, config.clip_norm) == (1e-4, 0.9, {"generator": "a/model"}, None)
    assert config.options.text_dropout == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 1}}, r"run\.yaml: unknown key 'optim\.lrr'; did you mean 'optim\.lr'\?"),
        ({"stepz": 1}, r"unknown key 'stepz'; did you mean 'steps'\?"),
        ({"options": {"shfit": 1}}, r"unknown key 'options\.shfit'; did you mean 'options\.shift'\?"),
        ({"batch_size": 1}, r"unknown key 'batch_size'; did you mean 'data\.batch_size'\?"),
        (
            {"optim": {"roles": {"fake_score": {"Lr": 1}}}},
            r"'optim\.roles\.fake_score\.Lr'; did you mean 'optim\.roles\.fake_score\.lr'",
        ),
        ({"sampler": {"num_step": 4}}, r"unknown key 'sampler\.num_step'; did you mean 'sampler\.num_steps'\?"),
        ({"stage": "bidirectionl"}, r"run\.yaml: stage must be one of .*did you mean 'bidirectional'\?"),
        ({"optim": {"lr": "fast"}}, r"run\.yaml: optim\.lr expects float, got 'fast' \(str\)"),
        ({"steps": 1.5}, r"steps expects int, got 1\.5 \(float\)"),
        ({"steps": True}, r"steps expects int, got True \(bool\)"),
        ({"tensorboard": 1}, r"tensorboard expects bool, got 1 \(int\)"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas expects tuple\[float, float\], got \[0\.9\]"),
        ({"optim": 1}, r"optim expects a section with OptimConfig's keys, got 1"),
        ({"precision": "fp16"}, r"precision expects one of \['fp32', 'bf16'\], got 'fp16'"),
        ({"data": {"batch_size": 2}}, r"data\.path is required"),
        ({"data": {"path": "x", "batch_size": 0}}, r"data: batch_size must be at least 1, got 0"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"ema": {"decay": 1.0}}, r"ema: decay must be in \[0, 1\), got 1\.0"),
        ({"options": {"text_dropout": 2}}, r"options: bidirectional: text_dropout must be in \[0, 1\], got 2\.0"),
        ({"validate": {"prompts": ["a"]}}, r"poses must be one per prompt, got 0 poses and 1 prompts"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_file_is_explained(write, values, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(**values))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"override 'optim\.lrr=1': unknown key 'optim\.lrr'; did you mean 'optim\.lr'\?"),
        ("optim.lr=x", r"override 'optim\.lr=x': optim\.lr expects float"),
        ("optim.lr", r"override 'optim\.lr': expected key=value"),
        ("steps.more=1", r"override 'steps\.more=1': 'steps' is not a section"),
    ],
)
def test_a_wrong_override_is_explained(write, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(), [override])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "expected a mapping of config keys, got list")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"run.yaml: {message}"):
        load_config(tmp_path / "run.yaml")


def test_a_saved_config_reads_back_equal(write, tmp_path):
    config = load_config(write(ema={"decay": 0.99}, sampler={"denoising_steps": [1000, 500]}, init={"generator": "m"}))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert parse_config(config_dict(config)) == config


def test_the_learning_rate_warms_up_and_then_stays_or_falls():
    def factors(steps: int, **schedule) -> list[float]:
        config = parse_config(MINIMAL | {"schedule": schedule})
        return [config.schedule.factor(i, steps) for i in range(steps)]

    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(2) == [1.0, 1.0]
    # 0.2 + 0.8·(1 + cos(π·k/4))/2 after two steps of warm-up
    expected = [0.5, 1.0, 1.0, 0.8828427, 0.6, 0.3171573]
    assert factors(6, warmup_steps=2, decay="cosine", final=0.2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config_of_every_size(size, stage):
    config = load_config(CONFIGS / size / f"{stage}.yaml")
    assert isinstance(config, RunConfig) and config.stage == stage
    assert isinstance(config.options, stage_class(stage).config_class)


@pytest.mark.parametrize("size", SIZES)
def test_stages_of_a_size_follow_each_other(size):
    """Each init is the model of a stage of the same size, or of the published one; few-step stages share levels and shift."""
    configs = {stage: load_config(CONFIGS / size / f"{stage}.yaml") for stage in STAGES}
    models = {f"{config.output}/model" for config in configs.values()}
    for stage, config in configs.items():
        for role, path in config.init.items():
            assert path in models or (stage == "bidirectional" and not path.startswith("out/")), (
                f"{stage}: init.{role} = {path}"
            )
    assert configs["causal_ode"].data.path == configs["ode_sampling"].output
    few_step = [configs[stage].options for stage in ("ode_sampling", "causal_ode", "dmd")]
    assert len({(options.shift, options.denoising_steps) for options in few_step}) == 1
    blocks = {config.model.block_frames for stage, config in configs.items() if stage != "bidirectional"} - {None}
    assert len(blocks) <= 1
