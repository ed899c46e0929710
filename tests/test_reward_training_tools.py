"""parquet_to_shards, folder_to_shards, make_rule_preferences; and that the page's commands are right."""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny.reward_training import blue_pairs

from nemo_aligner_diffusion.cli import evaluate_reward as evaluate_cli
from nemo_aligner_diffusion.cli import rule_preferences as rule_cli
from nemo_aligner_diffusion.cli import train_reward as train_cli
from nemo_aligner_diffusion.cli.preferences_to_shards import (
    folder_main,
    folder_parser,
    parquet_main,
    parquet_parser,
)
from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, read_preference_file
from nemo_aligner_diffusion.rewards.registry import rewards

ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path) -> list[PreferencePair]:
    return [pair for path in sorted(folder.glob("*.tar")) for pair in read_preference_file(path, BadSamples())]


def content(pairs: list[PreferencePair]) -> list[tuple[Any, ...]]:
    return [(pair.pictures, pair.prompt, pair.label) for pair in pairs]


def parquet(path: Path, pairs: list[PreferencePair], **columns: list[Any]) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {
        "jpg_0": [pair.pictures[0] for pair in pairs],
        "jpg_1": [pair.pictures[1] for pair in pairs],
        "caption": [pair.prompt for pair in pairs],
        "label_0": [pair.label[0] for pair in pairs],
        "label_1": [pair.label[1] for pair in pairs],
        "model_0": ["sdxl"] * len(pairs),
        **columns,
    }
    writer.write_table(arrow.table({k: v for k, v in table.items() if v is not None}), path, row_group_size=3)
    return path


def test_parquet_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = blue_pairs(8)
    (tmp_path / "in").mkdir()
    parquet(tmp_path / "in" / "a.parquet", pairs[:5])
    parquet(tmp_path / "in" / "b.parquet", pairs[5:], label_1=None)  # type: ignore[arg-type]
    assert parquet_main([str(tmp_path / "in"), str(tmp_path / "out"), "--samples-per-shard", "3"]) == 0
    assert content(read(tmp_path / "out")) == content(pairs)
    printed = capsys.readouterr().out
    assert "pairs written      8 in" in printed
    assert "shards             3 (preferences-0000.tar … preferences-0002.tar" in printed


