"""The mixtures of experts of transformers that the kernels know, one `ExpertFamily` row each.

Every family keeps the experts of a layer in stacked tensors, gate and up in one, and calls them with hidden states, the
router's choice and its weights. `experts.replacing` compares a loaded module with its row; `test_expert_families.py`
builds a small model of every row and compares it with transformers. The table imports no torch, as preflight reads it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertFamily:
    """Everything the kernels know of one family's experts; the defaults are those of most families."""

    prefix: str
    """Prefix of the classes in transformers: Qwen3Moe in Qwen3MoeExperts."""
    model_type: str
    """`model_type` of the text configuration."""
    router: str = "TopKRouter"
    """Class of the router, behind the prefix."""
    activation_field: str | None = "hidden_act"
    """Field of the configuration that names the activation."""
    activation: str | None = None
    """The activation of a family that has no such field."""
    block_bias: str | None = None
    """Buffer of the block that its router takes beside hidden states, under the same name, to add it to the scores by
    which it chooses (LFM2 MoE, MiniMax M2); the other routers have what they need."""
    is_interleaved: bool = False
    """True if the rows of gate and up alternate; else gate's half comes first."""
    is_transposed: bool = False
    """True if the tensors are [experts, in, out]."""
    has_bias: bool = False
    """True if both projections have a bias for each expert."""
    is_gated: bool = True
    """False if experts have an up projection alone (Nemotron H)."""
    scales_input: bool = False
    """True if the router's weights multiply the experts' input (Llama 4), whose whole block is replaced then."""

    @property
    def weights(self) -> tuple[str, str]:
        """Parameters of the experts that are matrices: gate and up in one, or up, and down."""
        return ("gate_up_proj" if self.is_gated else "up_proj"), "down_proj"

    @property
    def experts(self) -> str:
        """Class of the experts' module."""
        return f"{self.prefix}Experts"

    @property
    def router_class(self) -> str:
        """Class of the router."""
        return f"{self.prefix}{self.router}"


_LATER = "TopkRouter"
EXPERT_FAMILIES = (
    ExpertFamily("Mixtral", "mixtral"),
    ExpertFamily("Qwen2Moe", "qwen2_moe"),
    ExpertFamily("Qwen3Moe", "qwen3_moe"),
    ExpertFamily("Qwen3Next", "qwen3_next"),
    ExpertFamily("Qwen3_5Moe", "qwen3_5_moe_text"),
    ExpertFamily(
        "GptOss", "gpt_oss", activation_field=None, activation="clamped", is_interleaved=True, is_transposed=True,
        has_bias=True,
    ),
    ExpertFamily("Llama4Text", "llama4_text", router="", is_transposed=True, scales_input=True),
    ExpertFamily("Gemma4Text", "gemma4_text", router="Router", activation_field="hidden_activation"),
    ExpertFamily("Glm4Moe", "glm4_moe", router=_LATER),
    ExpertFamily("Glm4MoeLite", "glm4_moe_lite", router=_LATER),
    ExpertFamily("DeepseekV2", "deepseek_v2", router=_LATER),
    ExpertFamily("DeepseekV3", "deepseek_v3", router=_LATER),
    ExpertFamily("Dots1", "dots1", router=_LATER),
    ExpertFamily("Olmoe", "olmoe"),
    ExpertFamily("FlexOlmo", "flex_olmo"),
    ExpertFamily("GraniteMoe", "granitemoe"),
    ExpertFamily("GraniteMoeShared", "granitemoeshared"),
    ExpertFamily("GraniteMoeHybrid", "granitemoehybrid"),
    ExpertFamily("Ernie4_5_Moe", "ernie4_5_moe"),
    ExpertFamily("ExaoneMoe", "exaone_moe", router=_LATER),
    ExpertFamily("HunYuanMoEV1", "hunyuan_v1_moe", router="Gate"),
    ExpertFamily("Lfm2Moe", "lfm2_moe", activation_field=None, activation="silu", block_bias="expert_bias"),
    ExpertFamily("Mellum", "mellum"),
    ExpertFamily("NemotronH", "nemotron_h", router=_LATER, activation_field="mlp_hidden_act", is_gated=False),
    ExpertFamily("MiniMaxM2", "minimax_m2", block_bias="e_score_correction_bias"),
    ExpertFamily("Phimoe", "phimoe"),
    ExpertFamily("SolarOpen", "solar_open", router=_LATER),
)  # fmt: skip


def expert_family_of_type(model_type: str | None) -> ExpertFamily | None:
    """Returns the row of a text configuration's `model_type`; None if the kernels do not know its experts."""
    return next((family for family in EXPERT_FAMILIES if family.model_type == model_type), None)
