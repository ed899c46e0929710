"""Small UNets of real block types in float64, and what a rank does with them: the cut model against the whole one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.placements import Placement, placements

TINY = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,  # heads, as diffusers names them
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    **TINY,
    "attention_head_dim": (4, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": TINY,
    "sd2": {**TINY, "use_linear_projection": True, "attention_head_dim": (4, 8), "upcast_attention": True},
    "sdxl": SDXL,
    # older block types: attention with its own group norm and residual, gated time embedding, resampling in blocks
    "scale_shift": {
        **TINY,
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
}
# every kind of layer that a user may adapt: cut over outputs, over inputs, or left whole
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj",
                "conv_shortcut", "proj_in", "proj_out", "conv_in", "linear_1")  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """A UNet with random weights everywhere, in float64."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    if name == "embedded":
        from nemo_aligner_diffusion.embedded_assets import embedded_model_path

        model = UNet2DConditionModel.from_pretrained(embedded_model_path() / "unet")
    else:
        model = UNet2DConditionModel.from_config(CONFIGS[name])
    model = model.to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros: too kind
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def add_adapters(model: Any, names: tuple[str, ...] = ("default",), dropout: float = 0.0, **options: Any) -> None:
    from peft import LoraConfig

    model.requires_grad_(False)
    for name in names:
        targets = [t for t in LORA_TARGETS if any(n.endswith(f".{t}") or n == t for n, _ in model.named_modules())]
        config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=targets, **options)
        model.add_adapter(config, adapter_name=name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(0.2 * torch.randn_like(parameter))


def inputs(model: Any, batch: int = 2, seed: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Arguments of one call; latents and text states ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    size = model.config.sample_size
    arguments: dict[str, Any] = {
        "sample": draw(batch, model.config.in_channels, size, size).requires_grad_(),
        "timestep": torch.tensor([17, 803][:batch], device=device),
        "encoder_hidden_states": draw(batch, 5, model.config.cross_attention_dim).requires_grad_(),
    }
    if model.config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {"text_embeds": draw(batch, 10), "time_ids": draw(batch, 6)}
    return arguments


def results(model: Any, arguments: dict[str, Any], where: Mapping[str, Placement] | None = None) -> dict[str, Tensor]:
    """Output, gradients with respect to the inputs, and every parameter's gradient, of a weighted sum of the output."""
    model.zero_grad()
    for value in arguments.values():
        if isinstance(value, Tensor):
            value.grad = None
    torch.manual_seed(5)  # dropout
    output = model(**arguments, return_dict=False)[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weights.to(output.device)).sum().backward()
    found = {"output": output.detach()}
    found |= {f"d {k}": v.grad for k, v in arguments.items() if isinstance(v, Tensor) and v.grad is not None}
    where = where or placements(model)
    found |= {n: where[n].full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return found


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a tensor (of its largest entry), and the tensor's name."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:5]
    floor = 1e-4 * max(float(value.abs().max()) for value in expected.values())
    worst = (0.0, "")
    for name, value in expected.items():
        assert found[name].shape == value.shape, (name, found[name].shape, value.shape)
        difference = float((found[name] - value).abs().max()) / max(float(value.abs().max()), floor)
        worst = max(worst, (difference, name))
    return worst


def prepared(name: str, mode: str) -> Any:
    """A model for one way of training it: full, lora, checkpointed, dropout or two_adapters."""
    model = build(name)
    if mode == "full":
        return model
    if mode == "dropout":
        add_adapters(model, dropout=0.3)
        for module in model.modules():
            if isinstance(module, nn.Dropout) and module.p == 0.0:
                module.p = 0.2
        return model.train()
    if mode == "two_adapters":
        add_adapters(model, ("first", "second"), lora_bias=True, use_rslora=True)
        model.set_adapters(["first", "second"], [0.7, -1.3])
        return model
    add_adapters(model)
    if mode == "checkpointed":
        model.enable_gradient_checkpointing()
        model.train()
    return model


def compare(name: str, mode: str, device: str = "cpu") -> dict[str, Any]:
    """On each rank: the whole model, then the same model cut, on the same input."""
    from diffusers.models.resnet import ResnetBlock2D

    from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

    model = prepared(name, mode).to(device)
    names = [n for n, _ in model.named_parameters()]
    keys = list(model.state_dict())
    whole_size = sum(p.numel() for p in model.parameters())
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    arguments = inputs(model, device=device)
    expected = results(model, arguments)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    apply_tensor_parallel(model, dist.group.WORLD)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    where = placements(model)
    for n, p in model.named_parameters():
        assert torch.equal(where[n].full(p), weights[n]), n
        assert torch.equal(where[n].local(weights[n], p), p), n
    calls: list[nn.Module] = []
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    found = results(model, arguments)
    answer = {
        "calls": len(calls) / len(blocks),
        "difference": largest_difference(found, expected),
        "compared": len(found),
        "share": sum(p.numel() for p in model.parameters()) / whole_size,
    }
    if mode == "lora":
        model.disable_adapters()
        off = model(**arguments, return_dict=False)[0]
        model.enable_adapters()
        again = model(**arguments, return_dict=False)[0]
        base = build(name).to(device)(**arguments, return_dict=False)[0]
        answer["off"] = largest_difference({"": off.detach()}, {"": base.detach()})
        answer["on again"] = torch.equal(again, found["output"])
        answer["moved"] = float((again - off).abs().max())
    return answer


def compare_sharded(name: str, mode: str) -> tuple[float, str]:
    """Cut over two ranks, then sharded by FSDP2 over two; one input for all, so that averages change nothing."""
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.parallel.sharding import shard_denoiser
    from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    model = prepared(name, mode)
    arguments = inputs(model)
    expected = results(model, arguments)
    apply_tensor_parallel(model, mesh["tensor_parallel"].get_group())
    where = placements(model)
    shard_denoiser(model, mesh["data_parallel"], True)
    return largest_difference(results(model, arguments, where), expected)


def all_reduces(name: str) -> tuple[int, int, int, int]:
    """Transformer and residual blocks of the model; all-reduces of a forward and of a backward pass, full tuning."""
    from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

    model = build(name)
    kinds = [type(module).__name__ for module in model.modules()]
    apply_tensor_parallel(model, dist.group.WORLD)
    arguments = inputs(model)
    arguments["encoder_hidden_states"].requires_grad_(False)
    original, calls = dist.all_reduce, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        output = model(**arguments, return_dict=False)[0]
        forward = len(calls)
        output.sum().backward()
    finally:
        dist.all_reduce = original
    return kinds.count("BasicTransformerBlock"), kinds.count("ResnetBlock2D"), forward, len(calls) - forward


def refused(name: str, change: str) -> str:
    """The message with which ``apply_tensor_parallel`` refuses a model."""
    from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

    model: Any = nn.Linear(4, 4) if change == "no plan" else build(name)
    if change == "dora":
        add_adapters(model, use_dora=True)
    elif change == "lokr":
        from peft import LoKrConfig

        model.add_adapter(LoKrConfig(r=2, target_modules=["to_q"]))
    elif change == "fused":
        model.fuse_qkv_projections()
    elif change == "cut":
        apply_tensor_parallel(model, dist.group.WORLD)
    before = {n: p.clone() for n, p in model.named_parameters()}
    try:
        apply_tensor_parallel(model, dist.group.WORLD)
    except (ConfigurationError, ValueError) as error:
        if change != "cut":
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        return f"{type(error).__name__}: {error}"
    return "not refused"


def clip_config() -> dict[str, Any]:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": 12,
        "text_config": {**tower, "vocab_size": 40, "max_position_embeddings": 9, "eos_token_id": 39},
        "vision_config": {**tower, "image_size": 8, "patch_size": 4},
    }


def compare_clip() -> tuple[float, str]:
    """A reward's scores, their gradient with respect to the picture, and every parameter's, whole and cut."""
    from transformers import CLIPConfig, CLIPModel

    from nemo_aligner_diffusion.parallel.tensor.plans import apply_tensor_parallel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**clip_config())).double().eval()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 39, (3, 9), generator=generator)
    tokens[:, -1] = 39
    found = []
    for cut in (False, True):
        if cut:
            apply_tensor_parallel(model, dist.group.WORLD, "rm.tensor_model_parallel_size")
        model.zero_grad()
        pixels = torch.randn(3, 3, 8, 8, generator=generator.manual_seed(2), dtype=torch.float64).requires_grad_()
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels)
        (output.logits_per_image.diagonal().sum() + output.text_embeds.square().sum()).backward()
        where = placements(model)
        result = {"scores": output.logits_per_image.detach(), "d pixels": pixels.grad}
        found.append(result | {n: where[n].full(p.grad) for n, p in model.named_parameters()})
    return largest_difference(found[1], found[0])


def cut_share(model: Any) -> float:
    """Share of the parameters of ``model``, whole and on any device, that a plan cuts; the rest is on every rank."""
    from nemo_aligner_diffusion.parallel.tensor.plans import check_tensor_parallel

    cut = 0
    for block in check_tensor_parallel(model, 1):
        owner = model.get_submodule(block.path)
        for name in (*block.columns, *block.norms):
            cut += sum(p.numel() for p in owner.get_submodule(name).parameters())
        cut += sum(owner.get_submodule(name).weight.numel() for name in block.rows)
    return cut / sum(p.numel() for p in model.parameters())
