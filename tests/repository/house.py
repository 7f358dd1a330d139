"""Measures of the code as a house: sizes of files and functions, comments, paragraphs, docstrings, parameters, folders.

`python tests/repository/house.py` prints a row for each package; `house.py FOLDER...` lists what breaks a rule below
those folders. test_layout.py holds the rules. Reads source text only; nothing is imported.
"""

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PACKAGES = (
    "crds/finetune_api",
    "operator/finetune_operator",
    "operator/finetune_client",
    "trainer_image/finetune_trainer",
    "kernels/finetune_kernels",
)
MAX_PARAMETERS = 6
MAX_MODULES = 15
MAX_LINES_WITHOUT_A_BREAK = 12
WEAK_BEGINNINGS = re.compile(
    r"(What|Whether|Of|As|Where|How|Who|Which|Why|When|For|In|On|With|Without|By|To|From|That|Those|These)\b"
)
"""First words of a docstring that begins neither with a verb nor with a noun."""

COMPILED = ("jit", "njit", "heuristics", "autotune")
"""Decorators of functions whose parameters are a kernel's."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its text and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]


def read_sources(*folders: str) -> list[Source]:
    """The Python files below folders of the checkout, in order."""
    paths = [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]
    return [Source(path, path.read_text(), ast.parse(path.read_text())) for path in paths]


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def body_lines(function: Function, source: Source) -> list[str]:
    """The lines of a function below its docstring."""
    first = function.body[1:] if ast.get_docstring(function) else function.body
    return source.text.splitlines()[first[0].lineno - 1 : function.end_lineno] if first else []


def is_compiled(function: Function) -> bool:
    """Whether Triton or numba compiles it."""
    return any(name in ast.unparse(decorator) for decorator in function.decorator_list for name in COMPILED)


def parameters(function: Function) -> list[str]:
    """Names of all parameters but self and cls."""
    arguments = function.args
    found = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in found if name not in ("self", "cls", "ctx")]


def too_many_parameters(source: Source) -> Iterator[str]:
    for function in source.functions:
        if not is_compiled(function) and len(parameters(function)) > MAX_PARAMETERS:
            yield f"{function.lineno}: {function.name} has {len(parameters(function))} parameters"


def weak_docstrings(source: Source) -> Iterator[str]:
    documented = [source.tree, *(n for n in ast.walk(source.tree) if isinstance(n, Function | ast.ClassDef))]
    for node in documented:
        if found := WEAK_BEGINNINGS.match(ast.get_docstring(node) or ""):
            name = getattr(node, "name", "module")
            yield f"{getattr(node, 'lineno', 1)}: the docstring of {name} begins with {found[0]}"


def bodies_without_a_break(source: Source) -> Iterator[str]:
    """Long bodies of several statements without a blank line."""
    for function in source.functions:
        lines = body_lines(function, source)
        statements = len(function.body) - bool(ast.get_docstring(function))
        if statements > 2 and len(lines) > MAX_LINES_WITHOUT_A_BREAK and all(line.strip() for line in lines):
            yield f"{function.lineno}: {function.name} has {len(lines)} lines and no paragraph"


RULES = (too_many_parameters, weak_docstrings, bodies_without_a_break)


def crowded_folders(*folders: str) -> list[str]:
    """Folders with more than MAX_MODULES modules, `__init__` not counted."""
    found = []
    for top in folders:
        for folder in (CHECKOUT / top, *(path for path in sorted((CHECKOUT / top).rglob("*")) if path.is_dir())):
            count = len([path for path in folder.glob("*.py") if path.stem != "__init__"])
            if count > MAX_MODULES:
                found.append(f"{folder.relative_to(CHECKOUT)}: {count} modules")
    return found


def spread(values: Sequence[int]) -> str:
    """Median/p90/max."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.0f}/{ordered[int(0.9 * (len(ordered) - 1))]}/{ordered[-1]}"


@dataclass(frozen=True)
class Measures:
    """Figures of some packages, as in the table of rooms."""

    files: str
    functions: str
    long_functions: float
    comments: float
    blank_lines: float
    width: int
    most_files: int

    def row(self, name: str) -> str:
        shares = f"{self.long_functions:.0%} | {self.comments:.1%} | {self.blank_lines:.1%}"
        return f"| {name} | {self.files} | {self.functions} | {shares} | {self.width} | {self.most_files} |"


def measure(*folders: str) -> Measures:
    """Sizes, comments as a share of lines, blank lines as a share of lines inside functions."""
    sources = [source for source in read_sources(*folders) if source.text.strip()]
    functions = [(function, source) for source in sources for function in source.functions]
    lines = [line for source in sources for line in source.text.splitlines() if line.strip()]
    inside = [line for function, source in functions for line in body_lines(function, source)]
    lengths = [length(function) for function, _ in functions]
    return Measures(
        files=spread([source.text.count("\n") for source in sources]),
        functions=spread(lengths),
        long_functions=sum(value > 50 for value in lengths) / len(lengths),
        comments=sum(count_comments(source) for source in sources) / len(lines),
        blank_lines=sum(not line.strip() for line in inside) / len(inside),
        width=sorted(len(line) for line in lines)[int(0.9 * len(lines))],
        most_files=max(len([*source.path.parent.glob("*.py")]) for source in sources),
    )


def count_comments(source: Source) -> int:
    """Comments of a file, those behind code included."""
    readline = io.StringIO(source.text).readline
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(readline))


def main(folders: Sequence[str]) -> None:
    if folders:
        for source in read_sources(*folders):
            for rule in RULES:
                for line in rule(source):
                    print(f"{source.path.relative_to(CHECKOUT)}:{line}")
        print(*crowded_folders(*folders), sep="\n")
        return
    print("| code | file med/p90/max | fn med/p90/max | fn > 50 | comments | blank lines | line p90 | most files |")
    print("|---|---|---|---|---|---|---|---|")
    for package in PACKAGES:
        print(measure(package).row(package))
    print(measure(*PACKAGES).row("all"))


if __name__ == "__main__":
    main(sys.argv[1:])
