"""Keys that users of NeMo and NeMo-Aligner bring, and what becomes of them here.

Three tables: :data:`ALIASES` (another spelling of a key we have), :data:`WITHOUT_EFFECT` (accepted, named in one
warning with the reason) and :data:`NOT_YET` (harmless at its neutral value, an error at any other, because going on
would train something else than what was asked for). Sources: NeMo-Aligner 0.7 ``draftp_sd.yaml``, ``draftp_sdxl.yaml``
and its launch scripts; NeMo 2.0 ``exp_manager`` and ``nlp_overrides``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_aligner_diffusion.settings import BOOL, LOOP, Kind


@dataclass(frozen=True)
class Alias:
    """Another spelling of ``target``.

    Attributes:
        target: the key of the schema, ``<loop>`` standing for the loop's section.
        weak: gives way where the target itself is written too, as in NeMo-Aligner, where ``trainer.max_steps`` stands
            beside ``trainer.draftp_sd.max_steps`` and the latter counts. Two *strong* spellings must agree.
        convert: the value under the target's conventions; None: leave the target alone.
        kind: of what is given, where it is not the target's.
    """

    target: str
    weak: bool = False
    convert: Callable[[Any], Any] | None = None
    kind: Kind | None = None


def _sdxl_sampler(value: Any) -> Any:
    """NeMo's SDXL sampler classes that we have too; other names go through and are refused by the list of ours."""
    names = {"EulerEDMSampler": "Euler", "DPMPP2MSampler": "DPM++2M"}
    return names.get(value, value) if isinstance(value, str) else value


def _dataset_path(value: Any) -> Any:
    """NeMo's ``dataset_path`` is a list, ``[null]`` where it is not used."""
    if isinstance(value, list):
        paths = [path for path in value if path is not None]
        return paths or None
    return value


def _without_end(value: Any) -> Any:
    """Lightning's -1, "no limit": what the loop's section says holds."""
    return None if value == -1 else value


_TRAIN_PATH = "model.data.train.webdataset.local_root_path"

ALIASES: dict[str, Alias] = {
    # The user guide's spelling of the published command's data key.
    "model.data.webdataset.local_root_path": Alias(_TRAIN_PATH),
    # The 0.3-era launch scripts give the shard both ways; the webdataset key counts.
    "model.data.train.dataset_path": Alias(_TRAIN_PATH, weak=True, convert=_dataset_path),
    "model.data.validation.dataset_path": Alias(
        "model.data.validation.webdataset.local_root_path", weak=True, convert=_dataset_path
    ),
    # SDXL's spelling of model.infer.
    "model.sampling.base.steps": Alias("model.infer.inference_steps"),
    "model.sampling.base.height": Alias("model.infer.height"),
    "model.sampling.base.width": Alias("model.infer.width"),
    "model.sampling.base.scale": Alias("model.infer.unconditional_guidance_scale"),
    "model.sampling.base.sampler": Alias("model.infer.sampler_type", convert=_sdxl_sampler),
    # Lightning's own keys, which NeMo-Aligner keeps beside the loop's section.
    **{
        f"trainer.{key}": Alias(f"trainer.{LOOP}.{key}", weak=True, convert=_without_end)
        for key in ("max_steps", "max_epochs", "val_check_interval", "limit_val_batches", "gradient_clip_val")
    },
    # The first releases kept the loop's settings under model.
    **{
        f"model.{key}": Alias(f"trainer.{LOOP}.{key}", weak=True)
        for key in ("max_steps", "max_epochs", "save_interval", "gradient_clip_val")
    },
    # How often NeMo's own checkpoint callback saves; the loop's section counts.
    "exp_manager.checkpoint_callback_params.every_n_train_steps": Alias(f"trainer.{LOOP}.save_interval", weak=True),
    "model.peft.enable": Alias(
        "model.peft.peft_scheme", weak=True, convert=lambda enabled: None if enabled else "none", kind=BOOL
    ),
    "model.peft.lora_tuning.adapter_dropout": Alias("model.peft.lora_tuning.dropout"),
    "model.peft.lora_tuning.network_alpha": Alias("model.peft.lora_tuning.alpha"),
    "model.unet_config.lora_network_alpha": Alias("model.peft.lora_tuning.alpha", weak=True),
}

