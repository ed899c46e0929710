"""Recipes, overrides, types, cross-key checks and errors of ``load_config``."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.training import schema
from nemo_aligner_diffusion.training.config import derived, groups, load_config, loop_section, recipes, refl_window

ALGORITHM_OF = {
    "draftp_sd": "draft+",
    "drtune_sd": "drtune",
    "draft_sd": "draft",
    "draft_k_sd": "draft_k",
    "draft_lv_sd": "draft_lv",
    "refl_sd": "refl",
    "alignprop_sd": "alignprop",
}


def message(*overrides: str, name: str = "draftp_sd") -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_config(name, list(overrides))
    text = str(caught.value)
    assert "\n" not in text, "errors are one line"
    return text


@pytest.mark.parametrize("name", sorted(ALGORITHM_OF))
def test_every_recipe_composes_and_validates(name: str) -> None:
    cfg = load_config(name)
    assert cfg.name == name
    assert cfg.exp_manager.name == name
    assert cfg.model.algorithm == ALGORITHM_OF[name]
    assert loop_section(cfg) is cfg.trainer[name]
    assert cfg.rm.name == "clip"
    assert cfg.rm.model.restore_from_path is None
    assert derived(cfg).accumulation == 2


def test_the_recipes_are_the_ones_named_here() -> None:
    assert set(recipes()) == set(ALGORITHM_OF)


@pytest.mark.parametrize("group", sorted(groups()))
def test_every_option_of_every_group_can_be_picked(group: str) -> None:
    needed = {
        ("rm", "classifier"): ["rm.model.from_pretrained=vit", "rm.target_class=cat"],
        ("rm", "detection"): ["rm.model.from_pretrained=owlv2"],
        ("rm", "custom"): ["rm.import_path=mine:Reward"],
        ("rm", "ensemble"): ["rm.parts.second={name:clip,model:{restore_from_path:second.nemo}}"],
        **{
            ("rm", name): ["rm.model.restore_from_path=r.nemo"]
            for name in ("pickscore", "hpsv2", "clipscore", "aesthetic", "image_reward")
        },
    }
    for option in groups()[group]:
        more = needed.get((group, option), [])
        cfg = load_config("draftp_sd", [f"{group}={option}", *more])
        assert cfg.name == "draftp_sd"
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
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(wrong: str, right: str) -> None:
    text = message(f"{wrong}=1")
    assert f"unknown key '{wrong}'" in text
    assert right in text.split("did you mean")[1]


@settings(deadline=None, max_examples=25)
@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_invented_key_of_the_model_passes(name: str) -> None:
    key = f"model.{name}"
    accepted = {pattern.split(".")[1] for pattern in schema.KEYS if pattern.startswith("model.")}
    from nemo_aligner_diffusion.training.schema_compat import ALIASES, NOT_YET, reason_without_effect

    if name in accepted or key in ALIASES or key in NOT_YET or reason_without_effect(key):
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
        ("model.algorithm=dpok", "expected one of draft, draft_k"),
        ("model.infer.eta=1.5", "expected a number >= 0 and <= 1"),
        ("model.infer.sampler_type=heun", "expected one of DDIM"),
        ("model.decode_micro_batch_size=0", "expected an integer >= 1, or null"),
        ("rm.model.score=aesthetic", "expected one of pickscore, hps, clipscore, or null"),
        ("rm.trainer.precision=8", "expected one of 32, 16, bf16"),
        ("rm.quality=101", "expected an integer >= 1 and <= 100"),
        ("model.infer.height=100", "expected a multiple of 8 pixels, such as 96 or 104"),
        ("model.optim.betas=[0.9]", "expected a list of 2 numbers"),
        ("model.optim.betas=0.9", "expected a list of 2 numbers"),
        ("trainer.devices=0", "expected an integer >= 1 or a list of device indices"),
        ("trainer.devices=[0,0]", "expected an integer >= 1 or a list of device indices"),
        ("trainer.precision=fp8", "expected one of 32, 16, bf16"),
        ("model.seed=null", "expected an integer >= 0"),
        ("exp_manager.max_time_per_run=3h", "days:hours:minutes:seconds"),
        ("trainer.draftp_sd.limit_val_batches=1.5", "a whole number of batches, or a fraction"),
        ("model.unet_config.from_pretrained=", "an unset shell variable?"),
        ("model.data.train.webdataset.local_root_path=", "an unset shell variable?"),
        ("model.peft.lora_tuning.dropout=1", "< 1"),
        ("model.tensor_model_parallel_size=2", "not available yet"),
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
        ("rm.model.from_pretrained=/clip", "convert the folder with"),
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


@settings(deadline=None, max_examples=25)
@given(micro=st.integers(1, 12), devices=st.integers(1, 6), nodes=st.integers(1, 3), whole=st.integers(1, 200))
def test_batch_arithmetic(micro: int, devices: int, nodes: int, whole: int) -> None:
    words = [f"model.micro_batch_size={micro}", f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"]
    step = micro * devices * nodes
    if whole % step == 0:
        result = derived(load_config("draftp_sd", [*words, f"model.global_batch_size={whole}"]))
        assert (result.world_size, result.data_parallel_size) == (devices * nodes, devices * nodes)
        assert result.accumulation * step == whole
        return
    text = message(*words, f"model.global_batch_size={whole}")
    suggestions = text.split("These would fit: ")[1].split("; or ")
    assert suggestions[0].startswith("model.global_batch_size=")
    for suggestion in suggestions:  # what the message offers is indeed accepted
        key, values = suggestion.split("=")
        for value in values.split(" or "):
            load_config("draftp_sd", [*words, f"model.global_batch_size={whole}", f"{key}={value}"])


def test_a_list_of_devices_counts_its_entries() -> None:
    cfg = load_config("draftp_sd", ["trainer.devices=[1,3]", "model.micro_batch_size=2"])
    assert derived(cfg).accumulation == 4


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("draftp_sd", ["model.truncation_steps=21"], "model.truncation_steps = 21 is beyond"),
        ("draft_k_sd", ["model.infer.inference_steps=4", "model.truncation_steps=5"], "expected 1 … 4"),
        ("drtune_sd", ["model.infer.inference_steps=10", "model.drtune.train_steps=4"], "expected 1 … 3"),
        ("drtune_sd", ["model.drtune.train_steps=14"], "early stopping may leave 13: expected 1 … 13"),
        ("drtune_sd", ["model.drtune.early_stop_steps=21"], "expected 0 … 20"),
        ("refl_sd", ["model.refl.window=[15,20]"], "0 <= first <= last <= 19"),
        ("refl_sd", ["model.refl.window=[9,5]"], "0 <= first <= last <= 19"),
        ("alignprop_sd", ["model.alignprop.max_truncation_steps=21"], "1 <= min <= max <= 20"),
        ("alignprop_sd", ["model.alignprop.min_truncation_steps=21"], "1 <= min <= max <= 20"),
    ],
)
def test_steps_beyond_the_sampling_steps(name: str, overrides: list[str], expected: str) -> None:
    assert expected in message(*overrides, name=name)


def test_eta_is_ddims_own() -> None:
    assert load_config("draftp_sd", ["model.infer.eta=0.5", "model.infer.sampler_type=ddim"]).model.infer.eta == 0.5
    assert "expected 0, or sampler_type=DDIM" in message("model.infer.eta=0.5", "model.infer.sampler_type=Euler")


def test_steps_up_to_the_sampling_steps_are_fine() -> None:
    load_config("draftp_sd", ["model.truncation_steps=20"])
    load_config("drtune_sd", ["model.drtune.train_steps=13"])
    load_config("drtune_sd", ["model.drtune.train_steps=20", "model.drtune.early_stop_steps=0"])
    assert refl_window(load_config("refl_sd", ["model.infer.inference_steps=40"])) == (30, 39)
    assert refl_window(load_config("refl_sd", ["model.infer.inference_steps=1"])) == (0, 0)
    assert refl_window(load_config("refl_sd", ["model.refl.window=[3,5]"])) == (3, 5)


def test_a_file_for_a_reward_without_one_is_an_error() -> None:
    assert "which restores no file" in message("rm=symmetry", "rm.model.restore_from_path=/r.nemo")
    assert "which restores no file" in message("rm.name=symmetry", "rm.model.restore_from_path=/r.nemo")


def test_only_what_the_reward_reads_remains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfg = load_config("draftp_sd", ["rm.name=compressibility", "rm.quality=50", "rm.model.micro_batch_size=2"])
    assert set(cfg.rm) == {"name", "quality", "augment"}
    assert cfg.rm.quality == 50
    assert "rm.model.micro_batch_size: rm.name=compressibility does not read it" in caplog.text
    assert "rm.quality" not in caplog.text


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("{clip:{weight:much}}", "rm.parts.clip.weight = 'much': expected a number"),
        ("{clip:3}", "rm.parts.clip = 3: expected keys"),
        ("{aesthetics:{weight:1}}", "rm.parts.aesthetics.name = 'aesthetics': expected one of clip, symmetry"),
        ("{a:{name:simmetry}}", "did you mean symmetry"),
        ("{symmetry:{wieght:1}}", "unknown key 'rm.parts.symmetry.wieght'; did you mean weight?"),
        ("{compressibility:{qualty:50}}", "did you mean quality"),
        ("{compressibility:{quality:500}}", "rm.parts.compressibility.quality = 500: expected an integer >= 1 and <="),
        ("{clip:{model:{restore_path:/r.nemo}}}", "did you mean model.restore_from_path"),
        ("{clip:{model:{from_pretrained:/r}}}", "unknown key 'rm.parts.clip.model.from_pretrained'"),
        ("{classifier:{target_class:3}}", "rm.parts.classifier.model.from_pretrained"),
        (
            "{classifier:{target_class:3,model:{restore_from_path:/r.nemo}}}",
            "rm.parts.classifier.model.restore_from_path",
        ),
        ("{clip:{normalize:bas}}", "expected {mean: …, std: …}, or base"),
        ("{clip:{normalize:{mean:0,sd:1}}}", "did you mean std"),
        ("{clip:{normalize:{mean:0,std:0}}}", "rm.parts.clip.normalize.std = 0: expected a number > 0"),
        ("{clip:{clip:3}}", "rm.parts.clip.clip = 3: expected [low, high]"),
        ("{clip:{clip:[3,1]}}", "expected low < high"),
        ("{clip:{clip:[null,1],clip_mode:smooth}}", "needs both bounds"),
        ("{clip:{augment:{noise_std:much}}}", "rm.parts.clip.augment.noise_std = 'much'"),
        ("{clip:{augment:{noise:1}}}", "did you mean augment.noise_std"),
        ("{custom:{}}", "needs rm.parts.custom.import_path"),
        ("{a:{name:ensemble,parts:{clip:{},symmetry:{weight:1}}}}", "count alike"),
        ("{clip:{trainer:{precision:16}}}", "set rm.trainer.precision"),
        ("{a:{weight:1,reward:{name:clip},model:{}}}", "expected only weight and reward"),
        ("{a:{name:composite}}", "needs rm.parts.a.parts"),
        ("{a:{name:composite,parts:{b:{}}}}", "rm.parts.a.parts.b.name = 'b'"),
    ],
)
def test_parts_of_a_composite_are_checked_before_anything_is_loaded(parts: str, expected: str) -> None:
    assert expected in message("rm=composite", "~rm.parts.clip", "~rm.parts.symmetry", f"rm.parts={parts}")


def test_parts_that_fit() -> None:
    parts = "{clip:{weight:1,model:{restore_from_path:/r.nemo,score:hps}},a:{weight:-2,reward:{name:symmetry}}}"
    cfg = load_config("draftp_sd", ["rm=composite", f"rm.parts={parts}"])
    assert set(cfg.rm.parts) == {"clip", "a", "symmetry"}, "added to the parts that rm=composite brings"
    assert cfg.rm.parts.a == {"weight": -2, "reward": {"name": "symmetry"}}
    nested = "{all:{name:composite,parts:{symmetry:{},compressibility:{quality:50}}}}"
    load_config("draftp_sd", ["rm=composite", f"rm.parts={nested}"])


def test_parts_take_any_rewards_keys() -> None:
    parts = (
        "{owl:{name:detection,weight:2,normalize:base,clip:[null,3],model:{from_pretrained:/owl},query:a cat},"
        "mine:{name:custom,import_path:mine:Reward,kwargs:{strength:3,deep:{er:[1]}}},"
        "judges:{name:ensemble,aggregate:min,parts:{clip:{normalize:{mean:20,std:1.5}},hps:{name:clip}}}}"
    )
    cfg = load_config("draftp_sd", ["rm=composite", f"rm.parts={parts}"])
    assert cfg.rm.parts.mine.kwargs == {"strength": 3, "deep": {"er": [1]}}
    assert cfg.rm.parts.owl.clip == [None, 3]


def test_what_is_measured_on_validation_pictures_needs_validation() -> None:
    given = ["rm=composite", "rm.parts.clip.normalize=base"]
    assert load_config("draftp_sd", given).rm.parts.clip.normalize == "base"
    text = message(*given, "trainer.draftp_sd.val_check_interval=0")
    assert "rm.parts.clip.normalize = base" in text
    assert "val_check_interval >= 1" in text


def test_a_setting_that_the_method_does_not_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config("draftp_sd", ["model.drtune.train_steps=3", "peft=none", "model.peft.lora_tuning.adapter_dim=4"])
    assert "model.drtune.train_steps: model.algorithm=draft+ does not read it" in caplog.text
    assert "model.peft.lora_tuning.adapter_dim: model.peft.peft_scheme=none" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_config("drtune_sd", ["model.drtune.train_steps=3"])
    assert not caplog.text


def test_steps_and_ratio_take_each_other_back() -> None:
    sched = load_config("draftp_sd", ["model.optim.sched.warmup_ratio=0.1"]).model.optim.sched
    assert (sched.warmup_steps, sched.warmup_ratio) == (None, 0.1)


class TestOwnYaml:
    """--config-path / --config-name."""

    def write(self, folder: Path, text: str, name: str = "mine.yaml") -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return folder

    def test_values_lie_between_recipe_and_command_line(self, tmp_path: Path) -> None:
        self.write(tmp_path, "name: mine\nmodel:\n  kl_coeff: 0.5\n  seed: 3\ntrainer:\n  draftp_sd: {max_steps: 9}\n")
        cfg = load_config("mine", ["model.seed=4"], config_dir=tmp_path, recipe="drtune_sd")
        assert (cfg.model.kl_coeff, cfg.model.seed, cfg.model.algorithm) == (0.5, 4, "drtune")
        assert cfg.trainer.drtune_sd.max_steps == 9
        assert cfg.exp_manager.name == "mine"

    def test_a_recipes_name_means_that_recipe_below(self, tmp_path: Path) -> None:
        self.write(tmp_path, "model: {kl_coeff: 0.5}\n", "refl_sd.yaml")
        assert load_config("refl_sd.yaml", config_dir=tmp_path).model.algorithm == "refl"

    def test_defaults_may_name_our_groups_and_own_ones(self, tmp_path: Path) -> None:
        self.write(tmp_path, "defaults: [draftp_sd, override rm: mine, _self_]\nmodel: {seed: 5}\n")
        self.write(tmp_path, "name: clip\nmodel: {restore_from_path: /r.nemo}\n", "rm/mine.yaml")
        cfg = load_config("mine", config_dir=tmp_path)
        assert (cfg.model.seed, cfg.rm.model.restore_from_path, cfg.model.infer.inference_steps) == (5, "/r.nemo", 20)

    def test_groups_on_the_command_line_count_more_than_the_file(self, tmp_path: Path) -> None:
        self.write(tmp_path, "model: {optim: {name: sgd, lr: 0.5}}\n")
        self.write(tmp_path, "name: incompressibility\n", "rm/noisy.yaml")
        cfg = load_config("mine", ["optim=adamw", "rm=noisy", "loop=default"], config_dir=tmp_path)
        assert (cfg.model.optim.name, cfg.model.optim.lr, cfg.rm.name) == ("adamw", 4e-4, "incompressibility")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("model: {kl_coef: 1}\n", "unknown key 'model.kl_coef' in"),
            ("model: [1, 2\n", "is not valid YAML"),
            ("- 1\n", "expected keys and values"),
            ("model.seed: 1\n", "write the sections indented"),
            ('model: {seed: "${nope}"}\n', "cannot be resolved"),
            ("defaults: [nothing]\n", "cannot be composed"),
            ("model: {optim: adamw}\n", "is a section"),
            ("model: {seed: '???'}\n", "model.seed must be given"),
        ],
    )
    def test_errors_name_the_file_or_key(self, tmp_path: Path, text: str, expected: str) -> None:
        self.write(tmp_path, text)
        with pytest.raises(ConfigurationError) as caught:
            load_config("mine", config_dir=tmp_path)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe\n")
        with pytest.raises(ConfigurationError, match=r"mine.yaml"):
            load_config("mine", config_dir=tmp_path)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        self.write(tmp_path, "name: x\n", "other.yaml")
        with pytest.raises(ConfigurationError, match=r"there is no mine.yaml in .*; it holds other"):
            load_config("mine", config_dir=tmp_path)
        with pytest.raises(ConfigurationError, match="there is no such folder"):
            load_config("mine", config_dir=tmp_path / "no")
