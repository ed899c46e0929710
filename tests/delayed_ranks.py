"""The command of reward training, with ranks that come late, as on machines where others want the processor, too.

    python tests/delayed_ranks.py '{"connect": [0, 3], "raise": [0, 0]}' key=value …

Seconds by rank: ``connect``: before its health thread looks for rank 0; ``raise``: between an error that all processes
have agreed on and what becomes of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from nemo_aligner_diffusion.cli.train_reward import main
from nemo_aligner_diffusion.parallel import broadcast
from nemo_aligner_diffusion.runtime.health.client import HealthClient


def delay_ranks(seconds: dict[str, list[float]], rank: int) -> None:
    connect, gather = HealthClient._connect, broadcast.gather

    def connect_late(client: HealthClient) -> Any:
        time.sleep(seconds["connect"][rank])
        return connect(client)

    def raise_late(value: Any, group: Any = None) -> list[Any]:  # on_every_process gathers its failures, and raises
        values = gather(value, group)
        if any(isinstance(failure, Exception) for failure in values):
            time.sleep(seconds["raise"][rank])
        return values

    HealthClient._connect = connect_late  # type: ignore[method-assign]
    broadcast.gather = raise_late  # type: ignore[assignment]


if __name__ == "__main__":
    delays = json.loads(sys.argv.pop(1))
    if "RANK" in os.environ:  # not in the process that starts the others
        delay_ranks(delays, int(os.environ["RANK"]))
    sys.exit(main())
