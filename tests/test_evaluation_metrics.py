"""A metric is one file: what is declared there is measured, written and shown, and nothing else has to know of it."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_evaluation_report import make_run
from tiny.training import Toy, fit

from nemo_aligner_diffusion.algorithms.picture_validation import ValidationPictures
from nemo_aligner_diffusion.algorithms.reward_tuning import RewardTuning
from nemo_aligner_diffusion.evaluation.diversity import diversity, embed_images
from nemo_aligner_diffusion.evaluation.metrics.appearance import Saturation, Sharpness
from nemo_aligner_diffusion.evaluation.metrics.base import (
    Pictures,
    Step,
    TrainingMetric,
    ValidationMetric,
    metrics,
    of_kind,
    training_columns,
    training_figures,
    validation_figures,
)
from nemo_aligner_diffusion.evaluation.run_files import RunFiles

ROOT = Path(__file__).resolve().parents[1]


class MeanColours(torch.nn.Module):
    """Embeds a picture as its mean colours, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = 0

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        self.pictures += len(images)
        return images.mean((2, 3))


def pictures(prompts: list[str], seed: int = 0) -> ValidationPictures:
    count, generator = len(prompts), torch.Generator().manual_seed(seed)
    base, tuned = torch.rand(2, count, 3, 4, 4, generator=generator)
    return ValidationPictures(prompts, list(range(count)), base, tuned, [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 5.0])


def test_a_validation_is_measured_by_every_metric() -> None:
    shown, embedder = pictures(["a", "a", "b", "b"]), MeanColours()
    found = validation_figures(shown, embedder)
    assert list(found)[:2] == ["reward", "base_reward"]
    assert (found["reward"], found["base_reward"], found["share_improved"]) == (3.0, 2.5, 0.75)
    assert embedder.pictures == 8  # each picture is embedded once, for all metrics together
    for name, images in (("diversity", shown.tuned), ("base_diversity", shown.base)):
        assert found[name] == diversity(embed_images(embedder, images), shown.prompts)
    cosines = torch.nn.functional.cosine_similarity(shown.base.mean((2, 3)), shown.tuned.mean((2, 3)))
    assert found["similarity_to_base"] == pytest.approx(float(cosines.mean()), abs=1e-6)


def test_what_cannot_be_measured_is_left_out() -> None:
    found = set(validation_figures(pictures(["a", "a", "b", "b"])))
    both = {f"{of}{name}" for of in ("", "base_") for name in ("reward", "sharpness", "saturation")}
    assert found == {*both, "share_improved"}
    one_seed = validation_figures(pictures(["a", "b", "c", "d"]), MeanColours())
    assert "diversity" not in one_seed
    assert "similarity_to_base" in one_seed


def test_sharpness_and_saturation_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 9, 7, generator=generator, dtype=torch.float64)
    grey, total = images.mean(1), 0.0
    for n, y, x in itertools.product(range(3), range(9), range(7)):
        around = [grey[n, min(max(y + i, 0), 8), min(max(x + j, 0), 6)] for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        total += abs(float(sum(around) - 4 * grey[n, y, x]))
    shown = Pictures(images, ["a"] * 3, [0, 1, 2], [0.0] * 3)
    assert Sharpness().of(shown) == pytest.approx(total / (3 * 9 * 7), rel=1e-6)
    assert Saturation().of(shown) == pytest.approx(float((images.amax(1) - images.amin(1)).mean()), rel=1e-6)
    video = Pictures(images.unflatten(0, (1, 3)), ["a"], [0], [0.0])
    assert Sharpness().of(video) == Sharpness().of(shown)


@pytest.mark.parametrize(
    ("metric", "tuned", "said"),
    [(Sharpness(), 0.8, "Sharpness fell to 80%"), (Sharpness(), 0.95, None),
     (Saturation(), 1.4, "Saturation rose to 140%"), (Saturation(), 1.2, None)],
)  # fmt: skip
def test_blur_and_colour_are_said(metric: ValidationMetric, tuned: float, said: str | None, tmp_path: Path) -> None:
    run = RunFiles(tmp_path, validation={"step": [1.0], metric.name: [tuned], f"base_{metric.name}": [1.0]})
    assert [finding.title.startswith(said or "") for finding in metric.findings(run)] == [True] * (said is not None)


def test_a_step_is_measured_and_what_else_it_reports_is_kept() -> None:
    reported = {"reward": 2.0, "images": 6.0, "seconds": 3.0, "own": 7.0}
    found = training_figures(Step(reported, 1e-3, 100.0, "cpu"))
    assert (found["reward"], found["lr"], found["images_per_second"], found["own"]) == (2.0, 1e-3, 2.0, 7.0)
    assert found["kl_penalty"] is None
    assert training_figures(Step({"images": 6.0}, 0.0, 2.0, "cpu"))["images_per_second"] == 3.0


def test_every_metric_says_what_it_is() -> None:
    for kind in (TrainingMetric, ValidationMetric):
        names = [metric.name for metric in of_kind(kind)]
        assert len(names) == len(set(names)) > 3
    for metric in metrics():
        assert metric.title
        assert metric.direction in ("higher", "lower", None)


def test_the_rows_of_a_run_have_the_metrics_columns(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), 1)
    columns = training_columns(RewardTuning.reports)
    assert columns[:3] == ["step", "reward", "kl_penalty"]
    assert set(columns) < set(training_columns())  # no empty ones of other methods
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert next(csv.reader(file))[: len(columns)] == columns


def test_a_metric_of_one_file_is_everywhere(tmp_path: Path) -> None:
    """In a process of its own: the package is given a further folder, where a user would put the file into it."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "brightness.py").write_text(
        "from nemo_aligner_diffusion.evaluation.metrics.base import Pictures, ValidationMetric\n"
        "class Brightness(ValidationMetric):\n"
        "    name, title, unit, direction = 'brightness', 'Brightness', '0 to 1', 'lower'\n"
        "    caption = 'Mean value of all <pixels>.'\n"
        "    def of(self, pictures: Pictures) -> float:\n"
        "        return float(pictures.images.mean())\n"
    )
    run = make_run(tmp_path / "run")
    (tmp_path / "program.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "import nemo_aligner_diffusion.evaluation.metrics as package\n"
        f"package.__path__.append({str(folder)!r})\n"
        "from pytorch_lightning.loggers import TensorBoardLogger\n"
        "from test_evaluation_metrics import pictures\n"
        "from tiny.training import Toy, fit\n"
        "from nemo_aligner_diffusion.evaluation.metrics.base import validation_figures\n"
        "from nemo_aligner_diffusion.evaluation.report import write_report\n"
        f"run, trained = Path({str(run)!r}), Path({str(tmp_path / 'trained')!r})\n"
        "class Measured(Toy):\n"
        "    def on_validation_epoch_end(self):\n"
        "        shown = pictures(['a', 'a', 'b', 'b'], seed=self.global_step)\n"
        "        self.last_validation = validation_figures(shown)\n"
        "logger = TensorBoardLogger(str(trained), name='', version='tensorboard')\n"
        "fit(trained, Measured(), 2, val_every=1, logger=logger)\n"
        "(run / 'validation.csv').write_text((trained / 'validation.csv').read_text())\n"
        "write_report(run)\n"
    )
    words = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "trained" / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [0.4 < float(row[name]) < 0.6 for row in rows for name in ("brightness", "base_brightness")] == [True] * 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "trained" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/base_brightness")] == [1, 2]
    page = (run / "report.html").read_text()
    assert "Brightness, 0 to 1" in page
    assert "Mean value of all &lt;pixels&gt;. Lower is better." in page
