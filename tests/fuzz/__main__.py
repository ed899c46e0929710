"""``python -m tests.fuzz --cases 10000``: run the fuzzer and print figures; ``--write N`` keeps case N as a file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.campaign import broken_properties, run_campaign, table
from tests.fuzz.cases import make_case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", type=int, metavar="N", help="write case N to case_N.nemo and do nothing else")
    arguments = parser.parse_args()
    if arguments.write is not None:
        case = make_case(arguments.write, arguments.seed)
        path = Path(f"case_{case.number}.nemo")
        path.write_bytes(case.content)
        print(f"{path}: {case.category.name}, {len(case.content)} bytes, hostile: {case.category.hostile}")
        return 0
    started = time.monotonic()
    results = run_campaign(arguments.cases, arguments.seed, arguments.processes, arguments.first)
    print(table(results))
    broken = broken_properties(results)
    print(f"\n{len(results)} cases in {time.monotonic() - started:.0f} s, {len(broken)} properties broken")
    print("\n".join(broken[:200]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
