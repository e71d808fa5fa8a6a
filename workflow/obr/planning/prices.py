"""What each job costs, from its recipe and the sizes of its model."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from obr.config import paths
from obr.config.recipe import Option, Recipe
from obr.config.schemes import checkpoint_entry, requested_scores
from obr.errors import ObrError
from obr.planning import cost_model, learning_cost, measured_times, memory, tensor_sizes
from obr.planning.dry_run import Job

UNPACKED = 2.6  # size of a shard of C4 as text beside its compressed file
TEXT_TOKENS = 340_000  # of a text whose length the config does not tell: WikiText-2's test split
OVERHEAD = 0.3  # seconds that Snakemake spends on a job
TIMED = ("compress", "generate", "gradients", "hessian", "learn_rotation", "evaluate", "sensitivity")


@dataclass
class Price:
    """Of one job: seconds, peak GB on host and GPU, GB written and fetched, and GB on disk while it runs."""

    seconds: float
    host: float = 0.6
    gpu: float = 0.0
    disk: float = 0.0
    fetched: float = 0.0
    scratch: float = 0.0


class Prices:
    """Prices the jobs of one configuration.

    config: as Snakemake validated it, recipes still to be resolved. bandwidth: of downloads, MB a second.
    """

    def __init__(self, config: dict, bandwidth: float = 20.0, known: list[measured_times.Timing] | None = None):
        self.config, self.bandwidth = config, bandwidth
        self.device = config["device"]
        self.threads = dict.fromkeys(("hessian", "gradients"), config["threads"]["hessian"])
        self.threads |= dict.fromkeys(("compress", "sensitivity"), config["threads"]["compress"])
        self.threads |= dict.fromkeys(("generate", "evaluate"), config["threads"]["evaluate"])
        self.scores = requested_scores(config)
        self.known = known if known is not None else []
        self.factors = measured_times.factors(self.known, self.device, self.threads)

    def sizes(self, model: str) -> tensor_sizes.Sizes:
        """A model's, from its folder, its source, its entry, or its number of parameters."""
        entry = self.config["models"][model]
        folders = [paths.folder(self.config["results"], "model", model=model)]
        if entry["source"]["source"] == "path":
            folders.append(Path(os.path.expanduser(os.path.expandvars(entry["source"]["path"]))))
        for folder in folders:
            if sizes := tensor_sizes.sizes_in(folder):
                return sizes
        return (
            tensor_sizes.Sizes.from_config(entry["sizes"])
            if entry.get("sizes")
            else tensor_sizes.Sizes.estimate(entry["parameters"])
        )

    def recipe(self, key: str) -> Recipe:
        """A recipe as the workflow resolves it."""
        return Recipe.parse(checkpoint_entry(self.config, key), key)

    def calibration(self, key: str | None) -> tuple[int, int]:
        """(tokens, tokens of a window)."""
        entry = self.config["calibrations"].get(key) if key else None
        return (entry["nsamples"] * entry["seqlen"], entry["seqlen"]) if entry else (0, 1)

    def price(self, job: Job) -> Price:
        """Of one job of the dry run.

        Raises:
            ObrError: a rule that plans have no cost for, or a method whose solver they do not know.
        """
        if job.rule in TIMED:
            return self._timed(job)
        if job.rule == "kernels":
            device = job.wildcards["device"]
            if (device, self.config["device"]) == ("cuda", "cpu"):  # sizes alone: nothing is multiplied
                return Price(15.0 + OVERHEAD, 1.0)
            return Price(self._kernels(device), 1.0 + self._largest_product(device))
        if job.rule == "released":  # on the host, whatever the device
            sizes, recipe = self.sizes(job.wildcards["model"]), self.recipe(job.wildcards["recipe"])
            seconds = cost_model.released(sizes).seconds(cost_model.SPEEDS["cpu"], job.threads) + OVERHEAD
            kept = sizes.block * sizes.blocks * (2 * (1 - recipe.sparsity) + 1 / 8) + 2.0 * sizes.ends
            return Price(seconds, memory.memory(job.rule, sizes, 0, 1, False)[0], 0.0, kept / 1e9)
        if job.rule not in cost_model.CONSTANT:
            raise ObrError(f"Plans have no cost for the rule {job.rule!r}; add one to CONSTANT in cost_model.py.")
        constant = cost_model.CONSTANT[job.rule]
        fetched, disk = self._downloads(job)
        host, _ = memory.memory(job.rule, tensor_sizes.Sizes.estimate(0.1), 0, 1, False)
        return Price(constant + OVERHEAD + 1000 * fetched / self.bandwidth, host, 0.0, disk, fetched)

    def _timed(self, job: Job) -> Price:
        sizes, like = self.sizes(job.wildcards["model"]), job.rule
        recipe = self.recipe(job.wildcards["recipe"]) if "recipe" in job.wildcards else None
        disk, tokens, length, held, learned = 1e-4, 2048, 2048, None, 0.0
        if job.rule == "compress":
            tokens, length = self.calibration(recipe.calibration if recipe.hessian == "sequential" else None)
            work, disk = (
                cost_model.compress(sizes, recipe, tokens, length),
                cost_model.checkpoint_bytes(sizes, recipe) / 1e9,
            )
        elif job.rule == "hessian":
            tokens, length = self.calibration(job.wildcards["calibration"])
            work, disk = cost_model.hessian(sizes, tokens, length), cost_model.hessian_bytes(sizes) / 1e9
        elif job.rule == "generate":
            tokens, length = self.calibration(job.wildcards["calibration"])
            options = self.config["calibrations"][job.wildcards["calibration"]]["generated"]
            work = cost_model.generation(sizes, tokens, length, options.get("batch_size", 16))
        elif job.rule == "gradients":
            tokens, length = self.calibration(job.wildcards["calibration"])
            most = self.config["gradients"]
            tokens, length = (
                min(tokens // length, most["nsamples"]) * min(length, most["seqlen"]),
                min(length, most["seqlen"]),
            )
            work = cost_model.gradients(sizes, tokens, length)
        elif job.rule == "sensitivity":
            options = self.config["layer_options"][job.wildcards["options"]]
            recipes = [self.recipe(key) for key, entry in self.config["recipes"].items() if entry.get("allocation")]
            blocks = {len(recipe.chosen(sizes.blocks)) for recipe in recipes}
            measured = replace(sizes, blocks=max(blocks, default=sizes.blocks))
            work = cost_model.sensitivity(measured, [Option.parse(option, "option") for option in options])
        elif job.rule == "learn_rotation":
            entry = self.config["rotations"][job.wildcards["rotation"]]
            tokens, length = self.calibration(entry["learn"]["calibration"])
            windows, kind = tokens // length, entry["kind"]
            work, like = learning_cost.learning(sizes, kind, entry["learn"], windows, length), "compress"
            on_gpu = self.device == "cuda"
            held = learning_cost.memory(sizes, kind, entry["learn"], windows, length, on_gpu)
            learned = learning_cost.states_of(sizes, kind, entry["learn"], windows, length)
        else:
            texts, tasks = self._scores(job)
            work = cost_model.evaluation(sizes, texts, tasks)
            tokens, length = cost_model.evaluated_tokens(texts, tasks)
        expected = work.seconds(cost_model.SPEEDS[self.device], job.threads)
        seconds = expected * self.factors.get(measured_times.stage_of(job.rule, recipe), 1.0) + OVERHEAD
        host, gpu = held or memory.memory(like, sizes, tokens, length, self.device == "cuda", recipe)
        states = learned or memory.states_of(like, sizes, tokens, self.device == "cuda", recipe)
        return Price(seconds, host, gpu, disk, scratch=states / 1e9 if states > memory.STATES else 0.0)

    def _scores(self, job: Job) -> tuple[list[tuple[int, int]], list[tuple[str, int | None, int]]]:
        """What an evaluation computes: (tokens, window) of each text, (name, rows, tokens at a time) of each task."""
        names = tuple(job.wildcards[key] for key in ("model", "recipe", "activations"))
        wanted = self.scores.get(names, {"perplexity": [], "zero_shot": []})
        texts = [self.config["perplexity"][name] for name in wanted["perplexity"]]
        tasks = [(name, self.config["zero_shot"][name]) for name in wanted["zero_shot"]]
        return (
            [(entry.get("tokens") or TEXT_TOKENS, entry["seqlen"]) for entry in texts],
            [(name, entry.get("limit"), entry["batch_tokens"]) for name, entry in tasks],
        )

    def _downloads(self, job: Job) -> tuple[float, float]:
        """(GB fetched, GB written) by a job."""
        if job.rule in ("download_model", "download_released"):
            model = job.wildcards["model"]
            recipe = self.config["recipes"].get(job.wildcards.get("recipe"), {})
            sizes, source = self.sizes(model), (recipe or self.config["models"][model])["source"]["source"]
            size = 2.0 * (sizes.block * sizes.blocks + sizes.ends) / 1e9
            if recipe and source == "path":  # it is read where it lies
                return 0.0, 1e-3
            return {"path": 0.0, "pypi": GGUF_SHARE * size}.get(source, size), size
        if job.rule in ("download_text", "download_documents"):
            entry = self.config["texts"][job.wildcards["text"]]
            shard = "c4" in entry.get("repo", "")
            size = C4_SHARD_GB if shard else TEXT_GB
            return (0.0 if entry["source"] == "path" else size), size * (UNPACKED if shard else 1)
        if job.rule == "download_task":
            source = self.config["zero_shot"][job.wildcards["task"]]["source"]["source"]
            return (TASK_GB if source == "hub" else 0.0), TASK_GB
        return 0.0, 1e-3

    def _shapes(self, device: str) -> list[dict]:
        return [shape for shape in self.config["kernels"]["shapes"] if shape.get("device", device) == device]

    def _kernels(self, device: str) -> float:
        """Of each kernel at each shape: its layout, the check in float64, and its runs within the budget."""
        entry, speeds = self.config["kernels"], cost_model.SPEEDS[device]
        count, cleared, laid_out = cost_model.KERNELS[device]
        count, seconds = len(entry.get("kernels") or range(count)), 3 * speeds["start"]
        for shape in self._shapes(device):
            weights = shape["columns"] * shape["rows"]
            work = 2.0 * shape["tokens"] * weights
            run = 4 * work / speeds["products"] + cleared
            runs = max(run, min(entry["seconds"], run * (entry["repeats"] + entry["warmup"])))
            seconds += count * (runs + run + work / speeds["exact"] + laid_out * weights)
        return seconds

    def _largest_product(self, device: str) -> float:
        return max((8e-9 * 3 * s["tokens"] * max(s["columns"], s["rows"]) for s in self._shapes(device)), default=0)


# Downloads in GB where the config does not tell: rough sizes of what the hub sends.
TEXT_GB, C4_SHARD_GB, TASK_GB = 0.01, 0.32, 0.03
GGUF_SHARE = 0.4  # of 16 bits per weight: GGUF files of 4 bits, with some tensors of 5 to 8
