#!/usr/bin/env bash
# Builds and runs both images for real with podman, on a machine without a Docker engine and without an image registry:
#
#     sudo docker/proof/prove.sh                 everything
#     sudo docker/proof/prove.sh lint cpu gpu    some of: lint (the compose file; make lint does the rest), cpu, gpu
#
# Needs root, Linux x86-64, Debian's packages podman runc catatonit debootstrap (apt-get install them) and a Python package
# index; 6 GB below $TMPDIR, about 10 minutes on two cores. Everything happens in one temporary folder, which it removes.
#
#   NAD_PROOF_PYTHON=IMAGE   a base image for the CPU image that podman can pull; default: Debian and its Python by debootstrap
#   NAD_PROOF_PYTORCH=IMAGE  NVIDIA's image where it can be pulled (or a copy); default: Dockerfile.stand_in of this folder
#   NAD_PROOF_WHEELS=FOLDER  wheels offered beside the index: torch's CPU build where PyTorch's own index is out of reach
#   TORCH_INDEX=URL          index of torch's CPU build; default: the Dockerfile's
#   NAD_PROOF_WORK=FOLDER    work there and leave it: a second run goes on with the layers of the first
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
parts=${*:-lint cpu gpu}
started=$SECONDS

say() { printf '=== %4d s  %s\n' $((SECONDS - started)) "$*"; }
die() { printf '=== FAILED: %s\n' "$*" >&2; exit 1; }
wants() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

[ "$(id -u)" = 0 ] || die "run it as root (debootstrap and podman's storage here need it)"
for tool in podman runc debootstrap; do
    command -v "$tool" > /dev/null || die "$tool is missing: apt-get install podman runc catatonit debootstrap"
done

work=${NAD_PROOF_WORK:-$(mktemp -d "${TMPDIR:-/tmp}/nad-proof-XXXXXX")}
mkdir -p "$work"
engine=(podman --root "$work/store" --runroot "$work/run" --storage-driver overlay --runtime runc --cgroup-manager cgroupfs)
cleanup() {
    local status=$? mount
    if [ -n "${NAD_PROOF_WORK:-}" ]; then say "left: ${engine[*]}"; exit "$status"; fi
    pkill -TERM -P $$ || true # this script's own children, where it was told to stop in the middle of one
    sleep 1
    "${engine[@]}" rm --all --force > /dev/null 2>&1 || true
    "${engine[@]}" rmi --all --force > /dev/null 2>&1 || true
    awk -v below="$work/" 'index($5, below) == 1 {print $5}' /proc/self/mountinfo | sort -r | while read -r mount; do
        umount "$mount" || umount -l "$mount" || true
    done
    if grep -q " $work/" /proc/self/mountinfo; then
        printf 'mounts are left below %s: not removed\n' "$work" >&2
    else
        rm -rf "$work"
    fi
    exit "$status"
}
trap cleanup EXIT

