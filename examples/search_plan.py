"""Search how many tokens EViT keeps in each layer of the built-in ViT for 40 % of the FLOPs, and apply the plan.

python examples/search_plan.py

Takes about two minutes on one core. With --study trials.db the trials are kept in a file: stop the program and start it
again, or start it twice at a time.
"""

from __future__ import annotations

import argparse

import torch

import vtr
import vtr.zoo
from vtr.strategies import PSigmoid, Uniform


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers."""
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(100)])
    return float((found == labels).float().mean())


def main() -> None:
    """Search on training pictures, and compare on held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="searched.json", help="the plan")
    parser.add_argument("--study", help="SQLite file with the trials")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--samples", type=int, default=128)
    asked = parser.parse_args()
    model = vtr.zoo.load("digits-vit")
    images, _ = vtr.zoo.samples("digits-vit", asked.samples, seed=0, split="train")
    data, target = images.split(32), {"flops": 0.4}
    method = vtr.EViT(fuse=False)

    plan = vtr.search(
        model,
        data,
        method,
        target=target,
        strategy=PSigmoid(asked.trials),
        study=asked.study,
        progress=True,
    )
    plan.save(asked.out)
    plans = {
        "uniform": vtr.search(model, data, method, target=target, strategy=Uniform()),
        "searched": vtr.Plan.load(asked.out),  # as a colleague does
    }

    held, labels = vtr.zoo.samples("digits-vit", 4 * asked.samples, seed=1)
    print(f"dense     100.0 % of the FLOPs  accuracy {accuracy(model, held, labels):.1%}")
    for name, found in plans.items():
        with vtr.apply(model, found):
            right = accuracy(model, held, labels)
        share, kept = found.measured["costs"]["flops"]["share"], found.measured["schedule"]["kept"]
        print(
            f"{name:9} {share:6.1%} of the FLOPs  accuracy {right:.1%}  loss {found.measured['loss']:.4f} nats  "
            f"tokens {kept}"
        )


if __name__ == "__main__":
    main()
