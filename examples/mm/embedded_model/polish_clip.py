"""Second phase of the embedded CLIP: the text tower is final, the vision tower and both projections learn on.

The denoiser is conditioned on the text tower's hidden states, so it can be trained from the end of the first phase on
while this one still runs. Frozen text states also make a step a good deal cheaper.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import augment, unnatural
from common import AveragedWeights, Log, save_atomically, to_unit
from data import DataSet
from train_clip import (
    BATCH,
    LARGEST_LOGIT_SCALE,
    NEGATIVES,
    WARMUP_STEPS,
    contrastive_loss,
    embed_images,
    retrieval,
    tokenize,
)
from transformers import CLIPModel, CLIPTokenizer

CAPTION_SHARES = (0.75, 0.15, 0.10)
CLEAN_SHARE = 0.3  # of the pictures are shown as they are


@torch.no_grad()
def pooled_texts(clip: CLIPModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the text projection sees of every caption, ``(C, hidden)`` float32."""
    return torch.cat([clip.text_model(input_ids=part).pooler_output for part in tokens.split(512)])


def polish_clip(data: DataSet, work_dir: Path, steps: int, learning_rate: float = 7e-4, seed: int = 3) -> Path:
    """Train on for ``steps`` from ``work_dir/clip`` (resuming if interrupted) and replace the model there."""
    folder = work_dir / "clip"
    checkpoint = work_dir / "clip_polish_checkpoint.pt"
    log = Log(work_dir / "clip_polish.jsonl")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    clip = CLIPModel.from_pretrained(folder, attn_implementation="eager").train()
    clip.text_model.requires_grad_(False)
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    average = AveragedWeights(clip, decay=0.995)
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        clip.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        first = state["step"]
    log(steps=steps, first=first)

    texts = pooled_texts(clip, tokenize(tokenizer, data.captions.texts))
    fits = data.captions.fits()
    index, weight = data.captions.sampling_table(CAPTION_SHARES)
    picture_weight = data.weights(flag_weight=0.6) * (data.held_out == 0)
    running = 0.0
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rate = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.multinomial(picture_weight, BATCH, replacement=False, generator=generator)
        captions = index[chosen].gather(1, torch.multinomial(weight[chosen], 1, generator=generator)).squeeze(1)
        clean = to_unit(data.images[chosen])
        plain = torch.rand((BATCH, 1, 1, 1), generator=generator) < CLEAN_SHARE
        seen = torch.where(plain, clean, augment(clean, generator))
        with torch.autocast("cpu", torch.bfloat16):
            image_vectors = embed_images(clip, torch.cat([seen, unnatural(clean, NEGATIVES, generator)]))
            text_vectors = F.normalize(clip.text_projection(texts[captions]).float(), dim=-1)
        logits = clip.logit_scale.exp() * image_vectors @ text_vectors.T
        loss = contrastive_loss(logits, fits[chosen[:, None], captions[None, :]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(LARGEST_LOGIT_SCALE))
        average.update(clip)
        running += loss.item()
        if (step + 1) % 50 == 0:
            log(step=step + 1, loss=running / 50, lr=rate, logit_scale=clip.logit_scale.exp().item())
            running = 0.0
        if (step + 1) % 200 == 0 or step + 1 == steps:
            state = {"model": clip.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_atomically({**state, "average": average.state_dict()}, checkpoint)
    clip.load_state_dict(average.values)
    clip.eval()
    log(**retrieval(clip, data, tokenizer))
    clip.save_pretrained(folder)
    return folder
