"""The transformers of the tiny pipelines, whole and spread over processes, on arguments that their pipelines give."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .tensor_parallel import largest_difference

# arguments that a training's gradient flows through; Z-Image's are given without names
_STATES = ("hidden_states", "encoder_hidden_states", "pooled_projections", None)


class _Called(Exception):
    pass


def built(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A pipeline's transformer with random weights, and the arguments of its first call."""
    from tiny_pipelines import named

    row = named(name)
    pipe = row.build(row.dtype)
    model = getattr(pipe, row.train)
    calls: list[Any] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Called

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    generator = [torch.Generator().manual_seed(sample) for sample in range(row.batch)]
    with contextlib.suppress(_Called):
        pipe(**row.inputs(), num_inference_steps=row.steps, generator=generator, output_type="latent")
    hook.remove()
    args, kwargs = calls[0]

    def leaf(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return value.detach().clone().requires_grad_() if floating else value

    given = {key: tree_map(leaf, value) if key in _STATES else value for key, value in kwargs.items()}
    return model, tuple(tree_map(leaf, value) for value in args), {**given, "return_dict": False}


def adapt(model: Any, name: str) -> None:
    """LoRA on every layer that its family adapts, B not zero; float32 over bfloat16, as training has it."""
    from tiny_pipelines import named

    from nemo_aligner_diffusion.diffusion.lora import add_lora

    torch.manual_seed(4)
    add_lora(model, 3, 5.0, 0.0, named(name).lora_targets)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                if parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()
                parameter.copy_(0.2 * torch.randn_like(parameter))


def _in_bf16(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to(torch.bfloat16).requires_grad_(value.requires_grad) if floating else value


def results(model: Any, args: Any, kwargs: Any, parallel: Any = None) -> dict[str, Tensor]:
    """Output, gradients with respect to the inputs, and every parameter's whole gradient, of a weighted output."""
    model.zero_grad()
    leaves = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) and v.requires_grad]
    for value in leaves:
        value.grad = None
    output = model(*args, **kwargs)[0]
    output = torch.stack(tuple(output)) if isinstance(output, (list, tuple)) else output
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weights.to(output.dtype)).sum().backward()
    found = {"output": output.detach()} | {f"d input {i}": v.grad for i, v in enumerate(leaves) if v.grad is not None}
    named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    if parallel is None:
        return found | {n: p.grad.clone() for n, p in named}
    parallel.average_gradients(named)
    found["norm"] = torch.tensor(parallel.gradient_norm(named))
    return found | {n: parallel.placement(n).full(p.grad) for n, p in named}


def compare(name: str, what: str, fsdp: bool, tensor: int, checkpointing: bool = False) -> dict[str, Any]:
    """On each rank: the whole model, then the same model spread over the processes, on the same input."""
    import torch.distributed as dist
    from tiny_pipelines import double_precision
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.parallelism import Parallelism
    from nemo_aligner_diffusion.parallel.placements import local_part

    # Z-Image asks for float32 where the others follow; what the backward pass recomputes leaves double precision
    exact = name != "z-image" and what != "bf16" and not checkpointing
    with double_precision() if exact else contextlib.nullcontext():
        model, args, kwargs = built(name)
        model.requires_grad_(True)
        if what != "full":
            adapt(model.to(torch.bfloat16) if what == "bf16" else model, name)
        if what == "bf16":
            args, kwargs = tree_map(_in_bf16, (args, kwargs))
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.train()
        names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
        size = sum(p.numel() for p in model.parameters())
        expected = results(model, args, kwargs)
        gradients = [g.flatten().double() for n, g in expected.items() if n != "output" and not n.startswith("d input")]
        expected["norm"] = torch.cat(gradients).norm()
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        layout = Layout(data=dist.get_world_size() // tensor, tensor=tensor, fsdp=fsdp)
        mesh = init_device_mesh(
            "cpu", (layout.data, layout.tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
        parallel = Parallelism(layout)
        parallel.apply(mesh, [model], {})
        assert [n for n, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == keys
        for n, p in model.named_parameters():
            assert torch.equal(parallel.placement(n).full(p), weights[n]), n
        held = sum(local_part(p).numel() for p in model.parameters()) / size
        found = results(model, args, kwargs, parallel)
    norm = abs(float(found.pop("norm") / expected.pop("norm")) - 1)
    worst = largest_difference(found, expected)
    return {"difference": worst, "exact": exact, "compared": len(found), "held": held, "norm": norm}


def compare_text_encoder(kind: str) -> tuple[float, float]:
    """How far a text encoder's states are when it is cut, and the share of its layers' numbers that a rank holds."""
    import torch.distributed as dist
    from tiny_pipelines.parts import language_model_config, qwen_vl, t5_config, t5_tokenizer
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import Qwen3Config, Qwen3ForCausalLM, T5EncoderModel

    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.parallelism import Parallelism

    from .stable_diffusion import tiny_stable_diffusion

    torch.manual_seed(0)
    if kind == "t5":
        config = t5_config(t5_tokenizer())
        config.num_layers, config.num_heads = 2, 4
        encoder: Any = T5EncoderModel(config)
    elif kind == "qwen3":  # more heads of queries than of keys and values
        encoder = Qwen3ForCausalLM(Qwen3Config(**{**language_model_config(40), "num_attention_heads": 4}))
    else:
        encoder, _ = qwen_vl()
    encoder.eval()
    tokens = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    encoder.double().requires_grad_(False)

    def states() -> Tensor:
        found = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([layer[mask.bool()] for layer in found])

    def held() -> int:
        return sum(p.numel() for n, p in encoder.named_parameters() if ".layers." in n or ".block." in n)

    expected, whole = states(), held()
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data_parallel", "tensor_parallel"))
    parts = {"text_encoder": torch.nn.ModuleDict({"text_encoder": torch.nn.Linear(2, 2), "text_encoder_2": encoder})}
    layout = Layout(tensor=size, cut_text_encoder=True)
    Parallelism(layout).apply(mesh, [tiny_stable_diffusion().denoiser], parts)
    found = states()
    assert expected.std() > 0.01
    return float((found - expected).abs().max() / expected.abs().max()), held() / whole
