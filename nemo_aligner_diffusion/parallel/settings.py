"""Batch sizes, and how the processes share model and batch (``model.*``). No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.layout import FROZEN_PARTS, SHARDING_STRATEGIES, Layout
from nemo_aligner_diffusion.runtime.settings import MachineSettings
from nemo_aligner_diffusion.settings import BOOL, Kind, Settings, choice, integer, setting


@dataclass(frozen=True)
class LayoutSettings(Settings):
    """Batch sizes, and how the processes share model and batch."""

    section = "model"

    micro_batch_size: int = setting(
        8, integer(1), "pictures a process handles at once; integer >= 1; memory grows with it"
    )
    global_batch_size: int = setting(
        16,
        integer(1),
        "pictures an optimizer step; = micro_batch_size × data_parallel_size × accumulation (derived)",
    )
    tensor_model_parallel_size: int = setting(
        1,
        integer(1),
        "processes that share one model, each with a part of its wide layers; divides devices × num_nodes",
    )
    tensor_parallel_reward: bool = setting(
        False,
        BOOL,
        "cut the reward over the tensor-parallel processes too, where it is a CLIP; else each of them scores all",
    )
    tensor_parallel_text_encoder: bool = setting(
        False,
        BOOL,
        "cut the text encoders over them too, where they are T5, Qwen or the like; CLIP's small ones stay whole",
    )
    fsdp: bool = setting(
        False,
        BOOL,
        "shard weights, gradients, optimizer state over data-parallel processes (FSDP2), not replicas",
    )
    fsdp_sharding_strategy: str = setting(
        "full",
        choice(*SHARDING_STRATEGIES),
        "full: between forward and backward pass too; grad: gathered weights stay, more memory, less traffic",
    )
    fsdp_frozen: tuple[str, ...] | None = setting(
        None,
        Kind("texts", nullable=True),
        "frozen parts that fsdp shards too: a list of text_encoder, vae, reward; null: none",
    )
    offload: tuple[str, ...] | None = setting(
        None,
        Kind("texts", nullable=True),
        "frozen parts kept in host memory outside of their turn: a list of text_encoder, vae, reward; null: none",
    )
    activation_checkpointing: bool = setting(
        False,
        BOOL,
        "recompute the denoiser's inner activations in the backward pass: less memory, more time",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("fsdp_frozen", "offload"):
            unknown = [name for name in getattr(self, key) or () if name not in FROZEN_PARTS]
            if unknown:
                raise ConfigurationError(f"model.{key} names {unknown[0]!r}: expected any of {', '.join(FROZEN_PARTS)}")
        if both := sorted({*(self.fsdp_frozen or ())} & {*(self.offload or ())}):
            raise ConfigurationError(
                f"model.fsdp_frozen and model.offload both name {', '.join(both)}: what is sharded stays on the "
                "devices; leave it out of one of the two"
            )
        if self.fsdp_frozen and not self.fsdp:
            raise ConfigurationError(
                f"model.fsdp_frozen = {list(self.fsdp_frozen)} without model.fsdp: add model.fsdp=true, or leave it "
                "empty"
            )
        for part in ("reward", "text_encoder"):
            if getattr(self, f"tensor_parallel_{part}") and self.tensor_model_parallel_size == 1:
                raise ConfigurationError(
                    f"model.tensor_parallel_{part} = true with model.tensor_model_parallel_size = 1: there is no group "
                    f"to cut the {part.replace('_', ' ')} over; expected false, or a larger size"
                )

    @property
    def validation_batch_size(self) -> int:
        return max(self.micro_batch_size, 8)

    def layout(self, machine: MachineSettings) -> Layout:
        """Processes and what each is for.

        Raises:
            ConfigurationError: the machine's processes cannot be shared out so.
        """
        size, tensor = machine.world_size, self.tensor_model_parallel_size
        if size % tensor:
            fits = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
            raise ConfigurationError(
                f"{self.given('tensor_model_parallel_size')} does not divide the {size} processes "
                f"(trainer.devices × trainer.num_nodes = {machine.devices_per_node} × {machine.num_nodes}): expected "
                f"{_any_of(fits)}, or trainer.devices={tensor}"
            )
        if self.fsdp and size == tensor:
            raise ConfigurationError(
                f"model.fsdp = true with one data-parallel process (trainer.devices × trainer.num_nodes / "
                f"model.tensor_model_parallel_size = {size} / {tensor}): there is nothing to shard over; add devices, "
                "or model.fsdp=false"
            )
        return Layout(
            data=size // tensor,
            tensor=tensor,
            fsdp=self.fsdp,
            reshard_after_forward=self.fsdp_sharding_strategy == "full",
            sharded_frozen=self.fsdp_frozen or (),
            cut_reward=self.tensor_parallel_reward,
            cut_text_encoder=self.tensor_parallel_text_encoder,
        )

    def accumulation(self, machine: MachineSettings) -> int:
        """Micro-batches an optimizer step on each process:
        ``global_batch_size = micro_batch_size × data_parallel_size × accumulation``.

        Raises:
            ConfigurationError: the sizes don't divide; the message names numbers that would fit.
        """
        whole, micro, data = self.global_batch_size, self.micro_batch_size, self.layout(machine).data
        step = micro * data
        if whole % step == 0:
            return whole // step
        sizes = [size for size in (whole // step * step, (whole // step + 1) * step) if size]
        fits = [f"model.global_batch_size={_any_of(sizes)}"]
        if whole % data == 0:
            shares = [size for size in range(1, micro) if whole // data % size == 0]
            fits.append(f"model.micro_batch_size={shares[-1]}")
        tensor = self.tensor_model_parallel_size
        raise ConfigurationError(
            f"model.global_batch_size = {whole} is no multiple of model.micro_batch_size × data_parallel_size = "
            f"{micro} × {data} = {step} ({machine.devices_per_node} device(s) × {machine.num_nodes} node(s)"
            f"{f' / {tensor} tensor-parallel' if tensor > 1 else ''}). These would fit: {'; or '.join(fits)}"
        )


def _any_of(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
