#!/usr/bin/env bash
# What runs first in the containers: looks at what the container was given (results folder, GPUs, shared memory, limits),
# says what is missing and how to give it, then becomes the command.
#
#   train [key=value …]      nad-train: DRaFT+ unless --config-name says otherwise; one process a visible GPU, by torchrun
#   generate [options …]     nad-generate; pictures go to $NAD_RESULTS/generated
#   test                     trains the embedded model for two steps and looks at what that left
#   check                    the report and the checks, torch's view of the GPUs among them; status 0 if training can start
#   help                     this list
#   anything else            is run as it is: torchrun …, python examples/mm/…, nad-convert-reward …, bash
#
# Environment: NAD_RESULTS (/results)   where results go       NAD_PROCESSES  processes of train, instead of one a GPU
#              NAD_REQUIRE_GPU=1        no GPU is an error     NAD_QUIET=1    no report, errors only
set -euo pipefail

: "${NAD_RESULTS:=/results}"
problems=0

note() { if [ "${NAD_QUIET:-0}" != 1 ]; then printf '%s\n' "$*" >&2; fi; }
warn() { note "warning: $*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 73; } # 73: EX_CANTCREAT, what was given cannot be used

# Under srun and torchrun every process comes through here: one of a node speaks.
if [ "${SLURM_LOCALID:-${LOCAL_RANK:-0}}" != 0 ]; then NAD_QUIET=1; fi

usage() { sed -n 's/^# \{0,1\}//; 2,13p' "$0"; }

# A caller's uid has no entry in the image's /etc/passwd: then HOME is / and getpass.getuser() fails, on which the caches
# of torch, triton, matplotlib and the Hugging Face hub depend.
prepare_user() {
    if ! id -un > /dev/null 2>&1; then
        export USER="${USER:-uid$(id -u)}" LOGNAME="${LOGNAME:-uid$(id -u)}"
    fi
    if [ ! -d "${HOME:-/nonexistent}" ] || [ ! -w "${HOME:-/nonexistent}" ]; then
        HOME="${TMPDIR:-/tmp}/nad-home-$(id -u)"
        # In a shared /tmp another user may have made it first, and would own what is cached and run from it.
        if ! mkdir -m 700 "$HOME" 2> /dev/null && { [ -L "$HOME" ] || [ ! -d "$HOME" ] || [ ! -O "$HOME" ]; }; then
            HOME=$(mktemp -d "$HOME-XXXXXX" 2> /dev/null) ||
                fail "no home folder: ${TMPDIR:-/tmp} cannot be written; mount a writable /tmp (--tmpfs /tmp:exec)"
        fi
        chmod 700 "$HOME"
        export HOME
        # What the image set for its own user would point outside.
        unset XDG_CACHE_HOME
    fi
}

# $1: "error" for commands that write there, "warning" for all others
check_results() {
    local probe problem=
    if [ ! -d "$NAD_RESULTS" ]; then
        problem="$NAD_RESULTS is not there"
    elif ! probe=$(mktemp "$NAD_RESULTS/.nad-write-XXXXXX" 2> /dev/null); then
        problem="$NAD_RESULTS cannot be written by uid $(id -u) (it is $(stat -c 'of uid %u, mode %a' "$NAD_RESULTS"))"
    else
        rm -f "$probe"
        # Field 5 of mountinfo is the mount point; a bare machine or a Slurm job without a container has no reason to mount.
        if [ -f /.dockerenv ] || [ -f /run/.containerenv ]; then
            if ! awk -v folder="$NAD_RESULTS" '$5 == folder {found = 1} END {exit !found}' /proc/self/mountinfo; then
                warn "$NAD_RESULTS is inside the container and goes with it: start with -v \"\$PWD/results:$NAD_RESULTS\""
            fi
        fi
        return 0
    fi
    problem="$problem; give a folder of yours: mkdir -p results, then docker run --user \"\$(id -u):\$(id -g)\" \
-v \"\$PWD/results:$NAD_RESULTS\" …"
    if [ "$1" = error ]; then fail "$problem"; fi
    problems=$((problems + 1))
    warn "$problem"
}

count_gpus() {
    local count
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # "" and -1 hide all
        printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '^[^-]' || true
        return
    fi
    if command -v nvidia-smi > /dev/null 2>&1; then
        count=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)
    else
        count=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2> /dev/null | wc -l)
    fi
    echo "$((count))"
}

check_gpus() { # $1: how many are visible
    if [ "$1" -gt 0 ]; then return; fi
    local how="start with --gpus all (docker), --device nvidia.com/gpu=all (podman), --gres or --gpus (srun)"
    if [ "${NAD_REQUIRE_GPU:-0}" = 1 ]; then fail "no GPU is visible and NAD_REQUIRE_GPU=1; $how"; fi
    if [ "${NAD_EXPECT_GPU:-0}" = 1 ]; then
        problems=$((problems + 1))
        warn "no GPU is visible, training would run on the CPU; $how"
    fi
}

