"""Pairs for diffusion training: order, crops, ties, latents, self-made ones; what is said about unusable ones."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from process_pool import ProcessPool
from safetensors.torch import save
from tiny.prompts import tar
from tiny.reward_training import blue_pairs, encode, picture
from tiny.runs import rows
from tiny.stable_diffusion import save_tiny_pipeline
from tiny_pipelines import named

from nemo_aligner_diffusion.algorithms.preference import self_made
from nemo_aligner_diffusion.cli.encode_latents import main as encode_main
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.data.bad_samples import BadSamples
from nemo_aligner_diffusion.data.preferences.encoding import Choices, encode_latents
from nemo_aligner_diffusion.data.preferences.latents import Encoding, read_moments, write_moments
from nemo_aligner_diffusion.data.preferences.pairs import PairDataModule, PairDataset, Wanted, prepare
from nemo_aligner_diffusion.data.preferences.settings import PairSettings, SelfMadeSettings
from nemo_aligner_diffusion.data.preferences.shards import PreferencePair, read_preference_file, write_preference_shards
from nemo_aligner_diffusion.diffusion.generate import Sampling, generate, own_size, picture_size
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.network.latents import encode as to_latents
from nemo_aligner_diffusion.diffusion.network.latents import from_moments
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.errors import ConfigurationError, DataError
from nemo_aligner_diffusion.planner.schedule import holds_latents
from nemo_aligner_diffusion.training.run import run_training

SIZE = Wanted(32, 32)
FIRST, SECOND = (encode(picture(redness, 0, (40, 48))) for redness in (0.2, 0.8))
GOOD: dict[str, bytes | str] = {"7.png_0": FIRST, "7.png_1": SECOND, "7.txt": "a cat", "7.label": "1/0"}
OTHER = {name.replace("7.", "8."): content for name, content in GOOD.items()} | {"8.txt": "ok"}


def pairs(path: Any, settings: PairSettings | None = None, wanted: Wanted = SIZE, **stream: Any) -> PairDataset:
    options = {"micro_batch_size": 1, "epochs": 1, "shuffle_buffer": 0} | stream
    return PairDataset(str(path), settings=settings or PairSettings(), wanted=wanted, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(embedded_model_path())


def test_batches_and_their_order_under_any_layout(tmp_path: Path) -> None:
    shapes = [(32, 32), (40, 64), (64, 40), (20, 20)]
    written = [blue_pairs(4, seed, size=size)[seed] for seed, size in enumerate(shapes)]
    soft = [PreferencePair(p.pictures, p.prompt, (0.75, 0.25)) for p in written]
    write_preference_shards([*written, *soft], tmp_path / "s", samples_per_shard=3)
    settings = PairSettings(crop="random", flip=True, tie_weight=0.5)
    options: dict[str, Any] = {"shuffle_buffer": 10, "seed": 3, "epochs": 2}
    whole = list(pairs(tmp_path / "s", settings, micro_batch_size=4, **options))
    assert whole[0]["pictures"].shape == (4, 2, 3, 32, 32)
    assert whole[0]["pictures"].dtype == whole[0]["labels"].dtype == torch.float32
    assert whole[0]["pictures"].min() >= 0
    assert whole[0]["pictures"].max() <= 1
    assert [i for batch in whole for i in batch["index"].tolist()] == list(range(16))
    assert [0.75, 0.25] in [row for batch in whole for row in batch["labels"].tolist()]
    ranks = [
        list(pairs(tmp_path / "s", settings, micro_batch_size=2, rank=rank, world_size=2, **options)) for rank in (0, 1)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch["pictures"], torch.cat([part["pictures"] for part in parts]))
        assert batch["prompts"] == [prompt for part in parts for prompt in part["prompts"]]
    resumed = next(iter(pairs(tmp_path / "s", settings, micro_batch_size=4, **options, start_sample=8)))
    assert torch.equal(resumed["pictures"], whole[2]["pictures"])
    other = next(iter(pairs(tmp_path / "s", settings, micro_batch_size=4, **{**options, "seed": 4})))
    assert not torch.equal(other["pictures"], whole[0]["pictures"])


@pytest.mark.parametrize("shape", [(40, 64), (64, 41), (20, 30), (32, 32), (7, 99)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_picture_is_resized_and_cropped_as_torchvision_does(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """``Resize(size, BILINEAR)`` and ``CenterCrop`` of Pillow's pictures, written out; another shape is covered."""
    given = Image.fromarray((picture(0.5, 1, shape) * 255).astype(np.uint8))
    got = prepare(given, size, PairSettings(), random.Random(0))
    assert got.shape == (*size, 3)
    if size[0] == size[1]:
        height, width = shape
        short, long = min(shape), int(size[0] * max(shape) / min(shape))
        scaled = (size[0], long) if width > height else (long, size[0])
        resized = np.asarray(given.resize(scaled[::-1], Image.Resampling.BILINEAR) if short != size[0] else given)
        top, left = (round((side - size[0]) / 2) for side in scaled)
        assert np.array_equal(got, resized[top : top + size[0], left : left + size[0]])


