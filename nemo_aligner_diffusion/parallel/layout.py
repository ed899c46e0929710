"""How many processes there are and what each is for; numbers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

SHARDING_STRATEGIES = ("full", "grad")
FROZEN_PARTS = ("text_encoder", "vae", "reward")


@dataclass(frozen=True)
class Layout:
    """``data × tensor`` processes; rank ``= data_rank * tensor + tensor_rank``, so tensor groups are neighbours.

    Attributes:
        data: data-parallel size: groups that see different samples.
        tensor: tensor-parallel size: processes of a group, which share every sample.
        fsdp: shard parameters, gradients and optimizer state over the data-parallel group (FSDP2); else replicas.
        reshard_after_forward: free a block's gathered weights after its forward pass and gather them again for its
            backward pass (``full``), or keep them in between (``grad``: more memory, less traffic).
        sharded_frozen: frozen parts that are sharded too, of :data:`FROZEN_PARTS`.
        cut_reward: cut the reward's CLIP over the tensor group too.
        cut_text_encoder: and text encoders that there is a plan for.
    """

    data: int = 1
    tensor: int = 1
    fsdp: bool = False
    reshard_after_forward: bool = True
    sharded_frozen: tuple[str, ...] = ()
    cut_reward: bool = False
    cut_text_encoder: bool = False

    @property
    def world_size(self) -> int:
        return self.data * self.tensor

    @property
    def is_single(self) -> bool:
        return self.world_size == 1
