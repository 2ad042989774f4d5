"""Label efficiency: what a pretrained encoder is worth when few images have labels; and its use.

    python finetune.py                                 # the table, for the newest run in runs/
    python finetune.py --checkpoint vits16_800ep.pth.tar --data imagenet --methods probe --no-full
    python finetune.py train --labels-per-class 10     # fine-tune; transformers loads the result
    python finetune.py predict runs/demo-001/classifier photo.jpg holiday/ --csv classes.csv
    python finetune.py attention runs/demo-001 photo.jpg   # where each head of the last layer looks
    python finetune.py embed runs/demo-001 photos --output features.npz
    python finetune.py neighbours runs/demo-001 photos    # each of some pictures with its nearest

The table is the paper's (arXiv 2204.07141, Section 5, Appendix A.2): a logistic probe on frozen
features; beside it fine-tuning, k-NN and three baselines. Mean and deviation are over draws of
labelled images. Validation images choose nothing.
"""

# The file tells in this order: settings, the probe, labelled sets, fine-tuning, the table, using a
# model, the command line. Shapes are in the letters of vitmsn.py: b images, c channels, d width,
# h heads, n tokens. "Departure:" marks what differs from the paper's evaluation.

import argparse
import csv
import difflib
import inspect
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from train_msn import (
    ANY,
    THREADS_HELP,
    TRIES,
    Batch,
    ImageFiles,
    Images,
    Panel,
    Point,
    Strip,
    Tile,
    TrainConfig,
    UsageError,
    add_flags,
    check_range,
    check_writable,
    choose_precision,
    crop_and_resize,
    crop_boxes,
    embed_images,
    find_pictures,
    generator_for,
    knn_predict,
    open_data,
    opt,
    picture_endings,
    picture_of,
    run_program,
    runs_by_age,
    save_neighbours,
    save_plot,
    save_sheet,
    say,
    send,
    set_threads,
    start_alone,
    to_picture,
    warmup_cosine,
    warn_of_slow_precision,
)
from vitmsn import (
    WEIGHT_FILES,
    FROM_THE_VALUES,
    MSNEncoder,
    PictureRules,
    Preprocessor,
    ViTMSNConfig,
    ViTMSNModel,
    autocast,
    load_weights,
    may_be_on_the_hub,
    normalize,
    preprocess,
    read_pretrained,
    resample_positions,
    with_image_size,
    without_projection_head,
    write_file,
)
from vitmsn import ViTMSNForImageClassification as Classifier

# ---- Settings, of the table and of the other commands --------------------------------------------

# The methods that the table compares.
TRAINED = ("finetune", "scratch")  # these train encoder and head; the others use frozen features
KNN = {
    "knn1": {"k": 1, "temperature": 0.07},  # the only one that fits a single label per class
    "knn20": {"k": 20, "temperature": 0.07},  # as pretraining's own k-NN
    "knn200": {"k": 200, "temperature": 0.1},  # as Lightly's benchmarks
}
METHODS = ("probe", *TRAINED, "untrained", "pixels", *KNN)

PROBE_TOLERANCE = 1e-8  # norm of the gradient at which the probe of a cell has converged
# The probe that fine-tuning starts from is regularised more than the table's: at lambda 0.0025 it
# is so sure of its labels that almost no gradient is left to learn from.
HEAD_L2 = 0.1
HEAD_TOLERANCE = 1e-6


class Choice(NamedTuple):
    """A setting that is chosen on training images which no draw uses, if it is not given."""

    methods: tuple[str, ...]  # that use it
    default: float  # where there are too few of these images
    candidates: tuple[float, ...]
    folds: int  # more of them are less noisy, and take longer


CHOICES = {
    "l2": Choice(
        ("probe", "untrained", "pixels"), 0.0025, (2.5e-5, 2.5e-4, 0.0025, 0.025), folds=5
    ),
    "lr": Choice(("finetune",), 5e-4, (5e-4, 1e-3, 2e-3), folds=1),
    "scratch_lr": Choice(("scratch",), 1e-3, (3e-4, 1e-3, 3e-3), folds=1),
}
PUBLISHED_WIDTH = 384  # of the smallest published encoder; from it on l2 and lr are the defaults
TUNING_IMAGES = 25  # of each class, at most
TUNING_FOLDS = 5
TUNING_SEED = 2**31  # one more than --seeds can be
CLIP_NORM = 3.0  # of the gradient of all parameters together, as in pretraining

ALL_LABELS = "100 %"  # the name of the column in which every training image has its label

# Streams of random numbers, for generator_for.
LABELLED_SETS = 0
CROPS = 1
VALIDATION_IMAGES = 2


