"""Does a learned rotation of the residual stream suit weights that are pruned and quantised? One CSV line for each.

    python benchmarks/pruning_rotation.py --model DIR --calibration TEXT --out out.csv

One rotation R (d, d) for all layers that read the residual stream in some blocks of a dense model. R is the factor Q
of a free matrix (DartQuant, arXiv 2511.04063), trained by Adam. Two losses: "pruned", the share of Wanda's squared
scores that lies in the smaller half of each row (DenoiseRotator's aim, arXiv 2505.23049); "pruned and rounded", that
and the expected error of rounding the others to 4 bits. Gains of the norms are in the weights, as where a rotation is
folded. Errors are those of `obr.restore`, of the outputs, relative, geometric mean over the layers.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from torch import Tensor

import obr
from layer_errors import layers
from obr.methods.restore import restore
from obr.models.architectures import layout_of
from obr.models.hadamard import hadamard, random_signs
from timing import machine

Layers = list[tuple[Tensor, Tensor]]  # weights (r, d) and Hessians (d, d)
RECIPES = {
    "OBR_GPTQ, 4 bits, 50 % zeros": {"method": "obr_gptq", "sparsity": 0.5},
    "joint, 4 bits, 50 % zeros": {"method": "joint", "sparsity": 0.5, "sweeps": 30},
    "GPTQ, 3 bits": {"method": "gptq", "bits": 3},
}
CLIPPED = 0.75  # of the largest weight of a row is what the search for its scale leaves, about


def read(model: Path, text: str, blocks: list[int], windows: int, seqlen: int) -> tuple[Layers, Layers]:
    """Layers that read the residual stream: as they are, and with the gain of the norm before them in the weights."""
    found = layers(model, text, blocks, windows, seqlen, every=1)
    loaded = obr.load_model(model, device="cpu")
    layout, plain, folded = layout_of(loaded.config), [], []
    for (index, group), (weight, hessian) in found.items():
        if group in layout.norms:
            norm = loaded.get_submodule(f"{layout.blocks}.{index}.{layout.norms[group]}")
            gain = norm.weight.detach().float() + layout.norm_offset
            plain.append((weight, hessian.float()))
            folded.append((weight * gain, hessian.float() / gain[:, None] / gain))
    return plain, folded


def rotated(rotation: Tensor, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    return weight @ rotation, rotation.T @ hessian @ rotation


def loss(rotation: Tensor, chosen: Layers, is_rounded: bool) -> Tensor:
    """Energy that pruning half of each row takes, and rounding if asked for, over the whole; mean over layers."""
    total = torch.zeros(())
    for weight, hessian in chosen:
        weight, hessian = rotated(rotation, weight, hessian)
        importance = hessian.diagonal()
        scores = weight.square() * importance
        pruned, places = scores.topk(scores.shape[1] // 2, dim=1, largest=False)
        lost = pruned.sum(1)
        if is_rounded:
            step = CLIPPED * weight.abs().amax(1) / 7
            lost = lost + step.square() / 12 * (importance.sum() - importance[places].sum(1))
        total = total + lost.sum() / scores.sum()
    return total / len(chosen)


def learned(folded: Layers, start: Tensor, is_rounded: bool, steps: int, rows: int, rate: float = 0.003) -> Tensor:
    """A rotation (d, d) trained from `start` on a random choice of each layer's rows a step."""
    free = start.clone().requires_grad_()
    optimizer, generator = torch.optim.Adam([free], rate), torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = [(w[torch.randint(len(w), (rows,), generator=generator)], h) for w, h in folded]
        optimizer.zero_grad()
        loss(orthogonal(free), chosen, is_rounded).backward()
        optimizer.step()
    return orthogonal(free.detach())


def orthogonal(free: Tensor) -> Tensor:
    """Q of Q R, its signs such that the diagonal of R is positive: an orthogonal matrix is its own."""
    q, r = torch.linalg.qr(free)
    return q * r.diagonal().sign()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the calibration windows")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 6, 14, 24])
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--rows", type=int, default=384, help="of each layer, in a step")
    parser.add_argument("--every", type=int, default=6, help="restore every so many rows of a layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.calibration.read_text(encoding="utf-8")
    plain, folded = read(args.model, text, args.blocks, args.windows, args.seqlen)
    d, generator = folded[0][0].shape[1], torch.Generator().manual_seed(0)
    flat = (hadamard(d, generator).matrix() * random_signs(d, generator)[:, None]).float()
    starts = {"identity": torch.eye(d), "Hadamard": flat}
    found = {"none": plain, "Hadamard": [rotated(flat, *layer) for layer in folded]}
    for name, start in starts.items():
        for aim, is_rounded in (("pruned", False), ("pruned and rounded", True)):
            rotation = learned(folded, start, is_rounded, args.steps, args.rows)
            found[f"{aim}, from {name}"] = [rotated(rotation, *layer) for layer in folded]
    lines = []
    for name, turned in found.items():
        with torch.no_grad():
            losses = [float(loss(torch.eye(d), turned, is_rounded)) for is_rounded in (False, True)]
        lines.append({"rotation": name, "pruned": losses[0], "pruned_and_rounded": losses[1]})
        for recipe, settings in RECIPES.items():
            thinned = [(weight[:: args.every].contiguous(), hessian.contiguous()) for weight, hessian in turned]
            errors = [restore(weight, hessian, **settings).relative_error for weight, hessian in thinned]
            lines[-1][recipe] = math.exp(sum(map(math.log, errors)) / len(errors))
        print(lines[-1], flush=True)
        lines[-1] |= machine()
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
