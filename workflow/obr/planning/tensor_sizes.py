"""Sizes of a model's tensors, in elements and bytes."""

from dataclasses import dataclass
from pathlib import Path

from obr.config.model_sizes import Experts, Latent, read_config, sizes_of
from obr.models.architectures import with_defaults


@dataclass(frozen=True)
class Sizes:
    """A model's: hidden d, intermediate f, width of queries and of keys, blocks, vocabulary.

    experts: of each block; the few blocks of some models that have none count as one that does. latent: attention
    whose projections pass latent vectors; `queries` is then the width of what its heads put out.
    """

    hidden: int
    intermediate: int
    queries: int
    keys: int
    blocks: int
    vocabulary: int
    experts: Experts | None = None
    latent: Latent | None = None

    @classmethod
    def of(cls, config: dict, what: str) -> "Sizes":
        """From a transformers config.json. what: the model's name in messages. Raises ObrError at a wrong size."""
        sizes = sizes_of(with_defaults(config), what)
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        extra = (sizes.experts, sizes.latent)
        return cls(sizes.hidden, sizes.intermediate, queries, keys, sizes.blocks, sizes.vocabulary, *extra)

    @classmethod
    def from_config(cls, sizes: dict) -> "Sizes":
        """From the `sizes` of a model in the workflow's config."""
        head = sizes.get("head_dim") or sizes["hidden"] // sizes["heads"]
        queries, keys = sizes["heads"] * head, sizes["kv_heads"] * head
        experts = Experts(**sizes["experts"]) if sizes.get("experts") else None
        return cls(
            sizes["hidden"], sizes["intermediate"], queries, keys, sizes["blocks"], sizes["vocabulary"], experts
        )

    @classmethod
    def estimate(cls, billions: float) -> "Sizes":
        """A Llama of this size: d = 128 times the blocks, f = 2.7 d, 12 d² weights a block."""
        hidden = max(64, 64 * round((128 * billions * 1e9 / 12) ** (1 / 3) / 64))
        return cls(hidden, int(2.7 * hidden), hidden, hidden, max(1, hidden // 128), 32000)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(rows, columns) of a block's linear layers."""
        return [layer for group in self.groups for layer in group]

    @property
    def groups(self) -> list[list[tuple[int, int]]]:
        """(rows, columns) of the layers of each group, which share a Hessian."""
        widths = [self.intermediate]
        if self.experts:
            shared = [self.experts.shared] if self.experts.shared else []
            widths = shared + [self.experts.width] * self.experts.number
        return self._attention() + [group for f in widths for group in self._mlp(f)]

    def _mlp(self, f: int) -> list[list[tuple[int, int]]]:
        return [[(f, self.hidden), (f, self.hidden)], [(self.hidden, f)]]

    def _attention(self) -> list[list[tuple[int, int]]]:
        d, q, k, latent = self.hidden, self.queries, self.keys, self.latent
        if latent is None:
            return [[(q, d), (k, d), (k, d)], [(d, q)]]
        heads = q // latent.value_dim
        queries = heads * latent.key_dim
        first = [(latent.query_rank or queries, d), (latent.rank + latent.rotary, d)]
        up = [[(queries, latent.query_rank)]] if latent.query_rank else []
        values = heads * (latent.key_dim - latent.rotary + latent.value_dim)
        return [first, *up, [(values, latent.rank)], [(d, q)]]

    @property
    def inputs(self) -> list[int]:
        """Columns of the groups that share a Hessian."""
        return [group[0][1] for group in self.groups]

    @property
    def passing(self) -> int:
        """Inner channels of a block's MLP that a token passes: of the experts that it is sent to, and shared ones."""
        if self.experts is None:
            return self.intermediate
        return self.experts.chosen * self.experts.width + self.experts.shared

    @property
    def active(self) -> int:
        """Weights of a block that a token is multiplied by."""
        if self.experts is None:
            return self.block
        return self.block - 3 * (self.experts.number - self.experts.chosen) * self.experts.width * self.hidden

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
        return self.blocks * tokens * (2 * self.active + 4 * length * self.queries)

    def logits(self, tokens: int) -> float:
        """Operations of the head."""
        return 2.0 * tokens * self.hidden * self.vocabulary

    def hessians(self, tokens: int) -> float:
        """Operations of all blocks' Hessians."""
        squares = sum(n**2 for n in self.inputs)
        if self.experts:  # a token is in the Hessians of its experts alone
            squares -= (self.experts.number - self.experts.chosen) * (self.hidden**2 + self.experts.width**2)
        return 2.0 * tokens * self.blocks * squares


def sizes_in(folder: Path) -> Sizes | None:
    """The sizes of a downloaded model, if it is there. Raises ObrError if its config.json has none that can be."""
    if not (Path(folder) / "config.json").is_file():
        return None
    return Sizes.of(read_config(folder), str(folder))
