"""One process that restores fuzzed archives under guard and prints what came of each, a line of JSON a case."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

SECONDS = 1.0  # of processor time a case may take
PEAK_MIB = 256  # a case may take beyond what the process had before
PROMPT = "a red apple"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--step", type=int, default=1, help="take every STEP-th case, so that processes share a series")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.count, arguments.step)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        sandbox = Path(folder).resolve()
        for name in ("outside", "outside/home", "outside/temporary", "case"):
            (sandbox / name).mkdir()
        (sandbox / "outside" / "canary.py").write_text("open('canary', 'w').close()\nclass Canary: pass\n")
        os.environ.update(HOME=f"{sandbox}/outside/home", TMPDIR=f"{sandbox}/outside/temporary", HF_HUB_OFFLINE="1")
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        sys.path.append(f"{sandbox}/outside")
        os.chdir(sandbox / "outside")
        try:
            _Session(sandbox).run(numbers, arguments.seed)
        finally:
            os.chdir("/")


class _Session:
    def __init__(self, sandbox: Path) -> None:
        import torch

        from nemo_aligner_diffusion.formats.nemo import load_nemo
        from nemo_aligner_diffusion.rewards.restore import restore_reward
        from tests.fuzz.guard import Guard
        from tests.fuzz.seeds import seeds

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        self._torch, self._load, self._restore = torch, load_nemo, restore_reward
        self._path = sandbox / "case" / "x.nemo"
        self._outside = sandbox / "outside"
        self._picture = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
        self._good = []  # (configuration, weights) of each seed
        for _ in range(2):  # the first round imports what is imported on first use
            for seed in seeds().values():
                self._path.write_bytes(seed.pack())
                reward = self._restore(self._path)
                reward(self._picture, [PROMPT])
                self._good.append((load_nemo(self._path).config, reward.state_dict()))
        gc.collect()
        gc.freeze()  # what was imported stays; collecting before each case is then cheap
        self._guard = Guard()
        self._before = self._listing()

    def run(self, numbers: range, seed: int) -> None:
        from tests.fuzz.cases import make_case

        for number in numbers:
            print(json.dumps({"started": number}), flush=True)
            case = make_case(number, seed)
            self._path.write_bytes(case.content)
            size = len(case.content)
            result = {"number": number, "category": case.category.name, "group": case.category.group, "bytes": size}
            hostile, exchanged = case.category.hostile, case.category.group == "reward"
            del case
            print(json.dumps(result | self.one(hostile, exchanged)), flush=True)

    def one(self, hostile: bool, exchanged: bool = False) -> dict[str, Any]:
        """What came of the archive at ``self._path``, and every property it broke.

        ``exchanged``: its weights may be whole and yet another model's.
        """
        from nemo_aligner_diffusion.errors import AlignerError
        from tests.fuzz.guard import Interrupted

        broken: list[str] = []
        reward: Any = None
        outcome, message = "accepted", ""
        gc.collect()
        with self._guard.watching() as watch:
            try:
                reward = self._restore(self._path)
            except AlignerError as error:
                outcome, message = "refused", f"{type(error).__name__}: {error}"
                if _asked_for_too_much(error):
                    broken.append("memory: an allocation failed")
            except (Exception, Interrupted) as error:
                outcome, message = "escaped", f"{type(error).__name__}: {error}"
                broken.append(f"exception: {message[:300]}")
        if outcome == "accepted":
            if hostile:
                broken.append("accepted: a hostile archive was restored")
            broken += [] if exchanged else self._wrong_weights(reward)
            with self._guard.watching() as scoring:
                try:
                    reward(self._picture, [PROMPT])
                except AlignerError:
                    pass  # refused: as good as done
                except (Exception, Interrupted) as error:
                    broken.append(f"exception when scoring: {type(error).__name__}: {str(error)[:200]}")
            broken += _broken_limits(scoring, "scoring")
        if "\n" in message or len(message) > 3000:
            broken.append(f"message: of {len(message)} characters or with line breaks: {message[:200]!r}")
        broken += _broken_limits(watch, "restoring")
        reward = None
        if (after := self._listing()) != self._before:
            broken.append(f"wrote: {sorted(after ^ self._before)[:5]}")
            self._before = after
        return {
            "outcome": outcome,
            "message": message[:300],
            "seconds": round(watch.seconds, 4),
            "peak_mib": round(watch.peak_mib, 1),
            "broken": broken,
        }

    def _wrong_weights(self, reward: Any) -> list[str]:
        """Weights carry checksums: whatever was damaged, with the configuration unchanged they are the seed's."""
        config, state = self._load(self._path).config, reward.state_dict()
        alike = [good for known, good in self._good if known == config]
        same = [all(key in good and self._agree(key, good[key], state[key]) for key in state) for good in alike]
        return ["accepted: with weights that no seed has"] if alike and not any(same) else []

    def _agree(self, key: str, good: Any, found: Any) -> bool:
        if key.endswith("token_embedding.weight"):
            # NeMo pads the vocabulary, and the tokenizer, which carries no checksum, says how many rows are in use.
            rows = min(len(good), len(found))
            good, found = good[:rows], found[:rows]
        return bool(self._torch.equal(good, found))

    def _listing(self) -> set[tuple[str, int]]:
        return {(str(path), path.lstat().st_size) for path in self._outside.rglob("*") if not path.is_dir()}


def _broken_limits(watch: Any, doing: str) -> list[str]:
    broken = [f"ran while {doing}: {what}" for what in watch.ran[:5]]
    broken += [f"wrote while {doing}: {what}" for what in watch.wrote[:5]]
    if watch.seconds > SECONDS:
        broken.append(f"time: {watch.seconds:.2f} s of processor time {doing}")
    if watch.peak_mib > PEAK_MIB:
        broken.append(f"memory: {watch.peak_mib:.0f} MiB {doing}")
    return broken


def _asked_for_too_much(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "needs more memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
