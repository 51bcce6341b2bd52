"""Options of the data commands that are numbers."""

from __future__ import annotations


def check_ranges(config: object, limits: dict[str, tuple[float, float]]) -> None:
    """Raises ValueError naming the first option of `config` that lies outside its (lowest, highest) of `limits`; None lies
    nowhere and is allowed."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be in {low} to {high}")
