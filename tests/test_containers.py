"""Dockerfiles, entry point, compose file: what needs no container engine; docker/proof/prove.sh does the rest."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = (ROOT / "Dockerfile", DOCKER / "Dockerfile.cpu")
INSTRUCTIONS = {"FROM", "ARG", "RUN", "COPY", "WORKDIR", "ENV", "LABEL", "USER", "ENTRYPOINT", "CMD"}

both = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of each logical line; comments inside continued lines are dropped, as Docker does."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    result = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        result.append((word, rest.strip()))
    return result


def final_stage(dockerfile: Path) -> list[tuple[str, str]]:
    steps = instructions(dockerfile)
    return steps[max(index for index, (word, _) in enumerate(steps) if word == "FROM") :]


def sources(dockerfile: Path) -> list[str]:
    """What COPY and bind mounts take from the build context."""
    found = []
    for word, rest in instructions(dockerfile):
        if word == "COPY" and "--from=" not in rest:
            found += [part for part in rest.split() if not part.startswith("--")][:-1]
        for mount in re.findall(r"--mount=(\S+)", rest):
            if "from=" not in mount:
                found += re.findall(r"source=([^,]+)", mount)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Dockerfiles


@both
def test_dockerfile_is_made_of_known_instructions_in_a_sane_order(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    assert {word for word, _ in steps} <= INSTRUCTIONS, (
        "ADD, HEALTHCHECK … have no place here; a typing error otherwise"
    )
    assert steps[0][0] == "ARG"
    words = [word for word, _ in final_stage(dockerfile)]
    assert words[-3:] == ["USER", "ENTRYPOINT", "CMD"]
    assert dict(final_stage(dockerfile))["USER"] == "10001:10001", (
        "a number, so that runAsNonRoot can see it is not root"
    )


@both
def test_base_image_is_pinned_in_one_place(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    (argument,) = [rest for word, rest in steps if word == "ARG" and "=" in rest and "IMAGE=" in rest]
    name, image = argument.split("=", 1)
    assert re.fullmatch(r"[\w.\-/]+:[\w.\-]*\d[\w.\-]*(@sha256:[0-9a-f]{64})?", image), image
    assert ":latest" not in image
    assert {rest.split()[0] for word, rest in steps if word == "FROM"} == {f"${{{name}}}"}
    tracked = subprocess.run(["git", "grep", "-lF", image], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # an unpacked release has no .git
        assert set(tracked.stdout.split()) <= {str(dockerfile.relative_to(ROOT))}


@both
def test_what_is_copied_exists_and_reaches_the_builder(dockerfile: Path) -> None:
    taken = sources(dockerfile)
    assert {"pyproject.toml", "constraints.txt", "docker/entrypoint.sh", "docker/wheels", "conf"} <= set(taken)
    for name in taken:
        path = ROOT / name
        assert path.exists(), f"{dockerfile.name} copies {name}"
        for file in (
            [path] if path.is_file() else [next(p for p in path.rglob("*") if p.suffix in (".py", ".yaml", ".md"))]
        ):
            assert in_context(file.relative_to(ROOT).as_posix()), f".dockerignore keeps {file} from the builder"


@both
def test_dependencies_come_before_sources(dockerfile: Path) -> None:
    steps = final_stage(dockerfile)
    install = next(i for i, (word, rest) in enumerate(steps) if word == "RUN" and "-r requirements.txt" in rest)
    copied = " ".join(rest for word, rest in steps[:install] if word == "COPY")
    assert copied == "pyproject.toml constraints.txt docker/python_packages.py ./", "a change of code must not renew it"
    later = " ".join(rest for word, rest in steps[install:] if word == "COPY")
    assert "--from=package" in later
    assert "examples" in later


@both
def test_no_version_beside_constraints(dockerfile: Path) -> None:
    text = " ".join(rest for _, rest in instructions(dockerfile))
    assert re.findall(r"[a-z][\w-]*==\d\S*", text) == [], "versions are those of constraints.txt"
    for name in re.findall(r"\^([\w-]+)==", text):  # grep '^torch==' constraints.txt
        assert len(re.findall(rf"(?m)^{name}==\d", (ROOT / "constraints.txt").read_text())) == 1, name


@both
def test_nothing_secret_and_no_cache_stays(dockerfile: Path) -> None:
    for word, rest in instructions(dockerfile):
        assert not re.search(r"(?i)(token|password|secret|api_?key|credential)", rest), rest
        if "pip install" in rest or re.search(r"pip .*install", rest):
            assert word == "RUN"
            assert rest.count(" install ") == rest.count("--no-cache-dir"), rest


@both
def test_labels_say_what_it_is(dockerfile: Path) -> None:
    labels = dict(
        re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', dict(instructions(dockerfile))["LABEL"])
    )
    assert labels["licenses"] == "Apache-2.0"
    assert {"title", "description", "version", "revision", "base.name"} <= set(labels)


def test_gpu_image_keeps_nvidias_torch_and_entry_point() -> None:
    steps = final_stage(ROOT / "Dockerfile")
    text = "\n".join(rest for _, rest in steps)
    assert "venv --system-site-packages --without-pip /opt/nad" in text
    order = [text.index(words) for words in (" freeze ", " combine ", " -r requirements.txt", " compare ")]
    assert order == sorted(order)
    assert dict(steps)["ENTRYPOINT"] == '["/opt/nvidia/nvidia_entrypoint.sh", "/usr/local/bin/nad-entrypoint"]'
    (extras,) = re.findall(r"^EXTRAS=(.*)$", "\n".join(rest for word, rest in steps if word == "ARG"), re.MULTILINE)
    known = re.findall(
        r"(?m)^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    )
    assert "megatron" in extras.split(",")
    assert set(extras.split(",")) <= set(known)


# --------------------------------------------------------------------------------------------------------------------
# .dockerignore


def in_context(path: str) -> bool:
    """Docker's rule: the last pattern that names the path or a folder above it decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        pattern, keep = line.removeprefix("!").strip("/"), line.startswith("!")
        parts = path.split("/")
        heads = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
        regular = "".join(
            {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
                piece, piece if piece[:1] == "[" else re.escape(piece)
            )
            for piece in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]*\]|[^*?\[]+", pattern)
        )
        if any(re.fullmatch(regular, head) for head in heads):
            kept = keep
    return kept