# NCCL's ring buffers and the data workers' batches live in /dev/shm; Docker gives 64 MiB.
check_shared_memory() { # $1: GPUs
    local kib need=$((256 * 1024))
    if [ "$1" -gt 0 ]; then need=$((1024 * 1024 * $1)); fi
    kib=$(df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 {print $2}')
    if [ "${kib:-0}" -lt "$need" ]; then
        warn "/dev/shm has $((${kib:-0} / 1024)) MiB, $((need / 1024)) MiB and more are better: start with --ipc=host or --shm-size=8g"
    fi
}

check_limits() { # $1: GPUs
    local value
    value=$(ulimit -Sl)
    if [ "$1" -gt 0 ] && [ "$value" != unlimited ]; then
        warn "locked memory is limited to $value KiB, InfiniBand and GPUDirect need it unlimited: start with --ulimit memlock=-1"
    fi
    value=$(ulimit -Ss)
    if [ "$1" -gt 0 ] && [ "$value" != unlimited ] && [ "$value" -lt 65536 ]; then
        warn "the stack is limited to $value KiB: start with --ulimit stack=67108864"
    fi
    value=$(ulimit -Sn)
    if [ "$value" != unlimited ] && [ "$value" -lt 4096 ]; then
        warn "open files are limited to $value, data workers need more: start with --ulimit nofile=65536:65536"
    fi
}

# Versions from the packages' metadata: importing torch would take seconds before every command.
report() { # $1: GPUs
    if [ "${NAD_QUIET:-0}" = 1 ]; then return; fi
    python - "$1" >&2 << 'PYTHON'
import os
import platform
import sys
from importlib import metadata


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


names = ("nemo_aligner_diffusion", "torch", "diffusers", "transformers", "peft", "pytorch-lightning")
optional = ("megatron-core", "transformer-engine", "apex")
words = [f"{name} {version(name)}" for name in names]
words += [f"{name} {version(name)}" for name in optional if version(name) != "absent"]
image = os.environ.get("NVIDIA_PYTORCH_VERSION")
print(f"{' · '.join(words)} · Python {platform.python_version()}" + (f" · NVIDIA's image {image}" if image else ""))
print(f"uid {os.getuid()} · {len(os.sched_getaffinity(0))} CPU cores · {sys.argv[1]} GPUs · results in {os.environ['NAD_RESULTS']}")
PYTHON
}

# Is one of the words $2… an override of key $1?
given() {
    local key=$1 word
    shift
    for word in "$@"; do
        case $word in "$key="* | "+$key="* | "++$key="*) return 0 ;; esac
    done
    return 1
}

train() {
    local devices=${NAD_PROCESSES:-} word words=()
    for word in "$@"; do
        case $word in
            trainer.devices=*[!0-9]*) ;; # "auto", a list: only the program knows
            trainer.devices=*) devices=${devices:-${word#*=}} ;;
        esac
    done
    devices=${devices:-$((gpus > 0 ? gpus : 1))}
    if ! given exp_manager.explicit_log_dir "$@" && ! given exp_manager.exp_dir "$@"; then
        words+=("exp_manager.exp_dir=$NAD_RESULTS")
    fi
    if ! given trainer.devices "$@"; then words+=("trainer.devices=$devices"); fi
    if [ "$devices" -le 1 ]; then exec nad-train "$@" "${words[@]}"; fi
    if ! given trainer.num_nodes "$@"; then words+=("trainer.num_nodes=1"); fi
    exec torchrun --standalone --nproc-per-node "$devices" --no-python nad-train "$@" "${words[@]}"
}

generate() {
    local word
    for word in "$@"; do
        case $word in --output | --output=*) exec nad-generate "$@" ;; esac
    done
    exec nad-generate "$@" --output "$NAD_RESULTS/generated"
}

# Two steps of the shipped recipe, and does what a user waits for lie there?
self_test() {
    local folder file
    folder=$(mktemp -d "$NAD_RESULTS/self_test_XXXXXX")
    nad-train trainer.devices=1 trainer.draftp_sd.max_steps=2 trainer.draftp_sd.val_check_interval=2 \
        trainer.draftp_sd.limit_val_batches=1 model.micro_batch_size=2 model.global_batch_size=2 \
        model.infer.inference_steps=6 "exp_manager.explicit_log_dir=$folder" "$@"
    for file in metrics.csv report.html export/pytorch_lora_weights.safetensors; do
        if [ ! -s "$folder/$file" ]; then printf 'error: the test run left no %s in %s\n' "$file" "$folder" >&2 && exit 1; fi
    done
    if [ "$(wc -l < "$folder/metrics.csv")" -ne 3 ]; then
        printf 'error: expected a header and two steps in %s\n' "$folder/metrics.csv" >&2
        exit 1
    fi
    rm -rf "$folder"
    printf 'self-test passed: two training steps, metrics, report and export\n'
}

check() {
    python - "$gpus" << 'PYTHON' || exit 1
import sys

import torch

visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(f"torch {torch.__version__} sees {visible} GPUs" + "".join(f"\n  {torch.cuda.get_device_name(i)}" for i in range(visible)))
if visible != int(sys.argv[1]):
    print(f"error: nvidia-smi or /dev shows {sys.argv[1]}: the driver does not fit this image's CUDA", file=sys.stderr)
    sys.exit(1)
PYTHON
    if [ "$problems" -gt 0 ]; then
        printf '%s problems above\n' "$problems" >&2
        exit 1
    fi
    printf 'ready\n'
}

prepare_user
gpus=$(count_gpus)
command=${1:-help}
if [ $# -gt 0 ]; then shift; fi
case $command in
    help | -h | --help)
        usage
        exit 0
        ;;
    train | generate | test)
        results_needed=error
        for word in "$@"; do # a question needs neither results nor GPUs, and one answer is enough
            case $command:$word in
                train:-h | train:--help | train:--cfg | train:-c) exec nad-train "$@" ;;
                generate:-h | generate:--help) exec nad-generate "$@" ;;
            esac
        done
        ;;
    *) results_needed=warning ;;
esac
export NAD_RESULTS
report "$gpus"
check_results "$results_needed"
check_gpus "$gpus"
check_shared_memory "$gpus"
check_limits "$gpus"
case $command in
    train) train "$@" ;;
    generate) generate "$@" ;;
    test) self_test "$@" ;;
    check) check ;;
    *) exec "$command" "$@" ;;
esac
