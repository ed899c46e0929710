"""What users of NeMo-Aligner bring: command lines, other spellings, whole YAML files."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.config.nemo_names import ALIASES, NOT_YET, WITHOUT_EFFECT
from nemo_aligner_diffusion.config.schema import KEYS, vocabulary
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.settings import LOOP
from nemo_aligner_diffusion.training.settings import RunSettings

# The published command with its variables filled in, word for word otherwise.
PUBLISHED = shlex.split("""
  trainer.num_nodes=1 trainer.devices=2
  model.micro_batch_size=1 model.global_batch_size=8 model.kl_coeff=0.2 model.optim.lr=0.0001
  model.unet_config.from_pretrained=/ckpt/unet.bin
  model.first_stage_config.from_pretrained=/ckpt/vae.bin
  rm.model.restore_from_path=/ckpt/reward.nemo
  model.data.train.webdataset.local_root_path=/data/prompts.tar
  exp_manager.explicit_log_dir=/results
""")


def test_the_published_command(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfg = load_config("draftp_sd", PUBLISHED)
    assert not caplog.text
    assert RunSettings.of(cfg).accumulation == 4
    assert cfg.model.algorithm == "draft+"
    assert (cfg.model.kl_coeff, cfg.model.optim.lr) == (0.2, 0.0001)
    assert cfg.model.unet_config.from_pretrained == "/ckpt/unet.bin"
    assert cfg.model.first_stage_config.from_pretrained == "/ckpt/vae.bin"
    assert cfg.rm.model.restore_from_path == "/ckpt/reward.nemo"
    assert cfg.model.data.train.webdataset.local_root_path == "/data/prompts.tar"
    assert cfg.exp_manager.explicit_log_dir == "/results"


def test_the_user_guides_spelling() -> None:
    words = [word.replace("data.train.webdataset", "data.webdataset") for word in PUBLISHED]
    cfg = load_config("draftp_sd", [*words, "exp_manager.create_wandb_logger=False", "model.truncation_steps=1"])
    assert cfg.model.data.train.webdataset.local_root_path == "/data/prompts.tar"
    assert "webdataset" not in cfg.model.data, "only the canonical key remains"


USED_KEYS = {
    "model.infer.unconditional_guidance_scale": 7.5, "model.infer.inference_steps": 25, "model.infer.eta": 0.0,
    "model.infer.height": 512, "model.infer.width": 512, "model.peft.peft_scheme": "none",
    "model.peft.lora_tuning.adapter_dim": 32, "model.optim.name": "fused_adam", "model.optim.weight_decay": 0.005,
    "model.optim.sched.name": "WarmupHoldPolicy", "model.optim.sched.warmup_steps": 10,
    "model.optim.sched.hold_steps": 10000000000000, "model.seed": 1234, "model.activation_checkpointing": True,
    "model.tensor_model_parallel_size": 1, "trainer.num_nodes": 1, "trainer.accelerator": "gpu",
    "trainer.draftp_sd.max_epochs": 1, "trainer.draftp_sd.max_steps": 4000, "trainer.draftp_sd.val_check_interval": 20,
    "trainer.draftp_sd.limit_val_batches": 1, "trainer.draftp_sd.save_interval": 200,
    "trainer.draftp_sd.gradient_clip_val": 10, "exp_manager.exp_dir": "/e", "exp_manager.name": "n",
    "exp_manager.create_tensorboard_logger": False, "exp_manager.resume_if_exists": True,
    "exp_manager.resume_ignore_no_checkpoint": False, "exp_manager.max_time_per_run": "00:03:45:00",
    "exp_manager.ema.enable": True, "exp_manager.ema.decay": 0.9999, "exp_manager.ema.every_n_steps": 2,
    "exp_manager.ema.validate_original_weights": True, "exp_manager.ema.cpu_offload": True,
    "rm.trainer.precision": "bf16",
}  # fmt: skip


def test_keys_in_use_act() -> None:
    cfg = load_config("draftp_sd", [f"{key}={value}" for key, value in USED_KEYS.items()])
    assert {key: OmegaConf.select(cfg, key) for key in USED_KEYS} == USED_KEYS


@pytest.mark.parametrize(
    ("word", "target", "value"),
    [
        ("model.sampling.base.steps=30", "model.infer.inference_steps", 30),
        ("model.sampling.base.height=1024", "model.infer.height", 1024),
        ("model.sampling.base.width=768", "model.infer.width", 768),
        ("model.sampling.base.scale=5.0", "model.infer.unconditional_guidance_scale", 5.0),
        ("model.sampling.base.sampler=EulerEDMSampler", "model.infer.sampler_type", "Euler"),
        ("trainer.max_steps=7", "trainer.draftp_sd.max_steps", 7),
        ("trainer.max_steps=-1", "trainer.draftp_sd.max_steps", 30),
        ("trainer.val_check_interval=7", "trainer.draftp_sd.val_check_interval", 7),
        ("trainer.gradient_clip_val=10.0", "trainer.draftp_sd.gradient_clip_val", 10.0),
        ("trainer.refl_sd.max_steps=7", "trainer.draftp_sd.max_steps", 7),
        ("trainer.draftp_sdxl.max_steps=7", "trainer.draftp_sd.max_steps", 7),
        ("model.save_interval=500", "trainer.draftp_sd.save_interval", 500),
        ("model.peft.enable=False", "model.peft.peft_scheme", "none"),
        ("model.peft.enable=True", "model.peft.peft_scheme", "sdlora"),
        ("model.peft.lora_tuning.adapter_dropout=0.1", "model.peft.lora_tuning.dropout", 0.1),
        ("model.peft.lora_tuning.network_alpha=16", "model.peft.lora_tuning.alpha", 16),
        ("model.data.train.dataset_path=/a.tar", "model.data.train.webdataset.local_root_path", "/a.tar"),
        ("model.data.train.dataset_path=[null]", "model.data.train.webdataset.local_root_path", None),
        ("model.nsys_profile.enabled=True", "model.profile.nsys", True),
        ("model.nsys_profile.start_step=2", "model.profile.start_step", 2),
        ("model.nsys_profile.gen_shape=True", "model.profile.shapes", True),
        ("++model.kl_coeff=0.3", "model.kl_coeff", 0.3),
    ],
)
def test_other_spellings(word: str, target: str, value: object) -> None:
    assert OmegaConf.select(load_config("draftp_sd", [word]), target) == value


def test_a_sampler_of_nemos_that_we_lack_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"model.infer.sampler_type = 'HeunEDMSampler': expected one of DDIM"):
        load_config("draftp_sd", ["model.sampling.base.sampler=HeunEDMSampler"])


def test_the_loops_alias_in_another_recipe() -> None:
    cfg = load_config("drtune_sd", ["trainer.draftp_sd.max_steps=7"])
    assert cfg.trainer.drtune_sd.max_steps == 7
    assert "draftp_sd" not in cfg.trainer


def test_two_spellings_must_agree() -> None:
    words = ["model.infer.inference_steps=20", "model.sampling.base.steps=30"]
    with pytest.raises(ConfigurationError, match="two spellings of one setting that disagree"):
        load_config("draftp_sd", words)
    load_config("draftp_sd", [words[0], "model.sampling.base.steps=20"])


def test_the_loops_own_key_counts_more_than_lightnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfg = load_config("draftp_sd", ["trainer.max_steps=9", "trainer.draftp_sd.max_steps=5"])
    assert cfg.trainer.draftp_sd.max_steps == 5
    assert "trainer.max_steps: trainer.draftp_sd.max_steps is given too" in caplog.text


@pytest.mark.parametrize(
    "word",
    [
        "rm.trainer.devices=2",
        "rm.model.precision=16",
        "trainer.benchmark=False",
        "trainer.logger=False",
        "exp_manager.create_checkpoint_callback=True",
        "exp_manager.checkpoint_callback_params.monitor=loss",
        "model.sampling.refiner.steps=10",
        "model.sampling.base.s_churn=0.0",
        "model.unet_config.use_flash_attention=True",
        "model.unet_config.from_NeMo=True",
        "model.first_stage_config.from_NeMo=False",
        "model.data.webdataset.infinite_sampler=False",
        "model.fsdp_cpu_offload=True",
        "hydra.run.dir=/tmp/x",
        "reward_model=pickscore",
    ],
)
def test_keys_without_effect_are_named_in_a_warning(word: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfg = load_config("draftp_sd", [word])
    assert f"{word.partition('=')[0]}: " in caplog.text
    assert cfg == load_config("draftp_sd")


@pytest.mark.parametrize("key", NOT_YET)
def test_what_would_train_something_else_is_an_error(key: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not available here: \S+"):
        load_config("draftp_sd", [f"{key}=/some/where"])
    neutral = NOT_YET[key][0][0]
    load_config("draftp_sd", [f"{key}={'null' if neutral is None else neutral}"])


def test_the_tables_do_not_contradict_each_other() -> None:
    known = vocabulary("draftp_sd")
    for key, alias in ALIASES.items():
        assert known.kind_of(alias.target.replace(LOOP, "draftp_sd")) is not None, key
        assert known.kind_of(key) is None, f"{key} is a key and an alias"
    for key in [*WITHOUT_EFFECT, *NOT_YET]:
        assert key not in KEYS, f"{key} acts and does not"
        assert key not in ALIASES, f"{key} acts and does not"


# The shape of a NeMo-Aligner recipe: no defaults list, interpolations, the loop's section beside Lightning's own keys.
NEMO_STYLE = """
name: my_run
trainer:
  devices: 2
  num_nodes: 1
  accelerator: gpu
  precision: bf16
  draftp_sd:
    {val_check_interval: 1, limit_val_batches: 1, save_interval: 500, gradient_clip_val: 10, max_steps: 1000}
  logger: False
  max_epochs: 50000000
  max_steps: 50
  log_every_n_steps: 1
  accumulate_grad_batches: 1
