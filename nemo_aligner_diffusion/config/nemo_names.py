"""Keys that users of NeMo and NeMo-Aligner bring, and what becomes of them here.

Tables: :data:`ALIASES` (another spelling of a key we have), :data:`HALVES` (two that are one of ours),
:data:`WITHOUT_EFFECT` (accepted, named in one warning with the reason) and :data:`NOT_YET` (harmless at its neutral
value, an error at any other, because going on would train something else than what was asked for). Sources:
NeMo-Aligner 0.7 ``draftp_sd.yaml``, ``draftp_sdxl.yaml``, what its code reads besides, and its launch scripts; NeMo 2.0
``exp_manager`` and ``nlp_overrides``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
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
    "family": Alias("model.family"),  # as other groups of conf/ are picked
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
    "model.infer.vae_batch_size": Alias("model.decode_micro_batch_size"),
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
    "model.nsys_profile.enabled": Alias("model.profile.nsys"),
    "model.nsys_profile.gen_shape": Alias("model.profile.shapes"),
    **{
        f"model.nsys_profile.{key}": Alias(f"model.profile.{key}", weak=True)
        for key in ("start_step", "end_step", "ranks")
    },
}

# SDXL's size and crop conditioning: argument of the pipeline -> the two keys of NeMo's that it is made of
HALVES: dict[str, tuple[str, str]] = {
    "model.pipeline.arguments.original_size": (*("model.sampling.base.orig_height", "model.sampling.base.orig_width"),),
    "model.pipeline.arguments.crops_coords_top_left": (
        *("model.sampling.base.crop_coords_top", "model.sampling.base.crop_coords_left"),
    ),
}

# Why keys do nothing, and the keys as shell-style patterns; of several that fit a key the longest counts.
_BY_REASON = {
    "it belongs to pretraining the model, not to reward fine-tuning": """
        model.data.synthetic_data* model.data.train.filterings* model.data.train.augmentations* model.loss_fn_config*
        model.num_timesteps_cond model.log_every_t model.monitor model.ckpt_path model.ignore_keys* model.clip_denoised
        model.load_only_unet model.original_elbo_weight model.v_posterior model.l_simple_weight model.learn_logvar
        model.logvar_init model.loss_type model.text_embedding_dropout_rate model.target model.nemo_version""",
    "the networks' shapes come from the checkpoint's own configuration": """
        model.infer.down_factor model.unet_config.* model.first_stage_config.* model.cond_stage_config.*
        model.conditioner_config* model.image_size model.channels model.conditioning_key model.scale_factor
        model.scale_by_std model.first_stage_key model.cond_stage_key model.cond_stage_trainable
        model.cond_stage_forward model.concat_mode model.use_positional_encodings model.is_legacy""",
    "kernels and memory formats are chosen by this project": """
        trainer.benchmark model.optim.bucket_cap_mb model.optim.overlap_grad_sync model.optim.overlap_param_sync
        model.optim.contiguous_grad_buffer model.optim.contiguous_param_buffer model.optim.grad_sync_dtype
        model.optim.capturable model.optim.master_weights model.apex_transformer_log_level model.gradient_as_bucket_view
        model.inductor* model.capture_cudagraph_iters model.channels_last model.ddp_overlap
        model.transformer_engine model.fsdp_limit_all_gathers model.fsdp_set_buffer_dtype fsdp_set_buffer_dtype""",
    "PyTorch Lightning is set up by this project": """
        trainer.enable_model_summary trainer.enable_progress_bar trainer.num_sanity_val_steps trainer.limit_test_batches
        trainer.sync_batchnorm trainer.use_distributed_sampler trainer.replace_sampler_ddp trainer.detect_anomaly
        trainer.profiler trainer.plugins* trainer.callbacks* trainer.overfit_batches
        exp_manager.create_early_stopping_callback exp_manager.early_stopping_callback_params*
        exp_manager.seconds_to_sleep""",
    "the noise schedule comes from the model's scheduler configuration": """
        model.noise_scheduler* model.linear_start model.linear_end model.timesteps model.beta_schedule model.cosine_s
        model.given_betas model.parameterization model.rescale_betas_zero_snr""",
    "TensorBoard and W&B are the loggers here": """
        exp_manager.create_mlflow_logger exp_manager.mlflow_logger_kwargs* exp_manager.create_dllogger_logger
        exp_manager.dllogger_logger_kwargs* exp_manager.create_clearml_logger exp_manager.clearml_logger_kwargs*
        exp_manager.create_neptune_logger exp_manager.neptune_logger_kwargs*""",
    "the reward runs inside the training processes, on their devices": """
        rm.trainer* rm.model.pipeline_model_parallel_size rm.model.global_batch_size rm.model.devices""",
    "use trainer.precision": "model.trainer* model.precision model.megatron_amp_O2 model.disable_first_stage_autocast",
    "checkpoints are written by trainer.<recipe>.save_interval": """
        trainer.enable_checkpointing exp_manager.create_checkpoint_callback exp_manager.checkpoint_callback_params.*
        """,
    "metrics.csv always has the pictures per second": """
        exp_manager.log_step_timing exp_manager.step_timing_kwargs* exp_manager.log_tflops_per_sec_per_gpu""",
    "it belongs to NeMo's own picture writer; pictures here are made by examples/mm/stable_diffusion/generate.py": """
        model.infer.output_type model.infer.save_to_file model.infer.out_path""",
    "use model.micro_batch_size": """
        model.infer.inference_batch_size_per_gpu model.data.train.batch_size model.data.validation.batch_size""",
    "prompts stream from local shards": """
        model.data.webdataset.* model.data.train.webdataset.* model.data.validation.webdataset.*""",
    "validation follows trainer.<recipe>.val_check_interval": """
        trainer.check_val_every_n_epoch exp_manager.disable_validation_on_resume""",
    "the best checkpoints are those of the highest validation reward": """
        exp_manager.checkpoint_callback_params.monitor exp_manager.checkpoint_callback_params.mode""",
    "the first process alone writes": "exp_manager.log_local_rank_0_only exp_manager.log_global_rank_0_only",
    "use model.data.validation.seeds": "model.infer.num_images_per_prompt model.infer.seed",
    "use model.data.num_workers": "model.data.train.num_workers model.data.validation.num_workers",
    "the names in the file tell whether NeMo, CompVis or diffusers wrote it": """
        model.unet_config.from_NeMo model.first_stage_config.from_NeMo""",
    "adapters start at zero, the way `peft` sets them up": """
        model.peft.lora_tuning.column_init_method model.peft.lora_tuning.row_init_method""",
    "adapters share no weights": """
        model.peft.lora_tuning.weight_tying model.peft.lora_tuning.position_embedding_strategy""",
    "the rate follows the step, not a metric": "model.optim.sched.monitor model.optim.sched.reduce_on_plateau",
    "accumulation follows from the batch sizes": "trainer.accumulate_grad_batches",
    "loggers are chosen by exp_manager": "trainer.logger",
    "trainer.<recipe>.max_steps ends the training": "trainer.limit_train_batches trainer.*.limit_train_batches",
    "metrics are those of docs/using_the_result.md": "trainer.*.inference_metrics*",
    "use exp_manager.max_time_per_run": "trainer.max_time",
    "the strategy follows from the number of devices": "trainer.strategy",
    "gradients are clipped by their norm": "trainer.gradient_clip_algorithm",
    "every draw follows from model.seed": "trainer.deterministic",
    "use exp_manager.explicit_log_dir": "trainer.default_root_dir",
    "use trainer.<recipe>.max_steps": "trainer.fast_dev_run",
    "the newest are always kept, as keep_last_n says": "exp_manager.checkpoint_callback_params.save_last",
    "Ctrl-C and SIGTERM always leave a usable export": "exp_manager.create_preemption_callback",
    "ranks are compared by the time of their own work": "exp_manager.straggler_detection_params.*",
    "torchrun --max-restarts and Slurm's requeue start a run again": "exp_manager.fault_tolerance.*",
    "TensorBoard writes into the run directory": "exp_manager.summary_writer_kwargs*",
    "config.yaml holds everything a run was made from": "exp_manager.files_to_copy",
    "use exp_manager.explicit_log_dir or exp_manager.version": "exp_manager.use_datetime_version",
    "raise trainer.<recipe>.max_steps to go on after the end": "exp_manager.resume_past_end",
    "use validate_original_weights": "exp_manager.ema.evaluate_ema_weights_instead",
    "use exp_manager.ema.every_n_steps": "exp_manager.ema.apply_ema_every_n_steps",
    "the average starts at the first step": "exp_manager.ema.start_step",
    "use model.tensor_model_parallel_size": "exp_manager.model_parallel_size",
    "hydra only reads the configuration here: it makes no folders and no log files": "hydra*",
    "the reward is chosen by rm.name and its file": "reward_model",
    "use rm.trainer.precision": "rm.model.precision",
    "use model.tensor_parallel_reward": "rm.model.tensor_model_parallel_size",
    "use rm.model.restore_from_path": "rm.name_or_path",
    "there is no refiner stage": "model.sampling.refiner*",
    "it is the refiner's": "model.sampling.base.aesthetic_score model.sampling.base.negative_aesthetic_score",
    "the sampler is a `diffusers` scheduler, set by model.infer": "model.sampling.base.*",
    "use model.data.validation.prompts": "model.infer.prompts*",
    "prompts stream from shards": "model.data.dataloader_type",
    "prompts are shuffled within model.data.shuffle_buffer": "model.data.shuffle_data",
    "the prediction type comes from the model's scheduler configuration": "model.denoiser_config*",
    "use model.peft.lora_tuning.target_modules": "model.peft.lora_tuning.layer_selection",
    "the schedule ends with trainer.<recipe>.max_steps": "model.optim.sched.max_steps",
    "the step is restored from the checkpoint": "model.optim.sched.last_epoch",
    "use model.optim.name=fused_adam": "model.fused_opt",
    "gradients are reduced in their own precision": "model.fsdp_grad_reduce_dtype",
    "a checkpoint is read under any layout": "model.fsdp_sharded_checkpoint",
    "states stay on the device": "model.fsdp_cpu_offload",
    "FSDP2 keeps the parameters as they are": "model.fsdp_use_orig_params",
    "what tensor parallelism leaves whole is small beside the rest": "model.sequence_parallel",
    "text is encoded while training": "model.precache_mode",
    "samples/ has a grid at every validation": "model.image_logger*",
    "use exp_manager.ema.enable": "model.use_ema",
}  # fmt: skip
WITHOUT_EFFECT: dict[str, str] = {
    pattern: reason for reason, patterns in _BY_REASON.items() for pattern in patterns.split()
}

_WHOLE_MODEL = "give the model as model.from_pretrained or model.unet_config.from_pretrained"
_RESUME = "use exp_manager.resume_if_exists=true in the run's own directory"

# key -> (values at which it changes nothing, what to do instead)
NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.restore_from_path": ((None, ""), _WHOLE_MODEL),
    "pretrained_checkpoint.restore_from_path": ((None, ""), _WHOLE_MODEL),
    "model.resume_from_checkpoint": ((None, ""), _RESUME),
    "exp_manager.resume_from_checkpoint": ((None, ""), _RESUME),
    "model.pipeline_model_parallel_size": ((None, 1), "leave it at 1"),
    "model.context_parallel_size": ((None, 1), "leave it at 1"),
    "model.data.webdataset.object_store": ((None, False), "copy the shards to a local disk"),
    "model.data.train.webdataset.object_store": ((None, False), "copy the shards to a local disk"),
}  # fmt: skip


def pattern_of(key: str, patterns: Iterable[str]) -> str | None:
    """The longest of shell-style ``patterns`` that fits ``key``."""
    return max((pattern for pattern in patterns if fnmatch.fnmatchcase(key, pattern)), key=len, default=None)
