"""``--map source=target``: which column or field of the input is which field of the payload."""

from collections.abc import Iterable

from spectrum_shell.errors import Usage
from spectrum_shell.payload import FIELDS, GEO_FIELDS

_TARGETS = ", ".join((*FIELDS, *(f"geo.{name}" for name in GEO_FIELDS), "properties.NAME"))


def parse_mapping(pairs: Iterable[str]) -> dict[str, str]:
    """The pairs as {source: target}; raises Usage for what is no pair, no target or given twice.

    The last ``=`` divides a pair, so a column's name may hold one.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        source, divider, target = pair.rpartition("=")
        if not divider or not source or not target:
            raise Usage(f'--map "{pair}" is no pair', "write --map COLUMN=FIELD")
        if not is_target(target):
            raise Usage(
                f'--map "{pair}": there is no payload field "{target}"', f"fields are {_TARGETS}"
            )
        if source in mapping:
            raise Usage(f'--map names the source "{source}" twice')
        if target in mapping.values():
            raise Usage(f'--map names the target "{target}" twice')
        mapping[source] = target
    return mapping


def is_target(name: str) -> bool:
    """True for a field of the payload, also inside geo and properties (``properties.plan``)."""
    head, dot, inner = name.partition(".")
    if not dot:
        return head in FIELDS
    return inner in GEO_FIELDS if head == "geo" else head == "properties" and inner != ""
