"""What PyTorch has no public way for; tests/test_parallel_private_api.py holds what each of them is to do."""

from __future__ import annotations

from datetime import timedelta

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """For collective calls on a group that exists already: one of a device mesh, which takes torch's default."""
    _set_pg_timeout(timeout, group)


def forget_load_hooks(module: nn.Module) -> None:
    """Take off the hooks that see a state dict before it is loaded: Megatron's layers invent entries in them."""
    module._load_state_dict_pre_hooks.clear()