exp_manager:
  exp_dir: null
  name: ${name}
  explicit_log_dir: null
  create_wandb_logger: False
  wandb_logger_kwargs: {project: P, name: "${name}", resume: False}
  create_checkpoint_callback: True
  resume_if_exists: True
  ema: {enable: True, decay: 0.9999, validate_original_weights: False, every_n_steps: 1, cpu_offload: False}
pretrained_checkpoint: {restore_from_path: null}
model:
  restore_from_path: null
  kl_coeff: 1.0
  truncation_steps: 1
  infer: {unconditional_guidance_scale: 7.5, height: 512, width: 512, inference_steps: 50, sampler_type: DDIM, eta: 0}
  precision: ${trainer.precision}
  micro_batch_size: 1
  global_batch_size: 4
  unet_config: {from_pretrained: null, from_NeMo: True, in_channels: 4, attention_resolutions: [4, 2, 1]}
  first_stage_config: {from_pretrained: null, ddconfig: {z_channels: 4}}
  optim: {name: fused_adam, lr: 1e-4, betas: [0.9, 0.999], sched: {name: WarmupHoldPolicy, warmup_steps: 10}}
  data:
    num_workers: 1
    train: {dataset_path: [null]}
    webdataset: {infinite_sampler: False, local_root_path: /data/p.tar}
  peft:
    peft_scheme: sdlora
    restore_from_path: null
    lora_tuning: {adapter_dim: 32, adapter_dropout: 0.0, network_alpha: null}
