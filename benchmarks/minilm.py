"""Half of the heads and of the feed-forward units of a fine-tuned encoder, gone while it imitates itself.

    python train.py experiment=movie_reviews_movement method=dense model.path=MINILM data.root=DATA data.limit=2048 \
        data.batch_size=16 data.max_length=32 optimizer.lr=1.0e-4 trainer.gradient_clip_val=1.0 trainer.max_epochs=3 \
        output_dir=dense
    python benchmarks/minilm.py dense --to half

It writes dense.onnx and model.onnx, and prints accuracies and latencies: batch 1, one thread, ONNX Runtime, in turns,
in the time of the processor.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from time import process_time
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from benchmarks.training import quiet_trainer
from pl_sparse import Pruner, Sparsity
from pl_sparse.app.finished import load_run
from pl_sparse.app.instantiate import network
from pl_sparse.callbacks import Distill
from pl_sparse.export import save_shrunk, shrink
from pl_sparse.export.measure import latencies
from pl_sparse.export.onnx import open_onnx, save_onnx
from pl_sparse.schedule import Cubic, OneShot
from pl_sparse.structure import Channel, Head, Structure

PARTS: dict[str, tuple[str, Structure]] = {
    "heads": ("*.attention.*", Head()),
    "neurons": ("*.intermediate.*", Channel(coupled=True)),
    "width": ("*output.dense*", Channel(coupled=True, through_norms=True)),
}


def sparsity(part: str, share: float) -> Sparsity:
    """What takes a share of heads or feed-forward neurons away in training, as many in each layer."""
    include, structure = PARTS[part]
    schedule = Cubic(final=share, begin=0.0, end=0.4, every=8)
    return Sparsity(
        scorer="taylor", schedule=schedule, structure=structure, allocation="uniform", include=[include], report=False
    )


def prune(net: nn.Module, part: str, share: float, example: Tensor) -> None:
    """Take a share of something away at once, by magnitude."""
    include, structure = PARTS[part]
    pruner = Pruner("magnitude", OneShot(final=share, begin=0.0), structure, "uniform", include=[include])
    pruner.attach(net.eval(), example)
    pruner.prepare(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="the folder of the dense run")
    parser.add_argument("--to", type=Path, default=Path("half"), help="where files go")
    parser.add_argument("--epochs", type=int, default=3, help="of training; 0: sizes and latencies alone")
    parser.add_argument("--hardness", type=float, default=0.8, help="the teacher's share of the loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="cpu", help="that trains; latencies are those of the CPU")
    parser.add_argument("--seconds", type=float, default=20, help="of measuring latencies; 0: accuracies alone")
    for part, share in (("heads", 0.5), ("neurons", 0.5), ("width", 0.0)):
        parser.add_argument(f"--{part}", type=float, default=share, help="the share that goes")
    args = parser.parse_args()
    if args.epochs and args.width:
        parser.error("--width is of --epochs 0: in training, heads and width would prune the same output projections")
    torch.set_num_threads(1)
    seed_everything(args.seed)
    module, data, _ = load_run(args.dense)
    assert data is not None
    figures: dict[str, Any] = dict(vars(args), dense=str(args.dense), to=str(args.to))
    dense = copy.deepcopy(network(module))
    shares = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    if args.epochs:
        teacher = Distill(copy.deepcopy(dense), hardness=args.hardness)
        figures["accuracies of dense"] = accuracies(module, data)
        options: dict[str, Any] = {"max_epochs": args.epochs, "limit_val_batches": 0, "gradient_clip_val": 1.0}
        options["accelerator"] = args.accelerator
        quiet_trainer(**options, callbacks=[*map(sparsity, shares, shares.values()), teacher]).fit(
            module.train(), datamodule=data
        )
    data.setup("fit")
    example = next(iter(data.val_dataloader()))[0]
    for part, share in shares.items() if not args.epochs else ():
        prune(network(module), part, share, example[:2])
    smaller = network(module).eval()
    removal = shrink(smaller, example[:2])
    args.to.mkdir(parents=True, exist_ok=True)
    save_shrunk(smaller, removal.plan, args.to)
    figures |= {"left": removal.left, "parameters": [removal.before, removal.after]}
    if args.epochs:
        figures["accuracies"] = accuracies(module, data)
        (args.to / "minilm.json").write_text(json.dumps(figures, indent=2))
        print(json.dumps(figures, indent=2), flush=True)
    if not args.seconds:
        return
    runs = {}
    for name, net in (("dense", dense), ("model", smaller)):
        save_onnx(net.eval(), example[:2], args.to / f"{name}.onnx")
        runs[name] = open_onnx(args.to / f"{name}.onnx", threads=1)
    taken = latencies(runs, example[:1], seconds=args.seconds, clock=process_time)
    figures["ms"] = {name: statistics.median(times) for name, times in taken.items()}
    figures["speedup"] = statistics.median(a / b for a, b in zip(taken["dense"], taken["model"], strict=True))
    (args.to / "minilm.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))


def accuracies(module: Any, data: Any) -> dict[str, float]:
    """On the sentences for validation and for the test, after the last epoch."""
    trainer = quiet_trainer()
    (val,) = trainer.validate(module, datamodule=data, verbose=False)
    (test,) = trainer.test(module, datamodule=data, verbose=False)
    return {key: value for key, value in {**val, **test}.items() if key.endswith("acc")}


if __name__ == "__main__":
    main()