def test_draws_of_crop_and_mirroring_are_even() -> None:
    wide = Image.fromarray(np.arange(4 * 12 * 3, dtype=np.uint8).reshape(4, 12, 3))
    seen = {prepare(wide, (4, 4), PairSettings(crop="random"), random.Random(n)).tobytes() for n in range(200)}
    assert len(seen) == 9
    plain = prepare(wide, (4, 4), PairSettings(), random.Random(0))
    flips = [prepare(wide, (4, 4), PairSettings(flip=True), random.Random(n)) for n in range(100)]
    assert all(np.array_equal(x, plain) or np.array_equal(x, plain[:, ::-1]) for x in flips)
    assert 30 < sum(np.array_equal(x, plain) for x in flips) < 70
    with pytest.raises(ValueError, match="less extreme shape"):
        prepare(Image.new("RGB", (1, 40_000)), (512, 512), PairSettings(), random.Random(0))


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("packed", [False, True])
def test_ties_are_left_out_counted_or_kept(
    tmp_path: Path, policy: Any, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tar(tmp_path / "a.tar", {**GOOD, "7.label": "0.5/0.5", **OTHER, "9.png_0": FIRST, "9.png_1": SECOND,
                                    "9.json": '{"caption": "soft", "label_0": 0.4}'})  # fmt: skip
    if packed:
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_suffix(".tar.gz")
    options: dict[str, Any] = {"on_bad_sample": policy, "index_folder": tmp_path / "index"}
    assert [batch["prompts"] for batch in pairs(path, **options)] == [["ok"], ["soft"]]
    assert "1 pair was passed over, '7' in" in caplog.text
    kept = list(pairs(path, PairSettings(tie_weight=0.25), **options))
    assert [batch["labels"].tolist() for batch in kept[:2]] == [[[0.5, 0.5]], [[1.0, 0.0]]]
    ties = tar(tmp_path / "ties.tar", {**GOOD, "7.label": "0.5/0.5"})
    with pytest.raises(DataError, match=r"not one usable pair \(0 unusable\); 1 pair .*\.tie_weight above 0"):
        pairs(ties, **options)


def without(name: str, **changed: bytes | str) -> dict[str, bytes | str]:
    return {key: value for key, value in GOOD.items() if key != f"7.{name}"} | {
        f"7.{key}": value for key, value in changed.items()
    }


JPEG = encode(picture(0.2, 0, (64, 64)), "JPEG")
BAD = {
    "lacks its picture 1": without("png_1"),
    "lacks its prompt": without("txt"),
    "lacks its label": without("label"),
    "the label 2/-1": without("label", label="2/-1"),
    "same picture twice": without("png_1", png_1=FIRST),
    "the same picture twice": without("png_1", webp_1=encode(picture(0.2, 0, (40, 48)), "PNG")),
    "cannot be read": without("png_0", jpg_0=JPEG[: len(JPEG) // 2]),
    "no JPEG, PNG or WebP": without("png_0", png_0=b"GIF89a"),
}


@pytest.mark.parametrize("said", BAD)
def test_unusable_pairs_stop_or_are_skipped(tmp_path: Path, said: str) -> None:
    path = tar(tmp_path / "a.tar", {**BAD[said], **OTHER})
    with pytest.raises(DataError, match=rf"a\.tar: sample '7' .*{said}.*on_bad_sample=skip"):
        list(pairs(path))
    skipping = pairs(path, on_bad_sample="skip")
    assert [batch["prompts"] for batch in skipping] == [["ok"]]
    assert skipping.index.left_out["samples"] == 1
    assert said in skipping.index.left_out["messages"][0]


def test_what_is_missing_is_found_at_the_start_and_pictures_at_their_turn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks its picture 1"):
        pairs(tar(tmp_path / "a.tar", {**OTHER, **BAD["lacks its picture 1"]}))
    stream = iter(pairs(tar(tmp_path / "b.tar", {**OTHER, **BAD["cannot be read"]}), on_bad_shard="skip"))
    assert next(stream)["prompts"] == ["ok"]
    with pytest.raises(DataError, match=r"b\.tar: sample '7' .* \(data rank 0, sample 1 of the run\)"):
        next(stream)  # never replaced by another one


def test_latents_encoded_once_are_those_encoded_in_training(tmp_path: Path, model: DiffusionModel) -> None:
    """Bit for bit: their moments, and what is drawn from them; prompts and labels too."""
    third = PreferencePair((FIRST, SECOND), "soft", (1 / 3, 2 / 3))
    write_preference_shards([*blue_pairs(5, size=(70, 90)), third], tmp_path / "s", samples_per_shard=4)
    settings = PairSettings(tie_weight=1.0)
    written, unusable = encode_latents(model, str(tmp_path / "s"), tmp_path / "l", Choices(64, 64, batch_size=4))
    assert (written.samples, unusable, len(written.paths)) == (6, 0, 2)
    again, _ = encode_latents(model, str(tmp_path / "s"), tmp_path / "again", Choices(64, 64, batch_size=4))
    assert again.paths[0].read_bytes() == written.paths[0].read_bytes()
    batches = []
    for folder in ("s", "l"):
        data = PairDataModule(str(tmp_path / folder), settings=settings, micro_batch_size=3, seed=5, epochs=1)
        data.setup("fit")
        data.fit_to(model, Sampling())
        batches.append(list(data.train_dataloader()))
    for pictures, latents in zip(*batches, strict=True):
        assert (pictures["prompts"], pictures["index"].tolist()) == (latents["prompts"], latents["index"].tolist())
        assert torch.equal(pictures["labels"], latents["labels"])
        assert latents["moments"].shape == (3, 2, 2, 4, 16, 16)
        draws = [[torch.Generator().manual_seed(n) for n in range(6)] for _ in range(2)]
        live = to_latents(model, pictures["pictures"].flatten(0, 1), draws[0])
        assert torch.equal(live, from_moments(model, latents["moments"].flatten(0, 1), draws[1]))


def latent_shard(path: Path, member: bytes) -> Path:
    return tar(path, {"7.moments.safetensors": member, "7.txt": "a cat", "7.label": "1/0"})


def made(**changed: Any) -> Encoding:
    return Encoding(
        **{"vae": "ab" * 32, "height": 32, "width": 32, "crop": "center", "flip": False, "seed": 0} | changed
    )


VALUES = torch.rand(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
MODEL = Wanted(32, 32, "ab" * 32, (4, 4, 4))


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (write_moments(VALUES, made(vae="cd" * 32)), "vae cdcdcdcdcdcd…; this run has vae abababababab…"),
        (write_moments(VALUES, made(height=64)), "height 64; this run has height 32"),
        (write_moments(VALUES, made(crop="random", flip=True)), "crop random, flip True; this run has crop center"),
        (write_moments(VALUES[:, :, :, :2], made()), r"shape \(4, 2, 4\); this run has shape \(4, 4, 4\)"),
    ],
)
def test_latents_of_another_making_stop_the_run(tmp_path: Path, member: bytes, said: str) -> None:
    path = latent_shard(tmp_path / "l.tar", member)
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=rf"l\.tar: 7 has latents of another making: {said}"):
            list(pairs(path, wanted=MODEL, on_bad_sample=policy))


ENTRY = {"dtype": "F32", "shape": list(VALUES.shape), "data_offsets": [0, 4 * VALUES.numel()]}


def header(**changed: Any) -> bytes:
    said = {"__metadata__": {"nemo_aligner_diffusion.moments": json.dumps(vars(made()))}, "moments": ENTRY, **changed}
    text = json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + VALUES.numpy().tobytes()


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (b"", "cannot be read"),
        (write_moments(VALUES, made())[:-4], "bytes where"),
        (save({"moments": VALUES}), "lacks an entry"),
        (struct.pack("<Q", 1 << 40) + b"{}", "its header has 1,099,511,627,776 bytes"),
        (header(__metadata__={"nemo_aligner_diffusion.moments": "{}"}), "version None, not 1"),
        (
            header(__metadata__={"nemo_aligner_diffusion.moments": json.dumps({**vars(made()), "flip": 1})}),
            "says no flip",
        ),
        (header(moments={**ENTRY, "dtype": "F16"}), "F16 of the shape"),
        (header(moments={**ENTRY, "shape": [2, 2, 4, 4]}), "expected F32 of"),
        (header(moments={**ENTRY, "shape": [2, 2, 4, 4, 1 << 60]}), "expected F32 of"),
        (header(moments={**ENTRY, "data_offsets": [4, 1]}), "bytes where"),
        (header(moments=[]), "cannot be read"),
        (write_moments(VALUES * float("nan"), made()), "NaN"),
        (write_moments(-VALUES, made()), "negative"),
        (write_moments(VALUES[:1].repeat(2, 1, 1, 1, 1), made()), "same picture twice"),
    ],
)
def test_damaged_and_hostile_latents(tmp_path: Path, member: bytes, said: str) -> None:
    path = latent_shard(tmp_path / "l.tar", member)
    with pytest.raises(DataError, match=rf"l\.tar: sample '7' has .*{said}"):
        list(pairs(path, wanted=MODEL))
    with pytest.raises(DataError, match=r"not one usable pair \(1 unusable\)"):
        pairs(path, wanted=MODEL, on_bad_sample="skip")