def test_parquet_columns_labels_and_structs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = blue_pairs(4)
    wrapped = [{"bytes": pair.pictures[0], "path": None} for pair in pairs]
    path = parquet(
        tmp_path / "a.parquet", pairs, jpg_0=wrapped, text=[f"p{n}" for n in range(4)], has_label=[True, False] * 2
    )
    assert parquet_main([str(path), str(tmp_path / "out"), "--prompt", "text"]) == 0
    assert [pair.prompt for pair in read(tmp_path / "out")] == ["p0", "p2"]
    assert "without label      2 left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"caption": None}, ["no column caption", "jpg_0, jpg_1, label_0", "--prompt"]),
        ({"label_0": [1.0, 0.0, 0.9], "label_1": [0.0, 1.0, 0.9]}, ["row 2", "label 0.9/0.9", "sums to 1.8"]),
        ({"jpg_1": [b"x", b"x", b"x"]}, ["no JPEG, PNG or WebP"]),
        ({"jpg_0": [None, None, None]}, ["row 0", "no picture as image_0"]),
        ({"caption": [None, "a", "b"]}, ["row 0", "has no prompt"]),
        ({"label_0": ["a", "b", "c"]}, ["row 0", "label 'a/"]),
    ],
)
def test_parquet_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], parts: list[str]
) -> None:
    path = parquet(tmp_path / "a.parquet", blue_pairs(3), **columns)
    assert parquet_main([str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for part in (str(path), *parts):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_no_parquet_and_no_pyarrow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no parquet at all")
    assert parquet_main([str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 2
    assert "cannot be read as parquet" in capsys.readouterr().err
    assert parquet_main([str(tmp_path / "b.parquet"), str(tmp_path / "out")]) == 2
    assert "b.parquet" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert parquet_main([str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 2
    assert "pip install 'nemo-aligner-diffusion[parquet]'" in capsys.readouterr().err


def table(folder: Path, pairs: list[PreferencePair], header: str = "image_0,image_1,prompt,label_0") -> Path:
    """Pictures as files and the CSV that names them."""
    folder.mkdir(exist_ok=True)
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        for number, pair in enumerate(pairs):
            for side in (0, 1):
                (folder / f"{number}_{side}.png").write_bytes(pair.pictures[side])
            writer.writerow([f"{number}_0.png", f"{number}_1.png", pair.prompt, f"{pair.label[0]:g}"])
    return folder / "labels.csv"


def test_folder_round_trip(tmp_path: Path) -> None:
    pairs = blue_pairs(5, prompts=('a "quoted", prompt', "två äpplen 🍎", "line\nbreak"))
    labels = table(tmp_path / "pictures", pairs)
    assert folder_main([str(tmp_path / "pictures"), str(labels), str(tmp_path / "out")]) == 0
    assert content(read(tmp_path / "out")) == content(pairs)
    again = table(tmp_path / "pictures", pairs, "left,right,text,share")
    words = ["--image-0", "left", "--image-1", "right", "--prompt", "text", "--label-0", "share", "--overwrite"]
    assert folder_main([str(tmp_path / "pictures"), str(again), str(tmp_path / "out"), *words]) == 0
    assert content(read(tmp_path / "out")) == content(pairs)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("0_0.png,gone.png,x,1", ["line 2", "gone.png", "cannot be read"]),
        ("0_0.png,0_1.png,x,2", ["line 2", "2/-1"]),
        ("0_0.png,0_1.png,x,first", ["line 2", "'first'", "0.5 for a tie"]),
        ("0_0.png,0_1.png,x", ["not as many fields"]),
        ("0_0.png,0_1.png,a red, apple,1", ["not as many fields", "quote"]),
        ("0_0.png,0_1.png,  ,1", ["empty prompt"]),
        ("labels.csv,0_1.png,x,1", ["no JPEG, PNG or WebP"]),
    ],
)
def test_folder_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, parts: list[str]) -> None:
    labels = table(tmp_path / "pictures", blue_pairs(2))
    good = labels.read_text().splitlines()[2]
    labels.write_text(f"image_0,image_1,prompt,label_0\n{line}\n{good}\n")
    arguments = [str(labels.parent), str(labels), str(tmp_path / "out")]
    assert folder_main(arguments) == 2
    error = capsys.readouterr().err
    for part in (str(labels), *parts, "--skip-bad-rows"):
        assert part in error
    assert not (tmp_path / "out").exists()
    assert folder_main([*arguments, "--skip-bad-rows"]) == 0
    assert len(read(tmp_path / "out")) == 1
    assert "unusable rows      1 left out" in capsys.readouterr().out


def test_csv_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, part in (
        (b"a,b\n1,2\n", "no column image_0, image_1, prompt, label_0; its columns are a, b"),
        (b"", "its columns are none"),
        (b"image_0,image_1,prompt,label_0\ncaf\xe9,a,b,1\n", "not UTF-8 (byte 0xe9"),
        (b"image_0,image_1,prompt,label_0\n", "no pair to write"),
    ):
        (tmp_path / "t.csv").write_bytes(text)
        assert folder_main([str(tmp_path), str(tmp_path / "t.csv"), str(tmp_path / "out")]) == 2
        assert part in capsys.readouterr().err
    assert folder_main([str(tmp_path), str(tmp_path / "none.csv"), str(tmp_path / "out")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.slow
def test_rule_preferences_obey_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_aligner_diffusion.algorithms.preference.self_made import TIE_MARGINS, labeller_of
    from nemo_aligner_diffusion.data.preferences.reward_pairs import pictures

    words = ["colourfulness", str(tmp_path), "--prompts", "3", "--seeds-per-prompt", "3", "--steps", "4"]
    rule, margin = labeller_of("colourfulness"), TIE_MARGINS["colourfulness"]
    assert rule_cli.make_main(words) == 0
    train, held_out = read(tmp_path / "train"), read(tmp_path / "validation")
    assert (len(train), len(held_out)) == (6, 3)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    for pair in [*train, *held_out]:
        first, second = (float(rule(picture[None], [""])) for picture in pictures(pair))
        # Stored at 8 bits, so a hair from what was measured.
        expected = 0.5 if abs(first - second) < margin else float(first > second)
        assert pair.label[0] == expected or abs(abs(first - second) - margin) < 0.05
    assert "held out  3 pairs" in capsys.readouterr().out
    assert rule_cli.make_main(words) == 2
    assert "ask for overwriting" in capsys.readouterr().err


def test_rule_names_are_the_rules() -> None:
    from nemo_aligner_diffusion.algorithms.preference.self_made import TIE_MARGINS

    assert set(rule_cli.RULE_NAMES) == set(TIE_MARGINS) < set(rewards())


def documented_commands() -> list[list[str]]:
    """The words of every python command in the page's shell blocks."""
    page = (ROOT / "docs" / "reward_training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


def test_the_pages_commands_are_understood() -> None:
    from nemo_aligner_diffusion.config.load import load_config
    from nemo_aligner_diffusion.reward_training.configuration import load_reward_config

    parsers = {
        "test_reward_model.py": evaluate_cli.build_parser,
        "parquet_to_shards.py": parquet_parser,
        "folder_to_shards.py": folder_parser,
        "make_rule_preferences.py": rule_cli.make_parser,
        "judge_rule.py": rule_cli.judge_parser,
    }
    seen = set()
    for python, script, *words in documented_commands():
        assert python == "python"
        assert (ROOT / script).is_file(), script
        name = Path(script).name
        seen.add(name)
        if name == "train_reward_model.py":
            load_reward_config(words)
        elif name == "train_sd_draftp.py":
            load_config("draftp_sd", words)
        else:
            parsers[name]().parse_args(words)  # exits where it does not understand
    assert seen == {*parsers, "train_reward_model.py", "train_sd_draftp.py"}


@pytest.mark.slow
def test_the_whole_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the page has it, with few pictures and steps: preferences, reward, its test, tuning on it, judging."""
    from nemo_aligner_diffusion.cli import train as cli
    from nemo_aligner_diffusion.runtime.directory import read_state

    preferences, reward, tuned = tmp_path / "preferences", tmp_path / "reward", tmp_path / "tuned"
    few = ["--prompts", "6", "--seeds-per-prompt", "3", "--steps", "4"]
    assert rule_cli.make_main(["colourfulness", str(preferences), *few]) == 0
    shards = "webdataset.local_root_path"
    words = [
        f"model.data.train.{shards}={preferences / 'train'}",
        f"model.data.validation.{shards}={preferences / 'validation'}",
        f"exp_manager.explicit_log_dir={reward}",
        *("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu"),
        *("model.micro_batch_size=4", "model.global_batch_size=4", "model.optim.sched.warmup_steps=1"),
    ]
    assert train_cli.main(words) == 0
    nemo = reward / "export" / "reward.nemo"
    assert evaluate_cli.main([str(nemo), str(preferences / "validation"), "--output", str(tmp_path / "test")]) == 0
    assert json.loads((tmp_path / "test" / "figures.json").read_text())["pairs"] == 3
    words = [
        f"rm.model.restore_from_path={nemo}",
        f"exp_manager.explicit_log_dir={tuned}",
        *("trainer.draftp_sd.max_steps=1", "trainer.draftp_sd.val_check_interval=0", "trainer.accelerator=cpu"),
        *("model.micro_batch_size=2", "model.global_batch_size=2", "model.infer.inference_steps=5"),
        *("model.truncation_steps=1", "exp_manager.create_tensorboard_logger=false"),
    ]
    assert cli.main("draftp_sd", words) == 0
    assert read_state(tuned)["status"] == "finished"
    words = ["colourfulness", str(tuned / "export"), "--output", str(tmp_path / "judged"), "--seeds", "1"]
    assert rule_cli.judge_main(words) == 0
    assert (tmp_path / "judged" / "grid.png").is_file()
    printed = capsys.readouterr().out
    assert re.search(r"mean reward .*, tuned: .* above base on \d+ of 24\)", printed)
    assert re.search(r"original CLIP, tuned: finds the prompt first 0\.\d{3}", printed)
