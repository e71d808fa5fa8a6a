"""What is asked for: compression recipes, quantiser settings and sparsity patterns.

Plain data, checked on construction; nothing here knows torch, a model or a file.
"""

from dataclasses import asdict, dataclass, replace

from obr.config import recipe_checks as checks
from obr.config.methods import MASKS, METHODS
from obr.config.pattern import Pattern
from obr.config.quantizer import SIXTEEN_BITS, QuantizerSettings, build_settings, check_choice
from obr.errors import ObrError

BUDGETS = ("model", "block")  # over whose layers an allocation's bits are spread
# Fields that say how inputs are quantised; they leave weights alone, unless Hessians see quantised inputs.
QUANTIZERS = ("activations", "o_inputs", "queries", "keys", "values")
EVALUATION_ONLY = ("label", "online", *QUANTIZERS)


@dataclass(frozen=True)
class Option:
    """What a layer may become where an allocation chooses layer by layer: fields of a recipe."""

    method: str
    bits: int = 4
    sparsity: float = 0.0
    pattern: str | None = None

    @classmethod
    def parse(cls, entry: "dict | Option", what: str) -> "Option":
        """A checked option from a config entry. Raises ObrError as `Recipe.parse`, or if its size is not fixed."""
        if isinstance(entry, Option):
            return entry
        build_settings(cls, {"method": None, **entry}, what)  # refuses unknown keys
        check_choice(entry.get("method"), METHODS, f"{what}.method")
        recipe = Recipe.parse({"calibration": "given", **entry}, what)
        if recipe.adopted or (METHODS[recipe.method].rows_differ and not recipe.pattern):
            raise ObrError(f"{what}.method is {recipe.method!r}, whose sparsity is not the same in every layer.")
        return cls(recipe.method, recipe.bits, recipe.sparsity, recipe.pattern)

    @property
    def label(self) -> str:
        """Such as "joint, 4 bits, 50 %"."""
        pruned = [self.pattern] if self.pattern else [f"{100 * self.sparsity:g} %"] if self.sparsity else []
        return ", ".join([self.method, f"{self.bits} bits", *pruned])

    @property
    def prunes(self) -> bool:
        """Whether it removes weights."""
        return bool(self.sparsity or self.pattern)

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of a layer (rows, columns) in its packed form: kept codes and mask, scales left out."""
        if self.pattern:
            pattern = Pattern.parse(self.pattern)
            return rows * (columns // pattern.group) * (pattern.index_bits + pattern.kept * self.bits)
        pruned = int(columns * self.sparsity)
        return rows * (columns * bool(pruned) + (columns - pruned) * self.bits)


@dataclass(frozen=True)
class Allocation:
    """Options and the mean `bits` a weight that the choices of all layers may take together.

    scope: which layers share a budget of these bits: all of the "model" or those of each "block".
    """

    bits: float
    options: tuple[Option, ...]
    scope: str = "model"

    @classmethod
    def parse(cls, entry: "dict | Allocation", what: str) -> "Allocation":
        """A checked allocation from {"bits", "options": a list of options, "scope"}. Raises ObrError."""
        if isinstance(entry, Allocation):
            return entry
        allocation = build_settings(cls, {"bits": 0, "options": [], **entry}, what)
        if not isinstance(allocation.options, list | tuple) or not allocation.options:
            raise ObrError(
                f"{what}.options is {allocation.options!r}; list options, in a config under layer_options."
            )
        check_choice(allocation.scope, BUDGETS, f"{what}.scope")
        options = tuple(Option.parse(option, f"{what}.options[{i}]") for i, option in enumerate(allocation.options))
        least = min(Recipe(o.method, o.bits, o.sparsity, o.pattern).bits_per_weight for o in options)
        if not least <= allocation.bits <= 16:
            raise ObrError(
                f"{what}.bits is {allocation.bits}; it must lie between its smallest option's {least:g} and 16."
            )
        return replace(allocation, bits=float(allocation.bits), options=options)


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed and evaluated: an entry of the config's `recipes` and one of its `activations`.

    sparsity: fraction of the weights of each linear layer that is removed (implied by `pattern`).
    mask: the score by which weights are removed, a key of SCORES (methods "obr_rtn" and "obr_gptq"; "wanda" takes
    "wanda" or "wanda_harmonic"). "wanda_harmonic" depends on the order of the calibration windows.
    scope: which weights of the method "joint" share a budget: those of a "row" or of a whole "layer".
    sweeps: of annealing, by the method "joint": more take longer and leave less error.
    row_weights: how rows that share a budget (scope "layer") count: alike ("none") or by their outputs' "gradient".
    group: consecutive columns of a row that share a scale, stored in 16 bits; None for all. Not for the method
    "sparsegpt_gptq".
    refit: after restoration each row's scale, or its groups' scales, become those with the least loss for its codes.
    allocation: method, bits, sparsity and pattern are chosen for each layer; those of the recipe are then no layer's.
    alpha: fraction of the columns whose rounding error the remaining columns absorb (OBR).
    column_order: in which a layer's columns are rounded: as "given", or from the largest diagonal element of the
    Hessian down ("hessian", GPTQ's act-order). Stored weights are in the given order. With groups of columns their
    scales are then found before rounding.
    damp: added to the Hessian's diagonal, in units of its mean.
    clip: "minmax", "mse" (search for the scale with the least |error|^2.4 on the dense row), or "hessian" (the least
    squared error, each column weighted by its diagonal element of the Hessian).
    "learned": minmax of weights within the bounds that the rotation has learned.
    hessian_scope: when the Hessians of a layer's inputs are collected: behind the compressed layers of its "block"
    too, "group" by group (the paper's code), or for a whole "block" before any of its layers changes (llm-compressor;
    one pass through the block instead of four; sequential only).
    hessian_inputs: "plain" or "quantised" (as in evaluation; sequential only).
    online: least precision of online transforms, "float32", "float64", or "model", which multiplies by Hadamard
    matrices that are not Sylvester's in the activations' dtype. Queries and keys always have float32 or better.
    Hessians of plain inputs are collected with "float32".
    dtype: of the computation, in compression and in evaluation: "float32", "float16" or "bfloat16"; None for the
    default, float32 on a CPU and the model's own dtype on a GPU.
    o_inputs: o_proj's settings where they differ from `activations`.
    hessian: "sequential" (inputs from the already compressed blocks) or "cached" (of the dense model).
    asymmetry: share, 0 to 1, of the step from a layer's weights to those whose outputs, from inputs out of compressed
    blocks, are nearest the dense model's; 0 aims at the outputs of the dense weights (sequential only).
    residual: share, 0 to 1, of the step by which o_proj and down_proj make up for what the residual stream has lost
    before them (sequential only).
    token_weights: share, 0 to 1, by which calibration tokens count in Hessians as the dense model's loss feels errors
    at them (mean squared output gradient); 0 counts all alike (sequential only).
    attention_weights: the same by the attention that a token receives, in the Hessian of q, k, v (sequential only).
    target_shrinkage: "none", or "held_out": the steps of asymmetry and residual are shortened, layer by layer, to
    what leaves the least error on the held-out windows.
    refine_steps: of block-wise refinement of each compressed block, see `obr.compression.refine` (sequential only).
    refine_rate: its learning rate in units of a weight's scale; for scales and norms a tenth, relative to themselves.
    held_out: the last so many calibration windows enter no Hessian; layers' errors on them are reported, too
    (sequential only).
    blocks: the blocks on which all this acts, as a Python slice such as "0:2" or "1:-1"; None for all. The
    others stay at 16 bits.

    Example:
        >>> Recipe.parse({"method": "obr_gptq", "bits": 4, "calibration": "wikitext2"}).bits_per_weight
        3.0
    """

    method: str
    bits: int = 4
    sparsity: float = 0.5
    pattern: str | None = None
    mask: str = "wanda"
    alpha: float = 0.5
    column_order: str = "given"
    scope: str = "row"
    sweeps: int = 600
    row_weights: str = "none"
    group: int | None = None
    refit: bool = False
    damp: float = 0.01
    clip: str = "mse"
    int8_down_proj: bool = False
    rotation: str = "none"
    calibration: str | None = None
    hessian: str = "sequential"
    hessian_scope: str = "group"
    hessian_inputs: str = "plain"
    asymmetry: float = 0.0
    residual: float = 0.0
    token_weights: float = 0.0
    attention_weights: float = 0.0
    target_shrinkage: str = "none"
    refine_steps: int = 0
    refine_rate: float = 0.03
    held_out: int = 0
    online: str = "float32"
    dtype: str | None = None
    blocks: str | None = None
    seed: int = 0
    allocation: Allocation | None = None
    activations: QuantizerSettings = SIXTEEN_BITS
    o_inputs: QuantizerSettings | None = None
    queries: QuantizerSettings = SIXTEEN_BITS
    keys: QuantizerSettings = SIXTEEN_BITS
    values: QuantizerSettings = SIXTEEN_BITS
    label: str | None = None

    @classmethod
    def parse(cls, entry: "dict | Recipe", name: str = "recipe") -> "Recipe":
        """A checked recipe from a config entry.

        Raises:
            ObrError: an unknown key or a value out of range; the sentence names key, value and choices.
        """
        if isinstance(entry, Recipe):
            return entry
        entry = {k: v for k, v in entry.items() if v is not None}
        entry.pop("source", None)  # of an adopted checkpoint; what it holds is checked when it is read
        if entry.get("method") == "external":
            entry.setdefault("sparsity", 0.0)  # zeros are codes, unless the recipe says that weights were removed
        for part in QUANTIZERS if "o_inputs" in entry else (q for q in QUANTIZERS if q != "o_inputs"):
            entry[part] = QuantizerSettings.parse(entry.get(part), f"{name}.{part}")
        recipe = build_settings(cls, entry, name)
        checks.check_choices(recipe, name)
        if not recipe.prunes:
            recipe = replace(recipe, sparsity=0.0, pattern=None)
        if recipe.pattern:
            recipe = replace(recipe, sparsity=Pattern.parse(recipe.pattern).sparsity)
        masks = METHODS[recipe.method].masks
        if masks and recipe.mask not in masks:
            recipe = replace(recipe, mask=masks[0])
        if recipe.method == "dense":
            recipe = replace(recipe, bits=16)
        if recipe.allocation is not None:
            recipe = recipe._allocated(name)
        checks.check_taken(entry, recipe, name)
        for check in checks.OF_FIELDS:
            check(recipe, name)
        return recipe

    def _allocated(self, name: str) -> "Recipe":
        """With its allocation checked, and the bits of the largest option."""
        allocation = Allocation.parse(self.allocation, f"{name}.allocation")
        if self.method == "dense" or self.adopted or self.int8_down_proj:
            odd = "int8_down_proj" if self.int8_down_proj else f"method {self.method}"
            raise ObrError(f"{name} has an allocation, which {odd} contradicts; drop one of them.")
        bits = max(option.bits for option in allocation.options)
        return replace(self, allocation=allocation, bits=bits, sparsity=0.0, pattern=None)

    def of_layer(self, option: Option | None) -> "Recipe":
        """The recipe of a layer for which an allocation has chosen this option; itself without an allocation."""
        if option is None:
            return self
        own = {"scope": "row", "row_weights": "none"}
        if METHODS[option.method].layer_scope and not option.pattern:
            own = {"scope": self.scope, "row_weights": self.row_weights}
        if not METHODS[option.method].ordered:
            own["column_order"] = "given"
        return replace(self, allocation=None, group=None, **own, **asdict(option))

    @property
    def left_out(self) -> "Recipe":
        """The recipe of blocks that this one leaves as they are."""
        return self.of_layer(Option("dense", 16))

    @property
    def prunes(self) -> bool:
        """Whether the method removes weights."""
        return METHODS[self.method].prunes

    @property
    def adopted(self) -> bool:
        """Whether others computed the weights."""
        return METHODS[self.method].adopted

    @property
    def zeros(self) -> Pattern | None:
        """The pattern of the weights that are removed; None where it is free, or nothing is removed."""
        return Pattern.parse(self.pattern) if self.prunes and self.pattern else None

    @property
    def chosen_mask(self) -> str | None:
        """The mask by whose score weights are removed; None where none are, or the method leaves no choice."""
        pruned = [(option.method, option.prunes) for option in self.options] or [(self.method, self.sparsity > 0)]
        return self.mask if any(len(METHODS[method].masks) > 1 and prunes for method, prunes in pruned) else None

    @property
    def needs_harmonic(self) -> bool:
        """Whether a mask is chosen by a score that reads norms which a Hessian does not hold."""
        return self.chosen_mask is not None and MASKS[self.chosen_mask].needs_harmonic

    @property
    def needs_hessian(self) -> bool:
        """Whether the weights depend on calibration data."""
        scales = (self.refit or self.clip == "hessian") and self.bits < 16 and not self.adopted
        return not METHODS[self.method].data_free or scales or self.allocation is not None

    @property
    def options(self) -> tuple[Option, ...]:
        """Of its allocation; none without one."""
        return self.allocation.options if self.allocation is not None else ()

    @property
    def needs_dense(self) -> bool:
        """Whether outputs of the dense model are targets, so that it runs beside the compressed one."""
        return bool(self.asymmetry or self.residual)

    @property
    def runs_dense(self) -> bool:
        """Whether the dense model runs beside the compressed one."""
        return self.needs_dense or self.refine_steps > 0

    @property
    def needs_gradients(self) -> bool:
        """Whether rows are weighted by output gradients."""
        return self.row_weights == "gradient"

    @property
    def shared(self) -> list[str]:
        """What a compression reads that is computed once for all recipes of a model, rotation and calibration."""
        used = {
            "cached Hessians": self.needs_hessian and self.hessian == "cached",
            "output gradients": self.needs_gradients,
            "predicted losses": self.allocation is not None,
        }
        return [name for name, needed in used.items() if needed]

    def chosen(self, count: int) -> range:
        """Which of a model's `count` blocks the recipe acts on. Raises ObrError if that is none."""
        start, end = (self.blocks or ":").split(":")
        found = range(count)[int(start) if start else None : int(end) if end else None]
        if not found:
            raise ObrError(f"The recipe's blocks {self.blocks!r} are none of the model's {count}; correct the slice.")
        return found

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight of a linear layer costs in theory: kept codes, mask, and 16 for the scale of each
        group; scales of whole rows are left out."""
        if self.allocation is not None:
            return self.allocation.bits
        if self.bits == 16 and not self.sparsity:
            return 16.0
        mask_bits = 0.0
        if self.pattern:
            pattern = Pattern.parse(self.pattern)
            mask_bits = pattern.index_bits / pattern.group
        elif self.sparsity:
            mask_bits = 1.0
        return self.bits * (1 - self.sparsity) + mask_bits + (16 / self.group if self.group else 0.0)

    @property
    def setting(self) -> str:
        """Such as "W4A4KV4"; keys and values are named apart where they differ; "W3.0" is a mean over layers,
        "W3g128" has groups of 128 columns."""
        k, v = self.keys.bits, self.values.bits
        bits = self.allocation.bits if self.allocation is not None else self.bits
        group = f"g{self.group}" if self.group else ""
        return f"W{bits}{group}A{self.activations.bits}" + (f"KV{k}" if k == v else f"K{k}V{v}")

    def decisive(self) -> dict:
        """The fields that decide a checkpoint's weights; a dtype only if the recipe names one."""
        dropped = {"label"} if self.hessian_inputs == "quantised" else set(EVALUATION_ONLY)
        dropped |= {"dtype"} if self.dtype is None else set()
        return {k: v for k, v in self.to_dict().items() if k not in dropped}

    def to_dict(self) -> dict:
        """Plain data, as JSON gives it back."""
        entry = asdict(self)
        if self.allocation is not None:
            entry["allocation"]["options"] = list(entry["allocation"]["options"])
        return entry
