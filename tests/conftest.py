"""What every test shares: one computing thread, no network, no inherited launcher."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from process_pool import DIED_OF_A_SIGNAL, ProcessPool

if TYPE_CHECKING:
    import torch

# Before torch is imported anywhere: several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

# As Hypothesis's own profile for CI: no verdict by the clock, and the same examples each time.
hypothesis.settings.register_profile(
    "this project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=True
)
hypothesis.settings.load_profile("this project")

# A test session started by torchrun or srun must not look like a rank to the code under test.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
                      "MASTER_PORT")  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The few tests that run alone: to import all the other files would take longer than they do."""
    if config.option.markexpr.endswith("and alone") and collection_path.match("test_*.py"):
        return "mark.alone" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for needed in item.iter_markers(
            "extras"
        ):  # in CI an installation gone wrong must not look like a test left out
            if importlib.util.find_spec(needed.args[0]) is None and not os.environ.get("NAD_REQUIRE_EXTRAS"):
                item.add_marker(pytest.mark.skip(reason=f"{needed.args[0]} is not installed: make test-extras"))
        if "processes" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=[DIED_OF_A_SIGNAL]))


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC_", "NAD_"))]:
        monkeypatch.delenv(name)
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of this test's own where every user may write; pytest's own may not even be entered."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def images() -> torch.Tensor:
    """Three pictures for three prompts, of a size that no reward takes as it is."""
    import torch

    return torch.rand(3, 3, 40, 36, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion's folder, for all tests of this process: not to be changed."""
    from tiny.stable_diffusion import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of forty prompts, for all tests of this process: not to be changed."""
    file = tmp_path_factory.mktemp("data") / "prompts.txt"
    file.write_text("".join(f"p{i}\n" for i in range(40)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def processes() -> Iterator[ProcessPool]:
    """Four warm processes for parallel code: ``processes.run(size, function, *args)``, one result a rank."""
    pool = ProcessPool()
    yield pool
    pool.close()
