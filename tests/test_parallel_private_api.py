"""What is used of PyTorch that is not public does what it is used for: a new version that changes it fails here."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nemo_aligner_diffusion.parallel.private_api import forget_load_hooks, set_timeout


def test_the_time_limit_of_a_group_that_exists() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group: Any = dist.group.WORLD
        set_timeout(group, timedelta(seconds=1234))
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=1234)
    finally:
        dist.destroy_process_group()


def test_a_layer_whose_load_hooks_are_forgotten_invents_no_entry() -> None:
    layer, seen = nn.Linear(2, 2), []
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: seen.append(prefix))
    layer.load_state_dict(layer.state_dict())
    assert seen == [""]
    forget_load_hooks(layer)
    layer.load_state_dict(layer.state_dict())
    assert seen == [""]
