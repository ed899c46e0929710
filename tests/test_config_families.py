"""``conf/family``: what holds where nobody says else, chosen by the checkpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from settings_page import BEGIN, END, recipe_table

from nemo_aligner_diffusion.algorithms.registry import methods
from nemo_aligner_diffusion.config.families import sampling_of
from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.config.recipes import conf_directory, recipes
from nemo_aligner_diffusion.diffusion.recognition import of_pipeline
from nemo_aligner_diffusion.diffusion.settings import FAMILIES
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.errors import CheckpointError, ConfigurationError


def folder(at: Path, kind: str, width: int = 768) -> Path:
    """What is read of a pipeline's folder: its class and its UNet's text width."""
    at.mkdir(parents=True, exist_ok=True)
    (at / "model_index.json").write_text(json.dumps({"_class_name": kind, "unet": ["diffusers", "X"]}), "utf-8")
    (at / "unet").mkdir(exist_ok=True)
    unet = {"cross_attention_dim": width, **({"addition_embed_type": "text_time"} if width == 2048 else {})}
    (at / "unet" / "config.json").write_text(json.dumps(unet), "utf-8")
    return at


CHECKPOINTS = {
    "sd15": ("StableDiffusionPipeline", 768),
    "sd21": ("StableDiffusionPipeline", 1024),
    "sdxl": ("StableDiffusionXLPipeline", 2048),
    "sd35": ("StableDiffusion3Pipeline", 0),
    "flux1": ("FluxPipeline", 0),
    "flux2": ("Flux2Pipeline", 0),
    "flux2_klein": ("Flux2KleinPipeline", 0),
    "qwen_image": ("QwenImagePipeline", 0),
    "z_image": ("ZImagePipeline", 0),
    "other": ("SanaPipeline", 0),
}
# published: NeMo-Aligner 0.7 for Stable Diffusion, FlowBP (arXiv 2606.11075) for flows
PUBLISHED: dict[str, dict[str, Any]] = {
    "embedded": {"scale": 2.0, "steps": 20, "size": None, "lr": 4e-4, "rank": 8, "alpha": 32, "micro": 8, "clip": 1},
    "sd15": {"scale": 7.5, "steps": 50, "size": 512, "lr": 1e-4, "rank": 32, "alpha": None, "micro": 1, "clip": 10},
    "sdxl": {"scale": 5.0, "steps": 40, "size": 1024, "lr": 1e-4, "rank": 32, "alpha": None, "micro": 1, "clip": 10},
    "sd35": {"scale": 3.5, "steps": 25, "size": 512, "lr": 1e-5, "rank": 32, "alpha": None, "micro": 1, "clip": 1},
    "other": {"scale": None, "steps": None, "size": None, "lr": 1e-4, "rank": 32, "alpha": None, "micro": 1, "clip": 1},
}  # fmt: skip


def values(cfg: Any) -> dict[str, Any]:
    model = cfg.model
    return {"scale": model.infer.unconditional_guidance_scale, "steps": model.infer.inference_steps,
            "size": model.infer.height, "lr": model.optim.lr, "rank": model.peft.lora_tuning.adapter_dim,
            "alpha": model.peft.lora_tuning.alpha, "micro": model.micro_batch_size,
            "clip": cfg.trainer.draftp_sd.gradient_clip_val}  # fmt: skip


def test_there_is_a_file_for_each_family_and_no_other() -> None:
    assert {file.stem for file in (conf_directory() / "family").glob("*.yaml")} == set(FAMILIES)
    assert {"embedded", *CHECKPOINTS} == set(FAMILIES)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_checkpoint_chooses(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", *CHECKPOINTS[family])
    chosen = load_config("draftp_sd", [f"model.from_pretrained={path}"])
    assert chosen.model.family == family
    assert CHECKPOINTS[family][0] in chosen.model.family_because
    said = load_config("draftp_sd", [f"family={family}"])
    assert said.model.family_because == "model.family says so"
    assert values(chosen) == values(said) == PUBLISHED.get(family, values(said))
    assert chosen.model.truncation_steps == chosen.model.kl_coeff == 1


def test_nothing_named_is_the_embedded_model() -> None:
    for words in ([], [f"model.from_pretrained={embedded_model_path()}"]):
        cfg = load_config("draftp_sd", words)
        assert (cfg.model.family, values(cfg)) == ("embedded", PUBLISHED["embedded"])
        assert (cfg.model.truncation_steps, cfg.model.kl_coeff) == (5, 5.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [method.option for method in methods().values()])
def test_every_method_has_settings_that_fit_every_family(family: str, method: str) -> None:
    """Four steps of FLUX.2-klein, a pipeline's own number, and DRTune's 40 % of each."""
    cfg = load_config("draft_sd", [f"family={family}", f"algorithm={method}"])
    if methods()[cfg.model.algorithm].kind != "reward":
        assert "kl_coeff" not in cfg.model
        return
    assert cfg.model.kl_coeff == (0 if method != "draft_plus" else 5 if family == "embedded" else 1)


def test_what_somebody_says_wins(tmp_path: Path) -> None:
    """The recipe's file, a user's YAML, the command line; each over the family's."""
    refl = ["rm.model.restore_from_path=r.nemo", "family=sd15"]
    model = load_config("refl_imagereward_sd", refl).model
    assert (model.infer.inference_steps, model.infer.unconditional_guidance_scale) == (40, 1.0)  # the recipe's own
    assert (model.infer.height, model.optim.lr, model.peft.lora_tuning.adapter_dim) == (512, 1e-4, 32)
    (tmp_path / "mine.yaml").write_text("model: {infer: {inference_steps: 20}, optim: {lr: 4e-4}}\n", "utf-8")
    cfg = load_config("mine", ["family=sdxl", "model.infer.height=512"], config_dir=tmp_path)
    assert values(cfg) == {**PUBLISHED["sdxl"], "steps": 20, "lr": 4e-4, "size": 512}
    assert cfg.model.infer.width == 1024
    null = load_config("draftp_sd", ["family=sd15", "model.infer.unconditional_guidance_scale=null"])
    assert null.model.infer.unconditional_guidance_scale is None  # the pipeline's own, as asked for


