"""Speed of learning from pairs: a real run beside a plain loop over the same network calls; what latent shards save.

The plain loop has its own networks of ``diffusers``, the pairs' latents in memory, and neither logs nor checks. It is
run inside the real run, a block of steps after each block of the run's, so that both meet the same machine.

    python -m benchmarks.pairs_per_second --blocks 20
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_aligner_diffusion.algorithms.preference.module import PreferenceTuning
from nemo_aligner_diffusion.algorithms.preference.self_made import make_rule_preferences
from nemo_aligner_diffusion.config.load import load_config
from nemo_aligner_diffusion.data.preferences.encoding import Choices, encode_latents
from nemo_aligner_diffusion.data.preferences.pairs import PairDataModule
from nemo_aligner_diffusion.data.preferences.settings import PairSettings
from nemo_aligner_diffusion.diffusion.generate import Sampling
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import add_lora
from nemo_aligner_diffusion.diffusion.network.latents import encode, from_moments
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.training.run import run_training


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def batches(shards: Path, pairs: int, epochs: int | None = None) -> tuple[Any, Iterator[dict[str, Any]]]:
    """The embedded model, and batches of these shards for it."""
    model = load_model(embedded_model_path())
    model.pipe.set_progress_bar_config(disable=True)
    data = PairDataModule(str(shards), settings=PairSettings(), micro_batch_size=pairs, epochs=epochs,
                          rank=0, world_size=1)  # fmt: skip
    data.setup("fit")
    data.fit_to(model, Sampling())
    return model, iter(data.train_dataloader())


class PlainLoop:
    """Diffusion-DPO as one would write it down: text encoder, frozen UNet, tuned UNet, AdamW.

    Args:
        shards: latents; read before the first step.
        lora: tune adapters like the run's; else every weight.
    """

    def __init__(self, shards: Path, pairs: int, lora: bool) -> None:
        model, stream = batches(shards, pairs)
        self.pipe = model.pipe
        self.given = []
        for batch in itertools.islice(stream, 8):
            latents = from_moments(model, batch["moments"].flatten(0, 1)).unflatten(0, (-1, 2))
            second = batch["labels"][:, 1] > batch["labels"][:, 0]
            rows = range(len(second))
            both = torch.cat([latents[rows, second.long()], latents[rows, (~second).long()]])
            self.given.append((both, batch["prompts"]))
        self.turn = itertools.cycle(self.given)
        self.frozen = copy.deepcopy(self.pipe.unet).requires_grad_(False).eval()
        if lora:
            add_lora(model.denoiser, 8, target_modules=model.lora_targets)
        else:
            model.denoiser.requires_grad_(True)
        self.trained = [parameter for parameter in self.pipe.unet.parameters() if parameter.requires_grad]
        self.pipe.unet.train()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)
        self.alphas = self.pipe.scheduler.alphas_cumprod

    def step(self) -> None:
        clean, prompts = next(self.turn)
        with torch.no_grad():
            text = self.pipe.encode_prompt(prompts, "cpu", 1, False)[0].repeat(2, 1, 1)
        t = torch.randint(0, len(self.alphas), (len(prompts),)).repeat(2)
        noise = torch.randn(len(prompts), *clean.shape[1:]).repeat(2, 1, 1, 1)
        noisy = self.pipe.scheduler.add_noise(clean, noise, t)
        with torch.no_grad():
            base = self.error(self.frozen, noisy, noise, t, text)
        winner, loser = (self.error(self.pipe.unet, noisy, noise, t, text) - base).chunk(2)
        loss = -logsigmoid(-2500 * (winner - loser)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def error(network: Any, noisy: Tensor, noise: Tensor, t: Tensor, text: Tensor) -> Tensor:
        prediction = network(noisy, t, encoder_hidden_states=text).sample
        return (prediction - noise).square().flatten(1).mean(1)


class Alternation:
    """Seconds of blocks of the run's steps, and after each of them of as many steps of the plain loop.

    A step of the run lasts from the end of the one before to its own end: data, logging and checks are in it.
    """

    def __init__(self, plain: PlainLoop, block: int) -> None:
        self.plain, self.block = plain, block
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.steps, self.began = 0, 0.0

    def ended(self) -> None:
        """A step of the run has ended; the first block warms both up."""
        self.steps += 1
        if self.steps % self.block:
            return
        stopped = now()
        for _ in range(self.block):
            self.plain.step()
        moment = now()
        if self.steps > self.block:
            self.ours.append(stopped - self.began)
            self.theirs.append(moment - stopped)
        self.began = now()

    @contextmanager
    def watching(self) -> Iterator[None]:
        original = PreferenceTuning.on_train_batch_end

        def hook(module: PreferenceTuning, *arguments: Any) -> None:
            original(module, *arguments)
            self.ended()

        PreferenceTuning.on_train_batch_end = hook  # type: ignore[method-assign]
        try:
            yield
        finally:
            PreferenceTuning.on_train_batch_end = original  # type: ignore[method-assign]


def described(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f}   {min(values):.3f} to {max(values):.3f}"


def latents_cost(pictures: Path, latents: Path, again: Path, batch: int) -> None:
    """From how many epochs on encoding the pairs once costs less; the least of three times each."""

    def of_an_epoch(shards: Path, latents_of: Callable[[Any, dict[str, Any]], object]) -> float:
        found = []
        for _ in range(3):
            model, stream = batches(shards, batch, epochs=1)
            began, pairs = now(), 0
            for given in stream:
                latents_of(model, given)
                pairs += len(given["prompts"])
            found.append(1000 * (now() - began) / pairs)
        return min(found)

    made, model = [], load_model(embedded_model_path())
    for _ in range(3):
        began = now()
        written, _ = encode_latents(model, str(pictures), again, Choices(64, 64, overwrite=True))
        made.append(1000 * (now() - began) / written.samples)
    into = min(made)
    fly = of_an_epoch(pictures, lambda model, given: encode(model, given["pictures"].flatten(0, 1)))
    read = of_an_epoch(latents, lambda model, given: from_moments(model, given["moments"].flatten(0, 1)))
    print(f"a pair: {into:.2f} ms into latent shards; an epoch {fly:.2f} ms from pictures, {read:.2f} ms from latents")
    print(f"encoding once pays after {into / (fly - read):.2f} epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="a batch (default 8)")
    parser.add_argument("--block", type=int, default=5, help="steps of each in turn (default 5)")
    parser.add_argument("--blocks", type=int, default=20, help="blocks that count (default 20)")
    parser.add_argument("--prompts", type=int, default=16, help="whose pairs are made: 6 of each (default 16)")
    parser.add_argument("--full", action="store_true", help="tune every weight, not adapters")
    parser.add_argument("words", nargs="*", help="overrides of the run, such as algorithm=dpo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rule_preferences(folder, "symmetry", arguments.prompts, 4, 4, 0, overwrite=False)
        pictures, latents = folder / "train", folder / "latents"
        encode_latents(load_model(embedded_model_path()), str(pictures), latents, Choices(64, 64))
        latents_cost(pictures, latents, folder / "again", arguments.pairs)
        alternation = Alternation(PlainLoop(latents, arguments.pairs, not arguments.full), arguments.block)
        words = [
            f"peft={'none' if arguments.full else 'sdlora'}",
            "sched=constant",
            "model.optim.lr=1e-5",
            "rm=none",
            f"model.global_batch_size={arguments.pairs}",
            f"model.micro_batch_size={arguments.pairs}",
            f"trainer.dde_sd.max_steps={arguments.block * (arguments.blocks + 1)}",
            "trainer.dde_sd.val_check_interval=0",
            "trainer.dde_sd.save_interval=0",
            "report.enable=false",
            f"model.data.train.webdataset.local_root_path={latents}",
            f"exp_manager.explicit_log_dir={folder / 'run'}",
            *arguments.words,
        ]
        with alternation.watching():
            if code := run_training(load_config("dde_sd", words)):
                raise SystemExit(code)
    each = arguments.pairs * arguments.block
    print(f"pairs a second, {len(alternation.ours)} blocks of {arguments.block} steps of {arguments.pairs} pairs")
    for label, seconds in (("run", alternation.ours), ("plain loop", alternation.theirs)):
        print(f"  {label:<12} {described([each / value for value in seconds])}")
    both = zip(alternation.ours, alternation.theirs, strict=True)
    print(f"  {'ratio':<12} {described([theirs / ours for ours, theirs in both])}   (at least 0.95 is wanted)")


if __name__ == "__main__":
    main()
