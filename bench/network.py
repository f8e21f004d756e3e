"""`python -m bench.network`: a training step of a torchvision network, with torch's batch norm and with ours.

The networks take turns, and the best time of each counts. One has no batch norm at all: subtracting its time from that
of the others leaves the share of batch norm.
"""

import argparse
import copy

import torch
import torchvision

from batchnorm.torch import convert

from .selection import best

FORMATS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}


def without_norm(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    return model


def stepper(model, x, labels):
    """A function that does one step; the weights move too little to change its work."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.network", description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", help="a name in torchvision.models (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="size of an image (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each network (%(default)s)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print("| order in memory | batch norm | step, ms | of it batch norm | step / torch's | batch norm / torch's |")
    print("|---|---|---:|---:|---:|---:|")
    for memory, memory_format in FORMATS.items():
        torch.manual_seed(0)
        model = getattr(torchvision.models, chosen.network)(num_classes=10).to(memory_format=memory_format)
        x = torch.randn(chosen.batch, 3, chosen.size, chosen.size).to(memory_format=memory_format)
        labels = torch.randint(10, (chosen.batch,))
        models = {
            "torch.nn": copy.deepcopy(model),
            "batchnorm.torch": convert(copy.deepcopy(model)),
            "none": without_norm(model),
        }
        seconds = best({name: stepper(each, x, labels) for name, each in models.items()}, chosen.rounds)
        share = {name: seconds[name] - seconds["none"] for name in models}
        for name in ("torch.nn", "batchnorm.torch"):
            cells = (
                f"{1e3 * seconds[name]:.1f}",
                f"{1e3 * share[name]:.1f}",
                f"{seconds[name] / seconds['torch.nn']:.2f}",
                f"{share[name] / share['torch.nn']:.2f}",
            )
            print(f"| {memory} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
