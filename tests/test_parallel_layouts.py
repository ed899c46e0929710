"""One run is the same under every layout: losses, gradients and weights after five steps, on gloo in float32."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 3
TOLERANCE = 1e-5  # relative
# gloo takes a millisecond for each of thousands of small sums: with two pictures at once there are half as many
TP2 = ["model.tensor_model_parallel_size=2", "model.micro_batch_size=2"]
LAYOUTS = {  # processes and what they do
    "DP2": (2, []),
    "DP4": (4, []),
    "TP2": (2, TP2),
    "TP2 DP2": (4, TP2),
    "FSDP2": (2, ["model.fsdp=true", "model.fsdp_frozen=[text_encoder,vae,reward]"]),
    "FSDP2 TP2": (4, ["model.fsdp=true", *TP2]),
}
EVERYWHERE = "[to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,time_emb_proj]"
WHAT = {
    "LoRA": [
        "model.peft.peft_scheme=sdlora",
        "model.optim.lr=1e-4",
        f"model.peft.lora_tuning.target_modules={EVERYWHERE}",
    ],
    "LoRA, bf16": ["model.optim.lr=1e-4", "model.rollout_precision=bf16"],
    "full, bf16": [
        "model.peft.peft_scheme=none",
        "model.optim.lr=1e-5",
        "model.rollout_precision=bf16",
        "model.fsdp_sharding_strategy=grad",
    ],
    "full": ["model.peft.peft_scheme=none", "model.optim.lr=1e-5"],
}
METHODS = {
    "draft+": ("draftp_sd", ["model.truncation_steps=2", "model.kl_coeff=2"]),
    "drtune": ("drtune_sd", ["model.drtune.train_steps=2", "model.drtune.early_stop_steps=2"]),
    "ddpo": ("ddpo_sd", ["model.infer.sampler_type=ddim", "model.ddpo.inner_passes=2", "model.ddpo.clip_range=0.2"]),
}


def train(devices: int, recipe: str, more: list[str]) -> dict[str, Any]:
    """Some steps of the embedded model; what came of them, whole, on every rank."""
    import pytorch_lightning as pl

    from nemo_aligner_diffusion.config.load import load_settings
    from nemo_aligner_diffusion.data.datamodule import PromptDataModule
    from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path
    from nemo_aligner_diffusion.parallel.strategy import ParallelStrategy
    from nemo_aligner_diffusion.rewards import build_reward
    from nemo_aligner_diffusion.training.build import build_model, build_module
    from nemo_aligner_diffusion.training.run import batches_of

    words = [
        f"trainer.devices={devices}",
        "trainer.accelerator=cpu",
        "model.micro_batch_size=1",
        "model.global_batch_size=4",
        "model.infer.inference_steps=4",
        "model.infer.height=32",
        "model.infer.width=32",
        "model.seed=11",
        *(() if recipe == "ddpo_sd" else ("model.rollout_precision=same",)),
    ]
    cfg = load_settings(recipe, [*words, *more])
    layout = cfg.layout
    model = build_model(cfg)
    with torch.no_grad():  # paler pictures: a pixel at the edge of [0, 1] has a gradient or none, by its last bit
        for parameter in model.vae.decoder.conv_out.parameters():
            parameter *= 0.3
    module = build_module(cfg, model, build_reward(cfg.rm), STEPS)
    losses: list[float] = []

    class Watch(pl.Callback):
        gradients: dict[str, torch.Tensor]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if len(losses) == trainer.global_step:
                return
            losses.append(pl_module.last_metrics["loss"])
            if trainer.global_step == STEPS:
                named = pl_module.trainable_parameters()
                self.gradients = {name: module.parallel.placement(name).full(p.grad) for name, p in named}

    watch = Watch()
    accumulation, batches = batches_of(cfg, cfg.method())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=ParallelStrategy(layout) if layout.world_size > 1 else "auto",
        max_steps=STEPS,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = PromptDataModule(embedded_prompts_path("train"), global_batch_size=4, seed=11, **batches)
    trainer.fit(module, datamodule=data)
    weights = {name: module.parallel.placement(name).full(p) for name, p in module.trainable_parameters()}
    return {"losses": losses, "gradients": watch.gradients, "weights": weights}


def _share(devices: int, recipe: str, more: list[str], file: str | None) -> Any:
    """In a process of the pool; tensors come back through a file."""
    outcome = train(devices, recipe, more)
    if file is not None and torch.distributed.get_rank() == 0:
        torch.save(outcome, file)
    return outcome["losses"]


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    """The same run by one process, made once for each method and way of tuning."""
    known: dict[tuple[str, str], dict[str, Any]] = {}

    def get(method: str, what: str) -> dict[str, Any]:
        if (method, what) not in known:
            file = tmp_path_factory.mktemp("alone") / "outcome.pt"
            recipe, more = METHODS[method]
            processes.run(1, _share, 1, recipe, [*more, *WHAT[what]], str(file))
            known[method, what] = torch.load(file, weights_only=True)
        return known[method, what]

    return get


def distance(there: dict[str, torch.Tensor], here: dict[str, torch.Tensor]) -> float:
    """Relative, of all numbers together: some tensors of an adapter's first steps are little but rounding noise."""
    assert there.keys() == here.keys()
    apart = sum(float((there[name].double() - here[name]).square().sum()) for name in there)
    return (apart / sum(float(value.double().square().sum()) for value in here.values())) ** 0.5


