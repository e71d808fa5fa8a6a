"""Broken packed layers, block files and configs, drawn at random: refused in a sentence or taken, never a crash, a
hang, or memory that the input does not call for.

hypothesis tries some hundreds. OBR_EXAMPLES asks for as many more of the reader and of configs as it says, in a plain
loop, which keeps no book of what it has tried; `make test-faults` asks for 10^5.
"""

import copy
import faulthandler
import json
import os
import random
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.layer_samples import layer
from helpers.paths import ROOT
from helpers.random_llama import random_llama
from obr.checkpoints.format import load_block, save_block
from obr.checkpoints.packing import Packed, pack, unpack
from obr.checkpoints.writer import store
from obr.config.config_files import layered
from obr.config.workflow import Config, objection
from obr.errors import ObrError
from obr.methods.restore import restore
from obr.models.blocks import StreamedBlocks

pytestmark = pytest.mark.fuzz

EXAMPLES = int(os.environ.get("OBR_EXAMPLES", "0"))
MANY = settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
HALF = settings(MANY, max_examples=200)  # the two tests of the reader make up the number
# What is drawn follows from a seed alone, by `random`: ten times as quick as strategies for every part of it.
seeds = st.integers(0, 2**64 - 1)
SECONDS = 5  # of CPU time for one example
HANG = 120  # seconds by the clock, after which a long run shows where it is and ends
SLACK, FACTOR = 64 << 20, 100  # bytes of address space in all cases, and times the input's size

LEAVES = [
    None, True, False, 0, -1, 1, 2, 3, 16, 64, 10**6, 10**12, 2**63, 0.5, -1e300, float("nan"), float("inf"),
    "", "..", "../x", "/", "a/b", "a\n", "\0", "é", "x" * 300, "2:4", "16:32", "none", "cpu", "bits",
    [], {}, [1], [None], {"": 0},
]  # fmt: skip


def drawn(draw: random.Random):
    """Any JSON value, most often a simple one."""
    kind = draw.random()
    if kind < 0.6:
        return copy.deepcopy(draw.choice(LEAVES))
    if kind < 0.7:
        return draw.randint(-(2**70), 2**70)
    if kind < 0.8:
        return "".join(
            chr(draw.choice((draw.randint(0, 127), draw.randint(0, 0xD7FF)))) for _ in range(draw.randint(0, 6))
        )
    if kind < 0.9:
        return [drawn(draw) for _ in range(draw.randint(0, 3))]
    return {str(drawn(draw)): drawn(draw) for _ in range(draw.randint(0, 3))}


def places(value, path=()) -> list[tuple]:
    """The paths of everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inside for found in ((*path, key), *places(part, (*path, key)))]


def mutated(draw: random.Random, value):
    """A JSON value with one to three of its parts replaced, removed, renamed or put in another's place."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        found = places(value)
        if not found:
            break
        *parents, last = draw.choice(found)
        node = at(value, parents)
        action = draw.choice(["replace", "replace", "remove", "rename", "move"])
        if action == "replace":
            node[last] = drawn(draw)
        elif action == "move":
            node[last] = copy.deepcopy(at(value, draw.choice(found)))
        else:
            part = node.pop(last)
            if action == "rename" and isinstance(node, dict):
                node[str(drawn(draw))] = part
    return value


def at(value, path):
    for key in path:
        value = value[key]
    return value


