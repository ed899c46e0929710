"""``report.html``: one self-contained page about a run, made from the files of its run directory alone.

Read are ``config.yaml, metrics.csv, validation.csv, samples/step_*.png, export/, startup.json``, and

- ``run.json``: any of ``status`` (``finished``, ``interrupted``, ``failed``, ``running``), ``error``,
  ``skipped_steps``, ``truncated_prompts``, ``command`` (a list; its ``key=value`` words are shown as chosen by the
  user); everything else in it is shown as environment;
- ``validation_samples.json``: ``{"step": n, "prompts": [{"prompt", "seed", "base_reward", "reward"}, …]}``.

Of these any may be missing or damaged: a run stopped after its first step has a report too, which says what is missing.

Example::

    python -m nemo_aligner_diffusion.evaluation.report results/my_run
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import OutputError, printable
from nemo_aligner_diffusion.evaluation.report.view import build_view
from nemo_aligner_diffusion.evaluation.run_files import read_run
from nemo_aligner_diffusion.evaluation.text import format_gain, format_number
from nemo_aligner_diffusion.runtime.ending import command
from nemo_aligner_diffusion.runtime.files import write_atomic


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    Raises:
        OutputError: the directory does not exist or cannot be written to.
    """
    import jinja2
    from markupsafe import Markup

    try:
        run = read_run(run_dir)
    except FileNotFoundError as error:
        raise OutputError(str(error)) from error

    def shown(value: Any) -> Any:
        """Whatever is not our own HTML is text of others: bounded and of printable characters, then escaped."""
        return value if isinstance(value, Markup) else printable(value, 2000)

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"number": format_number, "gain": format_gain}
    page = templates.get_template("page.html").render(build_view(run))
    return write_atomic(Path(run_dir) / "report.html", page)


@command(interrupted="interrupted")
def main(argv: Sequence[str]) -> int:
    """``python -m nemo_aligner_diffusion.evaluation.report RUN_DIRECTORY …``: write the report of each again."""
    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m nemo_aligner_diffusion.evaluation.report RUN_DIRECTORY [RUN_DIRECTORY …]")
        return 0 if arguments else 2
    for folder in arguments:
        print(write_report(folder))
    return 0
