"""Hessians that weigh what the loss feels, beside those of the inputs alone: perplexity of whole models, CSV lines.

    python benchmarks/loss_hessians.py --model DIR --calibration TEXT --test wiki.test.raw --out out.csv \\
        --recipe "method=gptq bits=3 column_order=hessian clip=hessian"

All Hessians are of the dense model, and no layer reads compressed ones. E is the error (r, n) of a layer's weights,
x (n,) a token's input, g (r,) the gradient of the loss at its output, G = Σ g xᵀ (r, n) that of a sequence's loss.

    inputs           tr(E H Eᵀ), H = Σ x xᵀ
    rows:K           K groups of rows, each with H = Σ s x xᵀ, s the group's mean g² (GuidedQuant, arXiv 2505.07004)
    two-sided:tokens tr(A E H Eᵀ), A = Σ |x|² g gᵀ and H = Σ |g|² x xᵀ (K-FAC's assumption of independence)
    two-sided:G      the same, A = Σ G Gᵀ and H = Σ Gᵀ G (YAQA, arXiv 2505.22988)
    attention:S      q, k and v: H = Σ (1 - S + S p) x xᵀ, p the attention that later tokens give this one, its mean 1
    scaled           inputs; then a scale for every row, and one for every column of layers that read a norm's output

Two-sided losses are lowered block of rows by block of rows. With the others' errors F given, the best errors of rows
B are those of `obr.restore` for the target W - A_BB⁻¹ A_BF F. What does not lower the loss is not taken. Labels of
two-sided losses are drawn from the model's own outputs, as a Fisher matrix has them.
"""

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import obr
from obr.calibration.attention_weights import ATTENDED, attention_weights
from obr.config.recipe_settings import command_line, parse_settings
from obr.methods.layer_hessian import Hessian
from obr.methods.restore import restore
from obr.models.architectures import layout_of
from obr.models.blocks import Blocks, run_in_place
from recipes import calibrated, tested, text_of
from timing import machine