def test_moments_round_trip_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    values, how = read_moments(write_moments(VALUES, made(crop="random")))
    assert torch.equal(values, VALUES)
    assert how == made(crop="random")
    latent_shard(tmp_path / "a.tar", write_moments(VALUES, made()))
    tar(tmp_path / "b.tar", GOOD)
    with pytest.raises(DataError, match=r"mixed, from .*b\.tar on"):
        pairs(tmp_path)


def test_the_encoding_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_pipeline(tmp_path / "model")
    weights = [part.rename(part.with_name("away")) for part in (tmp_path / "model" / "unet").glob("*.safetensors")]
    shard = tar(
        tmp_path / "a.tar", {**GOOD, **{k.replace("8.", "9."): v for k, v in OTHER.items() if "png_1" not in k}}
    )
    words = [str(shard), str(tmp_path / "l"), f"--model={tmp_path / 'model'}", "--height=32", "--width=48"]
    assert encode_main(words) == 2
    assert "sample '9' lacks its picture 1" in capsys.readouterr().err
    assert not (tmp_path / "l").exists()
    assert encode_main([*words, "--skip-bad-samples", "--crop=random"]) == 0
    said = capsys.readouterr().out
    assert "encoded  1 pairs of 48 x 32" in said
    assert "unusable 1 left out" in said
    assert encode_main([*words, "--skip-bad-samples"]) == 2
    assert "ask for overwriting" in capsys.readouterr().err
    assert encode_main([str(tmp_path / "l"), str(tmp_path / "m"), *words[2:]]) == 2
    assert "holds latents already" in capsys.readouterr().err
    weights[0].rename(weights[0].with_name("diffusion_pytorch_model.safetensors"))  # the VAE's alone were needed
    other = load_model(tmp_path / "model")
    with torch.no_grad():
        next(other.networks["vae"].encoder.parameters()).add_(1)
    data = PairDataModule(str(tmp_path / "l"), settings=PairSettings(crop="random"), micro_batch_size=1)
    data.setup("fit")
    data.fit_to(load_model(tmp_path / "model"), Sampling(height=32, width=48))
    with pytest.raises(DataError, match="000000000 has latents of another making: vae "):
        data.fit_to(other, Sampling(height=32, width=48))
    with pytest.raises(DataError, match="width 48; this run has width 32"):
        data.fit_to(load_model(tmp_path / "model"), Sampling(height=32, width=32))


