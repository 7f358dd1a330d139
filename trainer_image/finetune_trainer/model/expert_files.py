"""The names that a model's files give to the experts of a mixture, which of them an adapter is wanted on, and the order
of rows and columns in stacks. Pure.

Files hold a matrix for each expert (`experts.3.gate_proj.weight`, or `w1`), or stack all of a layer in one tensor
(`experts.gate_up_proj`). Adapters have the names of the files: so they merge into the files' tensors, and serving
engines find them.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from finetune_api.failures import FailureReason
from finetune_api.spec.training import ALL_LINEAR
from finetune_trainer.errors import TrainerError

_EACH = re.compile(
    r"^(?P<block>.*\blayers\.(?P<layer>\d+)\.(?:[\w.]+\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight$"
)
_STACK = re.compile(
    r"^(?P<block>.*\blayers\.(?P<layer>\d+)\.(?:[\w.]+\.)?(?:experts|block_sparse_moe))\."
    r"(?P<leaf>gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)$"
)
LAYER = re.compile(r"\blayers\.(\d+)\.")

PARTS = ("gate", "up", "down")
STACKED_PARTS = ("gate_up", "down")
_EACH_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("up_proj", "down_proj"))
_STACK_LEAVES = (("gate_up_proj", "down_proj"), ("input_linear.weight", "output_linear.weight"))
COMMON = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gate_up": "gate_up_proj"}
"""Name of each part that everybody writes, whatever the files call it."""


@dataclass(frozen=True)
class StoredExperts:
    """The experts of one layer in the files."""

    block: str
    """What their tensors' names begin with, such as model.layers.0.mlp.experts."""
    leaves: tuple[str, ...]
    """Names of gate, up and down, of gate and up together and down, or of up and down alone."""
    experts: int

    @property
    def is_stacked(self) -> bool:
        """True if a tensor holds all experts."""
        return self.leaves in _STACK_LEAVES

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that can have an adapter, in the order of `leaves`."""
        return STACKED_PARTS if self.is_stacked else PARTS[-len(self.leaves) :]

    def leaf(self, part: str) -> str:
        """The files' name of a part."""
        return self.leaves[self.parts.index(part)]

    def module(self, part: str, expert: int) -> str:
        """Name of one expert's matrix as a linear layer, for files that hold one for each."""
        return f"{self.block}.{expert}.{self.leaf(part)}"

    def part_of(self, name: str) -> str | None:
        """The part that a tensor of this name holds; None for another."""
        found = _EACH.match(name) or _STACK.match(name)
        return self.parts[self.leaves.index(found["leaf"])] if found and found["leaf"] in self.leaves else None

    def wanted(self, targets: Collection[str]) -> tuple[str, ...]:
        """The parts that `targets`, as the job writes them, ask for."""
        if tuple(targets) == (ALL_LINEAR,):
            return self.parts

        asked = set(targets)
        # One tensor holds gate and up: it stands for both, but not for one of them.
        if self.is_stacked and {COMMON["gate"], COMMON["up"]} <= asked:
            asked.add(COMMON["gate_up"])
        return tuple(part for part in self.parts if asked & {COMMON[part], self.leaf(part).removesuffix(".weight")})

    def answers(self) -> set[str]:
        """Names in targetModules that ask for experts."""
        names = {name for part in self.parts for name in (COMMON[part], self.leaf(part).removesuffix(".weight"))}
        return names | ({COMMON["gate"], COMMON["up"]} if self.is_stacked else set())


def find_experts(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Mapping[int, StoredExperts]:
    """The experts of each layer, from the names and shapes of all tensors; empty if they are named in another way."""
    leaves: dict[int, set[str]] = {}
    blocks: dict[int, str] = {}
    counts: dict[int, int] = {}
    for name, shape in shapes:
        found = _EACH.match(name) if len(shape) == 2 else _STACK.match(name) if len(shape) == 3 else None
        if found is None:
            continue
        layer = int(found["layer"])
        blocks[layer] = found["block"]
        leaves.setdefault(layer, set()).add(found["leaf"])
        last = int(found["expert"]) + 1 if len(shape) == 2 else shape[0]
        counts[layer] = max(counts.get(layer, 0), last)

    known = {frozenset(each): each for each in (*_EACH_LEAVES, *_STACK_LEAVES)}
    if any(frozenset(found) not in known for found in leaves.values()):
        return {}
    return {layer: StoredExperts(blocks[layer], known[frozenset(leaves[layer])], counts[layer]) for layer in leaves}


def turned_stacks(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> frozenset[str]:
    """Names of the stacks that files hold as [experts, in, out], of a type whose model has them as [experts, out, in].

    transformers 4 had that order, in which Qwen3-VL's mixtures are published; transformers 5 turns them when it loads
    them, and saves them as it has them. The shape of one stack tells nothing if it is square. But gate and up together
    have twice the width of down: [2 I, H] beside [H, I] as in the model, [H, 2 I] beside [I, H] as published, and no
    two stacks fit both. Raises TrainerError (InvalidConfiguration) for two that fit neither, and for experts one by
    one, which transformers does not read in a whole checkpoint of these types.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes:
        if _EACH.match(name):
            raise _unreadable(
                f"the weight files hold each expert by itself ({name}), which transformers does not read in such a "
                "checkpoint: take the one in 16 bits, whose experts are stacked"
            )
        if stack := _STACK.match(name):
            found.setdefault(stack["block"], {})[stack["leaf"]] = shape
    return frozenset(
        f"{block}.{leaf}" for block, stacks in found.items() if _are_turned(block, stacks) for leaf in stacks
    )


def turned_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a stack whose rows become columns."""
    experts, rows, columns = shape
    return experts, columns, rows


def _are_turned(block: str, stacks: Mapping[str, tuple[int, ...]]) -> bool:
    """True for the stacks of a layer, by the ends of their names, if they are [experts, in, out]."""
    names = _STACK_LEAVES[0]
    if stacks.keys() == set(names) and all(len(shape) == 3 for shape in stacks.values()):
        gate_up, down = (stacks[name] for name in names)
        if _belong_together(gate_up, down):
            return False
        if _belong_together(turned_shape(gate_up), turned_shape(down)):
            return True

    listed = ", ".join(f"{name} of shape {list(shape)}" for name, shape in sorted(stacks.items()))
    raise _unreadable(
        f"the weight files hold {listed} in {block}, but experts are gate_up_proj [E, H, 2 I] and down_proj [E, I, H], "
        "or both with their last two sizes swapped: get the files again"
    )


def _belong_together(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """True if gate_up is [E, 2 I, H] and down [E, H, I]."""
    experts, outer, width = down
    return gate_up == (experts, 2 * width, outer)


def _unreadable(message: str) -> TrainerError:
    return TrainerError(FailureReason.INVALID_CONFIGURATION, message)
