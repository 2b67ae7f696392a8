"""Train ToFe on a classifier of transformers with its Trainer, which takes the loss from the model.

python examples/train_with_trainer.py             # a small random ViT on drawn digits, half a minute of a core
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import vtr
from vtr.train.losses import TokenLoss
from vtr.train.modules import Student
from vtr.zoo import data


class Digits(Dataset[dict[str, torch.Tensor]]):
    """Drawn digits in the form that Trainer takes."""

    def __init__(self, n: int) -> None:
        self.drawn = data.digits(n, torch.Generator().manual_seed(n))

    def __len__(self) -> int:
        return len(self.drawn.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.drawn.images[index], "labels": self.drawn.labels[index]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96,
        image_size=96, patch_size=8, num_labels=10,
    )  # fmt: skip
    classifier = ViTForImageClassification(config)
    method = vtr.ToFe(layers=(1, 2, 3), trained=True)
    student = Student(classifier, method, TokenLoss(target=0.5))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=16, learning_rate=1e-3,
            logging_steps=5, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            student, settings, train_dataset=Digits(256), eval_dataset=Digits(64),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        found = trainer.evaluate()
    dense, reduced = student.handle.report().flops["encoder"]
    print(f"accuracy {found['eval_accuracy']:.1%} at {reduced / dense:.2f} of the dense FLOPs")


if __name__ == "__main__":
    main()