def test_pictures_of_the_models_own_size(model: DiffusionModel) -> None:
    assert picture_size(model, Sampling()) == own_size(model) == (64, 64)
    assert picture_size(model, Sampling(height=8, width=16)) == (8, 16)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "lumina2", "pixart-alpha", "if", "prx"])
def test_the_size_that_is_read_off_a_pipeline_is_that_of_its_pictures(name: str) -> None:
    row = named(name)
    arguments = {key: value for key, value in row.arguments.items() if key not in ("height", "width")}
    other = DiffusionModel(row.build(), arguments=arguments)
    said = own_size(other)
    assert (said is None) == (name in ("pixart-alpha", "if", "prx"))
    if said is not None:
        assert said == generate(other, ["a"], [0], Sampling(steps=1)).shape[-2:]


def read(folder: Path) -> list[PreferencePair]:
    return [pair for path in sorted(folder.glob("*.tar")) for pair in read_preference_file(path, BadSamples())]


def test_self_made_pairs(tmp_path: Path, model: DiffusionModel) -> None:
    """Labels follow the labeller but where the key turns one round; equal settings, equal bytes; found again."""
    settings = SelfMadeSettings(labeller="colourfulness", prompts=3, seeds=3, steps=1, tie_margin=0.0)
    rule = self_made.labeller_of("colourfulness")
    folder = self_made.own_preferences(model, tmp_path / "a", settings, 7)
    plain = read(folder)
    assert len(plain) == 9
    for pair in plain:
        first, second = (
            torch.from_numpy(np.array(Image.open(io.BytesIO(p)))).permute(2, 0, 1) / 255 for p in pair.pictures
        )
        gap = float(rule(first[None], [""]) - rule(second[None], [""]))
        assert abs(gap) < 0.1 or pair.label[0] == float(gap > 0)  # measured before it was stored in 8 bits
    before = (folder / "preferences-0000.tar").read_bytes()
    again = self_made.own_preferences(model, tmp_path / "b", settings, 7)
    assert (again / "preferences-0000.tar").read_bytes() == before
    stamp = (folder / "preferences-0000.tar").stat().st_mtime_ns
    self_made.own_preferences(model, tmp_path / "a", settings, 7)
    assert (folder / "preferences-0000.tar").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigurationError, match=r"made with label_noise 0.0, and this run asks for label_noise 0.5"):
        self_made.own_preferences(model, tmp_path / "a", SelfMadeSettings(**{**vars(settings), "label_noise": 0.5}), 7)
    for noise in (0.5, 1.0):
        noisy = SelfMadeSettings(**{**vars(settings), "label_noise": noise})
        turned = read(self_made.own_preferences(model, tmp_path / str(noise), noisy, 7))
        assert [pair.pictures for pair in turned] == [pair.pictures for pair in plain]
        count = sum(one.label != other.label for one, other in zip(plain, turned, strict=True))
        assert count == 9 if noise == 1 else 0 < count < 9


