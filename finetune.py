"""Label efficiency: what a pretrained encoder is worth when few images have labels, and how to use it afterwards.

    python finetune.py                                          # the table, for the newest run in runs/
    python finetune.py --checkpoint vits16_800ep.pth.tar --data path/to/imagenet --methods probe,knn20 --no-full
    python finetune.py train --labels-per-class 10              # fine-tune, save a classifier that transformers loads
    python finetune.py predict runs/demo-001/classifier photo.jpg holiday/ --csv classes.csv
    python finetune.py attention runs/demo-001 photo.jpg        # where each head of the last layer looks
    python finetune.py embed runs/demo-001 photos --output features.npz
    python finetune.py neighbours runs/demo-001 photos          # a sheet of pictures and those nearest to them

The table is the paper's (arXiv 2204.07141, Section 5, Appendix A.2): a logistic probe on frozen features; beside it
fine-tuning, k-NN and three baselines. Mean and deviation are over draws of labelled images. Validation chooses nothing.
"""
import argparse
import csv
import io
import json
import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from train_msn import (
    TRIES, ImageFiles, Images, TrainConfig, UsageError, add_flags, check_range, choose_precision, crop_and_resize,
    crop_boxes, embed_images, generator_for, image_paths, knn_predict, open_data, opt, run_program, save_neighbours,
    save_plot, save_sheet, start_processes, to_picture, warmup_cosine)
from vitmsn import MSNEncoder, ViTMSNModel, interpolate_positions, load_weights, normalize, read_pretrained, write_file
from vitmsn import ViTMSNForImageClassification as Classifier

# ---- Settings, of the table and of the other commands ----------------------------------------------------------------
TRAINED = ("finetune", "scratch")
KNN = {"knn20": (20, 0.07), "knn200": (200, 0.1)}  # k and temperature: ours, and those of Lightly's benchmarks
METHODS = ("probe", *TRAINED, "untrained", "pixels", *KNN)
SCRATCH_RATES = (3e-4, 1e-3, 3e-3)  # to choose from
HEAD_L2 = 0.1  # of the probe that fine-tuning starts from: milder than 0.0025, whose certainty leaves little to learn

