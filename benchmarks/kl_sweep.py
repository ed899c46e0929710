"""DRaFT+ at several ``kl_coeff``: reward and distance to the base model must move in opposite ways.

python -m benchmarks.kl_sweep --work results/kl --docs docs
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.judge import Job, Judge, run_jobs, table

COLUMNS = ["kl_coeff", "CLIP reward", "KL", "CLIP top-1", "diversity", "of the base's"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("results/kl"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of 16 pictures")
    parser.add_argument("--kl", type=float, nargs="+", default=[0.0, 10.0, 100.0])
    parser.add_argument("--overrides", nargs="*", default=[], help="further key=value for every run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    judge = Judge()
    base = judge(None)
    rows: list[tuple[object, ...]] = [("base", base.reward, base.divergence, base.top1, base.diversity, 1.0)]
    jobs = [
        Job(
            "draftp_sd",
            arguments.work / f"kl_{kl:g}",
            (),
            (
                f"model.kl_coeff={kl}",
                f"trainer.draftp_sd.max_steps={arguments.steps}",
                "trainer.draftp_sd.val_check_interval=0",
                "trainer.draftp_sd.save_interval=0",
                "report.enable=false",
                "model.optim.lr=8e-4",
                *arguments.overrides,
            ),
        )
        for kl in arguments.kl
    ]
    for kl, result in zip(arguments.kl, run_jobs(jobs, arguments.workers), strict=True):
        ratio = result.diversity / base.diversity
        rows.append((kl, result.reward, result.divergence, result.top1, result.diversity, ratio))
        print(table(COLUMNS, rows), flush=True)
    (arguments.docs / "kl_table.md").write_text(table(COLUMNS, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
