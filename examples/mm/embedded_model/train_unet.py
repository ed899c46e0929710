"""Train the embedded denoiser on the autoencoder's latents, conditioned on the frozen CLIP text tower."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from common import AveragedWeights, Log, Training, listed, save_atomically
from data import DataSet
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pipeline import build_pipeline, build_scheduler, generate, labelled_grid, text_tower
from train_clip import tokenize
from train_vae import encode_mean
from transformers import CLIPModel, CLIPTokenizer

BATCH = 64
WARMUP_STEPS = 200
DECAY_SHARE = 0.35  # the learning rate is constant, then falls linearly to zero over this last share of the steps
#: Probability of a specific, a keyword and a broad caption; EMPTY_SHARE of all are then replaced by the empty one.
CAPTION_SHARES = (0.70, 0.08, 0.22)
EMPTY_SHARE = 0.10
#: Sampling weights that favour things one would ask for by name over the many people, signs and flags.
FLAG_WEIGHT = 0.15
GROUP_WEIGHTS = {"People & Body": 0.4, "Symbols": 0.5}
#: From this step on the denoiser concentrates on what it can learn well in the time: animals, plants, food, vehicles,
#: buildings, sports, instruments and tools in full, other things by a third, people, signs and flags hardly.
FOCUS_STEP = 2250
FOCUS_WEIGHTS = {
    **dict.fromkeys(("Smileys & Emotion", "Activities", "Objects", "Travel & Places"), 0.35),
    **dict.fromkeys(("People & Body", "Symbols", "Component", "Flags"), 0.05),
    **dict.fromkeys(("transport-ground", "transport-air", "transport-water", "place-building", "sport"), 1.0),
    **dict.fromkeys(("musical-instrument", "tool"), 1.0),
    "time": 0.05,
}
FOCUS_TIME_POWER = (
    0.7  # from then on t = 1000 u^0.7: 63 % of the samples are noisier than t = 500, where shape is decided
)
#: Translations of the pictures in pixels (down, right), and the share of samples that use one other than the first.
SHIFTS = ((0, 0), (0, 2), (0, -2), (2, 0), (-2, 0))
SHIFTED_SHARE = 0.25
SAMPLE_PROMPTS = listed(
    """
    red apple, a picture of a pineapple, dog face, cat, unicorn, butterfly, penguin, sunflower, cactus, pizza,
    hamburger, birthday cake, soccer ball, guitar, rocket, automobile, sailboat, house, hammer, umbrella, red heart,
    star, grinning face, woman dancing, flag of france, fruit, animal, bird, vehicle, building, drink, face
    """
)


def build_unet(context_size: int) -> UNet2DConditionModel:
    """A freshly initialised denoiser of 8.7 million parameters for ``(B, 4, 16, 16)`` latents."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 160),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context_size,
        attention_head_dim=4,  # diffusers reads this as the number of heads
    )
    unet.set_attn_processor(AttnProcessor())  # half as fast again as SDPA on a CPU at this size
    return unet


def shifted_latents(data: DataSet, vae: AutoencoderKL) -> torch.Tensor:
    """Scaled latents of every picture at every shift, ``(N, len(SHIFTS), 4, 16, 16)`` float32."""
    result = []
    for down, right in SHIFTS:
        moved = F.pad(data.images, (2, 2, 2, 2), value=255).roll((down, right), dims=(2, 3))[..., 2:-2, 2:-2]
        result.append(encode_mean(vae, moved) * vae.config.scaling_factor)
    return torch.stack(result, dim=1)


@torch.no_grad()
def caption_states(clip_folder: Path, texts: list[str]) -> torch.Tensor:
    """Last hidden states of the text tower for every caption, padded as the pipeline pads, ``(C, 24, D)`` bfloat16."""
    tower = text_tower(CLIPModel.from_pretrained(clip_folder))
    tokens = tokenize(CLIPTokenizer.from_pretrained(clip_folder), texts)
    return torch.cat([tower(input_ids=part).last_hidden_state.bfloat16() for part in tokens.split(512)])


