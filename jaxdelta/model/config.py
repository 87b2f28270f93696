"""ModelConfig: everything a decoder's forward pass depends on, whatever its family and its config.json."""

import dataclasses
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: Su et al. 2021; yarn: Peng et al. 2023 (arXiv 2309.00071); llama3:
    Grattafiori et al. 2024 (arXiv 2407.21783)."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts (Shazeer et al. 2017): each token's router picks `per_token` of `count` MLPs.

    `layers`: the layers whose MLP is such a mixture. `renormalise`: the shares of the picked experts add up
    to 1.
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalise: bool
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The settings of a decoder's forward pass.

    Four fields have no influence on it: `model_type` (transformers' name of the family), `max_positions`,
    `initializer_range` (the standard deviation of untrained weights) and `notes` (what a user should know of
    how the file was read, a sentence each; not compared).

    `windows[i]`: number of positions layer i attends to, its own included; None for all.
    `qk_norm`: RMSNorm of each head's queries and keys before rotation; None for no norm.
    `qkv_bias`, `o_bias`: biases of attention's projections out of the stream and back into it.
    `mlp_bias`: biases of all projections of a dense MLP.
    `has_head`: false for an embedding model, whose layers can be measured, but which predicts no token.
    `experts`: None if all layers are dense.
    `weight_block`: rows and columns of the blocks of float8 weights with a common scale, 0 for a whole axis;
    None for plain weights.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qk_norm: Literal["per_head"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    has_head: bool = True
    max_positions: int = 32_768
    dtype: str = "float32"
    experts: Experts | None = None
    weight_block: tuple[int, int] | None = None
    initializer_range: float = 0.02
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    def layers_of(self, *, sparse: bool) -> tuple[int, ...]:
        """The layers of one kind, in order."""
        return tuple(i for i in range(self.num_layers) if self.is_sparse(i) == sparse)
