"""Search how many tokens EViT keeps in each layer of the built-in ViT for 40 % of the FLOPs, and apply the plan.

python examples/search_plan.py

Takes about two minutes on one core. With a file as second argument the trials are kept in it: stop the program and
start it again, or start it twice at a time.
"""

from __future__ import annotations

import sys

import torch

import vtr
import vtr.zoo
from vtr.strategies import PSigmoid, Uniform


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers."""
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(100)])
    return float((found == labels).float().mean())


def main(
    path: str = "searched.json", study: str | None = None, trials: int = 24, samples: int = 128
) -> None:
    """Search on training pictures, and compare on held-out ones."""
    model = vtr.zoo.load("digits-vit")
    images, _ = vtr.zoo.samples("digits-vit", samples, seed=0, split="train")
    data, target = images.split(32), {"flops": 0.4}
    method = vtr.EViT(fuse=False)

    plans = {
        "uniform": vtr.search(model, data, method, target=target, strategy=Uniform()),
        "searched": vtr.search(
            model,
            data,
            method,
            target=target,
            strategy=PSigmoid(trials),
            study=study,
            progress=True,
        ),
    }
    plans["searched"].save(path)
    plans["searched"] = vtr.Plan.load(path)  # what a colleague does

    held, labels = vtr.zoo.samples("digits-vit", 4 * samples, seed=1)
    print(f"dense     100.0 % of the FLOPs  accuracy {accuracy(model, held, labels):.1%}")
    for name, plan in plans.items():
        with vtr.apply(model, plan):
            right = accuracy(model, held, labels)
        share, kept = plan.measured["costs"]["flops"]["share"], plan.measured["schedule"]["kept"]
        print(
            f"{name:9} {share:6.1%} of the FLOPs  accuracy {right:.1%}  loss {plan.measured['loss']:.4f} nats  "
            f"tokens {kept}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
