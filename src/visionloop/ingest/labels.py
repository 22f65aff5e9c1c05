"""Labels as the dataset holds them: renamed by `ingest.label_map`, put right by `ingest.corrections`, one per image.

Pure. The same rules hold for what a pull brings and for the rows of earlier versions, so that a later pull of the same
files finds nothing new.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from visionloop.errors import ParamsError, shorten
from visionloop.ingest.corrections import Correction, Labels, match_corrections
from visionloop.ingest.inspect import Inspected
from visionloop.params import Params
from visionloop.records import ImageRecord, Rejected


@dataclass(frozen=True)
class LabelRules:
    """What is done to a label on its way into the dataset. `several`: an image may have more than one."""

    label_map: Mapping[str, str] = field(default_factory=dict)
    corrections: Sequence[Correction] = ()
    several: bool = False

    def rename(self, labels: Labels) -> Labels:
        """Apply the label map; several labels are sorted, each once."""
        if not self.label_map and len(labels) <= 1:
            return labels
        if len(labels) == 1:
            return (self.label_map.get(labels[0], labels[0]),)
        return tuple(sorted({self.label_map.get(label, label) for label in labels}))


def make_label_rules(params: Params, corrections: Sequence[Correction]) -> LabelRules:
    """Return the rules of params.yaml.

    Raises:
        ParamsError: the label map renames a label that it renames another to: the order would decide.
    """
    label_map = {old: new for old, new in params.ingest.label_map.items() if old != new}
    if chained := set(label_map) & set(label_map.values()):
        raise ParamsError(
            "params.yaml ingest.label_map",
            f"renames {shorten([*chained])}, and others to it",
            "names that stay, on the right side",
            "Write the last name at once; to swap two names, use `corrections`.",
        )
    return LabelRules(label_map, corrections, params.task == "multilabel")


def relabel(
    rules: LabelRules, before: Mapping[str, ImageRecord], offered: Sequence[Inspected], forgotten: frozenset[str]
) -> tuple[dict[str, ImageRecord], dict[str, list[tuple[Inspected, Labels]]], list[Rejected]]:
    """Return the earlier rows and what is offered, by content, under their labels; and what has labels too many.

    Raises:
        SourceError: a correction fits no image.
    """
    by_content: dict[str, list[tuple[Inspected, Labels]]] = {}
    refused: list[Rejected] = []
    for one in offered:
        labels = rules.rename(one.item.labels)
        if one.facts.sha256 in forgotten:
            refused.append(
                Rejected(one.item.origin, "forgotten", "was forgotten on purpose, and is not taken in again")
            )
        elif len(labels) > 1 and not rules.several:
            found = f"has the labels {shorten(list(labels))}; expected one, or `task: multilabel`"
            refused.append(Rejected(one.item.origin, "several_labels", found))
        else:
            by_content.setdefault(one.facts.sha256, []).append((one, labels))
    rows = dict(before)
    if rules.label_map:
        rows = {
            s: r if (new := rules.rename(r.labels)) == r.labels else replace(r, labels=new) for s, r in rows.items()
        }
    if rules.corrections:
        _correct(rules, rows, by_content, forgotten)
    return rows, by_content, refused


def unite_labels(known: Labels, offered: Iterable[Labels], *, several: bool) -> Labels | None:
    """Return the labels of one image; without a label gives way to a label. None: two labels where there may be one."""
    offered = [*offered]
    if all(labels == known for labels in offered):
        return known
    everything = tuple(sorted({label for labels in (known, *offered) for label in labels}))
    return everything if several or len(everything) <= 1 else None


def _correct(
    rules: LabelRules,
    rows: dict[str, ImageRecord],
    by_content: dict[str, list[tuple[Inspected, Labels]]],
    forgotten: frozenset[str],
) -> None:
    labels_of: dict[str, list[Labels]] = {sha256: [row.labels] for sha256, row in rows.items()}
    for sha256, same in by_content.items():
        labels_of.setdefault(sha256, []).extend(labels for _, labels in same)
    matched = match_corrections(rules.corrections, labels_of, forgotten, several=rules.several)

    def apply(sha256: str, labels: Labels) -> Labels:
        for one in matched[sha256]:
            labels = one.apply(labels, several=rules.several)
        return labels

    for sha256 in matched:
        if sha256 in rows:
            rows[sha256] = replace(rows[sha256], labels=apply(sha256, rows[sha256].labels))
        if sha256 in by_content:
            by_content[sha256] = [(one, apply(sha256, labels)) for one, labels in by_content[sha256]]