def test_a_resumed_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    """An earlier version sampled and trained every model as the embedded one, and knew no families."""
    run = tmp_path / "run"
    model = f"model.from_pretrained={folder(tmp_path / 'model', *CHECKPOINTS['sdxl'])}"
    begun = load_config("draftp_sd", [model, "family=embedded", "trainer.draftp_sd.gradient_clip_val=0.5"])
    del begun.model["family"], begun.model["family_because"]
    words = [model, f"exp_manager.explicit_log_dir={run}", "exp_manager.resume_if_exists=true"]
    run.mkdir()
    OmegaConf.save(begun, run / "config.yaml")
    assert values(load_config("draftp_sd", words)) == PUBLISHED["sdxl"], "nothing to resume"
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    for _ in range(2):
        cfg = load_config("draftp_sd", words)
        assert values(cfg) == {**PUBLISHED["embedded"], "clip": 0.5} == values(begun)
        assert (cfg.model.truncation_steps, cfg.model.kl_coeff) == (5, 5.0)
        assert cfg.model.family_because.endswith("; resumed with the settings in its config.yaml")
        OmegaConf.save(cfg, run / "config.yaml")
    another = load_config("config", [f"exp_manager.explicit_log_dir={tmp_path / 'again'}"], config_dir=run)
    assert values(another) == values(begun)
    assert another.model.family_because == "it is a StableDiffusionXLPipeline", "nothing is resumed"
    given = load_config("draftp_sd", [*words, "model.optim.lr=1e-5", "trainer.draftp_sd.gradient_clip_val=3"])
    assert values(given) == {**PUBLISHED["embedded"], "lr": 1e-5, "clip": 3}
    assert values(load_config("draftp_sd", [*words, "family=sdxl"])) == PUBLISHED["sdxl"]
    (run / "config.yaml").write_text("{", "utf-8")
    assert values(load_config("draftp_sd", words)) == PUBLISHED["sdxl"], "the run will say that it is damaged"


