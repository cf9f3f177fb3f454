"""Counts and sizes as a person reads them; powers of ten, as disks and models are sold."""

UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def bytes_text(num_bytes: int) -> str:
    """Return a size with three significant digits: 98.4 MB."""
    for factor, prefix in UNITS:
        if num_bytes >= factor:
            return f"{_three_digits(num_bytes / factor)} {prefix}B"
    return f"{num_bytes} B"


def count_text(count: int) -> str:
    """Return a number of parameters: 135 M, 3.23 B, 4,096 below a million."""
    if count >= 10**9:
        return f"{_three_digits(count / 10**9)} B"
    return f"{_three_digits(count / 10**6)} M" if count >= 10**6 else f"{count:,}"


def _three_digits(value: float) -> str:
    """Return a value with three digits, or all before its point."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"