@dataclass(frozen=True)
class FinetuneConfig:
    """All settings. `numbers` are the kind and limits of those that are lists with commas between."""
    checkpoint: str = opt("", "our run, a transformers folder or an original .pth.tar; by default the newest of runs/")
    data: str = opt("", "synthetic, cifar10, or a folder with train/CLASS/* and val/CLASS/*; by default the run's")
    output_dir: str = opt("", "where results go; by default finetune/ or classifier/ in the run, or attention/")
    methods: str = opt(",".join(METHODS[:-1]), "rows of the table; there is knn200 too")
    labels_per_class: str = opt("1,2,5,10", "labelled images per class, a column each", numbers=(int, 1, 1e9))
    fraction: str = opt("0.01", "shares of the labels; 1: all, for the trained methods too", numbers=(float, 1e-9, 1))
    full: bool = opt(True, "a column with all labels for methods on frozen features")
    label_list: str = opt("", "text files of image names, one a line; each file is a draw, instead of these columns")
    seeds: str = opt("0,1,2", "one draw of the labelled images each", numbers=(int, 0, 2**31 - 1))
    val_images: int = opt(0, "validation images for all cells, a fixed random part; 0: all", range=(0, 10**9))
    l2: float = opt(0.0025, "lambda of the probe, as published", range=(1e-9, 1e9))
    pixel_size: int = opt(16, "largest side of the raw-pixel baseline", range=(1, 4096))
    image_size: int = opt(0, "pixels; 0: the checkpoint's. For another one positions are resampled", range=(0, 4096))
    steps: int = opt(60, "updates of each trained cell", range=(1, 10**9))
    epochs: float = opt(0.0, "passes over the labelled images, where that is longer (train: 10)", range=(0, 10**6))
    batch_size: int = opt(32, "images per update, at most as many as have labels", range=(2, 10**6))
    lr: float = opt(5e-4, "highest learning rate of fine-tuning, at the head", range=(0, 100))
    scratch_lr: float = opt(0.0, "from scratch; 0: tuned on a part of train that no draw uses", range=(0, 100))
    layer_decay: float = opt(0.65, "factor of the learning rate from each layer to the one below", range=(1e-6, 1))
    weight_decay: float = opt(0.05, "of AdamW", range=(0, 100))
    drop_path_rate: float = opt(0.0, "stochastic depth of the last layer (train on all: 0.1)", range=(0, 0.99))
    label_smoothing: float = opt(0.1, "share of the target that all classes get alike", range=(0, 0.999))
    crop_scale: tuple = opt((0.8, 1.0), "share of the area in a random crop (train on all: 0.3 1)", range=(1e-6, 1))
    top: int = opt(5, "classes that predict names", range=(1, 10**6))
    csv: str = opt("", "predict: also write a table to this file")
    output: str = opt("", "embed, neighbours: the file to write (features.npz, neighbours.png)")
    device: str = opt("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = opt("auto", "bfloat16 is autocast", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        for f in fields(self):
            check_range(f, getattr(self, f.name))
            if "numbers" in f.metadata:
                self.listed(f.name)  # raises UsageError
        if not (self.listed("seeds") and self.listed("methods")):
            raise UsageError("seeds or methods is empty: give at least one of each.")
        if unknown := set(self.listed("methods")) - set(METHODS):
            raise UsageError(f"methods: {', '.join(sorted(unknown))} is not known; use {', '.join(METHODS)}.")

    def listed(self, name: str) -> list:
        """The values of a field that has commas between them, each once."""
        kind, *limits = self.__dataclass_fields__[name].metadata.get("numbers", (str,))
        try:
            values = list(dict.fromkeys(kind(part) for part in getattr(self, name).split(",") if part.strip()))
        except ValueError:
            raise UsageError(f"{name}={getattr(self, name)!r} must be numbers with commas between.") from None
        if limits and not all(limits[0] <= value <= limits[1] for value in values):
            raise UsageError(f"{name}={getattr(self, name)} is out of range; use {limits[0]:g} to {limits[1]:g}.")
        return values

# ---- Logistic probe on frozen features (Appendix A.2) ----------------------------------------------------------------
def center_and_scale(features: Tensor) -> Tensor:
    """Each row minus its own mean, then to unit length, in float64. features: n d -> n d."""
    rows = features.double()
    return F.normalize(rows - rows.mean(dim=-1, keepdim=True), dim=-1)

def fit_logistic_probe(rows: Tensor, labels: Tensor, num_classes: int, l2: float, tolerance: float = 1e-12) -> Tensor:
    """The minimiser W of mean cross-entropy + (l2 / n) / 2 |W|^2, no intercept (scikit-learn's C = 1 / l2), by Newton's
    method (at so small a lambda L-BFGS stalls) to a gradient of `tolerance`. rows: n d, labels: n -> num_classes d."""
    basis = torch.linalg.qr(rows.double().T)[0]  # W lies in the span of the rows: min(n, d) coordinates do
    x, n, targets = rows.double() @ basis, len(rows), F.one_hot(labels, num_classes).double()
    w, identity = x.new_zeros(num_classes, x.shape[1]), torch.eye(x.shape[1], dtype=x.dtype)
    def objective(w):
        return F.cross_entropy(x @ w.T, labels) + l2 / n / 2 * w.square().sum()
    for _ in range(100):
        p = (x @ w.T).softmax(dim=-1)
        gradient = (p - targets).T @ x / n + l2 / n * w
        if (norm := gradient.norm()) < tolerance:
            break
        # Conjugate gradients for Hessian @ step = gradient; their preconditioner is the Hessian of an average class.
        factor = torch.linalg.cholesky((x * (p * (1 - p)).mean(dim=-1, keepdim=True)).T @ x / n + l2 / n * identity)
        step, residual, direction, before = torch.zeros_like(w), gradient, 0.0, 1.0
        while residual.norm() > min(0.1, norm) * norm:
            z = torch.cholesky_solve(residual.T, factor).T
            now = (residual * z).sum()
            direction, before = z + now / before * direction, now
            u = p * (x @ direction.T)
            curved = (u - p * u.sum(dim=-1, keepdim=True)).T @ x / n + l2 / n * direction  # Hessian @ direction
            length = now / (direction * curved).sum()
            step, residual = step + length * direction, residual - length * curved
        size, highest = 1.0, objective(w) * (1 + 1e-12)  # as well as float64 can tell
        while objective(w - size * step) > highest and size > 1e-6:
            size /= 2
        w = w - size * step
    return w @ basis.T

# ---- Labelled sets: which training images have labels. A label of -1 marks an image that must not be drawn -----------
def draw_labelled(labels: Tensor, per_class: int | list[int], seed: int, names: list[str] | None = None) -> list[int]:
    """Indices of `per_class` images of each class (a list: of so many), class by class; fewer are a part of more."""
    order = torch.rand(len(labels), generator=generator_for(seed, 0)).argsort()
    chosen, names = [], names or range(int(labels.max()) + 1)
    for c, count in enumerate([per_class] * len(names) if isinstance(per_class, int) else per_class):
        members = order[labels[order] == c]
        if len(members) < count:
            raise UsageError(f"class {names[c]} has {len(members)} images to draw from, fewer than the {count} wanted.")
        chosen += members[:count].tolist()
    return chosen

def read_label_list(path: Path, images: Dataset) -> list[int]:
    """The images that a text file names, one a line: NAME, or CLASS/NAME or train/CLASS/NAME."""
    if not isinstance(images, ImageFiles):
        raise UsageError("--label-list names files: it needs --data with a folder of images.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    named: dict[str, list[int]] = {}
    for i, image in enumerate(images.paths):
        for count in (1, 2, 3):
            named.setdefault("/".join(image.parts[-count:]), []).append(i)
    if wrong := [line for line in lines if len(named.get(line, [])) != 1] if lines else ["nothing"]:
        raise UsageError(f"{path}: {len(wrong)} of {len(lines)} lines name no training image or several: {wrong[0]}.")
    return sorted({named[line][0] for line in lines})

def readable(images: Dataset, indices: list[int], seen: set[str]) -> list[int]:
    """The indices without those whose file is no readable image; each of them is named once."""
    bad = {i for i in indices if isinstance(images, ImageFiles) and images.read(i) is None}
    for path in sorted({str(images.paths[i]) for i in bad} - seen):
        seen.add(path)
        print(f"{path} is no readable image: skipped ({len(seen)} so far)", file=sys.stderr, flush=True)
    return [i for i in indices if i not in bad]

def draw_columns(config: FinetuneConfig, data: Images, seen: set[str]) -> tuple[dict[str, list[list[int]]], list[int]]:
    """The table's columns, name -> labelled images of each draw; and up to 25 images of each class in none, to tune."""
    labels, sizes = data.train_labels.clone(), data.train_labels.bincount(minlength=len(data.classes)).tolist()
    lists, fractions, counts, columns = config.listed("label_list"), config.listed("fraction"), {}, {}
    def draw(count, seed):
        chosen = draw_labelled(labels, count, seed, data.classes)
        if bad := set(chosen) - set(readable(data.train, chosen, seen)):
            labels[list(bad)] = -1  # the next image of the class takes its place
            return draw(count, seed)
        return chosen
    if lists:
        columns["listed"] = [readable(data.train, read_label_list(Path(path), data.train), seen) for path in lists]
    else:
        counts = {f"{n}/class": n for n in config.listed("labels_per_class")}
        counts |= {f"{100 * f:g} %": [max(1, round(f * n)) for n in sizes] for f in fractions if f < 1}
    columns |= {name: [draw(count, seed) for seed in config.listed("seeds")] for name, count in counts.items()}
    labels[[i for draws in columns.values() for drawn in draws for i in drawn]] = -1
    free = labels[labels >= 0].bincount(minlength=len(sizes)).min() if "scratch" in config.listed("methods") else 0
    tuning = readable(data.train, draw_labelled(labels, min(25, int(free)), 2**31, data.classes), seen)
    if not lists and (config.full or 1 in fractions):
        columns["100 %"] = [readable(data.train, list(range(len(labels))), seen)]
    return columns, tuning

# ---- Fine-tuning, and training from scratch (Appendix A.4; its RandAugment, Mixup and CutMix are left out) -----------
def layerwise_groups(model: Classifier, lr: float, decay: float, weight_decay: float) -> list[dict]:
    """Groups for AdamW: head and final norm learn at `lr`, each layer at `decay` times the rate of the one above it,
    patches, class token and positions at lr * decay^(layers + 1). Biases and norms have no weight decay."""
    groups, layers = {}, len(model.vit.blocks)
    for name, parameter in model.named_parameters():
        part, number = [*name.removeprefix("vit.").split("."), ""][:2]
        below = layers - int(number) if part == "blocks" else {"norm": 0, "classifier": 0}.get(part, layers + 1)
        groups.setdefault((below, parameter.ndim > 1), []).append(parameter)
    return [{"params": parameters, "lr": lr * decay**below, "weight_decay": weight_decay if matrices else 0.0}
            for (below, matrices), parameters in groups.items()]

def build_classifier(encoder: ViTMSNModel, classes: list, config: FinetuneConfig, probe: Tensor | None) -> Classifier:
    """The encoder's weights under a head of zeros or, so that training starts where it ends, of a logistic probe (W:
    classes d): after its centring and scaling, its features are those of a plain final norm over sqrt(d)."""
    model = Classifier(replace(encoder.config, num_labels=None, id2label=dict(enumerate(classes)), label2id=None,
                               problem_type=None, drop_path_rate=config.drop_path_rate))
    model.vit.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")})
    nn.init.zeros_(model.classifier.weight)
    if probe is not None:
        nn.init.ones_(model.vit.norm.weight), nn.init.zeros_(model.vit.norm.bias)
        model.classifier.weight.data.copy_(probe / encoder.config.hidden_size**0.5)
    model.set_attn_implementation("sdpa" if encoder.cls_token.is_cuda else "eager")  # on a CPU, fast in bfloat16 too
    return model.to(encoder.cls_token.device)

def train_classifier(model: Classifier, images: Dataset, labels: Tensor, indices: list[int],
                     config: FinetuneConfig, lr: float, layer_decay: float, seed: int, verbose: bool = False) -> None:
    """Train in place on random crops and flips of images[indices] alone. Raises FloatingPointError if it diverges."""
    device, size = model.classifier.weight.device, min(config.batch_size, len(indices))
    steps = max(config.steps, math.ceil(config.epochs * len(indices) / size))
    bfloat16 = choose_precision(config.precision, device) == "bfloat16"
    generator, queue = generator_for(seed, 1), torch.empty(0, dtype=torch.long)
    torch.manual_seed(seed)  # of stochastic depth
    optimizer = torch.optim.AdamW(layerwise_groups(model.train(), lr, layer_decay, config.weight_decay), fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(  # of each group: a tenth of the steps up, then a cosine down to 0
        optimizer, lambda step: warmup_cosine(step + 1, 0.1 * steps, steps + 1, 0.0, 1.0, 0.0))
    for step in range(steps):
        if len(queue) < size:  # each image once before any comes again
            queue = torch.cat([queue, torch.tensor(indices)[torch.randperm(len(indices), generator=generator)]])
        batch, queue = images.__getitems__(queue[:size].tolist()), queue[size:]
        u = torch.rand(size, 2 * TRIES + 3, generator=generator)
        boxes = crop_boxes(u[:, 1:], batch.sizes, config.crop_scale)
        pixels = normalize(crop_and_resize(batch.images.to(device), boxes, u[:, 0] < 0.5, model.config.image_size))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(pixels).logits
        loss = F.cross_entropy(logits.float(), labels[batch.indices].to(device), label_smoothing=config.label_smoothing)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        if not torch.isfinite(loss.detach() + norm):
            raise FloatingPointError(f"the loss is not finite at step {step}; use a learning rate lower than {lr}.")
        optimizer.step()
        rate.step()
        if verbose and (step + 1) % math.ceil(steps / 10) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    model.eval()

@torch.no_grad()
def classify(model: Classifier, images: Dataset, indices: list[int]) -> Tensor:
    """Class probabilities of whole images (which must be readable) -> rows classes, on the CPU."""
    features = embed_images(model.vit, images, indices, model.config.image_size, model.classifier.weight.device)[0]
    return model.classifier(model.vit.norm(features.to(model.classifier.weight.device))).softmax(dim=-1).cpu()

# ---- The table. An Experiment holds no validation label: `measure` alone sees them, after the predictions are made ---
@dataclass(frozen=True)
class Experiment:
    """All for predictions. encoders: pretrained ("probe"), "untrained", "pixels" (None); val: which images are used."""
    config: FinetuneConfig
    encoders: dict[str, ViTMSNModel | None]
    data: Images
    val: list[int]
    columns: dict[str, list[list[int]]]
    tuning: list[int]
    cache: dict = field(default_factory=dict)

    def features(self, kind: str, images: Dataset, indices: list[int]) -> Tensor:
        """Rows of frozen features, computed once."""
        if (key := (kind, id(images), *indices)) not in self.cache:
            size, device = self.encoders["probe"].config.image_size, self.encoders["probe"].cls_token.device
            size = min(size, self.config.pixel_size) if kind == "pixels" else size
            self.cache[key] = embed_images(self.encoders[kind], images, indices, size, device)[0]
        return self.cache[key]

    def trained(self, method: str, indices: list[int], seed: int, lr: float, verbose: bool = False) -> Classifier:
        """A classifier that was fine-tuned, or trained from scratch, on these images."""
        start, decay, probe, labels = self.encoders["untrained"], 1.0, None, self.data.train_labels
        if method == "finetune":
            start, decay = self.encoders["probe"], self.config.layer_decay
            rows = center_and_scale(self.features("probe", self.data.train, indices))
            probe = fit_logistic_probe(rows, labels[indices], len(self.data.classes), HEAD_L2, 1e-6)
        model = build_classifier(start, self.data.classes, self.config, probe)
        train_classifier(model, self.data.train, labels, indices, self.config, lr, decay, seed, verbose)
        return model

    @cached_property
    def scratch_lr(self) -> float:
        """The rate that does best when trained on a fifth of each class's tuning part and tested on the rest of it."""
        size = max(1, len(self.tuning) // len(self.data.classes))  # of a class
        fit, held = ([i for place, i in enumerate(self.tuning) if (place % size % 5 > 0) == rest] for rest in (0, 1))
        if self.config.scratch_lr or not held:
            return self.config.scratch_lr or SCRATCH_RATES[1]
        def accuracy(lr):
            predicted = classify(self.trained("scratch", fit, 0, lr), self.data.train, held).argmax(dim=-1)
            return (predicted == self.data.train_labels[held]).double().mean()
        best = max(SCRATCH_RATES, key=accuracy)
        print(f"scratch: learning rate {best:g}, the best on {len(held)} training images that no draw uses", flush=True)
        return best

    def predict(self, method: str, indices: list[int], seed: int) -> Tensor:
        """The class of each validation image, by a method that has the labels of the images `indices`."""
        if method in TRAINED:
            model = self.trained(method, indices, seed, self.scratch_lr if method == "scratch" else self.config.lr)
            return classify(model, self.data.val, self.val).argmax(dim=-1)
        kind, labels = "probe" if method in KNN else method, self.data.train_labels[indices]
        rows, val = self.features(kind, self.data.train, indices), self.features(kind, self.data.val, self.val)
        if method in KNN:
            return knn_predict(rows, labels, val, *KNN[method])
        w = fit_logistic_probe(center_and_scale(rows), labels, len(self.data.classes), self.config.l2, 1e-8)
        return (center_and_scale(val) @ w.T).argmax(dim=-1)

def measure(experiment: Experiment, val_labels: Tensor, folder: Path) -> None:
    """Print the table, method by method; table.csv and table.png grow with it."""
    config, truth, classes, rows = experiment.config, val_labels[experiment.val], len(experiment.data.classes), []
    print(f"\naccuracy in % on {len(truth)} validation images, mean ± standard deviation over the draws; at least "
          f"{config.steps} updates in trained cells\n{'':<10}" + "".join(f"{name:>13}" for name in experiment.columns))
    for method in config.listed("methods"):
        cells = dict.fromkeys(experiment.columns, "-")
        for name, draws in experiment.columns.items():
            if method in TRAINED and name == "100 %" and 1 not in config.listed("fraction"):
                continue
            scores = [(experiment.predict(method, draw, seed) == truth).double().mean().item()
                      for draw, seed in zip(draws, config.listed("seeds") * len(draws), strict=False)]
            mean, labels = np.mean(scores), np.mean([len(draw) for draw in draws])
            sd = np.std(scores, ddof=1) if len(scores) > 1 else ""
            cells[name] = f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if len(scores) > 1 else "")
            rows.append((method, name, labels, labels / classes, mean, sd, " ".join(map(str, scores))))
        print(f"{method:<10}" + "".join(f"{cell:>13}" for cell in cells.values()), flush=True)
        write_csv(folder / "table.csv", ("method", "column", "labels", "labels_per_class", "mean", "sd", "draws"), rows)
        curves = {name: sorted(row[3:5] for row in rows if row[0] == name) for name, *_ in rows}
        save_plot(folder / "table.png", {"accuracy against labelled images per class": curves}, log_x=True)

def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    """A table, whole or not at all."""
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows([header, *rows])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))  # names of files may be no UTF-8

def load_model(config: FinetuneConfig, classifier: bool = False) -> ViTMSNModel | Classifier:
    """The encoder or classifier of a checkpoint, at --image-size. Raises UsageError if it can't be that."""
    try:
        model_config, weights = read_pretrained(config.checkpoint, None)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    if classifier and "classifier.weight" not in weights:
        raise UsageError(f"{config.checkpoint} has no classifier; make one: python finetune.py train --checkpoint ...")
    if config.image_size and config.image_size != model_config.image_size:
        if config.image_size % (patch := model_config.patch_size):
            raise UsageError(f"image_size is no whole number of this checkpoint's patches of {patch} pixels.")
        model_config = replace(model_config, image_size=config.image_size)
        weights["pos_embed"] = interpolate_positions(weights["pos_embed"].float(), (model_config.grid_size,) * 2)
    model = (Classifier if classifier else ViTMSNModel)(model_config)
    load_weights(model, weights, config.checkpoint)
    return model.to(start_processes(config).device).eval()

def open_experiment(config: FinetuneConfig) -> tuple[Experiment, Tensor, Path]:
    """Encoder, data and draws -> the experiment, the validation labels, the folder in which results go by default."""
    if not config.checkpoint:
        runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UsageError("there is no run in runs/; pretrain one by python train_msn.py, or pass --checkpoint.")
        config = replace(config, checkpoint=str(runs[-1].parent))
    path = Path(config.checkpoint)  # of a run, or in one
    home = next((folder for folder in (path, path.parent) if (folder / "checkpoint.pt").is_file()), Path("."))
    saved = json.loads((home / "config.json").read_text()) if (home / "config.json").is_file() else {}
    if not (source := config.data or saved.get("data")):
        raise UsageError(f"{config.checkpoint} does not say on which images to work; pass --data.")
    encoder, seen = load_model(config), set()
    shape = encoder.config
    data = open_data(TrainConfig(data=source, data_dir=saved.get("data_dir", "data"), seed=saved.get("seed", 0),
                                 image_size=shape.image_size, patch_size=shape.patch_size, focal_views=0))
    if data.val is None:
        raise UsageError("this takes labels: the data must be folders train/CLASS/* and val/CLASS/*.")
    columns, tuning = draw_columns(config, data, seen)
    val = torch.randperm(len(data.val), generator=generator_for(0, 2))[:config.val_images or None].sort().values
    val = readable(data.val, val.tolist(), seen)
    if not all([val, columns, *(drawn for draws in columns.values() for drawn in draws)]):
        raise UsageError("no readable validation image is left, none of a label list, or no column is asked for.")
    print(f"{config.checkpoint}: {len(data.train)} training images of {len(data.classes)} classes, {len(val)} of "
          f"{len(data.val)} validation images; {len(seen)} can't be read", flush=True)
    torch.manual_seed(0)  # the untrained encoder is as pretraining starts it, the same in all cells
    encoders = dict(probe=encoder, untrained=MSNEncoder(shape, 1, 1).to(encoder.cls_token.device), pixels=None)
    return Experiment(config, encoders, data._replace(val_labels=None), val, columns, tuning), data.val_labels, home

def make_table(config: FinetuneConfig) -> None:
    """The label-efficiency table, as text, CSV and plot."""
    experiment, val_labels, home = open_experiment(config)
    folder = Path(config.output_dir or home / "finetune")
    measure(experiment, val_labels, folder)
    write_file(folder / "config.json", json.dumps(asdict(experiment.config), indent=2).encode())
    print(f"written: {folder}/table.csv, table.png, config.json", flush=True)

# ---- Using a model: train, predict, attention, embed, neighbours -----------------------------------------------------
def train_and_save(config: FinetuneConfig) -> None:
    """Fine-tune on one labelled set; save the classifier and its accuracy per class."""
    experiment, val_labels, home = open_experiment(config)
    folder, draws = Path(config.output_dir or home / "classifier"), [d for c in experiment.columns.values() for d in c]
    if len(draws) != 1:
        raise UsageError("train takes one labelled set: one --labels-per-class, one --fraction or one --label-list.")
    model = experiment.trained("finetune", draws[0], config.listed("seeds")[0], config.lr, verbose=True)
    model.save_pretrained(folder)
    truth = val_labels[experiment.val]
    right = classify(model, experiment.data.val, experiment.val).argmax(dim=-1) == truth
    rows = [(name, int((truth == c).sum()), right[truth == c].double().mean().item())
            for c, name in enumerate(experiment.data.classes) if c in truth]
    rows.append(("all", len(truth), right.double().mean().item()))
    write_csv(folder / "accuracy.csv", ("class", "images", "accuracy"), rows)
    print("\n".join(f"{name:<20} {accuracy:7.1%} of {count}" for name, count, accuracy in rows) + f"\nsaved: {folder}")

def open_pictures(names: list[str], model: ViTMSNModel | Classifier) -> ImageFiles:
    """The readable ones among files and the pictures in folders; others are named and counted."""
    paths = [path for name in map(Path, names) for path in (image_paths(name) if name.is_dir() else [name])]
    side = 2 * model.config.image_size
    if not (good := readable(ImageFiles(paths, side, 0, check=False), list(range(len(paths))), set())):
        raise UsageError(f"none of the {len(paths)} files is a readable image.")
    print(f"{len(good)} pictures, {len(paths) - len(good)} unreadable files skipped", file=sys.stderr)
    return ImageFiles([paths[i] for i in good], side, 2**28, check=False)

def predict(config: FinetuneConfig, model: Classifier, pictures: ImageFiles) -> None:
    """The likeliest classes of each picture."""
    rows, best = [], classify(model, pictures, list(range(len(pictures)))).sort(dim=-1, descending=True)
    for path, which, values in zip(pictures.paths, best.indices.tolist(), best.values.tolist(), strict=True):
        guesses = [(model.config.id2label[c], p) for c, p in zip(which, values, strict=True)][:config.top]
        print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in guesses))
        rows += [(path, place, name, f"{p:.6f}") for place, (name, p) in enumerate(guesses, 1)]
    if config.csv:
        write_csv(Path(config.csv), ("image", "place", "class", "probability"), rows)

