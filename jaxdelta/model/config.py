"""ModelConfig: what a decoder's forward pass depends on, whatever its family and its config.json."""

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
    """Mixture of experts (Shazeer et al. 2017): of `count` MLPs each token's router picks `per_token`.

    `layers` are those whose MLP is such a mixture; `renormalise`: the shares of those picked add up to 1.
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalise: bool
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What the forward pass of a decoder depends on, and nothing else but `model_type`, `max_positions` and
    `initializer_range`.

    `model_type`: transformers' name of the family, for files and reports; nothing is computed by it.
    `windows[i]` is the number of positions layer i attends to (its own included), None for all of them.
    `qk_norm`: RMSNorm of each head's queries and keys before rotation, None for no norm. `qkv_bias` and
    `o_bias`: biases of attention's projections out of the stream and back into it; `mlp_bias`: biases of all
    projections of a dense MLP. `experts` is None where all layers are dense. `weight_block`: rows and columns
    of the blocks of float8 weights that have a scale each; None where weights are stored as they are.
    `initializer_range`: the standard deviation of the weights before training.
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
    max_positions: int = 32_768
    dtype: str = "float32"
    experts: Experts | None = None
    weight_block: tuple[int, int] | None = None
    initializer_range: float = 0.02

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    def layers_of(self, *, sparse: bool) -> tuple[int, ...]:
        """The layers of one kind, in their order."""
        return tuple(i for i in range(self.num_layers) if self.is_sparse(i) == sparse)

    def layer_parameters(self, layer: int = 0) -> int:
        """Number of parameters of one layer, those of all its experts included."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        projections = 2 * self.hidden_size * (q_size + kv_size)
        biases = self.qkv_bias * (q_size + 2 * kv_size) + self.o_bias * self.hidden_size
        norms = 2 * self.hidden_size + 2 * self.head_dim * (self.qk_norm is not None)
        return projections + biases + norms + self._mlp_parameters(layer)

    def _mlp_parameters(self, layer: int) -> int:
        if self.experts is None or not self.is_sparse(layer):
            biases = self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
            return 3 * self.hidden_size * self.intermediate_size + biases
        return self.hidden_size * self.experts.count * (1 + 3 * self.experts.intermediate_size)

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        embeddings = (2 - self.tie_embeddings) * self.vocab_size * self.hidden_size
        layers = sum(self.layer_parameters(i) for i in range(self.num_layers))
        return layers + embeddings + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Size of all weights in the configuration's dtype, in bytes."""
        return self.parameters * DTYPE_BYTES[self.dtype]
