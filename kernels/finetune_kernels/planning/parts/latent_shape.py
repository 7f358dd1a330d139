"""Sizes of latent attention (DeepSeek's MLA) that memory and time depend on, from its configuration. Pure."""

from dataclasses import dataclass
from typing import Any

from finetune_kernels.planning.family import Family


@dataclass(frozen=True)
class LatentShape:
    """Sizes of the attention of one layer."""

    hidden: int
    heads: int
    query_rank: int
    """Elements of the latent vector of q; 0 if q comes from the residual stream."""
    rank: int
    """Elements of the latent vector of k and v."""
    rotated: int
    """Elements of a head of q and k that RoPE turns; those of k are the same for all heads."""
    unrotated: int
    value: int
    """Elements of a head of v."""

    @property
    def size(self) -> int:
        """Elements of a head of q and k."""
        return self.rotated + self.unrotated

    @property
    def narrow(self) -> int:
        """Elements of a row that the first projections make: the latent vectors, the keys' turned part, and q if that
        has no latent vector. They are saved, and q, k and v are made of them again."""
        return (self.query_rank or self.heads * self.size) + self.rank + self.rotated

    @property
    def widened(self) -> int:
        """Elements of a row of q, and of the unturned part of k and v."""
        return self.heads * (self.size + self.unrotated + self.value)

    @property
    def widening_parameters(self) -> int:
        """Parameters of the projections that read latent vectors."""
        return self.heads * (self.query_rank * self.size + self.rank * (self.unrotated + self.value))

    @property
    def parameters(self) -> int:
        """Parameters of all projections."""
        return self.widening_parameters + self.hidden * (self.narrow + self.heads * self.value)

    def linears(self, family: Family) -> dict[str, tuple[int, int]]:
        """Output and input size of each linear layer, by the names of the family's row for this configuration."""
        query, key_value = self.heads * self.size, self.heads * (self.unrotated + self.value)
        first, second = family.attention_inputs
        found = {
            first: (self.query_rank or query, self.hidden),
            second: (self.rank + self.rotated, self.hidden),
            family.attention_output: (self.hidden, self.heads * self.value),
        }
        widening = () if family.latent is None else family.latent.widening
        sizes = ((query, self.query_rank), (key_value, self.rank))[-len(widening) :]
        return found | dict(zip(widening, sizes, strict=True))


def latent_shape(config: Any, family: Family | None) -> LatentShape | None:
    """Returns the sizes of a configuration's latent attention; None if the family's row has none."""
    if family is None or family.latent is None:
        return None
    return LatentShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        query_rank=config.q_lora_rank or 0,
        rank=config.kv_lora_rank,
        rotated=config.qk_rope_head_dim,
        unrotated=config.qk_nope_head_dim,
        value=config.v_head_dim,
    )
