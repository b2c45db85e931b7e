"""Makes probe.safetensors: a linear layer trained by torch.optim.SGD on toy latents.

Needs torch 2.13.0 (CPU), numpy and safetensors. To run it, from the root of the repository:

    python tests/golden/make_probe.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

IMAGES, TEST, HEIGHT, WIDTH, CHANNELS, CLASSES = 100, 60, 2, 2, 3, 7
BATCH, EPOCHS = 16, 5
CASES = {
    "flatten": dict(head="flatten", learning_rate=0.008, momentum=0.0, drop_last=True),
    "mean": dict(head="mean", learning_rate=0.5, momentum=0.0, drop_last=False),
    "momentum": dict(head="flatten", learning_rate=0.1, momentum=0.9, drop_last=False),
}


def train(features, labels, others, other_labels, order, *, settings):
    """The layer before and after, and the figures of every epoch."""
    layer = torch.nn.Linear(features.shape[1], CLASSES)
    found = {"initial.weight": layer.weight, "initial.bias": layer.bias}
    found = {name: value.detach().clone() for name, value in found.items()}
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=settings["learning_rate"], momentum=settings["momentum"]
    )
    train_loss, loss, top1, top5 = [], [], [], []
    for images in order:
        losses = []
        for batch in torch.split(images, BATCH):
            if settings["drop_last"] and len(batch) < BATCH:
                continue
            value = torch.nn.functional.cross_entropy(layer(features[batch]), labels[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        with torch.no_grad():
            logits = layer(others)
            best = logits.topk(5, dim=1).indices == other_labels[:, None]
            train_loss.append(np.mean(losses))
            loss.append(torch.nn.functional.cross_entropy(logits, other_labels).item())
            top1.append(best[:, 0].float().mean().item())
            top5.append(best.any(dim=1).float().mean().item())
    found |= {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    curves = {"train_loss": train_loss, "loss": loss, "top1": top1, "top5": top5}
    return found | {name: torch.tensor(values) for name, values in curves.items()}


def main():
    torch.manual_seed(0)
    labels, other_labels = (torch.randint(CLASSES, (n,)) for n in (IMAGES, TEST))
    means = torch.randn(CLASSES, HEIGHT, WIDTH, CHANNELS)
    latents, others = (
        means[y] + torch.randn(len(y), HEIGHT, WIDTH, CHANNELS) for y in (labels, other_labels)
    )
    order = torch.stack([torch.randperm(IMAGES) for _ in range(EPOCHS)])
    tensors = {
        "latents": latents, "labels": labels.int(), "order": order.int(),
        "test_latents": others, "test_labels": other_labels.int(),
    }  # fmt: skip
    for name, settings in CASES.items():
        kept = [
            x.flatten(1) if settings["head"] == "flatten" else x.mean((1, 2))
            for x in (latents, others)
        ]
        found = train(kept[0], labels, kept[1], other_labels, order, settings=settings)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    config = {"batch_size": BATCH, "epochs": EPOCHS, "classes": CLASSES, "cases": CASES}
    save_file(
        {name: value.contiguous().numpy() for name, value in tensors.items()},
        Path(__file__).parent / "probe.safetensors",
        metadata={"config": json.dumps(config), "made_with": f"torch {torch.__version__}"},
    )


if __name__ == "__main__":
    main()
