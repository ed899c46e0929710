"""What keys of ``model``, ``rm`` and ``report`` say arrives where it acts, in what a run is assembled from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from tiny.stable_diffusion import save_tiny_pipeline
from torch.nn.modules.module import register_module_forward_pre_hook

from nemo_aligner_diffusion.algorithms import AlignProp, DRaFT, DRaFTK, DRaFTLV, DRaFTPlus, DRTune, ReFL
from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.noise import plan_random, sample_generator
from nemo_aligner_diffusion.diffusion.schedule import SchedulerPath
from nemo_aligner_diffusion.diffusion.trajectory import rollout
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.report.pictures import load_grid
from nemo_aligner_diffusion.evaluation.run_files import column, read_run
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.training.build import build_model, build_module
from nemo_aligner_diffusion.training.run import _build_data, run_training
from nemo_aligner_diffusion.training.settings import RunSettings


def configured(
    pipeline: Path, *words: str, recipe: str = "draftp_sd", more: tuple[str, ...] | list[str] = ()
) -> RunSettings:
    model = [f"model.{word}" for word in words]
    return load_settings(recipe, [f"model.from_pretrained={pipeline}", "family=embedded", "rm=symmetry", *model, *more])


def test_the_layout_is_as_configured() -> None:
    words = ["trainer.devices=4", "model.micro_batch_size=1"]
    assert load_settings("draftp_sd", words).layout == Layout(data=4)
    sharded = ["model.fsdp=true", "model.fsdp_sharding_strategy=grad", "model.fsdp_frozen=[vae,reward]"]
    cut = ["model.tensor_model_parallel_size=2", "model.tensor_parallel_reward=true"]
    assert load_settings("draftp_sd", [*words, *sharded, *cut]).layout == Layout(
        2, 2, fsdp=True, reshard_after_forward=False, sharded_frozen=("vae", "reward"), cut_reward=True
    )


def assembled(cfg: RunSettings) -> tuple[DiffusionModel, RewardTuning]:
    model = build_model(cfg)
    return model, build_module(cfg, model, build_reward(cfg.rm), 10)


def test_the_module_is_as_configured(pipeline: Path) -> None:
    cfg = configured(
        pipeline,
        "truncation_steps=2",
        "kl_coeff=0.3",
        "reward_scale=0.4",
        "reward_margin=0.5",
        "decode_micro_batch_size=1",
        "seed=6",
        "activation_checkpointing=true",
        "infer.unconditional_guidance_scale=1.7",
        "infer.inference_steps=3",
        "infer.sampler_type=PARA_DDIM",
        "infer.eta=0.8",
        "infer.height=24",
        "infer.width=32",
        "peft.lora_tuning.adapter_dim=3",
        "peft.lora_tuning.alpha=12",
        "peft.lora_tuning.dropout=0.9",
        "peft.lora_tuning.target_modules=[to_v]",
    )
    model, module = assembled(cfg)
    assert (module.kl_coeff, module.reward_scale, module.reward_margin, module.seed) == (0.3, 0.4, 0.5, 6)
    assert module.decode_micro_batch_size == 1
    assert module.sampling == Sampling(3, 1.7, 24, 32, 0.8)
    assert type(model.pipe.scheduler).__name__ == "DDIMScheduler"
    assert module.plan_rule.__self__ == DRaFTPlus(2)
    adapted = [part for name, part in model.denoiser.named_modules() if hasattr(part, "lora_A")]
    assert adapted
    for part in adapted:
        assert (part.r["default"], part.scaling["default"], part.lora_dropout["default"].p) == (3, 4.0, 0.9)
    assert {name.split(".")[-4] for name, _ in module.trainable_parameters()} == {"to_v"}
    # what checkpoints call it, those of earlier versions too
    assert all(name.startswith("model.denoiser.") for name, p in module.named_parameters() if p.requires_grad)
    assert model.denoiser.is_gradient_checkpointing
    module.on_train_start()
    still = (model.networks["vae"], model.networks["text_encoder"], module.reward)
    assert model.denoiser.training  # its dropout
    assert not any(part.training for network in still for part in network.modules())


def test_the_pipeline_is_as_configured(pipeline: Path) -> None:
    words = ["pipeline.arguments.negative_prompt=blurry", "pipeline.arguments.guidance_rescale=0.7"]
    model = build_model(configured(pipeline, *words, "pipeline.stateless=[SomeCache]", "infer.sampler_type=DPM++2M",
                                   "pipeline.trained=unet"))  # fmt: skip
    assert model.trained == "unet"
    assert "SomeCache" in model.stateless
    inputs = model.inputs(["cat", "dog"], steps=3, guidance_scale=1.5)
    assert (inputs["negative_prompt"], inputs["guidance_rescale"]) == (["blurry"] * 2, 0.7)
    solver = model.pipe.scheduler
    assert (type(solver).__name__, solver.config.beta_end) == ("DPMSolverMultistepScheduler", 0.012)
    own = build_model(configured(pipeline))
    assert dict(own.pipe.scheduler.config) == dict(load_model(pipeline).pipe.scheduler.config)
    for words, message in (
        (["pipeline.arguments.negativ_prompt=x"], "did you mean negative_prompt"),
        (["pipeline.arguments.prompt=x"], "arguments.prompt is set by model.data; leave it out"),
        (["pipeline.arguments.eta=1"], "arguments.eta is set by model.infer.eta"),
        (["pipeline.trained=vae"], "has no denoiser 'vae'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            build_model(configured(pipeline, *words))


def test_a_denoiser_that_takes_no_adapter_is_refused_by_name(tmp_path: Path) -> None:
    from tiny_pipelines import named

    named("hunyuan-dit").build().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"HunyuanDiT2DModel takes no LoRA .*peft_scheme=none"):
        build_model(configured(tmp_path))
    assert build_model(configured(tmp_path, "peft.peft_scheme=none")).trainable_parameters()


def test_an_adapter_goes_where_the_family_has_it_or_where_it_is_asked_for(pipeline: Path) -> None:
    def adapted(*words: str) -> set[str]:
        names = [name for name, _ in build_model(configured(pipeline, *words)).trainable_parameters()]
        return {name.split(".lora_")[0].rpartition(".")[2] for name in names}

    assert adapted() >= {"to_q", "to_k", "to_v", "0", "proj", "conv1", "conv2"}  # to_out.0, ff.net.0.proj, …
    assert adapted("peft.lora_tuning.target_modules=[to_k]") == {"to_k"}


@pytest.mark.parametrize(
    ("recipe", "words", "method"),
    [
        ("draft_sd", [], DRaFT()),
        ("draft_k_sd", ["truncation_steps=3"], DRaFTK(3)),
        ("draft_lv_sd", ["draft_lv.samples=5"], DRaFTLV(5)),
        ("drtune_sd", ["drtune.train_steps=3", "drtune.early_stop_steps=6"], DRTune(3, 6)),
        ("refl_sd", ["refl.window=[4,7]"], ReFL((4, 7))),
        ("alignprop_sd", ["alignprop.min_truncation_steps=2"], AlignProp(2)),
        ("alignprop_sd", ["alignprop.max_truncation_steps=3"], AlignProp(1, 3)),
    ],
)
def test_the_method_is_as_configured(pipeline: Path, recipe: str, words: list[str], method: Any) -> None:
    assert assembled(configured(pipeline, *words, recipe=recipe))[1].plan_rule.__self__ == method


def test_the_adapters_start_follows_from_the_seed(pipeline: Path) -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = build_model(configured(pipeline, f"seed={seed}"))
        starts.append(torch.cat([p.detach().flatten() for n, p in model.denoiser.named_parameters() if "lora_A" in n]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_weights_come_from_where_the_keys_say(pipeline: Path, tmp_path: Path) -> None:
    other = save_tiny_pipeline(tmp_path / "other", seed=1)
    paths = [f"unet_config.from_pretrained={other / 'unet'}", f"first_stage_config.from_pretrained={other / 'vae'}"]
    found = build_model(configured(pipeline, *paths, "peft.peft_scheme=none"))
    ours, theirs = (load_model(folder) for folder in (pipeline, other))
    for name, source in (("unet", theirs), ("vae", theirs), ("text_encoder", ours)):
        assert getattr(found.pipe, name) is found.networks[name]
        for one, two in zip(found.networks[name].parameters(), source.networks[name].parameters(), strict=True):
            assert torch.equal(one, two)


def prompts_of(data: Any, batches: int) -> list[str]:
    loader = iter(data.train_dataloader())
    return [prompt for _ in range(batches) for prompt in next(loader)["prompts"]]


def test_the_data_are_as_configured(pipeline: Path, tmp_path: Path) -> None:
    lines = [f"prompt {number}" for number in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(["", *lines]), encoding="utf-8")
    files = f"data.train.webdataset.local_root_path={tmp_path / 'prompts.txt'}"
    common = [files, "data.on_bad_sample=skip", "micro_batch_size=2", "global_batch_size=4"]
    data = _build_data(configured(pipeline, *common, "data.shuffle_buffer=0", "data.num_workers=1",
                                  "data.validation.max_prompts=2", "data.validation.seeds=[5]"))  # fmt: skip
    assert (data.validation_prompts, data.validation_seeds) == (lines[:2], [5])
    loader = data.train_dataloader()
    assert loader.num_workers == 1
    assert loader.stream.index.left_out["samples"] == 1
    assert (loader.stream.step_size, loader.stream.global_batch_size) == (2, 4)
    assert prompts_of(data, 6) == lines
    orders = [prompts_of(_build_data(configured(pipeline, *common, f"seed={seed}")), 6) for seed in (1, 1, 2)]
    assert sorted(orders[0]) == sorted(lines)
    assert orders[0] == orders[1] != orders[2] != lines
    chosen = _build_data(configured(pipeline, *common, "data.validation.prompts=[cat,dog,sun]",
                                    "data.validation.max_prompts=2"))  # fmt: skip
    assert chosen.validation_prompts == ["cat", "dog"]
    own = tmp_path / "validation.txt"
    own.write_text("mine\n", encoding="utf-8")
    assert _build_data(
        configured(pipeline, *common, f"data.validation.webdataset.local_root_path={own}")
    ).validation_prompts == ["mine"]
    once = load_settings(
        "draftp_sd",
        [*(f"model.{word}" for word in common), "trainer.draftp_sd.max_epochs=2"],
    )
    assert len(list(_build_data(once).train_dataloader())) == 12


def test_the_reward_is_as_configured() -> None:
    settings = ["score=hps", "micro_batch_size=3", "activation_checkpointing=true"]
    words = [f"rm.model.{word}" for word in settings]
    reward: Any = build_reward(load_settings("draftp_sd", [*words, "rm.trainer.precision=64"]).rm)
    assert (reward.score_type, reward.micro_batch_size, reward.activation_checkpointing) == ("hps", 3, True)
    assert reward.dtype == torch.float64


def test_the_pictures_and_the_report_are_as_configured(pipeline: Path, tmp_path: Path) -> None:
    cfg = configured(pipeline, "micro_batch_size=2", "global_batch_size=2", "infer.inference_steps=2",
                     "truncation_steps=1", "kl_coeff=0", "decode_micro_batch_size=1",
                     "data.validation.prompts=[cat,dog,sun]",
                     more=["report.max_prompts=2", "report.enable=false", "trainer.draftp_sd.max_steps=1",
                           "trainer.accelerator=cpu", f"exp_manager.explicit_log_dir={tmp_path / 'run'}"])  # fmt: skip
    decoded: list[int] = []
    hook = register_module_forward_pre_hook(
        lambda part, args: decoded.append(len(args[0])) if isinstance(part, Decoder) else None
    )
    try:
        assert run_training(cfg) == 0
    finally:
        hook.remove()
    assert set(decoded) == {1}
    # the check at the start, that a picture can be made again; a micro-batch, decoded again in its backward pass; base
    # and tuned pictures of three prompts, two seeds each
    assert len(decoded) == 2 + 2 * 2 + 2 * 6
    (sample,) = read_run(tmp_path / "run").samples
    grid = load_grid(*sample, [])
    assert grid is not None
    assert [cell["prompt"] for cell in grid.cells] == ["cat", "cat", "dog", "dog"]
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("draftp_sd", ["truncation_steps=2", "kl_coeff=0.7", "reward_scale=0.4", "infer.height=24"]),
        ("draftp_sd", ["truncation_steps=1", "kl_coeff=0", "reward_scale=3", "reward_margin=-0.05", "infer.width=32"]),
        ("draft_lv_sd", ["draft_lv.samples=3", "kl_coeff=0.7", "infer.eta=0.6"]),
        ("drtune_sd", ["drtune.train_steps=2", "drtune.early_stop_steps=1", "kl_coeff=0.2"]),
    ],
)
def test_the_gradient_of_a_step_is_that_of_the_stated_loss(pipeline: Path, recipe: str, words: list[str]) -> None:
    """``λ·mean(−R)`` or ``λ·mean(relu(margin − R))``, and ``kl_coeff·KL``, and the naive graph of the trajectory."""
    common = ["peft.peft_scheme=none", "infer.inference_steps=3", "decode_micro_batch_size=1", "micro_batch_size=2",
              "global_batch_size=2", "infer.unconditional_guidance_scale=1.5", "seed=9"]  # fmt: skip
    cfg = configured(pipeline, *common, *words, recipe=recipe)
    model, module = assembled(cfg)
    model.double()
    model.keep_reference()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    prompts, index = ["cat", "dog"], torch.tensor([5, 8])
    module.training_step({"prompts": prompts, "index": index}, 0).backward()
    found = {name: parameter.grad for name, parameter in module.trainable_parameters()}
    model.denoiser.zero_grad(set_to_none=True)

    settings, scores = cfg.model, []

    def loss_of(images: torch.Tensor, rows: slice, read: int) -> torch.Tensor:
        scores.append(module.reward(images, prompts[rows]))
        far = -scores[-1] if settings.reward_margin is None else torch.relu(settings.reward_margin - scores[-1])
        return settings.reward_scale * far

    infer = settings.infer
    inputs = {"prompt": prompts, "num_inference_steps": 3, "guidance_scale": 1.5, "eta": infer.eta,
              "height": infer.height, "width": infer.width}  # fmt: skip
    generators = [sample_generator(9, 0, int(number)) for number in index]
    naive = rollout(model, module.plan_rule, generators, inputs, loss_of, rng=plan_random(9, 0),
                    reference=settings.kl_coeff != 0, kept_steps=None)  # fmt: skip
    surrogate = sum((end * gradient).sum() for end, gradient in zip(naive.ends, naive.gradients, strict=True))
    divergence = torch.zeros(()) if naive.divergence is None else naive.divergence
    (surrogate + settings.kl_coeff * divergence).backward()
    far = [-s if settings.reward_margin is None else torch.relu(settings.reward_margin - s) for s in scores]
    loss = settings.reward_scale * torch.cat(far).mean() + settings.kl_coeff * divergence
    expected = torch.cat([parameter.grad.flatten() for _, parameter in module.trainable_parameters()])
    assert expected.norm() > 0
    apart = torch.cat([grad.flatten() for grad in found.values() if grad is not None]) - expected
    assert apart.norm() < 1e-6 * expected.norm()
    (figures,) = module._micro_batches
    assert figures["loss"].item() == pytest.approx(loss.item(), rel=1e-6)


def test_draws_are_keyed_by_seed_step_and_sample() -> None:
    keys = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0)]
    assert len({float(torch.randn((), generator=sample_generator(*key))) for key in keys}) == len(keys)
    assert len({plan_random(*key).random() for key in [(1, 2), (0, 2), (1, 0)]}) == 3


def test_a_plan_is_drawn_anew_for_every_step(pipeline: Path, tmp_path: Path) -> None:
    cfg = configured(pipeline, "micro_batch_size=1", "global_batch_size=1", "infer.inference_steps=4", "seed=3",
                     recipe="alignprop_sd",
                     more=["trainer.alignprop_sd.max_steps=4", "trainer.alignprop_sd.val_check_interval=0",
                           "report.enable=false", "trainer.accelerator=cpu",
                           f"exp_manager.explicit_log_dir={tmp_path / 'run'}"])  # fmt: skip
    assert run_training(cfg) == 0
    model = load_model(pipeline)
    model.pipe.scheduler.set_timesteps(4)
    path = SchedulerPath(model.pipe.scheduler)
    drawn = [len(AlignProp().plan(path, plan_random(3, step)).active) for step in range(4)]
    assert len(set(drawn)) > 1
    assert column(read_run(tmp_path / "run").metrics, "active_steps") == drawn
