"""Parts that some families have in a layer in place of Llama's: another mixer, or experts. Names are transformers'."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mixer:
    """A mixer other than attention, in its place or beside it, which transformers' own module runs."""

    name: str
    """Name of the module in a layer, where other layers have attention."""
    kind: str
    """Class of the module, behind the family's prefix."""
    packages: tuple[str, ...]
    """Packages whose kernels transformers takes for it; plain PyTorch stands in for one that is not installed."""
    layer_type: str = "linear_attention"
    """Type of such layers in the configuration."""
    barred: tuple[str, ...] = ()
    """Linear layers that get no adapter: kernels read their weights past it."""
    beside_attention: bool = False
    """True if such a layer has attention as well, and adds what both make of the same norm's output."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in the MLP's place. Names are those of modules of a layer; `expert_families` knows experts
    and router."""

    block: str = "mlp"
    """Name of the module that has router and experts."""
    kind: str = "SparseMoeBlock"
    """Class of that module, behind the family's prefix."""
    router: str = "mlp.gate"
    shared: str | None = "mlp.shared_expert"
    """The MLP that all tokens share."""
    shared_option: str | None = None
    """Field of the configuration that is 0 for models without it (ERNIE, Granite)."""
    shared_gate: str | None = "mlp.shared_expert_gate"
    """Linear layer of the one number that scales what they share."""

    @property
    def experts(self) -> str:
        """Name of the experts."""
        return f"{self.block}.experts"
