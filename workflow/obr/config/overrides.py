"""What one configuration makes of another: the paper's tables on other models, with less data, over several seeds.

Each function changes a validated config in place.
"""

# What `quick: true` leaves of every calibration, text and task, of a model's blocks, and of learning.
QUICK = {"nsamples": 8, "seqlen": 256, "tokens": 2048, "limit": 8}
QUICK_BLOCKS = "0:4"
QUICK_LEARNING = {"steps": 2, "epochs": 1, "batch": 2, "held_out": 2}
REVERSED = "-reversed"  # ends the names of recipes and calibrations whose windows come in the reverse order
QUICK_NOTE = (
    "Quick: only the first four blocks are compressed, with at most {nsamples} calibration windows of {seqlen} "
    "tokens; scored on {tokens:,} tokens and {limit} questions; rotations are learned in two steps. "
    "For the form, not the numbers."
)


def transpose(raw: dict) -> None:
    """Put every table and figure on the models and data that `overrides` names.

    Published numbers of the original models are not quoted beside other models: those have no published name.
    Tables and figures that name these models already are the overrides' own, and stay as they are. Those with
    checkpoints of the paper's authors are left out, since these are of the original models.
    """
    overrides = raw.get("overrides")
    if not overrides:
        return
    for recipe in raw["recipes"].values():
        if "dtype" in overrides:
            recipe["dtype"] = overrides["dtype"]
        for key in ("calibration", "rotation", "mask"):
            if recipe.get(key):
                recipe[key] = overrides.get(f"{key}s", {}).get(recipe[key], recipe[key])
    for scheme in raw.get("activations", {}).values():
        if "dtype" in overrides and "dtype" in scheme:
            scheme["dtype"] = overrides["dtype"]
    for rotation in raw.get("rotations", {}).values():
        if learn := rotation.get("learn"):
            learn["calibration"] = overrides["calibrations"].get(learn["calibration"], learn["calibration"])
    for calibration in raw.get("calibrations", {}).values():
        if "mix" in calibration:
            calibration["mix"] = [overrides["calibrations"].get(name, name) for name in calibration["mix"]]
    for section in ("tables", "figures"):
        for name, entry in list(raw[section].items()):
            if entry.get("models") == overrides["models"]:
                continue
            if _has_released(raw, entry):
                del raw[section][name]
                continue
            if "models" in entry:
                entry["models"] = list(overrides["models"])
            texts = entry.get("perplexity")
            if texts:
                entry["perplexity"] = (
                    overrides["perplexity"][0] if isinstance(texts, str) else overrides["perplexity"]
                )
                entry.pop("published_metrics", None)
            if entry.get("zero_shot"):
                entry["zero_shot"] = overrides["zero_shot"]
                entry["mean"] = entry.get("mean", False) and len(overrides["zero_shot"]) > 1
            if "rotations" in entry:
                renamed = [overrides.get("rotations", {}).get(name, name) for name in entry["rotations"]]
                entry["rotations"] = list(dict.fromkeys(renamed))
            if "models" in entry:  # others, of kernels, are the same products on any machine
                for key in ("mentions", "quoted"):
                    entry.pop(key, None)
    for section in ("tables", "figures"):
        for name in overrides.get(section, {}).keys() & raw[section].keys():
            raw[section][name] |= overrides[section][name]
        for name in overrides.get("without", []):
            raw[section].pop(name, None)


def _has_released(raw: dict, entry: dict) -> bool:
    """Whether a row is a checkpoint that others made, which is of the original model."""
    keys = [row if isinstance(row, str) else row.get("recipe") for row in entry.get("rows", [])]
    return any(raw["recipes"].get(key, {}).get("method") in ("released", "external") for key in keys)


def shrink(raw: dict) -> None:
    """With `quick`, cap every calibration, text, task, recipe and learning, in a results folder of its own."""
    if str(raw.get("quick")).lower() != "true":
        return
    raw["results"] += "-quick"
    for section, keys in (
        ("calibrations", ("nsamples", "seqlen")),
        ("perplexity", ("seqlen", "tokens")),
        ("zero_shot", ("limit",)),
    ):
        for entry in raw[section].values():
            for key in keys:
                entry[key] = min(entry.get(key) or QUICK[key], QUICK[key])
    for recipe in raw["recipes"].values():
        if recipe.get("method", "dense") not in ("dense", "released", "external"):
            recipe.setdefault("blocks", QUICK_BLOCKS)
    for rotation in raw["rotations"].values():
        learn = rotation.get("learn", {})
        for key, most in QUICK_LEARNING.items():
            if key in learn:
                learn[key] = min(learn[key], most)
    for table in raw["tables"].values():
        table["note"] = " ".join(filter(None, (table.get("note"), QUICK_NOTE.format(**QUICK))))


def multiply(raw: dict) -> None:
    """Give the rows of every table and figure with `seeds` one recipe a seed, listed as the row's `variants`.

    A seed is that of the calibration windows, of a rotation that is drawn and of random masks, together; the
    recipe of the seed that a row has already is the row's own. A row with `seeds` of its own has those. With
    `both_orders` each seed has a second recipe, whose calibration windows come in the reverse order.
    """
    for entry in [*raw["tables"].values(), *raw["figures"].values()]:
        if entry.get("seeds"):
            rows = [{"recipe": row} if isinstance(row, str) else dict(row) for row in entry["rows"]]
            for row in rows:
                if "recipe" in row:
                    variants = [_seeded(raw, row["recipe"], seed) for seed in row.get("seeds", entry["seeds"])]
                    if entry.get("both_orders"):
                        variants = [key for own in variants for key in (own, _reversed(raw, own))]
                    row["variants"] = list(dict.fromkeys(variants))
            entry["rows"] = rows


def _reversed(raw: dict, key: str) -> str:
    """The recipe `key` with its calibration windows in the reverse order; `key` itself if it reads no text."""
    recipe, calibrations = raw["recipes"][key], raw["calibrations"]
    name = recipe.get("calibration")
    if "text" not in calibrations.get(name, {}):
        return key
    calibrations[f"{name}{REVERSED}"] = {**calibrations[name], "reversed": True}
    raw["recipes"][f"{key}{REVERSED}"] = {**recipe, "calibration": f"{name}{REVERSED}"}
    return f"{key}{REVERSED}"


def _seeded(raw: dict, key: str, seed: int) -> str:
    """The recipe `key` with another seed, entered into the config; `key` itself if that is its seed already."""
    recipe = dict(raw["recipes"][key])
    before = dict(recipe)
    if recipe.get("calibration"):
        recipe["calibration"] = _with_seed(raw["calibrations"], recipe["calibration"], seed)
    rotation = raw["rotations"].get(recipe.get("rotation", "none"))
    if rotation and rotation["kind"] != "file":
        recipe["rotation"] = _with_seed(raw["rotations"], recipe["rotation"], seed)
    if recipe.get("mask") == "random" and recipe.get("seed", 0) != seed:
        recipe["seed"] = seed
    if recipe == before:
        return key
    name = f"{key}-seed{seed}"
    raw["recipes"][name] = recipe
    return name


def _with_seed(section: dict, name: str, seed: int) -> str:
    """The entry with this seed, made if there is none."""
    if section.get(name, {}).get("seed", 0) == seed:
        return name
    entry = {**section[name], "seed": seed}
    if "mix" in entry:
        entry["mix"] = [_with_seed(section, part, seed) for part in entry["mix"]]
    section.setdefault(f"{name}-seed{seed}", entry)
    return f"{name}-seed{seed}"