# Each engine once in the fast tests; every layout in CI, with one or two of the four pairs of method and way of tuning;
# the rest of the table at night.
FAST = {
    ("DP2", "LoRA", "drtune"),
    ("DP4", "full", "draft+"),
    ("TP2", "LoRA", "drtune"),
    ("FSDP2", "full", "draft+"),
}
SLOW = {
    ("TP2", "full", "draft+"),
    ("TP2 DP2", "full", "draft+"),
    ("FSDP2", "LoRA", "drtune"),
    ("FSDP2 TP2", "LoRA", "drtune"),
    ("DP2", "LoRA", "ddpo"),
    ("FSDP2", "full", "ddpo"),
    ("TP2", "LoRA", "ddpo"),
    ("TP2", "LoRA, bf16", "drtune"),
    ("FSDP2", "LoRA, bf16", "drtune"),
    ("FSDP2", "full, bf16", "draft+"),
}


def _mark(case: tuple[str, str, str]) -> tuple[pytest.MarkDecorator, ...]:
    if case in FAST:
        return ()
    return (pytest.mark.slow,) if case in SLOW else (pytest.mark.nightly,)


TABLE = [pytest.param(*case, marks=_mark(case)) for case in itertools.product(LAYOUTS, WHAT, METHODS)
         if case in SLOW or "bf16" not in case[1]]  # fmt: skip


@pytest.mark.parametrize(("layout", "what", "method"), TABLE)
def test_every_layout_trains_as_one_process(processes, alone, tmp_path: Path, layout, what, method):
    one = alone(method, what)
    size, more = LAYOUTS[layout]
    recipe, settings = METHODS[method]
    file = tmp_path / "outcome.pt"
    losses = processes.run(size, _share, size, recipe, [*settings, *WHAT[what], *more], str(file))
    many = torch.load(file, weights_only=True)
    tolerance = 5e-2 if "bf16" in what else TOLERANCE  # a product in bfloat16 is rounded by how it is cut
    assert all(rank == losses[0] for rank in losses)
    # a policy gradient's is a mean of advantages, numbers about 1 whose sum is 0
    assert many["losses"] == pytest.approx(one["losses"], rel=tolerance, abs=1e-6 if method == "ddpo" else 0)
    print(*(f"{distance(many[kind], one[kind]):.1e}" for kind in ("gradients", "weights")), layout, what, method)
    assert distance(many["gradients"], one["gradients"]) < tolerance
    assert distance(many["weights"], one["weights"]) < tolerance
