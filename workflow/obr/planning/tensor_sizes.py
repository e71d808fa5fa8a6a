"""Sizes of a model's tensors, in elements and bytes."""

from dataclasses import dataclass
from pathlib import Path

from obr.config.model_sizes import read_config, sizes_of


@dataclass(frozen=True)
class Sizes:
    """A model's: hidden d, intermediate f, width of queries and of keys, blocks, vocabulary."""

    hidden: int
    intermediate: int
    queries: int
    keys: int
    blocks: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict, what: str) -> "Sizes":
        """From a transformers config.json. what: the model's name in messages. Raises ObrError at a wrong size."""
        sizes = sizes_of(config, what)
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        return cls(sizes.hidden, sizes.intermediate, queries, keys, sizes.blocks, sizes.vocabulary)

    @classmethod
    def from_config(cls, sizes: dict) -> "Sizes":
        """From the `sizes` of a model in the workflow's config."""
        head = sizes["hidden"] // sizes["heads"]
        queries, keys = sizes["heads"] * head, sizes["kv_heads"] * head
        return cls(sizes["hidden"], sizes["intermediate"], queries, keys, sizes["blocks"], sizes["vocabulary"])

    @classmethod
    def estimate(cls, billions: float) -> "Sizes":
        """A Llama of this size: d = 128 times the blocks, f = 2.7 d, 12 d² weights a block."""
        hidden = max(64, 64 * round((128 * billions * 1e9 / 12) ** (1 / 3) / 64))
        return cls(hidden, int(2.7 * hidden), hidden, hidden, max(1, hidden // 128), 32000)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(rows, columns) of a block's linear layers."""
        d, f, q, k = self.hidden, self.intermediate, self.queries, self.keys
        return [(q, d), (k, d), (k, d), (d, q), (f, d), (f, d), (d, f)]

    @property
    def inputs(self) -> list[int]:
        """Columns of the four groups that share a Hessian."""
        return [self.hidden, self.queries, self.hidden, self.intermediate]

    @property
    def block(self) -> int:
        """Weights of a block's linear layers."""
        return sum(rows * columns for rows, columns in self.layers)

    @property
    def ends(self) -> int:
        """Weights of embeddings and head."""
        return 2 * self.vocabulary * self.hidden

    def forward(self, tokens: int, length: int) -> float:
        """Operations of the blocks for so many tokens, in sequences of this length."""
        return self.blocks * tokens * (2 * self.block + 4 * length * self.queries)

    def logits(self, tokens: int) -> float:
        """Operations of the head."""
        return 2.0 * tokens * self.hidden * self.vocabulary

    def hessians(self, tokens: int) -> float:
        """Operations of all blocks' Hessians."""
        return 2.0 * tokens * self.blocks * sum(n**2 for n in self.inputs)


def sizes_in(folder: Path) -> Sizes | None:
    """The sizes of a downloaded model, if it is there. Raises ObrError if its config.json has none that can be."""
    if not (Path(folder) / "config.json").is_file():
        return None
    return Sizes.of(read_config(folder), str(folder))
