"""Sizes in bytes, as people read them."""

MEBIBYTE, GIBIBYTE = 1 << 20, 1 << 30


def format_size(count: int) -> str:
    """A size for people: in GiB, or in MiB where that would be 0.0."""
    return f"{count / GIBIBYTE:.1f} GiB" if count >= GIBIBYTE / 10 else f"{count / MEBIBYTE:.1f} MiB"
