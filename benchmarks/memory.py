"""Peak memory against depth: `python -m benchmarks.memory`. A generated 4 GB Llama of 64 blocks, and one of 16, are pruned.

A run in a process of its own says how far its resident memory rose above what the imports took. The engine maps no file, so
that is memory that only it holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from secateur.pruning.checkpoint import write_shard
from secateur.pruning.headers import INDEX

ROOT = Path(__file__).parents[1]


def generate(folder: Path, *, layers: int, hidden: int, middle: int) -> int:
    """Write a random bfloat16 Llama whose tokens are bytes, a shard per block; never more than a block is held.

    Returns its bytes.
    """
    generator, places, total = torch.Generator().manual_seed(0), dict[str, str](), 0

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
        tensors = {key: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for key, shape in shapes.items()}
        for key in (key for key in tensors if key.endswith("norm.weight")):
            tensors[key] = torch.ones_like(tensors[key])
        write_shard(folder / name, tensors)
        places.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    folder.mkdir(parents=True)
    total += shard("outside.safetensors", {"model.embed_tokens.weight": (257, hidden), "model.norm.weight": (hidden,)})
    for index in range(layers):
        prefix = f"model.layers.{index}."
        square: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        wide: dict[str, tuple[int, ...]] = {f"{prefix}mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        norms: dict[str, tuple[int, ...]] = {
            f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")
        }
        down: dict[str, tuple[int, ...]] = {f"{prefix}mlp.down_proj.weight": (hidden, middle)}
        total += shard(f"block-{index:05d}.safetensors", square | wide | norms | down)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_byte_tokenizer(folder)
    return total


def _write_byte_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def rise(folder: Path, scratch: Path, *, samples: int, length: int) -> dict[str, float]:
    """Prune the model with Wanda in a process of its own: bytes that its memory rose by, and its seconds."""
    command = [sys.executable, "-m", "benchmarks.memory", "prune", str(folder), str(scratch), str(samples), str(length)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def prune(folder: str, scratch: str, samples: str, length: str) -> None:
    from benchmarks.protocol import recipe  # noqa: PLC0415 - the engine is imported where its memory is measured
    from secateur.pruning.pipeline import run  # noqa: PLC0415

    before = _status("VmRSS")
    result = run(
        recipe("wanda", int(samples), int(length)),
        source=Path(folder),
        output=Path(scratch) / "output",
        cache=Path(scratch) / "cache",
        on_event=lambda _: None,
    )
    seconds = result.metrics["seconds"]["prune"]
    print(json.dumps({"bytes": _status("VmHWM") - before, "seconds": seconds, "sparsity": result.metrics["sparsity"]}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    facts = {}
    for layers in (16, 64):
        with tempfile.TemporaryDirectory() as scratch:
            size = generate(Path(scratch) / "model", layers=layers, hidden=1536, middle=4608)
            facts[layers] = rise(Path(scratch) / "model", Path(scratch), samples=8, length=256)
            print(
                f"{layers} blocks, {size / 1e9:.2f} GB: {facts[layers]['bytes'] / 1e6:.0f} MB above the imports, "
                f"{facts[layers]['seconds']:.0f} s",
                flush=True,
            )
    document = {f"blocks_{layers}": found for layers, found in facts.items()}
    document["growth"] = {"share": facts[64]["bytes"] / facts[16]["bytes"] - 1}
    (ROOT / "benchmarks" / "results" / "memory.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    prune(*sys.argv[2:]) if sys.argv[1:2] == ["prune"] else main()
