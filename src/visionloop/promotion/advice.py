"""What to do about the rules of the gate that cannot tell: only what can help where it is said. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from visionloop.params.gate import LOWER_IS_BETTER

OTHER_MODEL = "Train on more images or with other params"
EQUAL_PASSES = "with `gate.rule: no_worse` an equal one passes, from 133 test images on for a margin of 2 points."
NEARLY_EQUAL = -0.02  # from here on that may help
LOWER = "a lower "  # said by a rule only where a lower number would let the candidate pass
# What to do about a rule that cannot tell: while the value is above its line, and where it is not. KEYS: as it names.
ADVICE = {
    "better": (f"More test images would tell; {EQUAL_PASSES}", f"{OTHER_MODEL}; {EQUAL_PASSES}"),
    "behind": (f"{OTHER_MODEL}.",) * 2,
    "no_worse": (
        "More test images would tell, or a larger `gate.margin`.",
        f"{OTHER_MODEL}, or set a larger `gate.margin`.",
    ),
    "baseline": ("More test images would tell whether it beats the baseline.", f"{OTHER_MODEL}."),
    "class_drop": (
        "Ingest more images of the class, of more groups; or see the changed answers in decisions/latest.html and set "
        "`gate.class_drop: {mode: dry_run}`.",
    )
    * 2,
    "simple_head": (
        "Run `visionloop evaluate` with `evaluate.baseline_images` above 0, then `visionloop gate`; with fewer than "
        "six groups of test images set `gate.baseline: {heads: dry_run}`.",
    )
    * 2,
    "min_images": ("Ingest more images, of more groups where they are grouped; or lower KEYS.",) * 2,
    "too_few": ("Ingest more images, of more groups where they are grouped.",) * 2,
    "new_class": (
        "Ingest more images of the class, or lower `gate.min_images.per_class` (one test image is the least), or set "
        "`gate.new_class: {mode: off}`.",
    )
    * 2,
    "new_few": ("Ingest more images of the class, or set `gate.new_class: {mode: off}`.",) * 2,
}
FEW = {"min_images": "too_few", "new_class": "new_few"}  # their advice where no lower number helps


def list_advice(held: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what to do about rules that cannot tell: of several, the advice of the first two."""
    held = list(held)
    if "min_images" in {rule["rule"] for rule in held}:  # the comparison on so few images shows nothing
        held = [rule for rule in held if rule["rule"] not in ("better", "no_worse")]
    return list(dict.fromkeys(filter(None, map(_advise, held))))[:2]


def _advise(rule: Mapping[str, Any]) -> str:
    name, value, line = rule["rule"], rule.get("value"), rule.get("line")
    if name.startswith("floor "):
        if value is None or line is None:
            return "Choose another figure in `gate.floors`."
        is_good = value <= line if name.removeprefix("floor ") in LOWER_IS_BETTER else value >= line
        as_value = ", or set `bound: value`" if is_good else ""
        return f"It has no interval yet: more test images give one{as_value}."
    if name in ("better", "no_worse") and value is None:
        return "It is the champion already: there is nothing to do."
    if name == "better" and value is not None and value < NEARLY_EQUAL:
        name = "behind"
    if name in FEW and LOWER not in rule["expected"]:
        name = FEW[name]
    above, not_above = ADVICE.get(name, ("", ""))
    advice = above if value is None or line is None or value > line else not_above
    keys = str(rule["expected"]).rpartition(LOWER)[2].split(" and ")
    return advice.replace("KEYS", " and ".join(f"`{key}`" for key in keys))
