"""One batch for all ranks of a tensor group, where reading it twice might give two."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def first_of_group(batch: Any, group: dist.ProcessGroup) -> Any:
    """The batch of the first rank of ``group``, on all of them: a collective call. It must pickle; CPU tensors do."""
    box = [batch]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]