Matrices = dict[str, list[Tensor]]  # of each layer, by name
KINDS = ["inputs", "rows:1", "rows:4", "two-sided:tokens", "two-sided:G", "attention:0.5", "attention:1", "scaled"]
SPLIT, PASSES = 12, 2  # blocks of rows of a two-sided loss, and how often each is solved again


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are compressed, by name."""
    layout = layout_of(model.config)
    names = [name for group in layout.groups.values() for name in group]
    blocks = range(model.config.num_hidden_layers)
    return {f"{i}.{name}": model.get_submodule(f"{layout.blocks}.{i}.{name}") for i in blocks for name in names}


def pass_back(model: nn.Module, tokens: Tensor, is_drawn: bool, take: Callable[[str, Tensor, Tensor], None]) -> None:
    """Call `take(layer, x (t, n), g (t, r))` for every window and layer; the loss is a sum over tokens."""
    inputs, generator = {}, torch.Generator().manual_seed(0)

    def watch(name: str) -> Callable:
        def see(module: nn.Module, args: tuple, output: Tensor) -> None:
            inputs[name] = args[0].detach()[0]
            output.register_hook(lambda gradient: take(name, inputs.pop(name), gradient[0]))

        return see

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in linears(model).items()]
    for window in tokens:
        embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
        labels = window[1:]
        if is_drawn:
            labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def attended(model: nn.Module, tokens: Tensor, share: float) -> dict[str, Tensor]:
    """{layer: (b, t)} of q, k and v: the attention weights of the tokens that they read."""
    blocks, found = Blocks(model), {}
    hidden, arguments = blocks.embed(tokens)
    names = [name for group in ATTENDED for name in blocks.layout.groups.get(group, ())]
    for index in range(len(blocks)):
        weights = attention_weights(blocks.load(index), blocks.layout, hidden, arguments[index], share)
        found |= {f"{index}.{name}": weights for name in names}
        run_in_place(blocks.load(index), hidden, arguments[index])
    return found


def collected(model: nn.Module, tokens: Tensor, kind: str) -> Matrices:
    """The matrices of a kind of loss: [H] or one H for each group of rows, or [A, H]."""
    found, (name, _, size) = {}, kind.partition(":")
    weights = attended(model, tokens, float(size)) if name == "attention" else {}
    seen = defaultdict(int)

    def take(layer: str, x: Tensor, g: Tensor) -> None:
        if layer in weights:
            made = [x.T @ (x * weights[layer][seen[layer], :, None])]
            seen[layer] += 1
        elif name in ("inputs", "scaled", "attention"):
            made = [x.T @ x]
        elif name == "rows":
            means = [part.square().mean(1) for part in g.tensor_split(int(size), dim=1)]
            made = [x.T @ (x * mean[:, None]) for mean in means]
        elif size == "tokens":
            made = [g.T @ (g * x.square().sum(1, keepdim=True)), x.T @ (x * g.square().sum(1, keepdim=True))]
        else:
            whole = g.T @ x
            made = [whole @ whole.T, whole.T @ whole]
        if layer in found:
            for total, matrix in zip(found[layer], made, strict=True):
                total += matrix
        else:
            found[layer] = made

    pass_back(model, tokens, name == "two-sided", take)
    return found


def one_sided(weight: Tensor, matrices: list[Tensor], recipe: dict) -> Tensor:
    """Groups of rows, each with its Hessian."""
    parts = zip(weight.tensor_split(len(matrices)), matrices, strict=True)
    return torch.cat([restore(part, Hessian(matrix), **recipe).weight for part, matrix in parts])


def two_sided(weight: Tensor, outer: Tensor, inner: Tensor, recipe: dict) -> Tensor:
    """Rows in blocks, each against a target that makes up for what the others lose."""
    hessian = Hessian(inner)
    outer = outer + 0.01 * outer.diagonal().mean() * torch.eye(len(outer))

    def loss(error: Tensor) -> float:
        return float((outer @ error @ inner).mul_(error).sum(dtype=torch.float64))

    made = restore(weight, hessian, **recipe).weight
    best = loss(made - weight)
    for rows in [*torch.arange(len(weight)).tensor_split(SPLIT)] * PASSES:
        error = made - weight
        error[rows] = 0
        shift = torch.linalg.solve(outer[rows][:, rows], outer[rows] @ error)
        tried = made.clone()
        tried[rows] = restore(weight[rows] - shift, hessian, **recipe).weight
        if (found := loss(tried - weight)) < best:
            made, best = tried, found
    return made


def scaled(weights: list[Tensor], made: list[Tensor], hessian: Tensor, has_norm: bool) -> list[Tensor]:
    """T Ŵ Γ of layers that read one input, T and Γ diagonal: the least squares of its outputs, in turns.

    has_norm: whether Γ can be part of the norm before these layers; else it is left out.
    """
    wanted, codes, h = torch.cat(weights).double(), torch.cat(made).double(), hessian.double()
    columns = torch.ones(h.shape[0], dtype=torch.float64)
    for _ in range(5):
        reached = codes * columns @ h
        rows = (reached * wanted).sum(1) / (reached * codes * columns).sum(1).clamp_min(1e-30)
        if has_norm:
            turned = codes * rows[:, None]
            matrix = h * (turned.T @ turned)
            matrix.diagonal().add_(1e-6 * matrix.diagonal().mean())
            columns = torch.linalg.solve(matrix, (turned * (wanted @ h)).sum(0))
    return list((codes * columns * rows[:, None]).float().split([len(weight) for weight in weights]))


def scale_all(model: nn.Module, dense: dict[str, Tensor], matrices: Matrices) -> None:
    """Give every layer of a compressed model the best scales."""
    layout, layers = layout_of(model.config), linears(model)
    for index in range(model.config.num_hidden_layers):
        for group, names in layout.groups.items():
            full = [f"{index}.{name}" for name in names]
            made = scaled([dense[n].float() for n in full], [layers[n].weight.float() for n in full],
                          matrices[full[0]][0], group in layout.norms)  # fmt: skip
            for name, weight in zip(full, made, strict=True):
                layers[name].weight.copy_(weight)


def compress(layers: dict[str, nn.Module], matrices: Matrices, kind: str, recipe: dict) -> float:
    """Put compressed weights into a model; returns the mean share of zeros of its layers."""
    zeros = 0.0
    for name, layer in layers.items():
        weight = layer.weight.float()
        if kind.startswith("two-sided"):
            made = two_sided(weight, *matrices[name], recipe)
        else:
            made = one_sided(weight, matrices[name], recipe)
        layer.weight.copy_(made)
        zeros += float((made == 0).float().mean()) / len(layers)
    return zeros


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the calibration windows")
    parser.add_argument("--test", type=Path, required=True, help="text of the perplexity; *.raw is read as WikiText")
    parser.add_argument("--out", type=Path, required=True, help="CSV file, continued")
    parser.add_argument("--recipe", action="append", default=[], required=True, help="settings of one recipe")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--tokens", type=int, default=6144, help="of the test text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text, windows = text_of(args.calibration), tested(args.model, text_of(args.test), 1024, args.tokens)
    model = obr.load_model(args.model, device="cpu").requires_grad_(False)
    layers = linears(model)
    dense = {name: layer.weight.clone() for name, layer in layers.items()}
    for seed in args.seeds:
        tokens = calibrated(args.model, text, args.windows, args.seqlen, seed)
        for kind in args.kinds:
            matrices = collected(model, tokens, kind)
            for words in args.recipe:
                recipe, started = parse_settings(words.split()), time.monotonic()
                zeros = compress(layers, matrices, kind, recipe)
                if kind == "scaled":
                    scale_all(model, dense, matrices)
                seconds = time.monotonic() - started
                row = {
                    "model": args.model.name, "calibration": args.calibration.name, "windows": args.windows,
                    "seqlen": args.seqlen, "test": args.test.name, "tokens": args.tokens, "seed": seed, "kind": kind,
                    "recipe": command_line(recipe), "perplexity": obr.perplexity(model, windows),
                    "zeros": zeros, "seconds": round(seconds, 1), **machine(),
                }  # fmt: skip
                append(args.out, row)
                for name, layer in layers.items():
                    layer.weight.copy_(dense[name])


def append(out: Path, row: dict) -> None:
    new = not out.exists()
    with out.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row["kind"], row["recipe"], f"seed {row['seed']}: {row['perplexity']:.2f}", flush=True)


if __name__ == "__main__":
    main()