@pytest.mark.parametrize(
    "path",
    [
        *(
            ".git/config",
            ".venv/bin/python",
            "results/train_001/report.html",
            ".env",
            "id_rsa",
            "nemo_experiments/a/b.ckpt",
        ),
        *("tests/test_containers.py", "docs/images/a.png", "shared/x", "examples/mm/embedded_model/.mypy_cache/x.json"),
        *("nemo_aligner_diffusion/__pycache__/errors.cpython-311.pyc", "nemo_aligner_diffusion.egg-info/PKG-INFO"),
        *("nemo_aligner_diffusion/training/.env", "examples/results/a.png", "docker/compose.yaml", "build/lib/x.py"),
    ],
)
def test_kept_from_the_builder(path: str) -> None:
    assert not in_context(path)


@pytest.mark.parametrize(
    "path",
    [
        *("pyproject.toml", "constraints.txt", "setup.py", "LICENSE", "conf/draftp_sd.yaml", "docker/entrypoint.sh"),
        *(
            "nemo_aligner_diffusion/errors.py",
            "nemo_aligner_diffusion/assets/embedded_reward.nemo",
            "docker/wheels/a.whl",
        ),
        "examples/mm/stable_diffusion/train_sd_draftp.py",
    ],
)
def test_given_to_the_builder(path: str) -> None:
    assert in_context(path)


# --------------------------------------------------------------------------------------------------------------------
# compose


@pytest.fixture(scope="module")
def services() -> dict[str, dict]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]


def test_compose_gives_the_gpu_service_what_nccl_needs(services: dict[str, dict]) -> None:
    assert set(services) == {"train", "train-cpu"}
    gpu = services["train"]
    assert gpu["ipc"] == "host"
    assert gpu["ulimits"]["memlock"] == -1
    assert gpu["ulimits"]["stack"] == 67108864
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert services["train-cpu"]["shm_size"]
    assert "deploy" not in services["train-cpu"]


def test_compose_services_are_confined_and_build_from_files_that_exist(services: dict[str, dict]) -> None:
    for name, service in services.items():
        assert re.fullmatch(r"\$\{NAD_UID:-\d+}:\$\{NAD_GID:-\d+}", service["user"]), name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        mounts = {mount["target"]: mount for mount in service["volumes"]}
        assert set(mounts) == {"/results", "/models", "/data"}
        assert [target for target, mount in mounts.items() if mount.get("read_only")] == ["/models", "/data"]
        assert service["environment"]["HF_HUB_OFFLINE"] == "${HF_HUB_OFFLINE:-1}"
        assert service["environment"]["WANDB_API_KEY"] is None, "handed through, not written down"
        assert any(entry.startswith("/tmp:") and "exec" in entry for entry in service["tmpfs"])
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).is_file()
