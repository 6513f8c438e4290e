"""What every room asks a number that a user gives."""

from __future__ import annotations

from math import inf
from numbers import Integral


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float = 0,
    most: float = inf,
    whole: bool = False,
) -> None:
    """Raise a `ValueError` that names the argument, the value and the range, unless the value is in it."""
    if above is not None:
        rule, holds = f"above {above}", above < value < inf
    elif most == inf:
        rule, holds = f"{least} or more", least <= value < inf
    else:
        rule, holds = f"between {least} and {most}", least <= value <= most
    if whole:
        rule, holds = f"a whole number, {rule}", holds and isinstance(value, Integral)
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value}.")
