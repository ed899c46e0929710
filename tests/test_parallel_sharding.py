"""What FSDP2 gathers, and when it lets go of it: counted in the real calls of two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

ACTIVE = (2, 3)  # of four steps: two replays in one backward pass


def whole_here(module: torch.nn.Module) -> int:
    """How many numbers of its parameters this rank holds beside its shards."""
    from nemo_aligner_diffusion.parallel.placements import is_sharded

    return sum(parameter.numel() for parameter in module.parameters() if not is_sharded(parameter))


def replay(what: str, cut: bool, checkpointing: bool, strategy: str) -> dict[str, float]:
    """One trajectory and its backward pass, sharded and not: the most that was gathered, and how far gradients are."""
    import copy

    from diffusers.models.resnet import ResnetBlock2D
    from tiny.stable_diffusion import tiny_stable_diffusion
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    from nemo_aligner_diffusion.diffusion.lora import add_lora
    from nemo_aligner_diffusion.diffusion.noise import sample_generator
    from nemo_aligner_diffusion.diffusion.plan import Plan
    from nemo_aligner_diffusion.diffusion.trajectory import rollout
    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.parallelism import Parallelism

    plain = tiny_stable_diffusion(torch.float64, channels=(16, 32))
    plain.denoiser.train().requires_grad_(what == "full")
    if what == "LoRA":
        add_lora(plain.denoiser, 4, 8.0, 0.0, ("to_q", "to_out.0"))
        for name, parameter in plain.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
    sharded = copy.deepcopy(plain)
    if checkpointing:
        sharded.denoiser.enable_gradient_checkpointing()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    parallel = Parallelism(Layout(data=2, fsdp=True, reshard_after_forward=strategy == "full"))
    parallel.apply(mesh, [sharded.denoiser], {})

    held: list[int] = []
    called: list[torch.nn.Module] = []

    def look(*_: Any) -> None:
        held.append(whole_here(sharded.denoiser))

    def look_on_the_way_back(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(look)

    def backward(model: Any) -> dict[str, torch.Tensor]:
        result = rollout(
            model,
            lambda path, rng: Plan(active=ACTIVE, cut=cut),
            [sample_generator(0, 0, sample) for sample in range(2)],
            model.inputs(["red", "blue"], steps=4, guidance_scale=3.0),
            lambda images, rows, read: images.square().mean((1, 2, 3)),
        )
        result.surrogate().backward()
        return {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}

    expected = {name: p.grad for name, p in backward(plain).items()}
    blocks = [module for module in sharded.denoiser.modules() if isinstance(module, ResnetBlock2D)]
    hooks = [register_module_forward_pre_hook(look), register_module_forward_hook(look_on_the_way_back)]
    hooks += [block.register_forward_pre_hook(lambda block, _: called.append(block)) for block in blocks]
    found = {name: parallel.placement(name).full(p.grad) for name, p in backward(sharded).items()}
    for hook in hooks:
        hook.remove()
    total = sum(parameter.numel() for parameter in sharded.denoiser.parameters())
    return {
        "gathered": max(held) / total,
        "left": whole_here(sharded.denoiser) / total,
        "calls": len(called) / len(blocks),
        "apart": max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected),
    }


@pytest.mark.parametrize(
    ("what", "cut", "checkpointing"),
    [("full", False, False), ("full", False, True), ("LoRA", True, True)],
    ids=["full", "full, checkpointing", "LoRA, cut, checkpointing"],
)
def test_a_replay_gathers_a_few_blocks_at_a_time(processes, what, cut, checkpointing):
    """The trajectory recomputes whole network calls in the backward pass; FSDP2 alone would keep all they gather."""
    for rank in processes.run(2, replay, what, cut, checkpointing, "full"):
        assert 0.1 < rank["gathered"] < 0.4  # of the denoiser: the root's part is 0.11, the largest block's 0.13
        # four steps and two replays; checkpointing calls again what has an inside to recompute
        assert rank["calls"] > 7 if checkpointing else rank["calls"] == 6
        assert rank["left"] == 0
        assert rank["apart"] < 1e-10


def test_the_other_strategy_gathers_once(processes):
    for rank in processes.run(2, replay, "full", False, False, "grad"):
        assert rank["gathered"] == 1
        assert rank["left"] == 0
        assert rank["apart"] < 1e-10


def blocks_of_every_pipeline() -> dict[str, tuple[float, float]]:
    """Of the trained network of every tiny pipeline: the share of its layers' numbers that are gathered block by block,
    and how far its first output is from the one of the whole network, sharded over one process."""
    import torch.distributed as dist
    from tiny.cut_transformers import built
    from tiny_pipelines import ROWS
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.parallel.sharding import _listed, gathered_blocks, shard_denoiser

    def numbers(modules: list[torch.nn.Module]) -> int:
        return sum(p.numel() for p in {parameter for module in modules for parameter in module.parameters()})

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for row in ROWS:
        if row.needs is not None:
            continue
        model, args, kwargs = built(row.name)
        share = numbers(gathered_blocks(model)) / numbers(_listed(model, None))
        model.requires_grad_(True)
        outputs = []
        for sharded in (False, True):
            if sharded:
                shard_denoiser(model, mesh, True)
            torch.manual_seed(0)
            output = model(*args, **kwargs)[0]
            outputs.append(torch.stack(tuple(output)) if isinstance(output, list) else output)
        found[row.name] = (share, float((outputs[1] - outputs[0]).detach().abs().max()))
    return found


@pytest.mark.slow
def test_every_denoiser_is_gathered_by_blocks(processes):
    (found,) = processes.run(1, blocks_of_every_pipeline)
    assert len(found) > 50
    print({name: round(share, 2) for name, (share, _) in found.items() if share < 0.99})
    assert all(apart == 0 for _, apart in found.values()), found
    assert all(share >= 0.5 for share, _ in found.values()), found  # of DiT's two blocks, one


def frozen_parts() -> list[dict[str, int]]:
    """Of frozen parts: sizes; what is whole here, and calls that FSDP2 remembers, before, after one use, after ten."""
    from tiny.stable_diffusion import tiny_stable_diffusion
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.parallelism import Parallelism

    model = tiny_stable_diffusion()
    model.denoiser.requires_grad_(True)
    model.keep_reference()
    assert model.reference_denoiser is not None
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    parts = model.frozen_parts()
    sizes = {name: whole_here(part) for name, part in parts.items()}
    # "grad" is of no use to what has no backward pass
    parallel = Parallelism(Layout(data=2, fsdp=True, reshard_after_forward=False, sharded_frozen=tuple(parts)))
    parallel.apply(mesh, [model.denoiser, model.reference_denoiser], parts)
    parts["reference"] = model.reference_denoiser
    sharded = [module for part in parts.values() for module in part.modules() if hasattr(module, "reshard")]

    def use() -> dict[str, int]:
        with model.reference():
            generate(model, ["red", "blue"], [0, 1], Sampling(1, 3.0))
        held = {name: whole_here(part) for name, part in parts.items()}
        # FSDP2's own lists of calls, which no public name shows; what was never called (the VAE's encoder) has none
        contexts = [module._get_fsdp_state()._comm_ctx for module in sharded]
        return held | {"calls": sum(len(getattr(context, "post_forward_order", ())) for context in contexts)}

    before = {name: whole_here(part) for name, part in parts.items()} | {"calls": 0}
    return [sizes, before, use(), [use() for _ in range(9)][-1]]


def test_frozen_parts_are_let_go_after_every_call(processes):
    for sizes, before, once, often in processes.run(2, frozen_parts):
        assert before["reference"] == 0
        assert 0 < before["text_encoder"] < 0.8 * sizes["text_encoder"]  # its embeddings stay
        assert before["vae"] < 0.4 * sizes["vae"]
        assert once == before
        assert often == before


def spread_reward(layout: Any) -> dict[str, float]:
    """The share of each tower's numbers that this rank holds of a reward inside another."""
    from tiny.clip import toy_clip
    from tiny.stable_diffusion import tiny_stable_diffusion
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.parallel.parallelism import Parallelism
    from nemo_aligner_diffusion.parallel.placements import local_part
    from nemo_aligner_diffusion.rewards.augmentation import Augmentation
    from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
    from nemo_aligner_diffusion.rewards.support.augmented import AugmentedReward

    clip = toy_clip(text_heads=4)
    reward = AugmentedReward(CLIPReward(clip, None), Augmentation(noise_std=0.1))  # type: ignore[arg-type]
    towers = {"text": clip.text_model.encoder, "vision": clip.vision_model.encoder}

    def held(tower: torch.nn.Module) -> int:
        return sum(local_part(parameter).numel() for parameter in tower.parameters())

    whole = {name: held(tower) for name, tower in towers.items()}
    sizes = (layout.data, layout.tensor)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel"))
    Parallelism(layout).apply(mesh, [tiny_stable_diffusion().denoiser], {"reward": reward})
    return {name: held(tower) / whole[name] for name, tower in towers.items()}


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"data": 2, "fsdp": True}, (1, 1)),
        ({"data": 2, "fsdp": True, "sharded_frozen": ("reward",)}, (1, 0.5)),  # ranks meet other prompts
        ({"tensor": 2}, (1, 1)),
        ({"tensor": 2, "cut_reward": True}, (0.5, 0.5)),
    ],
)
def test_a_reward_is_spread_as_asked(processes, keys, shares):
    from nemo_aligner_diffusion.parallel.layout import Layout

    for rank in processes.run(2, spread_reward, Layout(**keys)):
        assert (rank["text"], rank["vision"]) == pytest.approx(shares, abs=0.06)
