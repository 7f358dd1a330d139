"""Lines and tables as every command prints them."""

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_line(out: Console, line: str) -> None:
    """Print a line as it is, whatever the width."""
    out.print(Text(line), soft_wrap=True)


def print_facts(out: Console, facts: dict[str, str]) -> None:
    """Print a line for each fact that there is, with its title before it."""
    for title, text in facts.items():
        if text:
            print_line(out, f"{title:<12}{text}")


def plain_table(*headers: str) -> Table:
    """Return a table without lines, as kubectl draws it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="ignore")
    return table
