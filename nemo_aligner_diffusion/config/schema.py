"""What every configuration key accepts: its type, range and choices. Defaults live in ``conf/``, next to their meaning.

Imports nothing heavy: a misspelt key must be reported in well under a second.

A key is written dotted. ``trainer.<loop>.x`` stands for the training loop's section, which carries the recipe's name
(``trainer.draftp_sd.x`` in ``draftp_sd.yaml``). A ``*`` at the end stands for anything below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import method_keys, methods
from nemo_aligner_diffusion.config.reward_keys import PRECISIONS, REWARD_KEYS, REWARDS
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.layout import SHARDING_STRATEGIES
from nemo_aligner_diffusion.settings import (
    ANY,
    BOOL,
    FRACTION,
    PATH,
    PATHS,
    SHARE,
    TEXT,
    Kind,
    choice,
    integer,
    number,
)

__all__ = ["ANY", "KEYS", "LOOP", "PRECISIONS", "REWARDS", "Kind", "kind_of", "known_keys", "read_values"]

LOOP = "<loop>"


ALGORITHMS = tuple(methods())
# The names that diffusion/schedule.py, training/optimizers.py, training/schedules.py and rewards/ know (a test holds
# them together: this file may not import torch).
SAMPLERS = ("DDIM", "PLMS", "Euler", "DPM++2M", "DPM++2M_SDE", "UniPC", "DPM", "DPMSolver++", "PARA_DDIM")
OPTIMIZERS = ("fused_adam", "adamw", "adam", "sgd")
SCHEDULES = ("WarmupHoldPolicy", "CosineAnnealing", "constant")

KEYS: dict[str, Kind] = {
    "name": TEXT,
    "trainer.num_nodes": integer(1),
    "trainer.devices": Kind("devices"),
    "trainer.accelerator": choice("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.precision": choice(*PRECISIONS),
    "trainer.log_every_n_steps": integer(1),
    f"trainer.{LOOP}.max_epochs": integer(1, nullable=True),
    f"trainer.{LOOP}.max_steps": integer(1),
    f"trainer.{LOOP}.val_check_interval": integer(0),
    f"trainer.{LOOP}.limit_val_batches": number(0),
    f"trainer.{LOOP}.save_interval": integer(0),
    f"trainer.{LOOP}.gradient_clip_val": number(0, nullable=True),
    "exp_manager.explicit_log_dir": PATH,
    "exp_manager.exp_dir": PATH,
    "exp_manager.name": TEXT,
    "exp_manager.version": Kind("text", nullable=True),
    "exp_manager.create_wandb_logger": BOOL,
    "exp_manager.wandb_logger_kwargs.*": ANY,
    "exp_manager.create_tensorboard_logger": BOOL,
    "exp_manager.resume_if_exists": BOOL,
    "exp_manager.resume_ignore_no_checkpoint": BOOL,
    "exp_manager.max_time_per_run": Kind("text", nullable=True),
    "exp_manager.checkpoint_callback_params.save_top_k": integer(-1),
    "exp_manager.checkpoint_callback_params.keep_last_n": integer(1, nullable=True),
    "exp_manager.checkpoint_callback_params.async_save": BOOL,
    "exp_manager.requeue_on_preemption": BOOL,
    "exp_manager.requeue_on_max_time": BOOL,
    "exp_manager.create_fault_tolerance_callback": BOOL,
    "exp_manager.fault_tolerance.workload_check_interval": number(above=0),
    "exp_manager.fault_tolerance.silence_timeout": number(above=0),
    "exp_manager.fault_tolerance.initial_rank_heartbeat_timeout": number(above=0, nullable=True),
    "exp_manager.fault_tolerance.rank_heartbeat_timeout": number(above=0, nullable=True),
    "exp_manager.fault_tolerance.minimum_heartbeat_timeout": number(above=0),
    "exp_manager.fault_tolerance.calculate_timeouts": BOOL,
    "exp_manager.fault_tolerance.safety_factor": number(1),
    "exp_manager.create_straggler_detection_callback": BOOL,
    "exp_manager.straggler_detection_params.report_time_interval": number(above=0),
    "exp_manager.straggler_detection_params.gpu_relative_perf_threshold": Kind("float", low=0, high=1),
    "exp_manager.straggler_detection_params.stop_if_detected": BOOL,
    "exp_manager.ema.enable": BOOL,
    "exp_manager.ema.decay": FRACTION,
    "exp_manager.ema.every_n_steps": integer(1),
    "exp_manager.ema.validate_original_weights": BOOL,
    "exp_manager.ema.cpu_offload": BOOL,
    "model.from_pretrained": PATH,
    "model.unet_config.from_pretrained": PATH,
    "model.first_stage_config.from_pretrained": PATH,
    "model.pipeline.trained": Kind("text", nullable=True),
    "model.pipeline.stateless": Kind("texts", nullable=True),
    "model.pipeline.arguments.*": ANY,
    "model.seed": Kind("int", low=0, high=2**63 - 1),
    "model.micro_batch_size": integer(1),
    "model.global_batch_size": integer(1),
    "model.decode_micro_batch_size": integer(1, nullable=True),
    "model.tensor_model_parallel_size": integer(1),
    "model.tensor_parallel_reward": BOOL,
    "model.fsdp": BOOL,
    "model.fsdp_sharding_strategy": choice(*SHARDING_STRATEGIES),
    "model.fsdp_frozen": Kind("texts", nullable=True),
    "model.activation_checkpointing": BOOL,
    "model.infer.unconditional_guidance_scale": number(0, nullable=True),
    "model.infer.inference_steps": Kind("int", low=1, high=1000),
    "model.infer.sampler_type": choice(*SAMPLERS, nullable=True),
    "model.infer.eta": Kind("float", low=0, high=1),
    "model.infer.height": integer(8, nullable=True),
    "model.infer.width": integer(8, nullable=True),
    "model.nan_policy.max_consecutive": integer(0),
    "model.algorithm": Kind("text", choices=ALGORITHMS, or_import_path=True),
    "model.reward_scale": number(above=0),
    "model.reward_margin": number(nullable=True),
    "model.kl_coeff": number(0),
    "model.kl_space": choice("epsilon", "prediction", "velocity", nullable=True),
    **method_keys(),
    "model.peft.peft_scheme": choice("sdlora", "none"),
    "model.peft.lora_tuning.adapter_dim": integer(1),
    "model.peft.lora_tuning.alpha": number(above=0, nullable=True),
    "model.peft.lora_tuning.dropout": FRACTION,
    "model.peft.lora_tuning.target_modules": Kind("texts", nullable=True),
    "model.optim.name": choice(*OPTIMIZERS),
    "model.optim.lr": number(above=0),
    "model.optim.weight_decay": number(0),
    "model.optim.betas": Kind("floats", low=0, high=1, open_high=True, length=2),
    "model.optim.eps": number(above=0),
    "model.optim.momentum": FRACTION,
    "model.optim.nesterov": BOOL,
    "model.optim.sched.name": choice(*SCHEDULES),
    "model.optim.sched.warmup_steps": integer(0, nullable=True),
    "model.optim.sched.warmup_ratio": SHARE,
    "model.optim.sched.hold_steps": integer(0, nullable=True),
    "model.optim.sched.hold_ratio": SHARE,
    "model.optim.sched.constant_steps": integer(0, nullable=True),
    "model.optim.sched.constant_ratio": SHARE,
    "model.optim.sched.min_lr": number(0),
    "model.data.num_workers": integer(0),
    "model.data.shuffle_buffer": integer(0),
    "model.data.on_bad_sample": choice("error", "skip"),
    "model.data.on_bad_shard": choice("error", "skip", nullable=True),
    "model.data.prompt_key": Kind("text", nullable=True),
    "model.data.index_folder": PATH,
    "model.data.worker_timeout_seconds": number(0),
    "model.data.train.webdataset.local_root_path": PATHS,
    "model.data.validation.webdataset.local_root_path": PATHS,
    "model.data.validation.prompts": Kind("texts", nullable=True),
    "model.data.validation.max_prompts": integer(1),
    "model.data.validation.seeds": Kind("ints", low=0),
    **REWARD_KEYS,
    "report.enable": BOOL,
    "report.max_prompts": integer(1),
}


# Two ways to say one thing: a layer that gives one of them takes the other back.
EITHER_OR: dict[str, str] = {
    f"model.optim.sched.{name}_{way}": f"model.optim.sched.{name}_{other}"
    for name in ("warmup", "hold", "constant")
    for way, other in (("steps", "ratio"), ("ratio", "steps"))
}


def kind_of(key: str, loop: str) -> Kind | None:
    """The kind of a dotted key, None for a key the schema does not know. ``loop``: name of the loop's section."""
    if key.startswith(f"trainer.{loop}."):
        key = f"trainer.{LOOP}." + key.removeprefix(f"trainer.{loop}.")
    if key in KEYS:
        return KEYS[key]
    for pattern, kind in KEYS.items():
        if pattern.endswith(".*") and (key.startswith(pattern[:-1]) or key == pattern[:-2]):
            return kind
    return None


def known_keys(loop: str) -> list[str]:
    """Every key, with the loop's section under its own name; sections of free content end in ``*``."""
    return [key.replace(LOOP, loop) for key in KEYS]


def is_section(key: str, loop: str) -> bool:
    return any(known.startswith(key + ".") for known in known_keys(loop))


def is_free_section(key: str) -> bool:
    """Whether anything may stand below ``key`` (an empty mapping is then a value)."""
    return f"{key}.*" in KEYS


MAX_TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")


def read_values(leaves: Mapping[str, Any], loop: str) -> dict[str, Any]:
    """Check every leaf against its kind and return it converted. Keys are known already.

    Raises:
        ConfigurationError: for the first value that is not what its key accepts.
    """
    result: dict[str, Any] = {}
    for key, value in leaves.items():
        kind = kind_of(key, loop)
        assert kind is not None, key
        result[key] = kind.read(key, value)
    limit = result.get("exp_manager.max_time_per_run")
    if limit is not None and not MAX_TIME.fullmatch(limit):
        raise ConfigurationError(
            f"exp_manager.max_time_per_run = {limit!r}: expected days:hours:minutes:seconds such as 00:03:45:00, "
            "or null"
        )
    return result