@torch.no_grad()
def attention(config: FinetuneConfig, model: ViTMSNModel, pictures: ImageFiles) -> None:
    """A sheet per picture: beside it, each head of the last layer, as bright as the class token looks there."""
    size, folder = model.config.image_size, Path(config.output_dir or "attention")
    for i, path in enumerate(pictures.paths):
        pixels = embed_images(None, pictures, [i], size, torch.device("cpu"))[0].reshape(1, 3, size, size)
        heads = model(pixels.to(model.cls_token.device), output_attentions=True).attentions[-1][:, :, 0, 1:].cpu()
        maps = F.interpolate(heads.unflatten(-1, (model.config.grid_size,) * 2), (size, size), mode="bilinear")[0]
        picture = to_picture(pixels[0])
        lit = [(picture * (0.15 + 0.85 * m / m.max()).unsqueeze(-1).numpy()).astype(np.uint8) for m in maps]
        names = ["picture", *(f"head {h + 1}" for h in range(len(lit)))]
        save_sheet(folder / f"{i:04d}-{path.stem}.png", [[picture, *lit]], names, cell=224)
    print(f"written: {len(pictures)} sheets in {folder}")

def embed(config: FinetuneConfig, model: ViTMSNModel, pictures: ImageFiles) -> None:
    """features.npz: features (n d, float32), paths, and classes: the names of the folders that the pictures lie in."""
    target, indices = Path(config.output or "features.npz"), list(range(len(pictures)))
    features, _ = embed_images(model, pictures, indices, model.config.image_size, model.cls_token.device)
    paths, classes = [str(path) for path in pictures.paths], [path.parent.name for path in pictures.paths]
    write_file(target, lambda file: np.savez(file, features=features.numpy(), paths=paths, classes=classes))
    print(f"written: {target}, {len(features)} rows of {features.shape[1]} features")

