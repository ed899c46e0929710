"""Tensor parallelism and FSDP2 in groups of one process: what one device can run, NCCL on a GPU included."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: NCCL cannot run")


def step(device: str, fsdp: bool) -> tuple[float, float]:
    """How far the gradient of a model spread over groups of one is from the plain one; and the ratio of the norms."""
    import copy

    from tiny.stable_diffusion import tiny_stable_diffusion
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.diffusion.lora import add_lora
    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.parallelism import Parallelism
    from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

    plain = tiny_stable_diffusion(torch.float64).to(device)
    add_lora(plain.denoiser, 4, 8.0, target_modules=("to_q", "to_out.0", "ff.net.0.proj", "conv1", "conv2"))
    with torch.no_grad():
        for name, parameter in plain.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    spread = copy.deepcopy(plain)
    mesh = init_device_mesh(device, (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    parallel = Parallelism(Layout(fsdp=fsdp))
    apply_tensor_parallel(spread.denoiser, mesh["tensor_parallel"].get_group())
    parallel.apply(mesh, [spread.denoiser], {})

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=generator).to(device)
    states = torch.randn(2, 8, 16, dtype=torch.float64, generator=generator).to(device)
    named = []
    for model in (plain, spread):
        model.denoiser(latents, torch.tensor(500, device=device), states).sample.square().mean().backward()
        named.append([(name, p) for name, p in model.denoiser.named_parameters() if p.requires_grad])
    parallel.average_gradients(named[1])
    mine = {name: parallel.placement(name).full(parameter.grad) for name, parameter in named[1]}
    theirs = {name: parameter.grad for name, parameter in named[0]}
    assert mine.keys() == theirs.keys()
    apart = max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    norm = float(torch.nn.utils.get_total_norm(list(theirs.values())))
    return apart, parallel.gradient_norm(named[1]) / norm


@pytest.mark.parametrize("fsdp", [False, True], ids=["replica", "fsdp2"])
def test_groups_of_one_on_the_cpu(processes, fsdp):
    ((apart, ratio),) = processes.run(1, step, "cpu", fsdp)
    assert apart < 1e-10
    assert ratio == pytest.approx(1.0, rel=1e-6)  # each tensor's norm is taken in float32


def _with_nccl(store: str, fsdp: bool, answers) -> None:
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.FileStore(store, 1), rank=0, world_size=1)
    answers.put(step("cuda", fsdp))
    dist.destroy_process_group()


@needs_gpu
@pytest.mark.parametrize("fsdp", [False, True], ids=["replica", "fsdp2"])
def test_groups_of_one_with_nccl(tmp_path, fsdp):
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_with_nccl, args=(str(tmp_path / "store"), fsdp, answers))
    process.start()
    apart, ratio = answers.get(timeout=300)
    process.join(60)
    assert apart < 1e-10
    assert ratio == pytest.approx(1.0, rel=1e-6)
