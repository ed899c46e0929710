"""What ``load_config`` checks of several keys together: batch sizes, steps, precision, a reward and its parts."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_config import message

from nemo_aligner_diffusion.config.load import load_config, load_settings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import unflatten


@settings(max_examples=25)
@given(micro=st.integers(1, 12), devices=st.integers(1, 6), nodes=st.integers(1, 3), whole=st.integers(1, 200))
def test_batch_arithmetic(micro: int, devices: int, nodes: int, whole: int) -> None:
    words = [f"model.micro_batch_size={micro}", f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"]
    step = micro * devices * nodes
    if whole % step == 0:
        result = load_settings("draftp_sd", [*words, f"model.global_batch_size={whole}"])
        assert (result.trainer.world_size, result.layout.data) == (devices * nodes, devices * nodes)
        assert result.accumulation * step == whole
        return
    text = message(*words, f"model.global_batch_size={whole}")
    suggestions = text.split("These would fit: ")[1].split("; or ")
    assert suggestions[0].startswith("model.global_batch_size=")
    for suggestion in suggestions:  # what the message offers is indeed accepted
        key, values = suggestion.split("=")
        for value in values.split(" or "):
            load_config("draftp_sd", [*words, f"model.global_batch_size={whole}", f"{key}={value}"])


def test_precisions_of_one_process() -> None:
    """Lightning would say so of several, in its own words, when everything has been loaded."""
    for precision in ("16", "16-mixed", "64", "64-true"):
        load_config("draftp_sd", [f"trainer.precision={precision}"])
        text = message(f"trainer.precision={precision}", "trainer.devices=2")
        assert f"trainer.precision = {precision} with 2 processes" in text
    for precision in ("32", "32-true", "bf16", "bf16-mixed", "bf16-true", "16-true"):
        load_config("draftp_sd", [f"trainer.precision={precision}", "trainer.devices=2"])


def test_a_list_of_devices_counts_its_entries() -> None:
    assert load_settings("draftp_sd", ["trainer.devices=[1,3]", "model.micro_batch_size=2"]).accumulation == 4


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("draftp_sd", ["model.truncation_steps=21"], "model.truncation_steps = 21 is beyond"),
        ("draft_k_sd", ["model.infer.inference_steps=4", "model.truncation_steps=5"], "expected 1 … 4"),
        (
            "drtune_sd",
            ["model.infer.inference_steps=10", "model.drtune.early_stop_steps=8"],
            "(up to 8: model.drtune.early_stop_steps) may leave 3: set model.drtune.train_steps=3, ",
        ),
        (
            "drtune_sd",
            ["model.infer.inference_steps=4"],
            "model.drtune.train_steps = 4, but of 4 sampling steps early stopping (up to 2, 40 % of the steps: "
            "model.drtune.early_stop_steps) may leave 3: set model.drtune.train_steps=3, "
            "model.drtune.early_stop_steps=0, or more model.infer.inference_steps",
        ),
        ("drtune_sd", ["model.drtune.train_steps=21"], "may leave 13: set model.drtune.train_steps=13, or more model."),
        ("drtune_sd", ["model.drtune.early_stop_steps=21"], "expected 0 … 20"),
        ("refl_sd", ["model.refl.window=[15,20]"], "0 <= first <= last <= 19"),
        ("refl_sd", ["model.refl.window=[9,5]"], "0 <= first <= last <= 19"),
        ("alignprop_sd", ["model.alignprop.max_truncation_steps=21"], "1 <= min <= max <= 20"),
        ("alignprop_sd", ["model.alignprop.min_truncation_steps=21"], "1 <= min <= max <= 20"),
        ("draft_lv_sd", ["model.infer.inference_steps=1"], "expected 2 or more"),
        ("draftp_sd", ["algorithm=leapalign", "model.infer.inference_steps=1"], "LeapAlign needs a step before the"),
    ],
)
def test_steps_beyond_the_sampling_steps(name: str, overrides: list[str], expected: str) -> None:
    assert expected in message(*overrides, name=name)


def test_eta_is_ddims_own() -> None:
    assert load_config("draftp_sd", ["model.infer.eta=0.5", "model.infer.sampler_type=ddim"]).model.infer.eta == 0.5
    assert "expected 0, or sampler_type=DDIM" in message("model.infer.eta=0.5", "model.infer.sampler_type=Euler")


def test_steps_up_to_the_sampling_steps_are_fine() -> None:
    assert load_config("draftp_sd", ["model.truncation_steps=20"]).model.truncation_steps == 20
    assert load_config("drtune_sd", ["model.drtune.train_steps=13"]).model.drtune.train_steps == 13
    without_stop = ["model.drtune.train_steps=20", "model.drtune.early_stop_steps=0"]
    assert load_config("drtune_sd", without_stop).model.drtune.train_steps == 20


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
        ("{aesthetics:{weight:1}}", "rm.parts.aesthetics.name = 'aesthetics': expected one of classifier, clip"),
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
        ("{a:{name:composite}}", "needs rm.parts.a.parts"),
        ("{a:{name:composite,parts:{b:{}}}}", "rm.parts.a.parts.b.name = 'b'"),
    ],
)
def test_parts_of_a_composite_are_checked_before_anything_is_loaded(parts: str, expected: str) -> None:
    assert expected in message("rm=composite", "~rm.parts.clip", "~rm.parts.symmetry", f"rm.parts={parts}")


def test_parts_that_fit() -> None:
    parts = "{clip:{weight:1,model:{restore_from_path:/r.nemo,score:hps}},a:{weight:-2,name:symmetry}}"
    cfg = load_config("draftp_sd", ["rm=composite", f"rm.parts={parts}"])
    assert set(cfg.rm.parts) == {"clip", "a", "symmetry"}, "added to the parts that rm=composite brings"
    assert cfg.rm.parts.a == {"weight": -2, "name": "symmetry"}
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


WORDS = ["2024_01_15", "1e5", "3.10", "1_1_1", "007", "true", "-0", "0x10", "1.0e-3"]


@pytest.mark.parametrize("words", WORDS)
def test_text_and_paths_keep_the_words_that_were_typed(words: str, tmp_path: Path) -> None:
    path = "model.data.train.webdataset.local_root_path"
    keys = ["name", "exp_manager.explicit_log_dir", "exp_manager.version", "rm.model.restore_from_path",
            "model.unet_config.from_pretrained", path, "model.data.webdataset.local_root_path"]  # fmt: skip
    (tmp_path / "mine.yaml").write_text(
        OmegaConf.to_yaml(unflatten(dict.fromkeys(keys, "x"))).replace(": x", f": {words}")
    )
    typed = load_config("draftp_sd", [f"{key}={words}" for key in keys])
    for cfg in (typed, load_config("mine", config_dir=tmp_path)):
        assert {OmegaConf.select(cfg, key) for key in keys[:-1]} == {words}
    assert load_config("draftp_sd", [f"{keys[-1]}={words}"]).model.data.train.webdataset.local_root_path == words


def test_words_are_kept_in_lists_and_parts_and_numbers_stay_numbers(tmp_path: Path) -> None:
    cfg = load_config("draftp_sd", ["model.data.validation.prompts=[1_000, 1e3, 'a, b', 3.10]", "model.seed=1_000"])
    assert list(cfg.model.data.validation.prompts) == ["1_000", "1e3", "a, b", "3.10"]
    assert cfg.model.seed == 1000
    words = ["rm=composite", "rm.parts={a:{name:clip,weight:1e1,model:{restore_from_path:2024_01_15}}}"]
    part = load_config("draftp_sd", words).rm.parts.a
    assert (part.model.restore_from_path, part.weight) == ("2024_01_15", 10.0)
    (tmp_path / "mine.yaml").write_text("defaults: [draftp_sd, _self_]\nexp_manager: {version: 3.10}\n")
    assert load_config("mine", config_dir=tmp_path).exp_manager.version == "3.10"
    free = load_config("draftp_sd", ["rm=custom", "rm.import_path=a:b", "rm.kwargs.count=1_000"])
    assert free.rm.kwargs.count == 1000


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("[café]", ["café"]),
        ("[a cat, 介绍]", ["a cat", "介绍"]),
        ("[it's a cat]", ["it's a cat"]),
        ("[a (cat:1.2)]", ["a (cat:1.2)"]),
        ("[what? a cat!]", ["what? a cat!"]),
        ("['a, b', c!]", ["a, b", "c!"]),
    ],
)
def test_prompts_that_need_quotes_come_with_them_in_the_message(value: str, prompts: list[str]) -> None:
    key = "model.data.validation.prompts"
    text = message(f"{key}={value}")
    assert text.startswith(f"{key} = {value}: cannot be read: text with other than letters")
    (suggestion,) = shlex.split(text.partition("needs quotes: ")[2])
    assert list(load_config("draftp_sd", [suggestion]).model.data.validation.prompts) == prompts


def test_what_comes_from_the_environment_is_used_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret42")
    words = ["name=${oc.env:TOKEN}", "exp_manager.wandb_logger_kwargs.api_key=${oc.env:TOKEN}",
             "exp_manager.version=v-${name}", "model.data.validation.prompts=['a', '${oc.env:TOKEN}']",
             "model.seed=${oc.env:NUMBER,5}", "exp_manager.exp_dir=/runs/${oc.env:TOKEN}"]  # fmt: skip
    shown, settings = OmegaConf.to_yaml(load_config("draft_sd", words)), load_settings("draft_sd", words)
    assert shown == OmegaConf.to_yaml(settings.shown)
    assert settings.exp_manager.name == "secret42"
    assert settings.exp_manager.version == "v-secret42"
    assert settings.exp_manager.wandb_logger_kwargs == {"api_key": "secret42"}
    assert settings.model.data.prompts == ("a", "secret42")
    assert settings.model.seed == 5
    assert settings.exp_manager.exp_dir == "/runs/secret42"  # programs that come later look there
    assert shown.replace("/runs/secret42", "").count("secret42") == 0
    assert shown.count("${oc.env:TOKEN}") == 5