def test_an_adapters_file_has_the_rank_unless_somebody_says_it() -> None:
    rank, words = "model.peft.lora_tuning.adapter_dim", ["family=sdxl", "model.peft.restore_from_path=a.safetensors"]
    assert load_config("draftp_sd", words[:1]).model.peft.lora_tuning.adapter_dim == 32
    assert load_config("draftp_sd", words).model.peft.lora_tuning.adapter_dim is None
    assert load_config("draftp_sd", [*words, f"{rank}=32"]).model.peft.lora_tuning.adapter_dim == 32
    with pytest.raises(ConfigurationError, match=r"adapter_dim = None without model\.peft\.restore_from_path"):
        load_config("draftp_sd", [f"{rank}=null"])


def test_a_run_is_resumed_with_its_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = str(folder(tmp_path / "mine", *CHECKPOINTS["sdxl"]))
    key, unet = "model.from_pretrained", "model.unet_config.from_pretrained"
    embedded, known = load_settings("draftp_sd"), load_settings("draftp_sd", [f"{key}={mine}"])
    known.check_resumes({})
    known.check_resumes({key: ("mine", mine)})
    known.check_resumes({key: ("/moved/mine", mine)})
    known.check_resumes({key: ("org/mine", mine)})
    known.check_resumes({key: (None, mine)} | {"model.family": ("sd15", "sdxl")})  # a program's pipeline
    families = {"model.family": ("sdxl", "embedded")}
    for settings, changed, words in (
        (embedded, {key: (mine, None)} | families, f"was of {mine}, and {key} = None now: give {key}={mine} again, or"),
        (embedded, {unet: ("/gone", None)} | families, f"of /gone, and {unet} = None now: give {unet}=/gone again"),
        (known, {key: (None, mine), "model.family": ("embedded", "sdxl")}, "of the embedded model, .* give .*=null"),
        (known, {key: ("org/other", mine)}, "this run was of org/other, and"),
        (known, {unet: (mine, None)}, f"this run was of {mine} with {mine}, and {unet} = None now"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            settings.check_resumes(changed)


def test_groups_that_are_picked_go_with_the_family(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("model: {optim: {name: sgd, lr: 0.5}}\n", "utf-8")
    (tmp_path / "composed.yaml").write_text("defaults: [drtune_sd, override optim: adamw, _self_]\n", "utf-8")
    for where in ({}, {"config_dir": tmp_path, "config_name": "own"}):
        given = {"config_name": "draftp_sd", "overrides": ["family=sd35", "optim=adamw"], **where}
        assert load_config(**given).model.optim.lr == 1e-5
        given["overrides"] = ["family=sd35", "optim=sgd"]
        assert load_config(**given).model.optim.lr == 1e-2, "the families' rates are Adam's"
    for method, value in (("draft_plus", 1), ("drtune", 0)):
        model = load_config("own", ["family=sd35", f"algorithm={method}"], config_dir=tmp_path).model
        assert (model.kl_coeff, model.optim.lr) == (value, 0.5)
    assert model.drtune.train_steps == 3
    model = load_config("composed", ["family=sd35"], config_dir=tmp_path).model
    assert (model.algorithm, model.optim.name, model.optim.lr, model.kl_coeff) == ("drtune", "adamw", 1e-5, 0)
    model = load_config("draftp_sd", ["family=sd15", "model.algorithm=drtune"]).model
    assert model.kl_coeff == 1, "model.algorithm alone leaves the recipe's shared settings"


def test_a_family_in_a_users_yaml_and_a_shown_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {family: flux1}\n", "utf-8")
    cfg = load_config("mine", config_dir=tmp_path)
    assert (cfg.model.family, cfg.model.infer.inference_steps) == ("flux1", 25)
    path = folder(tmp_path / "model", *CHECKPOINTS["sd15"])
    shown = load_config("draftp_sd", [f"model.from_pretrained={path}"])
    from omegaconf import OmegaConf

    (tmp_path / "shown.yaml").write_text(OmegaConf.to_yaml(shown), "utf-8")
    assert load_config("shown", config_dir=tmp_path) == shown
    with pytest.raises(
        ConfigurationError, match=r"model.family = 'sd16': expected one of embedded, sd15.*; did you mean .*sd15"
    ):
        load_config("draftp_sd", ["family=sd16"])


@pytest.mark.parametrize("recipe", sorted(set(recipes()) - {"refl_imagereward_sd"}))
def test_a_recipe_leaves_the_families_their_numbers(recipe: str) -> None:
    words = ["family=sd15", "rm=symmetry"]  # hpsv2 needs its file
    assert load_config(recipe, words).model.infer == load_config("draft_sd", words).model.infer


def test_denoisers_alone(tmp_path: Path) -> None:
    for family, width in (("sd15", 768), ("sd21", 1024)):
        path = folder(tmp_path / family, "", width) / "unet"
        assert load_config("draftp_sd", [f"model.unet_config.from_pretrained={path}"]).model.family == family


def test_a_model_of_the_hub_is_known_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    at = tmp_path / "models--org--name"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("0" * 40)
    folder(at / "snapshots" / ("0" * 40), "FluxPipeline")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, family in (("org/name", "flux1"), ("org/another", "other")):
        cfg = load_config("draftp_sd", [f"model.from_pretrained={name}"])
        assert cfg.model.family == family
    assert "org/another" in cfg.model.family_because


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", "StableDiffusionPipeline")
    (path / "unet" / "config.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"unet/config.json"):
        load_config("draftp_sd", [f"model.from_pretrained={path}"])
    assert of_pipeline("StableDiffusionPipeline", lambda part: {"cross_attention_dim": [768]}).architecture == ""
    name = of_pipeline("\x1b[2J", lambda part: {}).because
    assert "\x1b" not in name


def test_no_warning_comes_of_a_family(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for family in FAMILIES:
            load_config("drtune_sd", [f"family={family}"])
    assert not caplog.text


def test_generate_samples_as_the_family_does(tmp_path: Path) -> None:
    from nemo_aligner_diffusion.cli.generate import read_request

    for family in CHECKPOINTS:
        path = folder(tmp_path / family, *CHECKPOINTS[family])
        assert read_request(["--prompt", "a", "--model", str(path)]).usual == sampling_of(family)
    assert read_request(["--prompt", "a"]).usual == sampling_of("embedded")
    with (conf_directory() / "family" / "sdxl.yaml").open(encoding="utf-8") as file:
        infer = yaml.safe_load(file)["infer"]
    assert sampling_of("sdxl").inference_steps == infer["inference_steps"] == 40


def test_nad_plan_takes_the_family_of_its_model(tmp_path: Path) -> None:
    from nemo_aligner_diffusion.cli.plan import _named

    path = folder(tmp_path / "model", *CHECKPOINTS["sd35"])
    for model, family in (("sd15", "sd15"), ("sdxl", "sdxl"), (str(path), "sd35")):
        assert load_config("draftp_sd", _named(model)).model.family == family
        assert load_config("draftp_sd", [*_named(model), "family=other"]).model.family == "other"


def test_the_table_in_the_documentation_is_current() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == recipe_table(), "run: python tests/settings_page.py docs"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["family=sd15"], (2.048e-5, 500)),  # all weights, as published
        (["family=sd15", "peft=sdlora"], (1e-4, 500)),  # the family's rate of a LoRA
        (["family=sd15", "sched=cosine"], (2.048e-5, 0)),
        (["family=sd15", "sched=cosine", "model.optim.sched.warmup_steps=7", "model.optim.lr=3e-6"], (3e-6, 7)),
    ],
)
def test_the_published_rate_is_of_all_weights_and_the_warm_up_of_its_schedule(words, expected) -> None:
    shards = "model.data.train.webdataset.local_root_path=pairs.tar"
    optim = load_config("dpo_sd", [*words, shards]).model.optim
    assert (optim.lr, optim.sched.warmup_steps) == expected