def neighbours(config: FinetuneConfig, model: ViTMSNModel, pictures: ImageFiles) -> None:
    """A sheet of evenly spaced queries, each with the nearest of (at most 2,000) other pictures."""
    if len(pictures) < 2:
        raise UsageError("neighbours takes two pictures or more.")
    target, step = Path(config.output or "neighbours.png"), max(2, math.ceil(len(pictures) / 8))
    parts = [path for i, path in enumerate(pictures.paths) if i % step], pictures.paths[::step]
    others, queries = (ImageFiles(paths, pictures.side, 2**28, check=False) for paths in parts)
    data = Images([], others, None, queries, None)
    save_neighbours(target, model, data, model.config.image_size, model.cls_token.device)
    print(f"written: {target}")

# ---- The command line ------------------------------------------------------------------------------------------------
USING = {"predict": (predict, "top csv"), "attention": (attention, "output_dir"), "embed": (embed, "output"),
         "neighbours": (neighbours, "output")}
TRAIN = {"labels_per_class": "", "fraction": "1", "seeds": "0", "full": False, "methods": "finetune", "epochs": 10.0}

def main(argv: list[str]) -> None:
    """The table, or what the first word says."""
    command = argv[0] if argv and argv[0] in ("train", *USING) else ""
    parser = argparse.ArgumentParser(prog=f"finetune.py {command}".strip(), description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if command in USING:
        parser.add_argument("source", metavar="checkpoint")
        parser.add_argument("images", nargs="+")
    add_flags(parser, FinetuneConfig)
    given = vars(parser.parse_args(argv[bool(command):]))
    source, images = given.pop("source", None), given.pop("images", None)
    run, used = USING.get(command, (None, " ".join(given.keys() - {"top", "csv", "output"})))
    if unused := given.keys() - {"image_size", "device", *used.split()}:
        raise UsageError(f"{command or 'the table'} has no use for --{min(unused).replace('_', '-')}.")
    if command in USING:
        model = load_model(config := FinetuneConfig(checkpoint=source, **given), classifier=command == "predict")
        return run(config, model, open_pictures(images, model))
    if command == "train":
        few = given.get("labels_per_class") or given.get("label_list") or given.get("fraction", "1") not in ("1", "1.0")
        given = TRAIN | ({"fraction": ""} if few else {"crop_scale": (0.3, 1.0), "drop_path_rate": 0.1}) | given
        return train_and_save(FinetuneConfig(**given))
    return make_table(FinetuneConfig(**given))

if __name__ == "__main__":
    sys.exit(run_program(main))