def peak() -> int:
    """Bytes of address space that this process has had at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmPeak:")[1].split()[0])


@contextmanager
def harmless(size: int):
    """What happens inside may raise ObrError, and must take little time, and memory as `size` bytes call for."""
    before, started = peak(), time.process_time()
    try:
        yield
    except ObrError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error
    assert time.process_time() - started < SECONDS
    assert peak() - before < SLACK + FACTOR * size


# --- One layer --------------------------------------------------------------------------------------------


def layers() -> list[Packed]:
    weight, hessian = layer(8, 64)
    found = [
        pack(restore(weight, hessian, method, bits=bits, pattern=pattern), torch.float16)
        for method, bits, pattern in (
            ("obr_gptq", 4, None), ("obr_gptq", 3, "2:4"), ("wanda", 8, "paired 4:8"), ("gptq", 4, None),
            ("magnitude", 16, None), ("dense", 16, None), ("wanda", 2, "8:16"),
        )
    ]  # fmt: skip
    return found


LAYERS = layers()
DTYPES = [torch.uint8, torch.int8, torch.int64, torch.float32, torch.float16, torch.bfloat16, torch.bool]


def other_tensors(draw: random.Random, tensors: dict) -> dict:
    """Some left out, cut, of another type or shape, with other bytes, or in each other's place."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(draw.randint(0, 2)):
        name = draw.choice([*tensors, "values", "codes", "scale", "mask"])
        tensor = tensors.get(name, torch.zeros(4, dtype=torch.uint8))
        change = draw.choice(["drop", "cut", "type", "shape", "bytes", "nan", "swap"])
        if change == "drop":
            tensors.pop(name, None)
        elif change == "cut":
            tensors[name] = tensor.flatten()[: draw.randint(0, 300)].clone()
        elif change == "type":
            tensors[name] = tensor.to(draw.choice(DTYPES))
        elif change == "shape":
            tensors[name] = torch.zeros([draw.randint(0, 9) for _ in range(draw.randint(0, 3))], dtype=tensor.dtype)
        elif change == "bytes" and tensor.numel():
            noise = torch.frombuffer(bytearray(draw.randbytes(tensor.nbytes)), dtype=torch.uint8)
            tensors[name] = noise.view(tensor.dtype).reshape(tensor.shape)
        elif change == "nan" and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[0] = float("nan")
        elif change == "swap":
            tensors[name] = tensors.get(draw.choice([*tensors, name]), tensor)
    return tensors


@HALF
@given(seeds)
def test_broken_packed_layers_are_refused_or_read(seed):
    draw = random.Random(seed)
    base = draw.choice(LAYERS)
    about = mutated(draw, base.about) if draw.random() < 0.5 else base.about
    packed = Packed(about, other_tensors(draw, base.tensors))
    with harmless(packed.bytes):
        restored = unpack(packed)
        assert restored.weight.isfinite().all() and list(restored.weight.shape) == about["shape"]
        assert restored.mask.shape == restored.weight.shape