def test_labellers() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert self_made.labeller_of("clip")(images, ["a cat", "a cat"]).shape == (2,)
    with pytest.raises(ConfigurationError, match=r"expected one of .*clip"):
        self_made.labeller_of("clipp")
    with pytest.raises(ConfigurationError, match="needs"):
        self_made.labeller_of("classifier")


def make_in_a_group(folder: Path) -> list[str]:
    """On a rank: the names of what is there afterwards, and the process that wrote it."""
    writers: list[int] = []
    write = self_made.make_preferences

    def noted(*args: Any, **options: Any) -> Any:
        writers.append(torch.distributed.get_rank())
        return write(*args, **options)

    self_made.make_preferences = noted  # type: ignore[assignment]
    try:
        settings = SelfMadeSettings(labeller="symmetry", prompts=1, seeds=2, steps=1)
        made = self_made.own_preferences(load_model(embedded_model_path()), folder, settings, 0)
    finally:
        self_made.make_preferences = write
    return [*sorted(path.name for path in made.iterdir()), *map(str, writers)]


@pytest.mark.slow
def test_one_of_several_processes_makes_the_pairs(tmp_path: Path, processes: ProcessPool) -> None:
    first, second = processes.run(2, make_in_a_group, tmp_path)
    assert first == [*second, "0"] == ["made.json", "preferences-0000.tar", "0"]