_ELSEWHERE = "PyTorch Lightning is set up by this project"
_ARCHITECTURE = "the networks' shapes come from the checkpoint's own configuration"
_NAMES = "the names in the file tell whether NeMo, CompVis or diffusers wrote it"
_PRETRAINING = "it belongs to pretraining the model, not to reward fine-tuning"
_REWARD_MACHINE = "the reward runs inside the training processes, on their devices"
_FILES = "checkpoints are written by trainer.<recipe>.save_interval"
_KERNELS = "kernels and memory formats are chosen by this project"
_PICTURES = (
    "it belongs to NeMo's own picture writer; pictures here are made by examples/mm/stable_diffusion/generate.py"
)

# shell-style pattern -> why it does nothing. The first match counts.
WITHOUT_EFFECT: dict[str, str] = {
    "trainer.accumulate_grad_batches": "accumulation follows from the batch sizes",
    "trainer.logger": "loggers are chosen by exp_manager",
    "trainer.enable_checkpointing": _FILES,
    "trainer.benchmark": _KERNELS,
    "trainer.enable_model_summary": _ELSEWHERE,
    "trainer.enable_progress_bar": _ELSEWHERE,
    "trainer.num_sanity_val_steps": _ELSEWHERE,
    "trainer.check_val_every_n_epoch": "validation follows trainer.<recipe>.val_check_interval",
    "trainer.limit_train_batches": "trainer.<recipe>.max_steps ends the training",
    "trainer.limit_test_batches": _ELSEWHERE,
    "trainer.max_time": "use exp_manager.max_time_per_run",
    "trainer.strategy": "the strategy follows from the number of devices",
    "trainer.sync_batchnorm": _ELSEWHERE,
    "trainer.use_distributed_sampler": _ELSEWHERE,
    "trainer.replace_sampler_ddp": _ELSEWHERE,
    "trainer.gradient_clip_algorithm": "gradients are clipped by their norm",
    "trainer.deterministic": "every draw follows from model.seed",
    "trainer.detect_anomaly": _ELSEWHERE,
    "trainer.profiler": _ELSEWHERE,
    "trainer.plugins*": _ELSEWHERE,
    "trainer.callbacks*": _ELSEWHERE,
    "trainer.default_root_dir": "use exp_manager.explicit_log_dir",
    "trainer.fast_dev_run": "use trainer.<recipe>.max_steps",
    "trainer.overfit_batches": _ELSEWHERE,
    "exp_manager.create_checkpoint_callback": _FILES,
    "exp_manager.checkpoint_callback_params.monitor": "the best checkpoints are those of the highest validation reward",
    "exp_manager.checkpoint_callback_params.mode": "the best checkpoints are those of the highest validation reward",
    "exp_manager.checkpoint_callback_params.save_last": "the newest are always kept, as keep_last_n says",
    "exp_manager.checkpoint_callback_params.*": _FILES,
    "exp_manager.create_early_stopping_callback": _ELSEWHERE,
    "exp_manager.early_stopping_callback_params*": _ELSEWHERE,
    "exp_manager.create_preemption_callback": "Ctrl-C and SIGTERM always leave a usable export",
    "exp_manager.straggler_detection_params.*": "ranks are compared by the time of their own work",
    "exp_manager.fault_tolerance.*": "torchrun --max-restarts and Slurm's requeue start a run again",
    "exp_manager.create_mlflow_logger": "TensorBoard and W&B are the loggers here",
    "exp_manager.mlflow_logger_kwargs*": "TensorBoard and W&B are the loggers here",
    "exp_manager.create_dllogger_logger": "TensorBoard and W&B are the loggers here",
    "exp_manager.dllogger_logger_kwargs*": "TensorBoard and W&B are the loggers here",
    "exp_manager.create_clearml_logger": "TensorBoard and W&B are the loggers here",
    "exp_manager.clearml_logger_kwargs*": "TensorBoard and W&B are the loggers here",
    "exp_manager.create_neptune_logger": "TensorBoard and W&B are the loggers here",
    "exp_manager.neptune_logger_kwargs*": "TensorBoard and W&B are the loggers here",
    "exp_manager.summary_writer_kwargs*": "TensorBoard writes into the run directory",
    "exp_manager.log_step_timing": "metrics.csv always has the pictures per second",
    "exp_manager.step_timing_kwargs*": "metrics.csv always has the pictures per second",
    "exp_manager.log_tflops_per_sec_per_gpu": "metrics.csv always has the pictures per second",
    "exp_manager.log_local_rank_0_only": "the first process alone writes",
    "exp_manager.log_global_rank_0_only": "the first process alone writes",
    "exp_manager.files_to_copy": "config.yaml holds everything a run was made from",
    "exp_manager.use_datetime_version": "use exp_manager.explicit_log_dir or exp_manager.version",
    "exp_manager.resume_past_end": "raise trainer.<recipe>.max_steps to go on after the end",
    "exp_manager.disable_validation_on_resume": "validation follows trainer.<recipe>.val_check_interval",
    "exp_manager.seconds_to_sleep": _ELSEWHERE,
    "exp_manager.ema.evaluate_ema_weights_instead": "use validate_original_weights",
    "exp_manager.ema.apply_ema_every_n_steps": "use exp_manager.ema.every_n_steps",
    "exp_manager.ema.start_step": "the average starts at the first step",
    "exp_manager.model_parallel_size": "use model.tensor_model_parallel_size",
    "hydra*": "hydra only reads the configuration here: it makes no folders and no log files",
    "reward_model": "the reward is chosen by rm.name and its file",
    "rm.trainer*": _REWARD_MACHINE,
    "rm.model.precision": "use rm.trainer.precision",
    "rm.model.tensor_model_parallel_size": "use model.tensor_parallel_reward",
    "rm.model.pipeline_model_parallel_size": _REWARD_MACHINE,
    "rm.model.global_batch_size": _REWARD_MACHINE,
    "rm.model.devices": _REWARD_MACHINE,
    "rm.name_or_path": "use rm.model.restore_from_path",
    "model.trainer*": "use trainer.precision",
    "model.precision": "use trainer.precision",
    "model.sampling.refiner*": "there is no refiner stage",
    "model.sampling.base.orig_width": "the picture's own size is used",
    "model.sampling.base.orig_height": "the picture's own size is used",
    "model.sampling.base.crop_coords_*": "pictures are not cropped",
    "model.sampling.base.*": "the sampler is a `diffusers` scheduler, set by model.infer",
    "model.infer.num_images_per_prompt": "use model.data.validation.seeds",
    "model.infer.seed": "use model.data.validation.seeds",
    "model.infer.prompts*": "use model.data.validation.prompts",
    "model.infer.down_factor": _ARCHITECTURE,
    "model.infer.output_type": _PICTURES,
    "model.infer.save_to_file": _PICTURES,
    "model.infer.out_path": _PICTURES,
    "model.infer.inference_batch_size_per_gpu": "use model.micro_batch_size",
    "model.data.dataloader_type": "prompts stream from shards",
    "model.data.shuffle_data": "prompts are shuffled within model.data.shuffle_buffer",
    "model.data.synthetic_data*": _PRETRAINING,
    "model.data.train.filterings*": _PRETRAINING,
    "model.data.train.augmentations*": _PRETRAINING,
    "model.data.train.batch_size": "use model.micro_batch_size",
    "model.data.train.num_workers": "use model.data.num_workers",
    "model.data.validation.batch_size": "use model.micro_batch_size",
    "model.data.validation.num_workers": "use model.data.num_workers",
    "model.data.webdataset.*": "prompts stream from local shards",
    "model.data.train.webdataset.*": "prompts stream from local shards",
    "model.data.validation.webdataset.*": "prompts stream from local shards",
    "model.unet_config.from_NeMo": _NAMES,
    "model.first_stage_config.from_NeMo": _NAMES,
    "model.unet_config.*": _ARCHITECTURE,
    "model.first_stage_config.*": _ARCHITECTURE,
    "model.cond_stage_config*": _ARCHITECTURE,
    "model.conditioner_config*": _ARCHITECTURE,
    "model.denoiser_config*": "the prediction type comes from the model's scheduler configuration",
    "model.loss_fn_config*": _PRETRAINING,
    "model.noise_scheduler*": "the noise schedule comes from the model's scheduler configuration",
    "model.peft.lora_tuning.column_init_method": "adapters start at zero, the way `peft` sets them up",
    "model.peft.lora_tuning.row_init_method": "adapters start at zero, the way `peft` sets them up",
    "model.peft.lora_tuning.layer_selection": "use model.peft.lora_tuning.target_modules",
    "model.peft.lora_tuning.weight_tying": "adapters share no weights",
    "model.peft.lora_tuning.position_embedding_strategy": "adapters share no weights",
    "model.optim.bucket_cap_mb": _KERNELS,
    "model.optim.overlap_grad_sync": _KERNELS,
    "model.optim.overlap_param_sync": _KERNELS,
    "model.optim.contiguous_grad_buffer": _KERNELS,
    "model.optim.contiguous_param_buffer": _KERNELS,
    "model.optim.grad_sync_dtype": _KERNELS,
    "model.optim.capturable": _KERNELS,
    "model.optim.master_weights": _KERNELS,
    "model.optim.sched.monitor": "the rate follows the step, not a metric",
    "model.optim.sched.reduce_on_plateau": "the rate follows the step, not a metric",
    "model.optim.sched.max_steps": "the schedule ends with trainer.<recipe>.max_steps",
    "model.optim.sched.last_epoch": "the step is restored from the checkpoint",
    "model.nsys_profile*": "use a profiler from outside: nsys profile -t cuda,nvtx …",
    "model.apex_transformer_log_level": _KERNELS,
    "model.gradient_as_bucket_view": _KERNELS,
    "model.inductor*": _KERNELS,
    "model.capture_cudagraph_iters": _KERNELS,
    "model.channels_last": _KERNELS,
    "model.fused_opt": "use model.optim.name=fused_adam",
    "model.fsdp_grad_reduce_dtype": "gradients are reduced in their own precision",
    "model.fsdp_sharded_checkpoint": "a checkpoint is read under any layout",
    "model.fsdp_cpu_offload": "states stay on the device",
    "model.fsdp_use_orig_params": "FSDP2 keeps the parameters as they are",
    "model.ddp_overlap": _KERNELS,
    "model.megatron_amp_O2": "use trainer.precision",
    "model.sequence_parallel": "what tensor parallelism leaves whole is small beside the rest",
    "model.precache_mode": "text is encoded while training",
    "model.image_logger*": "samples/ has a grid at every validation",
    "model.use_ema": "use exp_manager.ema.enable",
    "model.disable_first_stage_autocast": "use trainer.precision",
    **dict.fromkeys(
        (
            "model.linear_start", "model.linear_end", "model.timesteps", "model.beta_schedule", "model.cosine_s",
            "model.given_betas", "model.parameterization", "model.rescale_betas_zero_snr",
        ),
        "the noise schedule comes from the model's scheduler configuration",
    ),
    **dict.fromkeys(
        (
            "model.image_size", "model.channels", "model.conditioning_key", "model.scale_factor", "model.scale_by_std",
            "model.first_stage_key", "model.cond_stage_key", "model.cond_stage_trainable", "model.cond_stage_forward",
            "model.concat_mode", "model.use_positional_encodings", "model.is_legacy",
        ),
        _ARCHITECTURE,
    ),
    **dict.fromkeys(
        (
            "model.num_timesteps_cond", "model.log_every_t", "model.monitor", "model.ckpt_path", "model.ignore_keys*",
            "model.clip_denoised", "model.load_only_unet", "model.original_elbo_weight", "model.v_posterior",
            "model.l_simple_weight", "model.learn_logvar", "model.logvar_init", "model.loss_type",
            "model.text_embedding_dropout_rate", "model.target", "model.nemo_version",
        ),
        _PRETRAINING,
    ),
}  # fmt: skip