@dataclass(frozen=True)
class FinetuneConfig:
    """All settings. Raises UsageError for a value that is of a wrong kind or out of its range.

    A field with an `item_type` is a list in one string, with commas between its items; each item
    lies in `item_range`.
    """

    # What is measured, on what
    checkpoint: str = opt(
        "", "our run, a transformers folder or an original .pth.tar; by default the newest of runs/"
    )
    data: str = opt(
        "",
        "synthetic, cifar10, or a folder with train/CLASS/* and val/CLASS/*; by default the run's",
    )
    output_dir: str = opt(
        "", "where results go; by default finetune/, classifier/ or attention/ in the run"
    )
    methods: str = opt(
        "probe,finetune,scratch,untrained,pixels,knn1,knn20",
        "rows of the table; there is knn200 too",
    )

    # Which training images have labels, and how many validation images are predicted
    labels_per_class: str = opt(
        "1,2,5,10",
        "labelled images per class, a column each",
        item_type=int,
        item_range=(1, 10**9),
    )
    fraction: str = opt(
        "0.01",
        "shares of the labels; 1: all, for the trained methods too",
        item_type=float,
        item_range=(1e-9, 1),
    )
    full: bool = opt(True, "a column with all labels for methods on frozen features")
    label_list: str = opt(
        "", "text files of image names, one a line; each file is a draw, instead of these columns"
    )
    seeds: str = opt(
        "0,1,2",
        "one draw of the labelled images each",
        item_type=int,
        item_range=(0, 2**31 - 1),
    )
    val_images: int = opt(
        0, "validation images for all cells, a fixed random part; 0: all", range=(0, 10**9)
    )

    # Features and pictures
    l2: float = opt(
        0.0,
        "lambda of the probe; 0: the official code's 0.0025, or below width 384 tuned on a part "
        "of train that no draw uses",
        range=(0, 1e9),
    )
    pixel_size: int = opt(16, "largest side of the raw-pixel baseline", range=(1, 4096))
    image_size: int = opt(
        0,
        "pixels; 0: the checkpoint's. For another one positions are resampled",
        range=(0, 4096),
    )

    # Fine-tuning, and training from scratch.
    # Departure: the paper fine-tunes on whole data sets: 100 epochs, batches of 1024, a learning
    # rate of 0.002, drop path 0.2 (Appendix A.4). These values are for a few labelled images.
    steps: int = opt(60, "updates of each trained cell", range=(1, 10**9))
    epochs: float = opt(
        0.0, "passes over the labelled images, where that is longer (train: 10)", range=(0, 10**6)
    )
    batch_size: int = opt(32, "images per update, at most as many as have labels", range=(2, 10**6))
    lr: float = opt(
        0.0,
        "highest learning rate of fine-tuning, at the head; 0: 5e-4, or below width 384 tuned in "
        "the same way",
        range=(0, 100),
    )
    scratch_lr: float = opt(
        0.0, "learning rate from scratch; 0: tuned in the same way", range=(0, 100)
    )
    layer_decay: float = opt(
        0.65, "factor of the learning rate from each layer to the one below", range=(1e-6, 1)
    )
    weight_decay: float = opt(0.05, "of AdamW", range=(0, 100))
    drop_path_rate: float = opt(
        0.0,
        "stochastic depth, grows to this at the last layer (train on all: 0.1)",
        range=(0, 0.99),
    )
    label_smoothing: float = opt(
        0.1, "share of the target that all classes get alike", range=(0, 0.999)
    )
    crop_scale: tuple = opt(
        (0.8, 1.0), "share of the area in a random crop (train on all: 0.3 1)", range=(1e-6, 1)
    )

    # Pictures from files (for the table and train, of the data; for the other commands, of images)
    background: str = opt("", "behind transparent pixels, such as white; by default the model's")
    integer_range: tuple = opt(
        (0, 0), "16- and 32-bit values for black and white; 0 0: the model's, or found", range=ANY
    )
    float_range: tuple = opt(
        (0, 0), "floating-point values for black and white; 0 0: the model's, or found", range=ANY
    )
    max_megapixels: float = opt(
        0.0, "larger pictures are passed over; 0: the model's limit", range=(0, 10**6)
    )

    # Using a model
    top: int = opt(5, "classes that predict names", range=(1, 10**6))
    csv: str = opt("", "predict: also write a table to this file")
    output: str = opt(
        "", "the file to write (embed: features.npz; neighbours: neighbours/, in the run)"
    )

    # Machine
    device: str = opt("auto", "auto: a GPU if there is one, else cpu; or any that torch knows")
    threads: int = opt(0, THREADS_HELP, range=(0, 1024))
    precision: str = opt("auto", "bfloat16 is autocast", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        for f in fields(self):
            check_range(f, getattr(self, f.name))
            if "item_type" in f.metadata:
                self.listed(f.name)  # raises UsageError

        if not self.listed("seeds") or not self.listed("methods"):
            raise UsageError("seeds or methods is empty: give at least one of each.")

        unknown = sorted(set(self.listed("methods")) - set(METHODS))
        if unknown:
            raise UsageError(
                f"methods: {', '.join(unknown)} is not known; use {', '.join(METHODS)}."
            )

    def listed(self, name: str) -> list:
        """The items of a field that has commas between them, each once, in the order given."""
        metadata = self.__dataclass_fields__[name].metadata
        item_type = metadata.get("item_type", str)
        text = getattr(self, name)

        try:
            items = [item_type(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise UsageError(f"{name}={text!r} must be numbers with commas between.") from None

        if "item_range" in metadata:
            low, high = metadata["item_range"]
            if not all(low <= item <= high for item in items):
                raise UsageError(f"{name}={text} is out of range; use {low:g} to {high:g}.")

        return list(dict.fromkeys(items))


# ---- The logistic probe on frozen features (paper, Appendix A.2) ---------------------------------
#
# The features of an image are its class token from the target encoder, before the final norm
# (ViTMSNModel.representation).
#
# A linear classifier W without intercept: image i, with prepared features x_i (center_and_scale)
# and label y_i, has the class probabilities p_i = softmax(W x_i). Over the b labelled images, W is
# the minimiser of
#
#     L(W) = (1/b) sum_i -log p_i[y_i]  +  (lambda / b) / 2 * |W|^2
#
# L is strictly convex, so there is exactly one. (In scikit-learn it is
# LogisticRegression with C = 1 / lambda and fit_intercept=False.) The probe gives an image the
# class of the largest entry of W x.


def center_and_scale(features: Tensor) -> Tensor:
    """Prepare features for the probe: the d numbers of an image minus their own mean, then scaled
    to length 1. Other images do not matter. features: b d -> b d, float64.
    """
    # Departure: the paper's text names logistic regression only. Centring, scaling and the missing
    # intercept are what the official code's numbers show (tests/golden/logistic.npz).
    features = features.double()
    centered = features - features.mean(dim=-1, keepdim=True)
    return F.normalize(centered, dim=-1)


def fit_logistic_probe(
    features: Tensor, labels: Tensor, num_classes: int, l2: float, tolerance: float = 1e-12
) -> Tensor:
    """The minimiser W of L(W), found by Newton's method (paper, Appendix A.2).

    features: b d, from center_and_scale, labels: b class numbers, l2: lambda -> W: classes d,
    float64.

    From W = 0, each round computes the gradient

        G = (1/b) sum_i (p_i - onehot(y_i)) x_i^T  +  (lambda / b) W,

    solves H step = G for the Hessian H of L at W, and moves W by -step, or by a part of it where L
    would rise. It ends when the norm of G is below `tolerance`. (L-BFGS, the usual choice, stalls
    before it gets there at a lambda as small as 0.0025.)
    """
    # The part of a row of W that is orthogonal to all x_i changes no logit and only adds to |W|^2:
    # at the minimum it is 0. So we search in the space that the x_i span, of at most min(b, d)
    # dimensions; in the functions below, d is that number. x and w are in its coordinates (of an
    # orthonormal basis, so that |W| is the same); the last line goes back.
    basis, _ = torch.linalg.qr(features.double().T)
    x = features.double() @ basis
    num_images, dimensions = x.shape
    targets = F.one_hot(labels, num_classes).double()
    w = x.new_zeros(num_classes, dimensions)

    for _ in range(100):  # more than enough: 7 to 15 are usual
        p = (x @ w.T).softmax(dim=-1)
        gradient = (p - targets).T @ x / num_images + l2 / num_images * w
        if gradient.norm() < tolerance:
            break
        step = newton_step(x, p, gradient, l2)
        w = w - line_search(x, labels, w, step, l2) * step

    return w @ basis.T


def newton_step(x: Tensor, p: Tensor, gradient: Tensor, l2: float) -> Tensor:
    """Solve H step = gradient by preconditioned conjugate gradients.

    x: b d, p: b classes (the probabilities at W), gradient: classes d -> step: classes d.

    H has (classes d)^2 entries, too many to write down; conjugate gradients only need its product
    with a direction (`hessian_product`). They need fewer rounds when they may divide the residual
    by a matrix M that is like H but easy to invert. Our M has the mean over classes in place of
    each class's own p (1 - p), and leaves out the terms between two classes:

        M = (1/b) sum_i m_i x_i x_i^T  +  (lambda / b) I,   m_i = mean of p_ic (1 - p_ic) over c,

    which is d by d, the same for all classes.

    Far from the minimum an exact solution is not worth its time. We stop at a residual of a tenth
    of the gradient, |G| / 10, or of |G|^2 where that is less, near the minimum.
    """
    num_images, dimensions = x.shape
    identity = torch.eye(dimensions, dtype=x.dtype, device=x.device)
    weight = (p * (1 - p)).mean(dim=-1, keepdim=True)  # m_i
    average_hessian = (x * weight).T @ x / num_images + l2 / num_images * identity  # M
    factor = torch.linalg.cholesky(average_hessian)

    size = gradient.norm()
    step = torch.zeros_like(gradient)
    residual = gradient  # gradient - H step
    direction = torch.zeros_like(gradient)
    previous_product = 1.0  # of no effect: the direction before the first one is 0

    while residual.norm() > min(0.1, size) * size:
        # The next direction is conjugate to all earlier ones: (direction . H earlier) is 0.
        divided = torch.cholesky_solve(residual.T, factor).T  # the residual, divided by M
        product = (residual * divided).sum()
        direction = divided + product / previous_product * direction
        previous_product = product

        # Along it we go to the point where the residual has no part left in this direction.
        h_direction = hessian_product(x, p, direction, l2)
        length = product / (direction * h_direction).sum()
        step = step + length * direction
        residual = residual - length * h_direction

    return step


def hessian_product(x: Tensor, p: Tensor, direction: Tensor, l2: float) -> Tensor:
    """The Hessian of L times a direction D: how fast the gradient changes when W moves along D.

    x: b d, p: b classes, direction: classes d -> classes d. Along D the logits of image i change
    by u_i = D x_i, and its probabilities by p_i * u_i - p_i (p_i . u_i), where * is entry by entry.
    Therefore

        H D = (1/b) sum_i (p_i * u_i - p_i (p_i . u_i)) x_i^T  +  (lambda / b) D.
    """
    num_images = len(x)
    weighted = p * (x @ direction.T)  # p_i * u_i
    change = weighted - p * weighted.sum(dim=-1, keepdim=True)
    return change.T @ x / num_images + l2 / num_images * direction


def line_search(x: Tensor, labels: Tensor, w: Tensor, step: Tensor, l2: float) -> float:
    """The share of a Newton step to take: the first of 1, 1/2, 1/4, ... at which L does not rise.

    x: b d, labels: b, w and step: classes d. Near the minimum it is 1; further away a whole step
    can go too far.
    """
    # Near the minimum L hardly changes, and a rise by 1e-12 of its value is rounding.
    highest = probe_objective(x, labels, w, l2) * (1 + 1e-12)
    share = 1.0
    while probe_objective(x, labels, w - share * step, l2) > highest and share > 1e-6:
        share /= 2
    return share


def probe_objective(x: Tensor, labels: Tensor, w: Tensor, l2: float) -> Tensor:
    """L(W), a scalar. x: b d, labels: b, w: classes d."""
    return F.cross_entropy(x @ w.T, labels) + l2 / len(x) / 2 * w.square().sum()


# ---- Labelled sets: which training images have labels --------------------------------------------
#
# A draw is the list of the labelled images (their indices in the training set). A column of the
# table is a list of draws, one per seed. In `labels`, -1 marks an image that must not be drawn.

Columns = dict[str, list[list[int]]]  # name of the column -> its draws


def draw_labelled(
    labels: Tensor, per_class: int | list[int], seed: int, names: list[str] | None = None
) -> list[int]:
    """Draw labelled images of each class, in the order of the classes.

    labels: one class number per image, or -1; per_class: how many, one number for all classes or
    one for each; names: of the classes, for the error message. With the same seed, a smaller draw
    is a part of a larger one. Raises UsageError if a class has too few images.
    """
    num_classes = len(names) if names else int(labels.max()) + 1
    if isinstance(per_class, int):
        per_class = [per_class] * num_classes

    order = torch.rand(len(labels), generator=generator_for(seed, LABELLED_SETS)).argsort()
    chosen = []
    for c, count in enumerate(per_class):
        members = order[labels[order] == c]
        if len(members) < count:
            raise UsageError(
                f"class {names[c] if names else c} has {len(members)} images to draw from, "
                f"fewer than the {count} wanted."
            )
        chosen += members[:count].tolist()
    return chosen


def read_label_list(path: Path, images: Dataset) -> list[int]:
    """The training images that a text file names, one a line, as indices in rising order.

    A line is NAME, CLASS/NAME or train/CLASS/NAME. Raises UsageError if the file can't be read, or
    if a line names no image or several.
    """
    if not isinstance(images, ImageFiles):
        raise UsageError("--label-list names files: it needs --data with a folder of images.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path} names no training image: it has no line with a name.")

    named: dict[str, list[int]] = {}  # every way to write an image's name -> the images it fits
    for i, image in enumerate(images.paths):
        for num_parts in (1, 2, 3):
            name = "/".join(image.parts[-num_parts:])
            named.setdefault(name, []).append(i)

    wrong = [line for line in lines if len(named.get(line, [])) != 1]
    if wrong:
        raise UsageError(
            f"{path}: {len(wrong)} of {len(lines)} lines name no training image or several: "
            f"{wrong[0]}."
        )
    return sorted({named[line][0] for line in lines})


def readable(images: Dataset, indices: list[int], unreadable: set[str]) -> list[int]:
    """The indices without those whose file is no readable image.

    Each such file is named on stderr once: `unreadable` holds those named before, and grows.
    """
    if not isinstance(images, ImageFiles):
        return list(indices)

    bad = {i for i in indices if images.read(i) is None}
    reasons = {str(images.paths[i]): images.why(i) for i in bad}
    for path in sorted(reasons.keys() - unreadable):
        unreadable.add(path)
        say(
            f"skipped {path}: {reasons[path]} ({len(unreadable)} so far)",
            sys.stderr,
        )
    return [i for i in indices if i not in bad]


def draw_readable(
    data: Images, labels: Tensor, per_class: int | list[int], seed: int, unreadable: set[str]
) -> list[int]:
    """Like draw_labelled, but each unreadable image is replaced by the next one of its class.

    It is marked by -1 in `labels` too, so that no later draw tries it again.
    """
    while True:
        drawn = draw_labelled(labels, per_class, seed, data.classes)
        bad = set(drawn) - set(readable(data.train, drawn, unreadable))
        if not bad:
            return drawn
        labels[list(bad)] = -1


def images_per_class(config: FinetuneConfig, data: Images) -> dict[str, int | list[int]]:
    """How many images of each class the drawn columns have.

    -> name of the column -> one number for all classes, or a list with one for each.
    """
    class_sizes = data.train_labels.bincount(minlength=len(data.classes)).tolist()
    counts: dict[str, int | list[int]] = {}
    for number in config.listed("labels_per_class"):
        counts[f"{number}/class"] = number
    for share in config.listed("fraction"):
        if share < 1:
            counts[f"{100 * share:g} %"] = [max(1, round(share * size)) for size in class_sizes]
    return counts


def draw_columns(
    config: FinetuneConfig, data: Images, unreadable: set[str]
) -> tuple[Columns, list[int]]:
    """Draw the labelled images of the whole table, and those on which settings are chosen.

    -> the columns; images to tune on, class by class, which are in no draw (only the column of all
    labels has them). A column for which a class has too few images is left out, with a line on
    stderr; if that leaves none, the reason is raised as UsageError.
    """
    labels = data.train_labels.clone()  # images that must not be drawn any more become -1
    label_lists = config.listed("label_list")

    columns: Columns = {}
    left_out: dict[str, UsageError] = {}
    if label_lists:
        columns["listed"] = []
        for name in label_lists:
            named = read_label_list(Path(name), data.train)
            columns["listed"].append(readable(data.train, named, unreadable))
    else:
        for name, per_class in images_per_class(config, data).items():
            try:
                columns[name] = [
                    draw_readable(data, labels, per_class, seed, unreadable)
                    for seed in config.listed("seeds")
                ]
            except UsageError as error:
                left_out[name] = error

    tuning = []
    if is_to_choose(config):
        for draw in all_draws(columns):
            labels[draw] = -1
        tuning = draw_tuning_images(data, labels, unreadable)

    if not label_lists and (config.full or 1 in config.listed("fraction")):
        everything = list(range(len(labels)))
        columns[ALL_LABELS] = [readable(data.train, everything, unreadable)]
    if left_out and not columns:
        raise next(iter(left_out.values()))
    for name, error in left_out.items():
        say(f"column {name} is left out: {error}", sys.stderr)
    return columns, tuning


def is_to_choose(config: FinetuneConfig) -> bool:
    """Whether a method of the table has a setting that is to be chosen on training images."""
    methods = set(config.listed("methods"))
    for setting, choice in CHOICES.items():
        if getattr(config, setting) == 0 and methods.intersection(choice.methods):
            return True
    return False


def with_published_settings(config: FinetuneConfig, width: int) -> FinetuneConfig:
    """The settings for an encoder of this width: those of a published one are not to be chosen."""
    if width < PUBLISHED_WIDTH:
        return config
    l2 = config.l2 or CHOICES["l2"].default
    lr = config.lr or CHOICES["lr"].default
    return replace(config, l2=l2, lr=lr)


def count_draws(config: FinetuneConfig) -> int:
    """How many labelled sets the settings ask for."""
    label_lists = config.listed("label_list")
    if label_lists:
        return len(label_lists)
    shares = config.listed("fraction")
    parts = len([share for share in shares if share < 1])
    drawn = len(config.listed("labels_per_class")) + parts
    all_labels = config.full or 1 in shares
    return drawn * len(config.listed("seeds")) + all_labels


def all_draws(columns: Columns) -> list[list[int]]:
    """The draws of all columns in one list."""
    return list(chain.from_iterable(columns.values()))


def draw_tuning_images(data: Images, labels: Tensor, unreadable: set[str]) -> list[int]:
    """As many images of each class as every class has left, at most 25; class by class."""
    left = labels[labels >= 0].bincount(minlength=len(data.classes))
    per_class = min(TUNING_IMAGES, int(left.min()))
    drawn = draw_labelled(labels, per_class, TUNING_SEED, data.classes)
    return readable(data.train, drawn, unreadable)


# ---- Fine-tuning, and training from scratch (paper, Appendix A.4) --------------------------------


def layers_above(name: str, num_layers: int) -> int:
    """How often layer decay applies to a parameter, by its name.

    Head and final norm: 0 times; the last layer: once; the first layer: num_layers times; patch
    projection, class token and positions: num_layers + 1 times.
    """
    parts = name.removeprefix("vit.").split(".")
    if parts[0] in ("classifier", "norm"):
        return 0
    if parts[0] == "blocks":
        return num_layers - int(parts[1])
    return num_layers + 1


def layerwise_groups(model: Classifier, lr: float, decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW, with layer-wise decay (paper, Appendix A.4).

    Head and final norm learn at `lr`, each layer at `decay` times the rate of the one above it.
    Biases and the weights of norms have no weight decay.
    """
    num_layers = len(model.vit.blocks)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = (layers_above(name, num_layers), parameter.ndim > 1)
        members.setdefault(key, []).append(parameter)

    groups = []
    for (above, is_matrix), parameters in members.items():
        groups.append(
            {
                "params": parameters,
                "lr": lr * decay**above,
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
        )
    return groups


def build_classifier(
    encoder: ViTMSNModel, classes: list, config: FinetuneConfig, probe: Tensor | None
) -> Classifier:
    """A classifier with the encoder's weights, whose head is a logistic probe, or zero without one.

    probe: W, classes d. Training then starts where the probe ends, because the classifier gives the
    probe's probabilities: the probe takes a representation minus its mean, scaled to length 1, and
    a final norm of weight 1 and bias 0 gives sqrt(d) times that. So the head is W / sqrt(d).
    """
    model_config = replace(
        encoder.config,
        num_labels=None,  # the config counts id2label
        id2label=dict(enumerate(classes)),
        label2id=None,
        problem_type=None,
        drop_path_rate=config.drop_path_rate,
    )
    model = Classifier(model_config).to(encoder.cls_token.device)

    # An untrained encoder comes with pretraining's projection head, which goes.
    model.vit.load_state_dict(without_projection_head(encoder.state_dict()))

    nn.init.zeros_(model.classifier.weight)
    if probe is not None:
        nn.init.ones_(model.vit.norm.weight)
        nn.init.zeros_(model.vit.norm.bias)
        model.classifier.weight.data.copy_(probe / encoder.config.hidden_size**0.5)

    # On a CPU the written-out attention is the faster one, in bfloat16 too.
    on_cpu = encoder.cls_token.device.type == "cpu"
    model.set_attn_implementation("eager" if on_cpu else "sdpa")
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """What the highest learning rates are multiplied by: a linear warm-up, then a cosine down to 0.

    step: counted from 0. Neither the first nor the last step has rate 0.
    """
    # Departure: a tenth of the steps warms up; the paper takes a twentieth, 5 of 100 epochs.
    return warmup_cosine(step + 1, 0.1 * steps, steps + 1, 0.0, 1.0, 0.0)


def shuffled_batches(
    indices: list[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Batches without end, of `batch_size` indices; each index once before any comes again.

    A batch may hold the end of one order and the beginning of the next.
    """
    queue = torch.empty(0, dtype=torch.long)
    while True:
        if len(queue) < batch_size:
            shuffle = torch.randperm(len(indices), generator=generator)
            queue = torch.cat([queue, torch.tensor(indices)[shuffle]])
        yield queue[:batch_size].tolist()
        queue = queue[batch_size:]


def crop_and_flip(
    batch: Batch,
    crop_scale: tuple[float, float],
    size: int,
    generator: torch.Generator,
    normalize_pixels: Callable[[Tensor], Tensor] = normalize,
) -> Tensor:
    """The augmentation of training: a random resized crop of each image, half of them flipped.

    batch: its pixels on the device; crop_scale: smallest and largest share of the area
    -> b c size size, normalised.
    """
    # Departure: the paper adds RandAugment, Mixup and CutMix.
    u = torch.rand(len(batch.sizes), 1 + 2 * TRIES + 2, generator=generator)
    flip = u[:, 0] < 0.5  # the others are crop_boxes' own
    boxes = crop_boxes(u[:, 1:], batch.sizes, crop_scale)
    return normalize_pixels(crop_and_resize(batch, boxes, flip, size))


def check_finite(loss_and_norm: Tensor, step: int, lr: float) -> None:
    """Raise FloatingPointError if the loss, or the norm of its gradient, is nan or infinite."""
    if not torch.isfinite(loss_and_norm):
        raise FloatingPointError(
            f"the loss is not finite at step {step}; use a learning rate lower than {lr}."
        )


def train_classifier(
    model: Classifier,
    images: Dataset,
    labels: Tensor,
    indices: list[int],
    config: FinetuneConfig,
    lr: float,
    layer_decay: float,
    seed: int,
    verbose: bool = False,
) -> None:
    """Train a classifier in place on images[indices] alone (paper, Appendix A.4).

    labels: one class number for each of `images`; lr: the highest learning rate, of the head;
    verbose: print the loss ten times. Raises FloatingPointError if the loss or its gradient is not
    finite.
    """
    device = model.classifier.weight.device
    batch_size = min(config.batch_size, len(indices))
    steps = max(config.steps, math.ceil(config.epochs * len(indices) / batch_size))
    # Departure: bfloat16 where the machine is fast in it; the paper states no precision.
    bfloat16 = choose_precision(config.precision, device) == "bfloat16"

    generator = generator_for(seed, CROPS)
    torch.manual_seed(seed)  # of stochastic depth

    model.train()
    groups = layerwise_groups(model, lr, layer_decay, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    factor = partial(learning_rate_factor, steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    normalize_pixels = Preprocessor.from_config(model.config).normalize
    batches = shuffled_batches(indices, batch_size, generator)
    for step, chosen in zip(range(steps), batches, strict=False):
        batch = images.__getitems__(chosen)
        pixels = crop_and_flip(
            batch.on(device),
            config.crop_scale,
            model.config.image_size,
            generator,
            normalize_pixels,
        )
        batch.give_back()
        targets = send(labels[batch.indices], device)

        optimizer.zero_grad(set_to_none=True)
        with autocast(device, bfloat16):
            logits = model(pixels).logits
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        check_finite(loss.detach() + norm, step, lr)
        optimizer.step()
        schedule.step()

        if verbose and (step + 1) % math.ceil(steps / 10) == 0:
            say(f"step {step + 1}/{steps}  loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def classify(model: Classifier, images: Dataset, indices: list[int]) -> Tensor:
    """Class probabilities of whole images, which must be readable. -> b classes, on the CPU."""
    device = model.classifier.weight.device
    size = model.config.image_size
    representations, _ = embed_images(model.vit, images, indices, size, device)
    logits = model.classifier(model.vit.norm(representations.to(device)))
    return logits.softmax(dim=-1).cpu()


# ---- The table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """All that predictions are made from. It holds no validation label: only `measure` sees those.

    config: the settings
    encoders: "pretrained"; "untrained", the same as it was before pretraining; "pixels": None
    data: the images and the labels of the training images (val_labels is None)
    val: the validation images to predict
    columns: the labelled sets of the table
    tuning: training images in no draw, class by class, to choose settings on
    cache: the features that were computed and the settings that were chosen so far
    """

    config: FinetuneConfig
    encoders: dict[str, ViTMSNModel | None]
    data: Images
    val: list[int]
    columns: Columns
    tuning: list[int]
    cache: dict = field(default_factory=dict)

    def features(self, kind: str, part: str, indices: list[int]) -> Tensor:
        """Frozen features of some images, computed once. -> b d, float32, on the CPU.

        kind: the name of an encoder, whose representations they are, or "pixels": raw pixels;
        part: "train" or "val"; indices: of the images in that part.
        """
        key = (kind, part, tuple(indices))
        if key in self.cache:
            return self.cache[key]

        encoder = self.encoders["pretrained"]
        size = encoder.config.image_size
        if kind == "pixels":
            size = min(size, self.config.pixel_size)

        # Departure: whole images, squashed to a square, where the paper takes one centre crop.
        # Departure: the representation is the class token before the final norm; the paper does not
        # say whether before or after, the official numbers do.
        images = self.data.train if part == "train" else self.data.val
        features, _ = embed_images(
            self.encoders[kind], images, indices, size, encoder.cls_token.device
        )
        self.cache[key] = features
        return features

    def trained(
        self, method: str, indices: list[int], seed: int, lr: float, verbose: bool = False
    ) -> Classifier:
        """A classifier trained on the labelled images `indices`: "finetune" or "scratch".

        Fine-tuning starts from the pretrained encoder and a probe on its representations. From
        scratch, encoder and head are untrained and all layers learn at the same rate.
        """
        labels = self.data.train_labels
        classes = self.data.classes
        if method == "finetune":
            features = center_and_scale(self.features("pretrained", "train", indices))
            probe = fit_logistic_probe(
                features, labels[indices], len(classes), HEAD_L2, HEAD_TOLERANCE
            )
            model = build_classifier(self.encoders["pretrained"], classes, self.config, probe)
            layer_decay = self.config.layer_decay
        else:
            model = build_classifier(self.encoders["untrained"], classes, self.config, None)
            layer_decay = 1.0

        train_classifier(
            model, self.data.train, labels, indices, self.config, lr, layer_decay, seed, verbose
        )
        return model

    def predict(self, method: str, labelled: list[int], seed: int) -> Tensor:
        """The class of each validation image, from the labels of the training images `labelled`.

        -> class numbers, as many as `val` has images.
        """
        return self.predict_images(method, labelled, seed, "val", self.val)

    def predict_images(
        self, method: str, labelled: list[int], seed: int, part: str, wanted: list[int]
    ) -> Tensor:
        """The classes of the images `wanted` of a part of the data, "train" or "val"."""
        if method in TRAINED:
            lr = self.chosen("scratch_lr" if method == "scratch" else "lr", method)
            model = self.trained(method, labelled, seed, lr)
            images = self.data.train if part == "train" else self.data.val
            return classify(model, images, wanted).argmax(dim=-1)

        kind = method if method in ("untrained", "pixels") else "pretrained"
        features = self.features(kind, "train", labelled)
        wanted_features = self.features(kind, part, wanted)
        labels = self.data.train_labels[labelled]
        if method in KNN:
            return knn_predict(features, labels, wanted_features, **KNN[method])

        w = fit_logistic_probe(
            center_and_scale(features),
            labels,
            len(self.data.classes),
            self.chosen("l2", method),
            PROBE_TOLERANCE,
        )
        return (center_and_scale(wanted_features) @ w.T).argmax(dim=-1)

    def chosen(self, setting: str, method: str) -> float:
        """The value of a setting of CHOICES for a method: as given, or the best on training images
        that no draw uses. It is looked for once."""
        given = getattr(self.config, setting)
        if given:
            return given

        key = (setting, method)
        if key not in self.cache:
            self.cache[key] = self.best_on_tuning_images(setting, method)
        return self.cache[key]

    def best_on_tuning_images(self, setting: str, method: str) -> float:
        """The candidate with which most tuning images are predicted right.

        In each fold a fifth of them has labels and the other four fifths are predicted: labelled
        sets are as small as in the table, and the test is less noisy.
        """
        choice = CHOICES[setting]
        right = dict.fromkeys(choice.candidates, 0)
        tested: set[int] = set()
        for fold in range(choice.folds):
            labelled, held_out = self.split_tuning_images(fold)
            if not labelled or not held_out:
                continue
            truth = self.data.train_labels[held_out]
            tested.update(held_out)
            for value in choice.candidates:
                trial = replace(self, config=replace(self.config, **{setting: value}))
                predicted = trial.predict_images(method, labelled, 0, "train", held_out)
                right[value] += (predicted == truth).sum().item()

        if not tested:
            return choice.default
        best = max(right, key=right.get)
        flag = "--" + setting.replace("_", "-")
        say(
            f"{method}: {flag} {best:g}, the best on {len(tested)} training images that no draw "
            "uses",
            sys.stderr,
        )
        return best

    def split_tuning_images(self, fold: int) -> tuple[list[int], list[int]]:
        """Every fifth tuning image of each class, from number `fold` on; and the others."""
        per_class = max(1, len(self.tuning) // len(self.data.classes))
        labelled = []
        held_out = []
        for place, image in enumerate(self.tuning):
            place_in_class = place % per_class
            if place_in_class % TUNING_FOLDS == fold:
                labelled.append(image)
            else:
                held_out.append(image)
        return labelled, held_out


CELL_COLUMNS = ("method", "column", "labels", "labels_per_class", "mean", "sd", "draws")


def measure(experiment: Experiment, val_labels: Tensor, folder: Path) -> None:
    """Print the table, method by method; table.csv and table.png in the folder grow with it.

    val_labels: the class of every validation image of the data.
    """
    truth = val_labels[experiment.val]
    print_head(experiment)

    cells = []
    for method in experiment.config.listed("methods"):
        line = [
            measure_cell(experiment, method, column, truth)
            for column in columns_of(experiment, method)
        ]
        cells += line
        write_csv(folder / "table.csv", CELL_COLUMNS, cells)
        save_plot(folder / "table.png", [accuracy_panel(cells)])
        print_line(experiment, method, line)


def columns_of(experiment: Experiment, method: str) -> list[str]:
    """The columns in which a method is measured.

    Training on all labels takes long. It is done only where --fraction asks for it with a 1.
    """
    columns = list(experiment.columns)
    asked_for_all = 1 in experiment.config.listed("fraction")
    if method in TRAINED and not asked_for_all:
        columns = [column for column in columns if column != ALL_LABELS]
    return columns


def measure_cell(experiment: Experiment, method: str, column: str, truth: Tensor) -> dict:
    """One cell of the table, by the names of CELL_COLUMNS. Accuracies are shares, 0 to 1.

    truth: the class of each image that the experiment predicts. "sd" is the standard deviation
    over the draws (n - 1 in the denominator), or "" of a single draw.
    """
    draws = experiment.columns[column]
    seeds = experiment.config.listed("seeds")
    accuracies = []
    for i, draw in enumerate(draws):
        seed = seeds[i % len(seeds)]  # label lists may be more than the seeds
        predicted = experiment.predict(method, draw, seed)
        accuracies.append((predicted == truth).double().mean().item())

    labels = np.mean([len(draw) for draw in draws])
    return {
        "method": method,
        "column": column,
        "labels": labels,
        "labels_per_class": labels / len(experiment.data.classes),
        "mean": np.mean(accuracies),
        "sd": np.std(accuracies, ddof=1) if len(accuracies) > 1 else "",
        "draws": " ".join(map(str, accuracies)),
    }


def print_head(experiment: Experiment) -> None:
    """Print what the table shows and the names of its columns."""
    print(
        f"\naccuracy in % on {len(experiment.val)} validation images, mean ± standard deviation "
        f"over the draws; at least {experiment.config.steps} updates in trained cells"
    )
    print(f"{'':<10}" + "".join(f"{name:>13}" for name in experiment.columns))


def print_line(experiment: Experiment, method: str, line: list[dict]) -> None:
    """Print the cells of one method, in per cent; "-" where it is not measured."""
    texts = dict.fromkeys(experiment.columns, "-")
    for cell in line:
        text = f"{100 * cell['mean']:.1f}"
        if cell["sd"] != "":
            text += f" ± {100 * cell['sd']:.1f}"
        texts[cell["column"]] = text
    print(f"{method:<10}" + "".join(f"{text:>13}" for text in texts.values()), flush=True)


def accuracy_panel(cells: list[dict]) -> Panel:
    """The plot of a table: for each method a curve, accuracy in % against labels per class.

    Columns that are a share of the labels stay out: they have as many labels per class as other
    columns, or about as many, but not as many of each class. All labels are not a share.
    """
    curves: dict[str, list[Point]] = {}
    ticks = {}
    for cell in cells:
        is_all = cell["column"] == ALL_LABELS
        if cell["column"].endswith("%") and not is_all:
            continue
        x = cell["labels_per_class"]
        ticks[x] = f"all ({x:g})" if is_all else f"{x:g}"
        point = Point(x, 100 * cell["mean"], 100 * (cell["sd"] or 0))
        curves.setdefault(cell["method"], []).append(point)

    return Panel(
        title="accuracy in %: mean and standard deviation over draws",
        x_label="labelled images per class, on a logarithmic axis",
        curves={method: sorted(points) for method, points in curves.items()},
        log_x=True,
        x_ticks=ticks,
        y_range=(0, 100),
    )


def write_csv(path: Path, columns: tuple[str, ...], records: list[dict]) -> None:
    """Write records, dicts by the names of the columns, as a CSV file; whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    # The name of a file may be no UTF-8. Its bytes are written as they are.
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def load_model(config: FinetuneConfig, classifier: bool = False) -> ViTMSNModel | Classifier:
    """The encoder or classifier of a checkpoint, at --image-size, in evaluation mode.

    Raises UsageError if there is no such checkpoint or it does not hold what is asked for, and
    ValueError or OSError if it is damaged.
    """
    check_is_there(config.checkpoint)
    try:
        model_config, weights = read_pretrained(config.checkpoint, None)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    if classifier and "classifier.weight" not in weights:
        command = f"python finetune.py train --checkpoint {shlex.quote(config.checkpoint)}"
        if not saved_settings(run_folder(config.checkpoint)).get("data"):
            command += " --data FOLDER"
        raise UsageError(f"{config.checkpoint} has no classifier; make one: {command}")

    if config.image_size and config.image_size != model_config.image_size:
        patch_size = model_config.patch_size
        if config.image_size % patch_size:
            raise UsageError(
                f"image_size is no whole number of this checkpoint's patches of {patch_size} "
                "pixels."
            )
        model_config = with_image_size(model_config, config.image_size)
        weights["pos_embed"] = weights["pos_embed"].float()
        weights = resample_positions(weights, model_config)

    model_class = Classifier if classifier else ViTMSNModel
    model = model_class(model_config)
    load_weights(model, weights, config.checkpoint)
    if not classifier:  # predict follows them all
        note_other_processing(model_config)
    set_threads(config.threads, model_config.hidden_size)
    return model.to(start_alone(config.device)).eval()


def note_other_processing(config: ViTMSNConfig) -> None:
    """Say what of the model's preprocessor_config.json nothing but predict follows."""
    for change in Preprocessor.from_config(config).not_statistics(config):
        say(
            f"preprocessor_config.json: {change} is not followed here; pictures are squashed to "
            f"{config.image_size} pixels, bilinear",
            sys.stderr,
        )


def check_is_there(checkpoint: str) -> None:
    """Raise UsageError for a checkpoint that is not there, unless it may be a name on the hub."""
    if Path(checkpoint).exists() or may_be_on_the_hub(checkpoint):
        return
    runs = ", ".join(str(run) for run in runs_by_age(with_checkpoint=True)[:5])
    raise UsageError(
        f"there is no checkpoint {checkpoint}: it is neither a file nor a folder; "
        f"runs/ has {runs or 'none'}."
    )


def run_folder(checkpoint: str) -> Path:
    """The run that a checkpoint is or lies in; the current folder if it belongs to no run."""
    path = Path(checkpoint)
    for folder in (path, path.parent):
        if (folder / "checkpoint.pt").is_file():
            return folder
    return Path(".")


def saved_settings(run: Path) -> dict:
    """The settings with which a run was pretrained; none if it has no config.json."""
    path = run / "config.json"
    if not path.is_file():
        return {}
    return json.loads(path.read_text())


def picture_rules(config: FinetuneConfig, model: ViTMSNModel | Classifier) -> PictureRules:
    """How pictures become pixels: as flags say, else as in the model's training.

    Raises UsageError for a background that is no colour, or if config.json tells nonsense.
    """
    try:
        rules = PictureRules.from_config(model.config)
        if config.background:
            rules = replace(rules, background=config.background)
        for name in ("integer_range", "float_range"):
            if getattr(config, name) != FROM_THE_VALUES:
                rules = replace(rules, **{name: getattr(config, name)})
        if config.max_megapixels:
            rules = replace(rules, max_megapixels=config.max_megapixels)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return rules


def open_labelled_data(
    source: str, saved: dict, encoder: ViTMSNModel, rules: PictureRules
) -> Images:
    """The labelled images that `source` names, as in --data.

    saved: the settings of the encoder's run, which say where CIFAR-10 lies and from which seed the
    synthetic images are. Raises UsageError if the images have no labels.
    """
    data = open_data(
        TrainConfig(
            data=source,
            data_dir=saved.get("data_dir", "data"),
            seed=saved.get("seed", 0),
            image_size=encoder.config.image_size,
            patch_size=encoder.config.patch_size,
            focal_views=0,
            **asdict(rules),
        )
    )
    if data.val is None:
        raise UsageError(
            f"this takes labels, in folders train/CLASS/* and val/CLASS/*: {data.why_no_labels}."
        )
    return data


def choose_validation_images(
    config: FinetuneConfig, data: Images, unreadable: set[str]
) -> list[int]:
    """The validation images to predict: --val-images of them, or all, without unreadable ones.

    They are the same for all cells and seeds. -> their indices, in rising order.
    """
    order = torch.randperm(len(data.val), generator=generator_for(0, VALIDATION_IMAGES))
    wanted = config.val_images or len(data.val)
    chosen = order[:wanted].sort().values
    return readable(data.val, chosen.tolist(), unreadable)


def newest_labelled_run(config: FinetuneConfig) -> Path:
    """The newest run in runs/ that was on images with labels, or any with --data. Which one it is,
    and which ones were passed over, is said on stderr. Raises UsageError if there is none."""
    runs = runs_by_age(with_checkpoint=True)
    for run in runs:
        if config.data or has_labels(saved_settings(run)):
            say(f"the newest run: {run} (another one by --checkpoint)", sys.stderr)
            return run
        say(f"{run} is on images without labels: passed over", sys.stderr)
    if runs:
        raise UsageError(
            "all runs in runs/ are on images without labels; say which run and which labelled "
            "images: --checkpoint, --data."
        )
    raise UsageError(
        "there is no run in runs/; pretrain one by python train_msn.py, or pass --checkpoint."
    )


def has_labels(saved: dict) -> bool:
    """Whether the images of a run had labels, by its settings. True if they are not there to look
    at, so that opening them says what is wrong."""
    source = saved.get("data", "")
    if source in ("synthetic", "cifar10") or not Path(source).is_dir():
        return True
    return open_data(TrainConfig(data=source, cache_mb=0)).val is not None


def open_experiment(config: FinetuneConfig) -> tuple[Experiment, Tensor, Path]:
    """Load the encoder, open the data, draw the labelled images.

    -> the experiment, the labels of all validation images, and the run's folder, in which results
    go by default. Raises UsageError if something is missing.
    """
    if not config.checkpoint:
        config = replace(config, checkpoint=str(newest_labelled_run(config)))
    check_is_there(config.checkpoint)
    run = run_folder(config.checkpoint)
    saved = saved_settings(run)
    source = config.data or saved.get("data")
    if not source:
        raise UsageError(f"{config.checkpoint} does not say on which images to work; pass --data.")

    encoder = load_model(config)
    warn_of_slow_precision(config.precision, encoder.cls_token.device)
    config = with_published_settings(config, encoder.config.hidden_size)
    data = open_labelled_data(source, saved, encoder, picture_rules(config, encoder))
    if data.picture_rules and data.picture_rules.changes():  # a classifier is saved with them
        encoder.config.extra["picture_rules"] = data.picture_rules.changes()
    unreadable: set[str] = set()  # names of files
    columns, tuning = draw_columns(config, data, unreadable)
    val = choose_validation_images(config, data, unreadable)

    draws = all_draws(columns)
    if not val or not draws or not all(draws):
        raise UsageError(
            "no readable validation image is left, none of a label list, or no column is asked for."
        )
    first_line = (
        f"{config.checkpoint}: {len(data.train)} training images of {len(data.classes)} classes, "
        f"{len(val)} of {len(data.val)} validation images; {len(unreadable)} can't be read"
    )
    say("\n".join([first_line, *data.notes]), sys.stderr)

    torch.manual_seed(0)  # the untrained encoder is the same in all cells
    # As pretraining starts it. Its projection head, here of width 1, is not used.
    untrained = MSNEncoder(encoder.config, hidden_dim=1, output_dim=1)
    encoders = {
        "pretrained": encoder,
        "untrained": untrained.to(encoder.cls_token.device),
        "pixels": None,
    }
    without_val_labels = data._replace(val_labels=None)
    experiment = Experiment(config, encoders, without_val_labels, val, columns, tuning)
    return experiment, data.val_labels, run


def make_table(config: FinetuneConfig) -> None:
    """The label-efficiency table, as text, CSV and plot."""
    experiment, val_labels, run = open_experiment(config)
    folder = Path(config.output_dir or run / "finetune")
    check_writable(folder / "table.csv", "--output-dir")
    measure(experiment, val_labels, folder)
    write_file(folder / "config.json", json.dumps(asdict(experiment.config), indent=2).encode())
    say(f"written: {folder}/table.csv, table.png, config.json", sys.stderr)


# ---- Using a model: train, predict, attention, embed, neighbours ---------------------------------

PICTURE_CACHE = 2**28  # bytes of decoded pictures to keep in memory
MOST_QUERIES = 8  # lines on a sheet of neighbours
HIGHLIGHT = np.array([255.0, 90.0, 0.0])  # the colour of attention
MOST_HIGHLIGHT = 0.85  # its share where most attention goes
FILES_AT_ONCE = 32  # pictures in a batch of predict
ATTENTION_CELL = 320  # pixels, side of a picture on a sheet of attention maps


def train_and_save(config: FinetuneConfig) -> None:
    """Fine-tune on one labelled set; save the classifier and its accuracy per class.

    Raises UsageError if the settings ask for more labelled sets than one.
    """
    if count_draws(config) != 1:
        raise UsageError(
            "train takes one labelled set: one --labels-per-class, one --fraction or one "
            "--label-list."
        )
    experiment, val_labels, run = open_experiment(config)
    folder = Path(config.output_dir or run / "classifier")
    check_writable(folder / "config.json", "--output-dir")

    (draw,) = all_draws(experiment.columns)
    seed = config.listed("seeds")[0]
    model = experiment.trained("finetune", draw, seed, experiment.config.lr, verbose=True)
    model.save_pretrained(folder)

    truth = val_labels[experiment.val]
    predicted = classify(model, experiment.data.val, experiment.val).argmax(dim=-1)
    records = class_accuracies(predicted, truth, experiment.data.classes)
    write_csv(folder / "accuracy.csv", ("class", "images", "accuracy"), records)
    for record in records:
        print(f"{record['class']:<20} {record['accuracy']:7.1%} of {record['images']}")
    print(f"saved: {folder}")


def class_accuracies(predicted: Tensor, truth: Tensor, classes: list[str]) -> list[dict]:
    """How many images of each class there are and which share is right; at the end, of "all".

    predicted, truth: b class numbers. A class of which there is no image is left out.
    """
    right = (predicted == truth).double()
    records = []
    for c, name in enumerate(classes):
        is_class = truth == c
        if is_class.any():
            accuracy = right[is_class].mean().item()
            records.append({"class": name, "images": int(is_class.sum()), "accuracy": accuracy})
    records.append({"class": "all", "images": len(truth), "accuracy": right.mean().item()})
    return records


def number_of(number: int, thing: str) -> str:
    """A number of things, such as "1 picture" and "2 pictures"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def open_pictures(
    names: list[str], model: ViTMSNModel | Classifier, config: FinetuneConfig
) -> ImageFiles:
    """The readable pictures among files and all those in folders; the others are named on stderr.

    Raises UsageError if none is readable.
    """
    missing = [name for name in names if not Path(name).exists()]
    if len(missing) == len(names):
        raise UsageError(f"{missing[0]} is not found.")
    for name in missing:
        say(f"{name} is not found: skipped", sys.stderr)

    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = find_pictures(path)
            paths += found.pictures
            for line in found.summary():
                say(f"{path}: {line}", sys.stderr)
        elif path.exists():
            paths.append(path)

    side = 2 * model.config.image_size
    wanted = picture_rules(config, model)
    files = ImageFiles(paths, side, cache_bytes=0, check=False, rules=wanted)
    sample = files.read_sample()  # this completes the rules
    good = readable(files, list(range(len(paths))), set())
    if not good:
        raise UsageError(f"no readable picture in {number_of(len(paths), 'file')}.")
    sample = replace(sample, unreadable={})  # those are named already
    found = number_of(len(good), "picture")
    skipped = number_of(len(paths) - len(good), "unreadable file")
    first_line = f"{found}, {skipped} skipped"
    say("\n".join([first_line, *sample.notes(None, files.rules, wanted)]), sys.stderr)
    pictures = [paths[i] for i in good]
    return ImageFiles(pictures, side, PICTURE_CACHE, check=False, rules=files.rules)


def predict(config: FinetuneConfig, model: Classifier, pictures: ImageFiles) -> None:
    """Print the likeliest classes of each picture; with --csv, write them too.

    Pixels are made as the model's preprocessor_config.json says.
    """
    if config.csv:
        check_writable(Path(config.csv), "--csv")
    probabilities = classify_files(model, pictures)
    best = probabilities.sort(dim=-1, descending=True)
    num_guesses = min(config.top, probabilities.shape[1])

    lines = []
    records = []
    for i, path in enumerate(pictures.paths):
        guesses = []
        for place in range(num_guesses):
            name = model.config.id2label[best.indices[i, place].item()]
            probability = best.values[i, place].item()
            guesses.append(f"{name} {probability:.1%}")
            records.append(
                {
                    "image": path,
                    "place": place + 1,
                    "class": name,
                    "probability": f"{probability:.6f}",
                }
            )
        lines.append(f"{path}: " + ", ".join(guesses))

    if config.csv:
        write_csv(Path(config.csv), ("image", "place", "class", "probability"), records)
    print("\n".join(lines))


@torch.no_grad()
def classify_files(model: Classifier, pictures: ImageFiles) -> Tensor:
    """Class probabilities of picture files, which must be readable. -> b classes, on the CPU."""
    device = model.classifier.weight.device
    probabilities = []
    for first in range(0, len(pictures), FILES_AT_ONCE):
        paths = pictures.paths[first : first + FILES_AT_ONCE]
        pixels = preprocess(paths, model.config, rules=pictures.rules).to(device)
        logits = model(pixels, interpolate_pos_encoding=True).logits
        probabilities.append(logits.softmax(dim=-1).cpu())
    return torch.cat(probabilities)


def attention(config: FinetuneConfig, model: ViTMSNModel, pictures: ImageFiles) -> None:
    """A sheet per picture: the picture, what the model sees of it, and where each head of the last
    layer looks. Each head has its own scale, from where it looks least to where it looks most."""
    folder = Path(config.output_dir or run_folder(config.checkpoint) / "attention")
    check_writable(folder / "0000.png", "--output-dir")
    large_pictures = ImageFiles(
        pictures.paths, ATTENTION_CELL, PICTURE_CACHE, check=False, rules=pictures.rules
    )
    for i, path in enumerate(pictures.paths):
        seen, maps = attention_maps(model, pictures, i)
        picture = picture_of(large_pictures, i)  # with more pixels than the model sees, if it has
        square = resized(picture, Image.Resampling.BILINEAR)
        large_maps = F.interpolate(maps[None], (ATTENTION_CELL, ATTENTION_CELL), mode="bilinear")[0]

        as_seen = resized(seen, Image.Resampling.NEAREST)
        strip = Strip([Tile(at_least_as_large(picture)), Tile(as_seen)])
        header = ["picture", "as the model sees it"]
        for h, attention_map in enumerate(maps):
            most = 100 * attention_map.max().item()
            caption = f"at most {most:.2g} % on a patch"
            strip.tiles.append(Tile(highlight(square, large_maps[h]), caption))
            header.append(f"head {h + 1}")
        save_sheet(folder / f"{i:04d}-{path.stem}.png", [strip], header, cell=ATTENTION_CELL)
    print(f"written: {number_of(len(pictures), 'sheet')} in {folder}")


def resized(picture: np.ndarray, how: Image.Resampling) -> np.ndarray:
    """A picture as a square of ATTENTION_CELL pixels. h w 3, uint8."""
    image = Image.fromarray(picture).resize((ATTENTION_CELL, ATTENTION_CELL), how)
    return np.asarray(image)


@torch.no_grad()
def attention_maps(model: ViTMSNModel, pictures: ImageFiles, i: int) -> tuple[np.ndarray, Tensor]:
    """Picture i as the model sees it, and how much its class token looks where in the last layer.

    -> size size 3 (uint8); h size size, of each head, resized from patches to pixels.
    """
    size = model.config.image_size
    flat, _ = embed_images(None, pictures, [i], size, torch.device("cpu"))
    pixels = flat.reshape(1, model.config.num_channels, size, size)

    output = model(pixels.to(model.cls_token.device), output_attentions=True)
    last_layer = output.attentions[-1]  # b h n n, where token 0 is the class token
    to_patches = last_layer[:, :, 0, 1:].cpu()
    grid = to_patches.unflatten(-1, (model.config.grid_size, model.config.grid_size))
    maps = F.interpolate(grid, (size, size), mode="bilinear")
    return to_picture(pixels[0]), maps[0]


def at_least_as_large(picture: np.ndarray) -> np.ndarray:
    """The picture, enlarged if its longer side is less than ATTENTION_CELL. h w 3, uint8."""
    image = Image.fromarray(picture)
    factor = ATTENTION_CELL / max(image.size)
    if factor > 1:
        size = (round(image.width * factor), round(image.height * factor))
        image = image.resize(size, Image.Resampling.NEAREST)
    return np.asarray(image)


def highlight(picture: np.ndarray, attention_map: Tensor) -> np.ndarray:
    """The picture in grey, and the more of it in HIGHLIGHT, the more attention goes there.

    The least of the map is plain grey, the most is MOST_HIGHLIGHT. picture: size size 3 (uint8),
    attention_map: size size -> size size 3 (uint8).
    """
    low, high = attention_map.aminmax()
    share = (attention_map - low) / (high - low).clamp(min=1e-12)
    opacity = MOST_HIGHLIGHT * share.unsqueeze(-1).numpy()
    grey = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))
    return (grey + opacity * (HIGHLIGHT - grey)).round().astype(np.uint8)


def embed(config: FinetuneConfig, model: ViTMSNModel, pictures: ImageFiles) -> None:
    """Write features.npz: the representation of each picture, its path and its class.

    features: b d, float32; paths: b; classes: b, the names of the folders that the pictures lie in.
    """
    target = Path(config.output or "features.npz")
    check_writable(target, "--output")
    indices = list(range(len(pictures)))
    features, _ = embed_images(
        model, pictures, indices, model.config.image_size, model.cls_token.device
    )
    save = partial(
        np.savez,
        features=features.numpy(),
        paths=[str(path) for path in pictures.paths],
        classes=[path.parent.name for path in pictures.paths],
    )
    write_file(target, save)
    print(f"written: {target}, {number_of(len(features), 'row')} of {features.shape[1]} features")


def neighbours(config: FinetuneConfig, model: ViTMSNModel, pictures: ImageFiles) -> None:
    """A sheet of evenly spaced queries, each with the nearest of (at most 2,000) other pictures.

    Raises UsageError for a single picture.
    """
    if len(pictures) < 2:
        raise UsageError("neighbours takes two pictures or more.")

    every = max(2, math.ceil(len(pictures) / MOST_QUERIES))
    queries = pictures.paths[::every]
    others = [path for i, path in enumerate(pictures.paths) if i % every]
    data = Images(
        classes=[],
        train=ImageFiles(others, pictures.side, PICTURE_CACHE, check=False, rules=pictures.rules),
        train_labels=None,
        val=ImageFiles(queries, pictures.side, PICTURE_CACHE, check=False, rules=pictures.rules),
        val_labels=None,
    )
    name = f"{pictures.paths[0].parent.resolve().name or 'pictures'}.png"
    target = Path(config.output or run_folder(config.checkpoint) / "neighbours" / name)
    check_writable(target, "--output")
    save_neighbours(target, model, data, model.config.image_size, model.cls_token.device)
    print(f"written: {target}")


# ---- The command line ----------------------------------------------------------------------------


class Command(NamedTuple):
    """A command that uses a model: what it runs, and which flags besides COMMON_FLAGS it takes."""

    run: Callable[[FinetuneConfig, ViTMSNModel | Classifier, ImageFiles], None]
    flags: tuple[str, ...]


COMMANDS = {
    "predict": Command(predict, flags=("top", "csv")),
    "attention": Command(attention, flags=("output_dir",)),
    "embed": Command(embed, flags=("output",)),
    "neighbours": Command(neighbours, flags=("output",)),
}
PICTURE_FLAGS = ("background", "integer_range", "float_range", "max_megapixels")
COMMON_FLAGS = ("image_size", "device", "threads", *PICTURE_FLAGS)  # of all of them
THEIR_FLAGS = ("top", "csv", "output")  # of no use to train and the table
TABLE_FLAGS = ("methods", "full", "l2", "pixel_size", "scratch_lr")  # of no use to train

TRAIN_DEFAULTS = {
    "labels_per_class": "",
    "fraction": "1",
    "seeds": "0",
    "full": False,
    "methods": "finetune",
    "lr": CHOICES["lr"].default,
    "epochs": 10.0,
}
# Departure: drop path 0.1, where the paper has 0.2.
TRAIN_ON_ALL_LABELS = {"crop_scale": (0.3, 1.0), "drop_path_rate": 0.1}


def train_settings(given: dict) -> dict:
    """The settings of `train` from the flags that were given. Without any, it takes all labels."""
    few_labels = (
        given.get("labels_per_class")
        or given.get("label_list")
        or given.get("fraction", "1") not in ("1", "1.0")
    )
    if few_labels:
        return {**TRAIN_DEFAULTS, "fraction": "", **given}
    return {**TRAIN_DEFAULTS, **TRAIN_ON_ALL_LABELS, **given}


def flags_without_use(command: str) -> set[str]:
    """The fields of FinetuneConfig that a command, or the table (""), makes no use of."""
    if command in COMMANDS:
        used = {*COMMON_FLAGS, *COMMANDS[command].flags}
        return {f.name for f in fields(FinetuneConfig)} - used
    if command == "train":
        return {*THEIR_FLAGS, *TABLE_FLAGS}
    return set(THEIR_FLAGS)


def what_it_does(function: Callable) -> str:
    """A function's docstring for users: without its last paragraph, on errors."""
    return inspect.getdoc(function).partition("\n\nRaises")[0]


def make_parser(command: str) -> argparse.ArgumentParser:
    """The command line of a command, or of the table ("")."""
    usage = "%(prog)s [--flag value ...]; more by --help"
    description = __doc__
    defaults = {}
    if command in COMMANDS:
        usage = "%(prog)s CHECKPOINT IMAGES [IMAGES ...] [--flag value ...]; more by --help"
        description = what_it_does(COMMANDS[command].run)
    if command == "train":
        description = what_it_does(train_and_save)
        defaults = {**TRAIN_DEFAULTS, **TRAIN_ON_ALL_LABELS}

    parser = argparse.ArgumentParser(
        prog=f"finetune.py {command}".strip(),
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command in COMMANDS:
        checkpoint_help = "a run of ours, a transformers folder or an original .pth.tar"
        parser.add_argument("source", metavar="CHECKPOINT", help=checkpoint_help)
        parser.add_argument("images", metavar="IMAGES", nargs="+", help="pictures, or folders")
    add_flags(parser, FinetuneConfig, defaults, hidden=flags_without_use(command))
    return parser


def check_order(command: str, source: str, images: list[str]) -> None:
    """Raise UsageError if the pictures come before the checkpoint."""
    checkpoints = [name for name in images if holds_weights(Path(name))]
    if holds_weights(Path(source)) or not (checkpoints or is_picture(Path(source))):
        return
    checkpoint = checkpoints[0] if checkpoints else "CHECKPOINT"
    raise UsageError(
        f"{source} is no checkpoint; the checkpoint comes first, then the pictures: "
        f"finetune.py {command} {checkpoint} {source}"
    )


def holds_weights(path: Path) -> bool:
    """Whether this is a file that may be a checkpoint, or a folder with weights."""
    if path.is_file():
        return path.suffix.lower() in (".pt", ".pth", ".tar", ".bin", ".safetensors")
    return any((path / name).is_file() for name in WEIGHT_FILES)


def is_picture(path: Path) -> bool:
    """Whether its ending is that of a file which Pillow or we can open."""
    return path.is_file() and path.suffix.lower() in picture_endings()


def command_in(argv: list[str]) -> str:
    """The command that a command line begins with, "" for none. Raises UsageError for others."""
    if not argv or argv[0].startswith("-"):
        return ""
    commands = ("train", *COMMANDS)
    if argv[0] not in commands:
        nearest = difflib.get_close_matches(argv[0], commands, n=1)
        question = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(
            f"finetune.py has no command {argv[0]}; use {', '.join(commands)}, or no command for "
            f"the table.{question}"
        )
    return argv[0]


def main(argv: list[str]) -> None:
    """The table, or what the first word says."""
    command = command_in(argv)
    if command:
        argv = argv[1:]
    given = vars(make_parser(command).parse_args(argv))
    source = given.pop("source", None)
    images = given.pop("images", None)

    unused = given.keys() & flags_without_use(command)
    if unused:
        flag = min(unused).replace("_", "-")
        raise UsageError(f"{command or 'the table'} has no use for --{flag}.")

    if command in COMMANDS:
        check_order(command, source, images)
        config = FinetuneConfig(checkpoint=source, **given)
        model = load_model(config, classifier=command == "predict")
        COMMANDS[command].run(config, model, open_pictures(images, model, config))
    elif command == "train":
        train_and_save(FinetuneConfig(**train_settings(given)))
    else:
        make_table(FinetuneConfig(**given))


if __name__ == "__main__":
    sys.exit(run_program(main))
