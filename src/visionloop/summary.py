"""What a retrain came to, as a table for the terminal and as Markdown for Prefect. Pure: no printing, no disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARKS = {True: "pass", False: "FAIL", None: "cannot tell"}


@dataclass(frozen=True)
class Summary:
    """All that is told at the end. `outcome` is promoted, unchanged, refused or inconclusive."""

    name: str
    outcome: str
    headline: str
    dataset: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    rules: Sequence[Mapping[str, Any]] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Return the table: (what, found), top to bottom."""
        rows = [("result", self.headline)]
        rows.append(("dataset", f"version {self.dataset['version']}, digest {str(self.dataset['digest'])[:12]}"))
        rows += [
            (name, format_interval(self.metrics[name])) for name in ("accuracy", "macro_f1") if name in self.metrics
        ]
        rows += [
            (f"gate: {r['rule']}", f"{MARKS[r['passed']]}: {r['found']}; expected {r['expected']}") for r in self.rules
        ]
        if self.model:
            rows.append(("model", f"version {self.model['version']}, bundle {str(self.model['bundle'])[:12]}"))
        rows += [
            (f"asked: a {a['actual']}", f"{a['prediction']} ({a['confidence']:.1%})  {a['origin']}")
            for a in self.answers
        ]
        if self.step_seconds:
            steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in self.step_seconds.items())
            rows.append(("seconds", f"{steps}; in all {sum(self.step_seconds.values()):.1f}"))
        return rows

    def to_markdown(self) -> str:
        """Return the same as a Markdown table."""
        lines = [f"# {self.name}: {self.headline}", "", "| what | found |", "| --- | --- |"]
        lines += [f"| {what} | {found.replace('|', chr(92) + '|')} |" for what, found in self.rows()[1:]]
        lines += ["", *(f"- to {what}: `{command}`" for what, command in self.commands.items())]
        return "\n".join(lines) + "\n"


def format_interval(interval: Mapping[str, float]) -> str:
    """Return a figure with its interval: `0.9790 (95 %: 0.9552 to 0.9903)`."""
    return f"{interval['value']:.4f} (95 %: {interval['low']:.4f} to {interval['high']:.4f})"
