"""The settings of the report. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_aligner_diffusion.settings import BOOL, Settings, integer, setting


@dataclass(frozen=True)
class ReportSettings(Settings):
    """report.html, the page that shows what the run did."""

    section = "report"
    title = "Report"

    enable: bool = setting(True, BOOL, "write it; true or false")
    max_prompts: int = setting(8, integer(1), "prompts in the before/after grid; integer >= 1")
