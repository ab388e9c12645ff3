"""What `explain` finds in the folder of a run: what was given when it was begun, and how it went."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from causalvae.asked import Asked
from causalvae.errors import ConfigError
from causalvae.findings import Finding
from causalvae.flags import Given
from causalvae.report.records import Run, read_run


def as_it_ran(path: Path, asked: Asked) -> tuple[Asked, list[Finding]]:
    """What the run was asked, and notes on how it went. asked: all settings of its config.yaml.

    What was not given there counts as a default. A run that was moved is looked for where it is.
    """
    run = read_run(path)
    sources = {row.name: row.source for row in run.settings if row.source is not None}
    given: Mapping[str, Given] = {
        name: replace(item, source=sources[name]) for name, item in asked.given.items() if name in sources
    }
    settings, place = asked.settings, path.resolve()
    try:
        settings = replace(settings, output_dir=str(place.parent), exp_name=place.name, config=None)
    except ConfigError as error:
        return replace(asked, given=given), [
            Finding("run-unreadable", "problem", ("exp_name",), {"said": str(error)})
        ]
    return replace(asked, settings=settings, given=given), _of_run(run)


def _of_run(run: Run) -> list[Finding]:
    """What run.json says."""
    facts = run.facts
    if not facts:
        return []
    torch: Any = facts.get("torch")  # Any: JSON
    command: Any = facts.get("command")  # Any: JSON
    words = [str(word) for word in command] if isinstance(command, list) else []
    values = {
        "name": run.name,
        "path": str(run.path),
        "command": " ".join(words) or "?",
        "precision": str(facts.get("precision", "?")),
        "level": str(facts.get("amp_level", "?")),
        "device": str(facts.get("device", "?")),
        "torch": str(torch.get("version", "?")) if isinstance(torch, dict) else "?",
    }
    found = [Finding("run-was", "note", (), values)]
    return found + [Finding("run-warned", "note", (), {"said": said}) for said in run.warnings]