rm:
  trainer: {devices: 1, precision: 32}
  model: {restore_from_path: /rm.nemo, precision: "${trainer.precision}"}
"""


def test_a_whole_recipe_in_nemos_style(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "draftp_sd.yaml").write_text(NEMO_STYLE, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        cfg = load_config("draftp_sd", ["model.kl_coeff=0.2"], config_dir=tmp_path)
    assert RunSettings.of(cfg).accumulation == 2
    assert cfg.exp_manager.name == cfg.exp_manager.wandb_logger_kwargs.name == "my_run"
    assert cfg.trainer.draftp_sd.max_steps == 1000
    assert cfg.model.optim.lr == 1e-4
    assert cfg.model.kl_coeff == 0.2
    assert cfg.model.peft.lora_tuning.adapter_dim == 32
    assert cfg.model.data.train.webdataset.local_root_path == "/data/p.tar"
    assert cfg.rm.name == "clip"
    assert cfg.rm.model.restore_from_path == "/rm.nemo"
    assert "max_steps" not in cfg.trainer
    for key in ("trainer.logger", "trainer.max_steps", "rm.trainer.devices", "model.precision"):
        assert key in caplog.text
    for key in ("pretrained_checkpoint", "dataset_path"):  # null says nothing, so there is nothing to warn of
        assert key not in caplog.text


def test_warnings_come_from_the_first_process_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)  # srun sets no RANK
    with caplog.at_level(logging.WARNING):
        load_config("draftp_sd", ["model.fsdp_cpu_offload=True"])
    assert not caplog.text


def test_nemos_checkpoint_settings() -> None:
    section = "exp_manager.checkpoint_callback_params"
    words = [f"{section}.save_top_k=1", f"{section}.every_n_train_steps=7", f"{section}.async_save=True"]
    cfg = load_config("draftp_sd", [*words, f"{section}.save_last=True", f"{section}.mode=max"])
    assert cfg.exp_manager.checkpoint_callback_params == {"keep_last_n": 2, "save_top_k": 1, "async_save": True}
    assert cfg.trainer.draftp_sd.save_interval == 7
    cfg = load_config("draftp_sd", [*words, "trainer.draftp_sd.save_interval=3"])
    assert cfg.trainer.draftp_sd.save_interval == 3
    with pytest.raises(ConfigurationError, match="keep_last_n"):
        load_config("draftp_sd", [f"{section}.keep_last_n=0"])
