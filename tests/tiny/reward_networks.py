"""Classifiers and detectors small enough for tests, in the folders that ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .clip import END_OF_TEXT, VOCABULARY_SIZE, tokenizer_files

LABELS = ["goldfish, Carassius auratus", "tabby, tabby cat", "golden retriever", "banana", "Egyptian cat"]


def louder(model: Any, factor: float = 8.0) -> Any:
    """Random weights at the usual scale barely tell pictures apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model.eval()


def classifier_folder(folder: Path, *, size: int = 32, problem_type: str | None = None, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=size,
        patch_size=8,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        problem_type=problem_type,
    )
    louder(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def detector_folder(folder: Path, kind: str = "owlvit", *, size: int = 32, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 40}
    settings: dict[str, Any] = {
        "text_config": {
            **tower,
            "vocab_size": VOCABULARY_SIZE,
            "max_position_embeddings": 16,
            "bos_token_id": END_OF_TEXT - 1,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": 0,
        },
        "vision_config": {**tower, "image_size": size, "patch_size": 8},
        "projection_dim": 24,
    }
    shape = {"height": size, "width": size}
    if kind == "owlvit":
        louder(OwlViTForObjectDetection(OwlViTConfig(**settings)), 2).save_pretrained(folder)
        OwlViTImageProcessorPil(size=shape, crop_size=shape).save_pretrained(folder)
    else:
        louder(Owlv2ForObjectDetection(Owlv2Config(**settings)), 2).save_pretrained(folder)
        Owlv2ImageProcessorPil(size=shape).save_pretrained(folder)
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token="!", model_max_length=16)
    tokenizer.save_pretrained(folder)
    return folder
