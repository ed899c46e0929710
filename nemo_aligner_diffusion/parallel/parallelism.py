"""The one object through which training sees the layout: applied to a model from outside, asked about gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.placements import Placement, local_part, placements
from nemo_aligner_diffusion.runtime.health.progress import waiting

Named = Sequence[tuple[str, Parameter]]
BUCKET_BYTES = 64 * 2**20  # of one all-reduce: large enough for the link's full speed, small beside the model


class Parallelism:
    """A :class:`Layout` at work. Without a mesh (one process) everything here is local and free.

    Order of application, always on whole, unmodified modules: tensor parallelism (modules are replaced by slices of
    themselves), then FSDP2 over the data-parallel group. Adapters and the frozen reference copy exist before it, so
    that a run starts from the same numbers under any layout.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout or Layout()
        self.mesh: Any = None  # DeviceMesh ("data_parallel", "tensor_parallel")
        self._placements: dict[str, Placement] = {}
        self._sharded: list[Any] = []  # roots of FSDP2

    def apply(self, mesh: Any, denoisers: Sequence[nn.Module], frozen: dict[str, nn.Module]) -> None:
        """Cut and shard; once.

        Args:
            mesh: the strategy's device mesh.
            denoisers: the trained one first, then a frozen reference copy if there is one.
            frozen: by the names of :data:`.FROZEN_PARTS`; those in ``layout.sharded_frozen`` are sharded.
        """
        if self.mesh is not None:
            return
        self.mesh = mesh
        for denoiser in denoisers:
            if self.layout.tensor > 1:
                from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

                apply_tensor_parallel(denoiser, self.tensor_group)
        for part in ("reward", "text_encoder"):
            if getattr(self.layout, f"cut_{part}"):
                self._cut_frozen(part, frozen[part])
        self._placements = placements(denoisers[0])
        if self.layout.fsdp:
            from nemo_aligner_diffusion.parallel.sharding import shard_denoiser, shard_frozen

            for denoiser in denoisers:
                shard_denoiser(denoiser, mesh["data_parallel"], self.layout.reshard_after_forward)
                self._sharded.append(denoiser)
            for name in self.layout.sharded_frozen:
                shard_frozen(frozen[name], mesh["data_parallel"], leave="text" if name == "reward" else None)

    @property
    def tensor_group(self) -> Any:
        return self.mesh["tensor_parallel"].get_group()

    @property
    def data_group(self) -> Any:
        return self.mesh["data_parallel"].get_group()

    @property
    def data_rank(self) -> int:
        """Rank in the data-parallel group; equal in a tensor group, whose processes do the same work."""
        return 0 if self.mesh is None else int(self.mesh.get_local_rank("data_parallel"))

    @property
    def holds_whole_weights(self) -> bool:
        """Whether this process can write the trained weights without asking another."""
        return self.layout.tensor == 1 and not self.layout.fsdp

    def placement(self, name: str) -> Placement:
        """Of a parameter of the trained denoiser."""
        return self._placements.get(name, Placement())

    def reshard(self) -> None:
        """Let go of gathered weights after calls without a backward pass, so that the parameters are shards again.

        With ``fsdp_sharding_strategy=grad`` FSDP2 keeps them gathered until a backward pass. Who then reads or changes
        parameters by name would meet copies that the next gathering overwrites.
        """
        for root in self._sharded:
            for module in root.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    def average_gradients(self, parameters: Named) -> None:
        """After the last backward pass of an optimizer step: every rank then holds the gradient of the global batch.

        FSDP2 has averaged over the data group already. A parameter that is whole on every rank of a tensor group has
        the same gradient there but for the order in which a device sums; the mean keeps its copies from drifting apart.
        One that each rank reads for its own heads has a part of its gradient there.
        """
        if self.mesh is None:
            return
        if not self.layout.fsdp:
            _average(_gradients(parameters), self.data_group)
        if self.layout.tensor > 1:
            for partial in (False, True):
                alike = [named for named in self._whole(parameters) if self.placement(named[0]).partial == partial]
                _average(_gradients(alike), self.tensor_group, divide=not partial)

    def gradient_norm(self, parameters: Named) -> float:
        """The 2-norm of the whole gradient, each number of it counted once; equal on every rank."""
        if self.mesh is None:
            return float(torch.nn.utils.get_total_norm(_gradients(parameters)))
        whole = self._whole(parameters)
        cut = [(name, parameter) for name, parameter in parameters if self.placement(name).cut is not None]
        held = [[local_part(gradient) for gradient in _gradients(part)] for part in (whole, cut)]
        norms = [torch.nn.utils.get_total_norm(part).to(parameters[0][1].device) for part in held]
        squares = torch.stack(norms).double().square()
        if self.layout.fsdp:
            dist.all_reduce(squares, group=self.data_group)
        if self.layout.tensor > 1:
            dist.all_reduce(squares[1], group=self.tensor_group)
        return float(squares.sum().sqrt())

    def clip_gradients(self, parameters: Named, norm: float, limit: float) -> None:
        """Scale the gradient down to ``limit`` if its norm is larger, as ``torch.nn.utils.clip_grad_norm_`` does."""
        if self.mesh is None:
            whole = [parameter for _, parameter in parameters]
            torch.nn.utils.clip_grads_with_norm_(whole, limit, torch.tensor(norm, device=whole[0].device))
            return
        factor = min(limit / (norm + 1e-6), 1.0)
        if factor < 1.0:
            for gradient in _gradients(parameters):
                local_part(gradient).mul_(factor)

    def _cut_frozen(self, name: str, part: nn.Module) -> None:
        from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel, outermost_with_plan

        key, towers = f"model.tensor_parallel_{name}", outermost_with_plan(part)
        if not towers:
            kinds = ", ".join(sorted({type(module).__name__ for module in (part, *part.children())}))
            raise ConfigurationError(
                f"{key} = true, but there is no tensor-parallel plan for any part of the {name.replace('_', ' ')} "
                f"({kinds}); set it to false"
            )
        for tower in towers:
            apply_tensor_parallel(tower, self.tensor_group, key=f"{key}: model.tensor_model_parallel_size")

    def _whole(self, parameters: Named) -> list[tuple[str, Parameter]]:
        return [(name, parameter) for name, parameter in parameters if self.placement(name).cut is None]


def _gradients(parameters: Named) -> list[Tensor]:
    return [parameter.grad for _, parameter in parameters if parameter.grad is not None]


def _average(tensors: Sequence[Tensor], group: Any, divide: bool = True) -> None:
    """Replace each tensor by its mean (or sum) over ``group``, in place; few large messages, not many small ones."""
    size = dist.get_world_size(group)
    if size == 1:
        return
    for bucket in _buckets([local_part(tensor) for tensor in tensors]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with waiting():  # the others' slowness is not this rank's work
            dist.all_reduce(flat, group=group)
        if divide:
            flat /= size
        for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