# --- Files of blocks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> StreamedBlocks:
    """A random model of one block, with a block file beside it."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    random_llama(
        1, vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(folder)
    blocks = StreamedBlocks(folder, device="cpu")
    block = blocks.load(0)
    for name in blocks.layout.linears:
        linear = block.get_submodule(name)
        store(linear, restore(linear.weight, None, "magnitude", bits=4), torch.float16)
    save_block(block, blocks.layout, folder / "block", torch.float16)
    return blocks


def other_bytes(draw: random.Random, content: bytes) -> bytes:
    """Cut short, with bits flipped in header or data, or with another header of the same or another length."""
    change = draw.choice(["cut", "flip", "flip", "header", "metadata", "metadata"])
    length = int.from_bytes(content[:8], "little")
    if change == "cut":
        return content[: draw.randint(0, len(content))]
    if change == "flip":
        spoilt = bytearray(content)
        reach = draw.choice([8, 8 + length, len(content)])
        for _ in range(draw.randint(1, 4)):
            spoilt[draw.randrange(reach)] ^= 1 << draw.randint(0, 7)
        return bytes(spoilt)
    header = json.loads(content[8 : 8 + length])
    if change == "header":
        header = mutated(draw, header)
    else:
        header["__metadata__"]["block"] = json.dumps(mutated(draw, json.loads(header["__metadata__"]["block"])))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@HALF
@given(seeds)
@example(46548)  # a line end in place of a shape
def test_broken_block_files_are_refused_or_read(blocks, seed):
    content = other_bytes(random.Random(seed), (blocks.directory / "block").read_bytes())
    path = blocks.directory / "spoilt"
    path.write_bytes(content)
    with harmless(len(content)):
        block = load_block(blocks, 0, path)
        assert all(parameter.is_floating_point() for parameter in block.parameters())


def test_fuzzer_detects_memory_use_and_crashes(blocks, tmp_path):
    """A reader that believed what a file says of its size would be caught."""
    with pytest.raises(AssertionError), harmless(100):
        _ = torch.empty(1 << 15, 1 << 15)
    with pytest.raises(KeyError), harmless(100):
        {}["crash"]
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={"block": "[]"})
    with pytest.raises(ObrError, match="is not a block of this model"):
        load_block(blocks, 0, tmp_path / "a")


# --- Configs ----------------------------------------------------------------------------------------------

SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
TINY = yaml.safe_load((ROOT / "tests/config.yaml").read_text())
CONFIGS = [layered(TINY), layered({"experiments": "demo"})]


def small(raw: dict) -> dict:
    """A config with few of the recipes, so that a change falls on each key often."""
    raw = copy.deepcopy(raw)
    raw["recipes"] = {key: raw["recipes"][key] for key in ("dense", "obr_gptq", "allocated")}
    raw["activations"] = {"a4": {"activations": {"bits": 4}, "keys": {"bits": 4}}}
    rows = ["obr_gptq", {"recipe": "obr_gptq", "activations": "a4"}]
    for entry in (*raw["tables"].values(), *raw["figures"].values()):
        if "rows" in entry:
            entry["rows"] = ["allocated"] if entry.get("kind") == "allocation" else copy.deepcopy(rows)
    return raw


SMALL = small(TINY)


def _with_defaults(validator, properties, instance, schema):
    if isinstance(instance, dict):
        for name, part in properties.items():
            if "default" in part:
                instance.setdefault(name, copy.deepcopy(part["default"]))
    yield from jsonschema.Draft202012Validator.VALIDATORS["properties"](validator, properties, instance, schema)


VALIDATOR = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"properties": _with_defaults})(SCHEMA)


@pytest.mark.slow
@MANY
@given(seeds)
def test_broken_configs_are_refused_or_taken(seed):
    raw = mutated(random.Random(seed), SMALL)
    with harmless(len(json.dumps(raw))):
        if next(VALIDATOR.iter_errors(raw), None) is None:
            config = Config(raw)
            entries = [*config.raw["tables"].values(), *config.raw["figures"].values()]
            for path in [*raw["texts"], *(path for entry in entries for path in config.artefacts(entry))]:
                assert ".." not in path.split("/") and path[0] != "/" and path == path.strip(), path
        else:
            told = objection(raw, SCHEMA)
            assert told and "\n" not in told and len(told) < 2000, told


def test_unchanged_configs_are_taken():
    for raw in CONFIGS:
        raw = copy.deepcopy(raw)
        VALIDATOR.validate(raw)
        Config(raw)


# --- At length --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not EXAMPLES, reason="10^5 examples take minutes: use make test-faults, or set OBR_EXAMPLES")
@pytest.mark.parametrize("kind, count", [("layers", EXAMPLES // 2), ("files", EXAMPLES // 2), ("configs", EXAMPLES)])
def test_broken_inputs_at_length(kind, count, blocks):
    one = {
        "layers": test_broken_packed_layers_are_refused_or_read.hypothesis.inner_test,
        "files": lambda seed: test_broken_block_files_are_refused_or_read.hypothesis.inner_test(blocks, seed),
        "configs": test_broken_configs_are_refused_or_taken.hypothesis.inner_test,
    }[kind]
    draw, began, used = random.Random(kind), time.monotonic(), time.process_time()
    slowest, failed = 0.0, []
    faulthandler.register(signal.SIGALRM, chain=True)  # shows the stack, then ends the process
    for _ in range(count):
        seed, before = draw.getrandbits(64), time.process_time()
        signal.alarm(HANG)
        try:
            one(seed)
        except Exception as error:  # one failure may hide another
            failed.append(f"{type(error).__name__}: {str(error)[:300]} (seed {seed})")
        slowest = max(slowest, time.process_time() - before)
    signal.alarm(0)
    faulthandler.unregister(signal.SIGALRM)
    seconds = f"{time.process_time() - used:.0f} s of CPU time, {time.monotonic() - began:.0f} s"
    print(f"{kind}: {count} broken ones, {len(failed)} failures, {seconds}, slowest {slowest:.2f} s", flush=True)
    assert not failed, "\n".join(failed[:20])