# Only what git knows, so that neither results nor keys of the checkout are near; the ignore file is proven on top of that.
context=$work/context
rm -rf "$context" "$work/results" "$work/rootfs"
mkdir -p "$context" "$work/results"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2> /dev/null | tar -cf - -T -) | tar -xf - -C "$context"
if [ -n "${NAD_PROOF_WHEELS:-}" ]; then cp "$NAD_PROOF_WHEELS"/*.whl "$context/docker/wheels/"; fi
mkdir -p "$context/results" "$context/.git" && echo secret > "$context/.env" && echo x > "$context/results/x" && echo x > "$context/.git/x"
index=()
if [ -n "${TORCH_INDEX:-}" ]; then index=(--build-arg "TORCH_INDEX=$TORCH_INDEX"); fi

# This user may lack the right to raise limits: containers get the ones that are in force.
limits=(--ulimit "nofile=$(ulimit -Sn):$(ulimit -Hn)" --ulimit "nproc=8192:8192")
build() { # tag, Dockerfile, further options …; the log is $work/TAG.log
    local tag=$1 file=$2 certificates=()
    shift 2
    # A site's own certificate authority, where it has one: the index is read through it.
    if [ -d /etc/ssl/certs ]; then
        certificates=(--volume /etc/ssl/certs:/etc/ssl/certs:ro --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt)
    fi
    nice "${engine[@]}" build --isolation chroot --network host "${limits[@]:0:2}" "${certificates[@]}" "$@" \
        -f "$context/$file" -t "localhost/nad-proof/$tag:1" "$context" > "$work/$tag.log" 2>&1 \
        || { tail -n 30 "$work/$tag.log" >&2; die "building $file"; }
}
# As docker/compose.yaml confines them, with a uid that no image knows, and no network at all.
contained() {
    nice "${engine[@]}" run --rm --init --network none "${limits[@]}" --user 54321:54321 --read-only --tmpfs /tmp:exec --cap-drop ALL \
        --security-opt no-new-privileges --shm-size 1g --env OMP_NUM_THREADS=1 --volume "$work/results:/results" "$@"
}
expect() { # what is proven, command …: status 0
    local what=$1
    shift
    "$@" > "$work/out" 2>&1 || { tail -n 20 "$work/out" >&2; die "$what"; }
    say "ok: $what"
}
refuse() { # what is proven, the words expected, command …: status not 0, the words in its output
    local what=$1 text=$2
    shift 2
    if "$@" > "$work/out" 2>&1; then die "$what: it succeeded"; fi
    grep -qF -- "$text" "$work/out" || { tail -n 20 "$work/out" >&2; die "$what: '$text' is not said"; }
    say "ok: $what"
}
prints() { # what is proven, the words expected, command …
    local what=$1 text=$2
    shift 2
    "$@" > "$work/out" 2>&1 || { tail -n 20 "$work/out" >&2; die "$what"; }
    grep -qF -- "$text" "$work/out" || { tail -n 20 "$work/out" >&2; die "$what: '$text' is not said"; }
    say "ok: $what"
}

if wants lint; then
    python3 -m venv "$work/tools"
    "$work/tools/bin/pip" install --quiet --constraint "$root/constraints.txt" check-jsonschema > "$work/tools.log" 2>&1 \
        || die "check-jsonschema: $(tail -n 1 "$work/tools.log")"
    expect "the compose file fits the Compose specification" \
        "$work/tools/bin/check-jsonschema" --builtin-schema vendor.compose-spec "$root/docker/compose.yaml"
fi

if wants cpu || [ -z "${NAD_PROOF_PYTORCH:-}" ]; then
    python=${NAD_PROOF_PYTHON:-}
    if [ -z "$python" ] && "${engine[@]}" image exists localhost/nad-proof/python:1; then
        python=localhost/nad-proof/python:1
    elif [ -z "$python" ]; then
        say "base: Debian bookworm with its Python, by debootstrap"
        nice debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$work/rootfs" \
            > "$work/debootstrap.log" 2>&1 || die "debootstrap: $(tail -n 1 "$work/debootstrap.log")"
        python=localhost/nad-proof/python:1
        tar -C "$work/rootfs" --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' --exclude='./dev/*' -c . \
            | "${engine[@]}" import - "$python" > /dev/null 2>&1
        rm -rf "$work/rootfs"
    fi
fi

if wants cpu; then
    say "building docker/Dockerfile.cpu"
    build cpu docker/Dockerfile.cpu --build-arg "PYTHON_IMAGE=$python" "${index[@]}" --build-arg REVISION=proof
    cpu=localhost/nad-proof/cpu:1
    say "size: $("${engine[@]}" images --format '{{.Size}}' "$cpu")"
    prints "labels" '"org.opencontainers.image.revision": "proof"' "${engine[@]}" inspect "$cpu"
    prints "its user is not root" "10001:10001" "${engine[@]}" inspect --format '{{.Config.User}}' "$cpu"
    prints "it starts with its list of commands" "train [key=value" contained "$cpu"
    expect "versions are those of constraints.txt; no CUDA, no pip, no wheel, no cache, no .env in it" contained --user 0:0 "$cpu" python -c '
import re, pathlib
from importlib import metadata
here = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}
pins = dict(re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", pathlib.Path("/opt/nad/constraints.txt").read_text()))
pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
others = {n: v for n, v in here.items() if v.split("+")[0] != pins.get(n) and n != "nemo-aligner-diffusion"}
assert not others, others
assert here["torch"].endswith("+cpu"), here["torch"]
assert not [n for n in here if n.startswith("nvidia") or n in ("pip", "triton")]
assert not [p for p in ("/source", "/wheels", "/root/.cache/pip", "/workspace/.env", "/workspace/results") if pathlib.Path(p).exists()]
'
    chmod 755 "$work/results"
    refuse "a results folder of somebody else is an error that says how to give one" "cannot be written by uid 54321" contained "$cpu" train
    chmod 777 "$work/results"
    prints "the check finds nothing missing" "ready" contained "$cpu" check
    prints "two training steps as an unknown uid, read-only, no capabilities, no network" "self-test passed" contained "$cpu" test
    expect "the published command line under torchrun" contained "$cpu" torchrun --nproc_per_node=1 \
        examples/mm/stable_diffusion/train_sd_draftp.py trainer.num_nodes=1 trainer.devices=1 trainer.draftp_sd.max_steps=1 \
        trainer.draftp_sd.limit_val_batches=1 model.micro_batch_size=2 model.global_batch_size=2 model.infer.inference_steps=6 \
        exp_manager.explicit_log_dir=/results/published
    [ "$(stat -c %u "$work/results/published/report.html")" = 54321 ] || die "files are not the caller's"
    expect "pictures from what was trained" contained "$cpu" generate --prompt "red apple" --steps 4 --lora /results/published/export
    ls "$work"/results/generated/*.png > /dev/null || die "no picture in results/generated"
    prints "a change of code renews no dependency" "Using cache" bash -c "
        echo '# changed' >> '$context/nemo_aligner_diffusion/errors.py'
        nice ${engine[*]@Q} build --isolation chroot --network host ${limits[*]:0:2} -f '$context/docker/Dockerfile.cpu' \
            --volume /etc/ssl/certs:/etc/ssl/certs:ro --env PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
            --build-arg 'PYTHON_IMAGE=$python' ${index[*]@Q} --build-arg REVISION=proof -t localhost/nad-proof/cpu:2 '$context'"
    if grep -q 'Collecting diffusers' "$work/out"; then die "the second build installed the dependencies anew"; fi
fi

if wants gpu; then
    pytorch=${NAD_PROOF_PYTORCH:-}
    if [ -z "$pytorch" ]; then
        say "base: a stand-in for NVIDIA's image (docker/proof/Dockerfile.stand_in)"
        build stand-in docker/proof/Dockerfile.stand_in --build-arg "PYTHON_IMAGE=$python" "${index[@]}"
        pytorch=localhost/nad-proof/stand-in:1
    fi
    say "building Dockerfile"
    build gpu Dockerfile --build-arg "PYTORCH_IMAGE=$pytorch"
    gpu=localhost/nad-proof/gpu:1
    sed -n '/packages of the base image, /,/^-->/p' "$work/gpu.log" | grep -v '^-->' | sed 's/^/    /'
    frozen='import importlib.metadata as m; print(*(m.version(n) for n in ("torch", "numpy", "transformer_engine")))'
    base=$("${engine[@]}" run --rm --network none "${limits[@]}" --entrypoint python3 "$pytorch" -c "$frozen")
    prints "torch, NumPy and transformer-engine are the base image's: $base" "$base" contained "$gpu" python -c "$frozen"
    prints "torch is imported from the base image" "/usr/local/lib" contained "$gpu" python -c 'import torch; print(torch.__file__)'
    expect "the base image's own Python has none of our packages" contained --entrypoint /usr/bin/python3 "$gpu" -c '
import importlib.util
assert not [n for n in ("diffusers", "peft", "nemo_aligner_diffusion") if importlib.util.find_spec(n)]'
    expect "tensor-parallel layers are there" contained "$gpu" python -c 'import megatron.core'
    prints "no GPU is said, with the option that gives one" "--gpus all" contained "$gpu" true
    refuse "no GPU is an error where one is required" "no GPU is visible" contained --env NAD_REQUIRE_GPU=1 "$gpu" train
    prints "two training steps on the stand-in's torch" "self-test passed" contained --env CUDA_VISIBLE_DEVICES= "$gpu" test
    expect "two processes by torchrun" contained --env CUDA_VISIBLE_DEVICES= --env NAD_PROCESSES=2 "$gpu" train \
        trainer.draftp_sd.max_steps=1 trainer.draftp_sd.limit_val_batches=1 model.micro_batch_size=1 model.global_batch_size=2 \
        model.infer.inference_steps=6 exp_manager.explicit_log_dir=/results/two
fi
say "all proven: $parts"
