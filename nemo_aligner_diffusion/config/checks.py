"""Checks that need more than one key: batch arithmetic, steps, reward. They fail before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, ListConfig

from nemo_aligner_diffusion.algorithms.custom import is_import_path
from nemo_aligner_diffusion.algorithms.registry import method_of
from nemo_aligner_diffusion.config.reward_checks import check_reward
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.layout import FROZEN_PARTS


@dataclass(frozen=True)
class Derived:
    """What follows from the configuration's numbers.

    Attributes:
        world_size: processes, ``devices × num_nodes``.
        data_parallel_size: ``world_size / tensor_model_parallel_size``.
        accumulation: micro batches an optimizer step, on each process.
        tensor_parallel_size: processes that share each sample.
    """

    world_size: int
    data_parallel_size: int
    accumulation: int
    tensor_parallel_size: int = 1


def devices_per_node(cfg: DictConfig) -> int:
    devices = cfg.trainer.devices
    return len(devices) if isinstance(devices, list | tuple | ListConfig) else int(devices)


def world_size(cfg: DictConfig) -> int:
    """Processes of the run."""
    return int(cfg.trainer.num_nodes) * devices_per_node(cfg)


def precision_name(cfg: DictConfig) -> str:
    """Lightning's full name of ``trainer.precision``: NeMo's ``bf16`` and ``16`` mean mixed precision."""
    name = str(cfg.trainer.precision)
    return f"{name}-mixed" if name in ("16", "bf16") else name


def check_precision(cfg: DictConfig) -> None:
    """Several processes compute in what Lightning's ``ModelParallelStrategy`` takes: no loss scale, no float64.

    Raises:
        ConfigurationError: they would not.
    """
    name, processes = precision_name(cfg), world_size(cfg)
    if processes > 1 and name in ("16-mixed", "64", "64-true"):
        why = "numbers of 64 bits are for one" if name != "16-mixed" else "each would have a loss scale of its own"
        raise ConfigurationError(
            f"trainer.precision = {cfg.trainer.precision} with {processes} processes (trainer.devices × "
            f"trainer.num_nodes): {why}; expected 32 or bf16"
        )


def derived(cfg: DictConfig) -> Derived:
    """Batch arithmetic: ``global_batch_size = micro_batch_size × data_parallel_size × accumulation``.

    Raises:
        ConfigurationError: the sizes don't divide; the message names numbers that would fit.
    """
    nodes, devices = int(cfg.trainer.num_nodes), devices_per_node(cfg)
    tensor_parallel = int(cfg.model.tensor_model_parallel_size)
    size = world_size(cfg)
    if size % tensor_parallel:
        fits = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
        raise ConfigurationError(
            f"model.tensor_model_parallel_size = {tensor_parallel} does not divide the {size} processes "
            f"(trainer.devices × trainer.num_nodes = {devices} × {nodes}): expected {_any_of(fits)}, or "
            f"trainer.devices={tensor_parallel}"
        )
    data_parallel = size // tensor_parallel
    micro, whole = int(cfg.model.micro_batch_size), int(cfg.model.global_batch_size)
    if whole % (micro * data_parallel):
        raise ConfigurationError(_batch_mismatch(whole, micro, data_parallel, nodes, devices, tensor_parallel))
    return Derived(size, data_parallel, whole // (micro * data_parallel), tensor_parallel)


def _batch_mismatch(whole: int, micro: int, data_parallel: int, nodes: int, devices: int, tensor_parallel: int) -> str:
    step = micro * data_parallel
    below, above = whole // step * step, (whole // step + 1) * step
    fits = [f"model.global_batch_size={' or '.join(str(size) for size in (below, above) if size)}"]
    if whole % data_parallel == 0:
        share = whole // data_parallel
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        nearest = sorted(sorted(sizes, key=lambda size: abs(size - micro))[:3])
        fits.append(f"model.micro_batch_size={' or '.join(map(str, nearest))}")
    elif whole % micro == 0:
        shares = [
            size
            for size in range(1, devices)
            if (whole // micro * tensor_parallel) % (size * nodes) == 0 and size * nodes % tensor_parallel == 0
        ]
        if shares:
            fits.append(f"trainer.devices={shares[-1]}")
    return (
        f"model.global_batch_size = {whole} is no multiple of model.micro_batch_size × data_parallel_size = "
        f"{micro} × {data_parallel} = {step} ({devices} device(s) × {nodes} node(s)"
        f"{f' / {tensor_parallel} tensor-parallel' if tensor_parallel > 1 else ''}). "
        f"These would fit: {'; or '.join(fits)}"
    )


def _any_of(sizes: list[int]) -> str:
    return " or ".join([", ".join(map(str, sizes[:-1])), str(sizes[-1])] if len(sizes) > 1 else map(str, sizes))


def _check_parallel(cfg: DictConfig) -> None:
    model, sizes = cfg.model, derived(cfg)
    unknown = [part for part in model.fsdp_frozen or () if part not in FROZEN_PARTS]
    if unknown:
        raise ConfigurationError(f"model.fsdp_frozen names {unknown[0]!r}: expected any of {', '.join(FROZEN_PARTS)}")
    if model.fsdp_frozen and not model.fsdp:
        raise ConfigurationError(
            f"model.fsdp_frozen = {list(model.fsdp_frozen)} without model.fsdp: add model.fsdp=true, or leave it empty"
        )
    if model.tensor_parallel_reward and sizes.tensor_parallel_size == 1:
        raise ConfigurationError(
            "model.tensor_parallel_reward = true with model.tensor_model_parallel_size = 1: there is no group to cut "
            "the reward over; expected false, or a larger size"
        )
    if model.fsdp and sizes.data_parallel_size == 1:
        raise ConfigurationError(
            f"model.fsdp = true with one data-parallel process (trainer.devices × trainer.num_nodes / "
            f"model.tensor_model_parallel_size = {sizes.world_size} / {sizes.tensor_parallel_size}): there is nothing "
            "to shard over; add devices, or model.fsdp=false"
        )


def check(cfg: DictConfig) -> None:
    """Every check that needs no file and no torch.

    Raises:
        ConfigurationError: naming the keys, their values and what would be right.
    """
    check_precision(cfg)
    _check_parallel(cfg)
    if not is_import_path(cfg.model.algorithm):  # a user's own module is imported when training begins
        method_of(cfg).check(int(cfg.model.infer.inference_steps))
    for side in ("height", "width"):
        pixels = cfg.model.infer[side]
        if pixels is not None and pixels % 8:
            raise ConfigurationError(
                f"model.infer.{side} = {pixels}: expected a multiple of 8 pixels, such as {pixels // 8 * 8 or 8} "
                f"or {pixels // 8 * 8 + 8}"
            )
    _check_sampler(cfg)
    check_reward(cfg)
    _check_loop(cfg)


def _check_sampler(cfg: DictConfig) -> None:
    infer = cfg.model.infer
    if infer.eta and infer.sampler_type not in (None, "DDIM", "PARA_DDIM"):
        raise ConfigurationError(
            f"model.infer.eta = {infer.eta} with model.infer.sampler_type = {infer.sampler_type}: eta is DDIM's own; "
            "expected 0, or sampler_type=DDIM"
        )


def _check_loop(cfg: DictConfig) -> None:
    for name, section in cfg.trainer.items():
        if isinstance(section, DictConfig):
            limit = section.limit_val_batches
            if isinstance(limit, float) and limit > 1:
                if limit == int(limit):
                    section.limit_val_batches = int(limit)
                else:
                    raise ConfigurationError(
                        f"trainer.{name}.limit_val_batches = {limit}: expected a whole number of batches, or a "
                        "fraction up to 1.0"
                    )
