"""Recipes, overrides, types and errors of ``load_config``, key by key; keys together: test_config_checks.py."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_aligner_diffusion.algorithms.drtune import DRTune
from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.config.recipes import conf_directory, groups, recipes
from nemo_aligner_diffusion.config.schema import KEYS
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import flatten

ALGORITHM_OF = {
    "draftp_sd": "draft+",
    "draftp_sdxl": "draft+",
    "drtune_sd": "drtune",
    "drtune_sdxl": "drtune",
    "draft_sd": "draft",
    "draft_k_sd": "draft_k",
    "draft_lv_sd": "draft_lv",
    "refl_sd": "refl",
    "refl_imagereward_sd": "refl",
    "alignprop_sd": "alignprop",
    "ddpo_sd": "ddpo",
    "dde_sd": "dde",
    "dde_sdxl": "dde",
    "dpo_sd": "dpo",
    "dpo_sdxl": "dpo",
}
NEEDED = {name: ["rm.model.restore_from_path=r.nemo"] for name in ("drtune_sdxl", "refl_imagereward_sd")}


def message(*overrides: str, name: str = "draftp_sd") -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_config(name, list(overrides))
    text = str(caught.value)
    assert "\n" not in text, "errors are one line"
    return text


@pytest.mark.parametrize("name", sorted(ALGORITHM_OF))
def test_every_recipe_composes_and_validates(name: str) -> None:
    cfg = load_config(name, NEEDED.get(name, []))
    assert cfg.name == name
    assert cfg.exp_manager.name == name
    assert cfg.model.algorithm == ALGORITHM_OF[name]
    steps = load_settings(name, NEEDED.get(name, [])).loop.max_steps
    pairs = ALGORITHM_OF[name] in ("dde", "dpo")
    assert steps == cfg.trainer[name].max_steps == (120 if pairs else 30)  # of pairs the embedded family's
    assert cfg.rm.name == ("colourfulness" if pairs else "clip")
    assert pairs or cfg.rm.model.restore_from_path == ("r.nemo" if name in NEEDED else None)
    assert load_settings(name, NEEDED.get(name, [])).accumulation == (1 if pairs else 2)


def test_refls_recipe_is_its_authors() -> None:
    model = load_config("refl_imagereward_sd", NEEDED["refl_imagereward_sd"]).model
    assert (model.reward_scale, model.reward_margin, model.infer.unconditional_guidance_scale) == (1e-3, 2, 1)
    assert (model.infer.inference_steps, list(model.refl.window)) == (40, [30, 39])


def test_fdxls_recipe_is_drtune_on_hpsv2() -> None:
    cfg = load_config("drtune_sdxl", ["rm.model.restore_from_path=hps_v2.1.nemo", "family=sdxl"])
    assert (cfg.rm.name, cfg.rm.model.score, cfg.model.drtune.train_steps) == ("clip", "hps", 4)
    assert (cfg.model.infer.inference_steps, DRTune(**cfg.model.drtune).most_early(40)) == (40, 16)
    assert "rm.model.restore_from_path must be given" in message(name="drtune_sdxl")


def test_the_recipes_are_the_ones_named_here() -> None:
    assert set(recipes()) == set(ALGORITHM_OF)


@pytest.mark.parametrize("group", sorted(groups()))
def test_every_option_of_every_group_can_be_picked(group: str) -> None:
    also = {("rm", "ensemble"): ["rm.parts.second={name:clip,model:{restore_from_path:second.nemo}}"]}
    for option in groups()[group]:
        text = (conf_directory() / group / f"{option}.yaml").read_text(encoding="utf-8")
        leaves = flatten({group: yaml.safe_load(text)})
        more = [f"{key}=x" for key, value in leaves.items() if value == "???"] + also.get((group, option), [])
        recipe = {"jpeg_size": "ddpo_sd"}.get(option, "draftp_sd")  # it has no gradient
        recipe = "dde_sd" if (group, option) == ("rm", "none") else recipe  # nothing to be learnt from
        cfg = load_config(recipe, [f"{group}={option}", *more])
        assert cfg.name == recipe
        if more:
            text = message(f"{group}={option}")
            assert more[0].partition("=")[0] in text


def test_a_picked_group_replaces_the_whole_section() -> None:
    assert set(load_config("draftp_sd", ["rm=symmetry"]).rm) == {"augment", "name"}
    cosine = load_config("drtune_sd", ["sched=cosine"]).model.optim.sched
    assert cosine.name == "CosineAnnealing"
    assert "hold_steps" not in cosine


def test_values_keep_or_get_the_type_of_their_key() -> None:
    cfg = load_config(
        "draftp_sd",
        [
            "model.optim.lr=1e-4",
            "trainer.precision=bf16",
            "trainer.draftp_sd.max_steps=1e3",
            "model.seed=7",
            "name=5",
            "model.infer.sampler_type=euler",
            "trainer.draftp_sd.limit_val_batches=2.0",
            "model.optim.betas=[0.8,0.99]",
        ],
    )
    assert cfg.model.optim.lr == 1e-4
    assert cfg.trainer.precision == "bf16"
    assert cfg.trainer.draftp_sd.max_steps == 1000
    assert isinstance(cfg.trainer.draftp_sd.max_steps, int)
    assert cfg.name == cfg.exp_manager.name == "5"
    assert cfg.model.infer.sampler_type == "Euler"
    assert isinstance(cfg.trainer.draftp_sd.limit_val_batches, int)
    assert list(cfg.model.optim.betas) == [0.8, 0.99]
    assert load_config("draftp_sd", ["trainer.precision=32"]).trainer.precision == "32"


@pytest.mark.parametrize(
    "value",
    ["prompts-{0000..0127}.tar", "/data/lr=1e-4/p.tar", "~/prompts.tar", "/data/a b.tar", "shards-*.tar", "/x(1).tar"],
)
def test_paths_are_taken_as_they_stand(value: str) -> None:
    cfg = load_config("draftp_sd", [f"model.data.train.webdataset.local_root_path={value}"])
    assert cfg.model.data.train.webdataset.local_root_path == value


def test_lists_of_paths_and_interpolations() -> None:
    cfg = load_config(
        "draftp_sd",
        ["model.data.train.webdataset.local_root_path=[/a.tar,/b.tar]", "exp_manager.explicit_log_dir=runs/${name}"],
    )
    assert list(cfg.model.data.train.webdataset.local_root_path) == ["/a.tar", "/b.tar"]
    assert cfg.exp_manager.explicit_log_dir == "runs/draftp_sd"


def test_free_sections_take_any_key() -> None:
    cfg = load_config(
        "draftp_sd",
        [
            "exp_manager.wandb_logger_kwargs.project=p",
            "rm=composite",
            "rm.parts.jpeg={name:compressibility,weight:2}",
            "~rm.parts.clip",
        ],
    )
    assert cfg.exp_manager.wandb_logger_kwargs == {"project": "p"}
    assert set(cfg.rm.parts) == {"symmetry", "jpeg"}
    assert cfg.rm.parts.jpeg == {"name": "compressibility", "weight": 2}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.kl_coef", "model.kl_coeff"),
        ("kl_coeff", "model.kl_coeff"),
        ("optim.lr", "model.optim.lr"),
        ("model.unet_config.from_pretraned", "model.unet_config.from_pretrained"),
        ("model.data.train.webdataset.local_rootpath", "model.data.train.webdataset.local_root_path"),
        ("trainer.draftp_sd.max_step", "trainer.draftp_sd.max_steps"),
        ("trainer.drafttp_sd.max_steps", "trainer.draftp_sd.max_steps"),
        ("rm.model.restore_path", "rm.model.restore_from_path"),
        ("exp_manager.explicit_logdir", "exp_manager.explicit_log_dir"),
        ("model.sampling.base.step", "model.sampling.base.steps"),
        ("model.guidance_scale", "model.infer.unconditional_guidance_scale?"),
        ("true_cfg_scale", "model.infer.unconditional_guidance_scale?"),
        ("model.num_inference_steps", "model.infer.inference_steps?"),
        ("height", "model.infer.height?"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(wrong: str, right: str) -> None:
    text = message(f"{wrong}=1")
    assert f"unknown key '{wrong}'" in text
    assert right in text.split("did you mean")[1]


@settings(max_examples=25)
@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_invented_key_of_the_model_passes(name: str) -> None:
    key = f"model.{name}"
    accepted = {pattern.split(".")[1] for pattern in KEYS if pattern.startswith("model.")}
    from nemo_aligner_diffusion.config.nemo_names import ALIASES, NOT_YET, WITHOUT_EFFECT, pattern_of

    if name in accepted or key in ALIASES or key in NOT_YET or pattern_of(key, WITHOUT_EFFECT):
        return
    assert f"unknown key '{key}'" in message(f"{key}=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.optim.lr=fast", "expected a number > 0"),
        ("model.optim.lr=0", "expected a number > 0"),
        ("model.optim.lr=nan", "expected a number > 0"),
        ("model.optim.lr=true", "expected a number > 0"),
        ("model.kl_coeff=-1", "expected a number >= 0"),
        ("model.micro_batch_size=0", "expected an integer >= 1"),
        ("model.micro_batch_size=1.5", "expected an integer >= 1"),
        ("model.activation_checkpointing=1", "expected true or false"),
        ("model.algorithm=dpok", "expected one of alignprop, draft, draft_k"),
        ("model.kl_space=v", "expected one of epsilon, prediction, velocity, or null"),
        ("algorithm=leapaling", "did you mean leapalign"),
        ("model.infer.eta=1.5", "expected a number >= 0 and <= 1"),
        ("model.infer.sampler_type=heun", "expected one of DDIM"),
        ("model.decode_micro_batch_size=0", "expected an integer >= 1, or null"),
        ("rm.model.score=aesthetic", "expected one of pickscore, hps, clipscore, or null"),
        ("rm.trainer.precision=8", "expected one of 32, 16, bf16"),
        ("rm.quality=101", "expected an integer >= 1 and <= 100"),
        ("model.infer.height=100", "expected a multiple of 8 pixels, such as 96 or 104"),
        ("model.optim.betas=[0.9]", "expected a list of 2 numbers"),
        ("model.optim.betas=0.9", "expected a list of 2 numbers"),
        ("trainer.devices=0", "expected an integer >= 1 or a list of different device indices"),
        ("trainer.devices=[0,0]", "expected an integer >= 1 or a list of different device indices"),
        ("trainer.precision=fp4", "expected one of 32, 16, bf16"),
        ("model.seed=null", "expected an integer >= 0"),
        ("exp_manager.max_time_per_run=3h", "days:hours:minutes:seconds"),
        ("trainer.draftp_sd.limit_val_batches=1.5", "a whole number of batches, or a fraction"),
        ("model.unet_config.from_pretrained=", "an unset shell variable?"),
        ("model.data.train.webdataset.local_root_path=", "an unset shell variable?"),
        ("model.peft.lora_tuning.dropout=1", "< 1"),
        ("model.tensor_model_parallel_size=2", "= 1 × 1): expected 1, or trainer.devices=2"),
        ("model.fsdp=true", "nothing to shard over"),
        ("model.tensor_parallel_reward=true", "there is no group to cut the reward over"),
        ("model.fsdp_frozen=[vae]", "add model.fsdp=true"),
        ("model.fsdp_frozen=[unet]", "expected any of text_encoder, vae, reward"),
        ("model.optim=adamw", "is a section; its keys are model.optim.name"),
        ("model.seed=1,2", "several values separated by commas"),
        ("model.optim.betas=[0.9,0.99", "cannot be read"),
        ("exp_manager.explicit_log_dir=${nothing.there}", "cannot be resolved"),
        ("rm=aesthetics", "did you mean aesthetic"),
        ("rm=pickscore", "rm.model.restore_from_path must be given"),
        ("rm=classifier", "rm.target_class and rm.model.from_pretrained must be given"),
        ("rm=ensemble", "nothing to agree with: add another"),
        ("rm.name=classifier", "needs rm.model.from_pretrained, such as"),
        ("rm.name=custom", "needs rm.import_path, such as rm.import_path=my_package.my_module:my_reward"),
        ("rm.model.from_pretrained=/clip", "becomes a .nemo by"),
        ("rm.augment.noise_std=-1", "expected a number >= 0"),
        ("rm.augment.crop_scale=0", "> 0 and <= 1"),
        ("rm.augment.dropout=1", "< 1"),
        ("rm.views=11", "<= 10"),
        ("rm.aggregate=max", "expected one of mean, min, mean_minus_std"),
        ("optim=adamww", "did you mean adamw"),
        ("~model.seed", "cannot be deleted"),
        ("rm.name=composite", "needs rm.parts"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_was_expected(override: str, expected: str) -> None:
    text = message(override)
    assert expected in text
    assert override.partition("=")[0].lstrip("~") in text


@pytest.mark.parametrize("word", ["model.seed", "=3", "--resume", "model..seed=1"])
def test_a_word_that_is_no_override(word: str) -> None:
    assert "expected key=value" in message(word)


def test_an_unknown_recipe_names_the_nearest() -> None:
    text = message(name="drtune")
    assert "did you mean drtune_sd" in text