def test_a_run_on_latents_is_the_run_on_pictures(tmp_path: Path, model: DiffusionModel) -> None:
    """The whole program: the same figures, digit by digit."""
    sampling = Sampling(1, 1.0)
    labeller, prompts = self_made.labeller_of("symmetry"), self_made.drawn_prompts(4, 0)
    self_made.make_preferences(model, labeller, prompts, tmp_path / "s", seeds_per_prompt=2, sampling=sampling)
    encode_latents(model, str(tmp_path / "s"), tmp_path / "l", Choices(64, 64, batch_size=3))
    assert [holds_latents(tmp_path / data) for data in ("s", "l", "nothing")] == [False, True, False]
    figures = []
    for data in ("s", "l"):
        given = {
            "model.data.train.webdataset.local_root_path": tmp_path / data,
            "trainer.dpo_sd.max_steps": 2,
            "trainer.dpo_sd.val_check_interval": 0,
            "model.micro_batch_size": 2,
            "model.global_batch_size": 2,
            "trainer.accelerator": "cpu",
            "report.enable": "false",
            "exp_manager.explicit_log_dir": tmp_path / f"run_{data}",
        }
        assert run_training(load_config("dpo_sd", [f"{key}={value}" for key, value in given.items()])) == 0
        measured = rows(tmp_path / f"run_{data}" / "metrics.csv")
        timed = ("pairs_per_second", "seconds", "peak_memory_bytes")
        figures.append([{name: value for name, value in row.items() if name not in timed} for row in measured])
    assert figures[0] == figures[1]
    assert float(figures[0][1]["winner_error"]) != 0


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_families_latents(tmp_path: Path, family: str) -> None:
    other = DiffusionModel(named(family).build())
    tar(tmp_path / "s.tar", GOOD)
    encode_latents(other, str(tmp_path / "s.tar"), tmp_path / "l", Choices(16, 16))
    read = {}
    for name, path in (("pictures", tmp_path / "s.tar"), ("moments", tmp_path / "l")):
        data = PairDataModule(str(path), settings=PairSettings(), micro_batch_size=1)
        data.setup("fit")
        data.fit_to(other, Sampling(height=16, width=16))
        read[name] = next(iter(data.train_dataloader()))[name][0]
    assert torch.equal(from_moments(other, read["moments"]), to_latents(other, read["pictures"]))