_WHOLE_MODEL = "give the model as model.from_pretrained or model.unet_config.from_pretrained"
_RESUME = "use exp_manager.resume_if_exists=true in the run's own directory"

# key -> (values at which it changes nothing, what to do instead)
NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.restore_from_path": ((None, ""), _WHOLE_MODEL),
    "pretrained_checkpoint.restore_from_path": ((None, ""), _WHOLE_MODEL),
    "model.resume_from_checkpoint": ((None, ""), _RESUME),
    "exp_manager.resume_from_checkpoint": ((None, ""), _RESUME),
    "model.peft.restore_from_path": ((None, ""), "use exp_manager.resume_if_exists=true to go on with a run's adapter"),
    "model.pipeline_model_parallel_size": ((None, 1), "leave it at 1"),
    "model.context_parallel_size": ((None, 1), "leave it at 1"),
    "model.data.webdataset.object_store": ((None, False), "copy the shards to a local disk"),
    "model.data.train.webdataset.object_store": ((None, False), "copy the shards to a local disk"),
}  # fmt: skip


def reason_without_effect(key: str) -> str | None:
    """Why an accepted key does nothing; None for a key that is not of that kind."""
    pattern = pattern_without_effect(key)
    return None if pattern is None else WITHOUT_EFFECT[pattern]


def pattern_without_effect(key: str) -> str | None:
    """The entry of :data:`WITHOUT_EFFECT` that lets ``key`` through."""
    return next((pattern for pattern in WITHOUT_EFFECT if fnmatch.fnmatchcase(key, pattern)), None)