def prepared(data: DataSet, work_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and caption states, cached in ``work_dir/unet_inputs.pt``."""
    cache = work_dir / "unet_inputs.pt"
    if not cache.is_file():
        latents = shifted_latents(data, AutoencoderKL.from_pretrained(work_dir / "vae"))
        states = caption_states(work_dir / "clip", data.captions.texts)
        save_atomically({"latents": latents, "states": states}, cache)
    stored = torch.load(cache, weights_only=True)
    return stored["latents"], stored["states"]


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, linear decay to zero over the last ``DECAY_SHARE`` of ``steps``."""
    decay = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def train_unet(data: DataSet, work_dir: Path, steps: int, learning_rate: float = 6e-4, seed: int = 2) -> Path:
    """Train for ``steps`` (resuming if interrupted); returns the ``save_pretrained`` folder of the averaged weights.

    Until the decay begins the run does not depend on ``steps``, so it may be stopped and resumed with another number.
    """
    folder = work_dir / "unet"
    checkpoint = work_dir / "unet_checkpoint.pt"
    log = Log(work_dir / "unet.jsonl")
    latents, states = prepared(data, work_dir)
    torch.manual_seed(seed)
    unet = build_unet(states.shape[-1]).train()
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    average = AveragedWeights(unet, decay=0.999)
    training = Training(unet, optimizer, average, checkpoint, log, steps=steps, save_every=250)

    scheduler = build_scheduler()
    index, weight = data.captions.sampling_table(CAPTION_SHARES)
    first_weight, focus_weight = data.weights(FLAG_WEIGHT, GROUP_WEIGHTS), data.weights(FLAG_WEIGHT, FOCUS_WEIGHTS)
    for step, generator in training.generators(seed):
        rate = learning_rate_at(step, steps, learning_rate)
        focus = step >= FOCUS_STEP
        chosen = torch.multinomial(focus_weight if focus else first_weight, BATCH, generator=generator)
        captions = index[chosen].gather(1, torch.multinomial(weight[chosen], 1, generator=generator)).squeeze(1)
        captions = captions * (torch.rand(BATCH, generator=generator) >= EMPTY_SHARE)
        move = torch.randint(1, len(SHIFTS), (BATCH,), generator=generator)
        move = move * (torch.rand(BATCH, generator=generator) < SHIFTED_SHARE)
        clean = latents[chosen, move]
        noise = torch.randn(clean.shape, generator=generator)
        # Stratified timesteps: one in each of BATCH equal intervals.
        times = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        times = (1000 * (times**FOCUS_TIME_POWER if focus else times)).long().clamp(max=999)
        times = times[torch.randperm(BATCH, generator=generator)]
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(
                scheduler.add_noise(clean, noise, times), times, encoder_hidden_states=states[captions].float()
            ).sample
        loss = F.mse_loss(output.float(), scheduler.get_velocity(clean, noise, times))
        norm = training.update(step, rate, loss)
        training.record(step, lr=rate, grad_norm=norm)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            export(average, folder, work_dir, states.shape[-1], work_dir / "samples" / f"step_{step + 1:06d}.png")
    return folder


def export(average: AveragedWeights, folder: Path, work_dir: Path, context_size: int, grid: Path) -> None:
    """Save the averaged weights in ``folder`` and draw ``SAMPLE_PROMPTS`` with two seeds into ``grid``."""
    with torch.random.fork_rng():
        unet = build_unet(context_size).eval()
    unet.load_state_dict(average.values)
    unet.save_pretrained(folder)
    images = generate(build_pipeline(work_dir / "clip", work_dir / "vae", unet), list(SAMPLE_PROMPTS), [0, 1])
    grid.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(images, list(SAMPLE_PROMPTS), columns=2).save(grid)
