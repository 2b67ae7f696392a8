"""Train DynamicViT in a loop of your own, such as timm's train.py: a module, and a loss function.

python examples/train_own_loop.py                 # the built-in ViT, a minute of a core

Two lines of timm's train.py change: the model that create_model returns is wrapped in a Student, and its loss is the
training loss. Optimiser, schedule, averaged weights and the loop stay as they are.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy

import vtr
from vtr.train.losses import TokenLoss
from vtr.train.modules import Student
from vtr.zoo import data, load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", default="dynamicvit.safetensors", help="file of the predictors")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    test = data.digits(256, torch.Generator().manual_seed(1), "heldout")
    method = vtr.DynamicViT(keep=0.5, layers=(1, 2, 3))
    classifier = load("digits-vit").requires_grad_(False)  # the predictors alone are trained
    model = Student(classifier, method, TokenLoss(logits=0.5, tokens=0.5))
    train_loss_fn = model.loss  # instead of nn.CrossEntropyLoss()

    with torch.no_grad():
        dense = accuracy(model.teacher(test.images), test.labels)[0].item()  # type: ignore[misc]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05)
    lr_scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=1, updates_per_epoch=options.updates,
        step_on_epochs=False,
    )  # fmt: skip
    model_ema = ModelEmaV3(model, decay=0.9)
    model.train()
    for update in range(options.updates):
        batch = data.digits(options.batch, torch.Generator().manual_seed(update))
        output = model(batch.images)
        loss = train_loss_fn(output, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model_ema.update(model, step=update)
        lr_scheduler.step_update(update)
        if update % 10 == 9:
            print(f"update {update + 1}: loss {loss.item():.3f}, cost {model.facts['cost']:.2f}")

    student = model_ema.module.eval()
    with torch.no_grad():
        reduced = accuracy(student(test.images), test.labels)[0].item()
    before, after = student.handle.report().flops["encoder"]
    Console().print(f"dense {dense:.1f} %, with {after / before:.2f} of its FLOPs {reduced:.1f} %")
    student.save(options.out)
    print(f"vtr.apply(model, {method.replace(weights=options.out)})")


if __name__ == "__main__":
    main()
