"""`python -m bench.deploy`: a plan compared to `inference` and torch, and normalized images to other packages.

The calls take turns, in one process, and the best time of each counts. The first table has microseconds and ratios. In
the second every way returns one float32 array, (N, 3, H, W) or (N, H, W, 3), in existing or new memory. "limit" is the
time of `np.copyto`, which has one thread, for as many bytes, divided by the number of threads. Packages that are not
installed are left out.
"""

import argparse
import importlib.util

import numpy as np

import batchnorm as bn

from .selection import best

SHAPES = [(32, 64), (1, 2048), (4096, 64), (1, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7), (32, 64, 56, 56)]
IMAGES = (64, 224, 224, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def has(package):
    return importlib.util.find_spec(package) is not None


def layers(shape, threads):
    """Inference of one layer, in new and in existing memory, by name."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape, dtype=np.float32)
    numbers = [generator.random(shape[1], dtype=np.float32) + 0.5 for _ in range(4)]
    plan, y = bn.Plan(*numbers), np.empty_like(x)
    calls = {
        "plan": lambda: plan(x),
        "plan, out=": lambda: plan(x, out=y),
        "inference": lambda: bn.inference(x, *numbers),
        "inference, out=": lambda: bn.inference(x, *numbers, out=y),
    }
    if has("torch"):
        import torch

        torch.set_num_threads(threads)
        tensor, mean, var, gamma, beta = map(torch.from_numpy, (x, *numbers))

        def of_torch():
            with torch.inference_mode():
                return torch.nn.functional.batch_norm(tensor, mean, var, gamma, beta, False, 0.1, 1e-5)

        calls["torch"] = of_torch
    return calls


def images(x, threads):
    """The ways to normalize a batch of images, by name: channels first, then last."""
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    plan, last = bn.Plan.normalizer(MEAN, STD, axis=1), bn.Plan.normalizer(MEAN, STD)
    transposed, out = x.transpose(0, 3, 1, 2), np.empty((x.shape[0], 3, *x.shape[1:3]), np.float32)
    out_last = np.empty(x.shape, np.float32)

    def in_numpy():
        y = x.astype(np.float32) / 255
        return np.ascontiguousarray(((y - mean) / std).transpose(0, 3, 1, 2))

    calls = {
        "plan": lambda: plan(transposed, order="C"),
        "plan, out=": lambda: plan(transposed, out=out),
        "NumPy": in_numpy,
    }
    if has("torchvision"):
        import torch
        from torchvision import transforms

        torch.set_num_threads(threads)
        both = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        calls["torchvision"] = lambda: torch.stack([both(image) for image in x])
    calls["plan, channels last"] = lambda: last(x)
    calls["plan, channels last, out="] = lambda: last(x, out=out_last)
    if has("albumentations"):
        import albumentations

        normalize = albumentations.Normalize(MEAN, STD)

        def by_albumentations():
            y = np.empty(x.shape, np.float32)
            for image, to in zip(x, y, strict=True):
                to[...] = normalize(image=image)["image"]
            return y

        calls["albumentations"] = by_albumentations
    if has("cv2"):
        import cv2

        cv2.setNumThreads(threads)
        shift, scale = (*(255 * mean).tolist(), 0.0), (*(1 / (255 * std)).tolist(), 0.0)

        def by_opencv():
            y = np.empty(x.shape, np.float32)
            for image, to in zip(x, y, strict=True):
                cv2.subtract(image, shift, dst=to, dtype=cv2.CV_32F)
                cv2.multiply(to, scale, dst=to, dtype=cv2.CV_32F)
            return y

        calls["OpenCV"] = by_opencv
    return calls


def print_layers(threads, rounds):
    print("| x | plan | plan, out= | inference | inference, out= | torch | inference / plan | out= | torch / plan |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        t = {name: 1e6 * taken for name, taken in best(layers(shape, threads), rounds).items()}
        t.setdefault("torch", np.nan)
        ratios = t["inference"] / t["plan"], t["inference, out="] / t["plan, out="], t["torch"] / t["plan"]
        cells = [f"{taken:.2f}" for taken in t.values()] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {shape} | {' | '.join(cells)} |", flush=True)


def print_images(threads, rounds, count):
    x = np.random.default_rng(0).integers(0, 256, (count, *IMAGES[1:]), np.uint8)
    a, b = np.ones((2, *x.shape), np.float32)  # zeros may share one page
    moved = x.nbytes + a.nbytes
    calls = images(x, threads) | {"copy": lambda: np.copyto(b, a)}
    t = best(calls, rounds)
    limit = t.pop("copy") * moved / (2 * a.nbytes) / threads
    print(f"\n| images {x.shape}, {moved / 1e6:.0f} MB moved | ms | over the plan | over limit |\n|---|---:|---:|---:|")
    for name, taken in t.items():
        ours = t["plan, channels last" if "last" in name or name in ("albumentations", "OpenCV") else "plan"]
        print(f"| {name} | {1e3 * taken:.2f} | {taken / ours:.2f} | {taken / limit:.2f} |")


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.deploy", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each call (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="turns of each call (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few images")
    chosen = parser.parse_args()
    bn.set_num_threads(chosen.threads)
    print_layers(chosen.threads, chosen.rounds)
    print_images(chosen.threads, chosen.rounds, 2 if chosen.quick else IMAGES[0])


if __name__ == "__main__":
    main()
