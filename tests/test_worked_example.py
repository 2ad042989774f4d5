"""The worked example of `python vitmsn.py`: what it prints, held against NumPy and pencil."""

import contextlib
import io
import math
import re

import numpy as np
import pytest
import torch

from vitmsn import sharpen, sinkhorn, worked_example

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TAU = 1 / (3 * math.log(2))
ANCHORS = np.array([[2, 1, -2], [4, 4, 2]])
TARGETS = np.array([[3, 0, 0], [2, 2, 1]])
TOGETHER = np.array([[3, 0, 0], [3, 0, 0]])
APART = np.array([[3, 0, 0], [0, 3, 0]])


# The objective once more, from the paper's formulas: plain probabilities in float64, no logarithm
# but where the formula has one.
def cosines(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)  # the prototypes are the axes


def normalised(p):
    return p / p.sum(axis=1, keepdims=True)


def assignments(vectors):
    return normalised(np.exp(cosines(vectors) / TAU))


def sinkhorn_rounds(p, count):
    """p, then p after each round."""
    rounds = [p]
    for _ in range(count):
        balanced = rounds[-1] / rounds[-1].sum(axis=0)
        rounds.append(normalised(balanced))
    return rounds


def entropy(p):
    return -(p * np.log(p)).sum()


def objective(anchors, targets, sharpening=0.5, rounds=3):
    """p+ of the targets, cross-entropy, me-max and their sum."""
    p = assignments(anchors)
    sharpened = normalised(assignments(targets) ** (1 / sharpening))
    p_plus = sinkhorn_rounds(sharpened, rounds)[-1]

    cross_entropy = -(p_plus * np.log(p)).sum(axis=1).mean()
    me_max = math.log(3) - entropy(p.mean(axis=0))
    return p_plus, cross_entropy, me_max, cross_entropy + me_max


@pytest.fixture(scope="module")
def output():
    """What `python vitmsn.py` prints."""
    return printed()


def printed() -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        worked_example()
    return text.getvalue()


def part(output: str, number: int) -> str:
    """The part of the output under this number."""
    return re.split(r"^\d  (?=[A-Z])", output, flags=re.MULTILINE)[number]


def paragraph(output: str, start: str) -> str:
    """The paragraph whose first line starts like this."""
    return next(text for text in output.split("\n\n") if text.startswith(start))


def numbers(text: str, label: str) -> list[float]:
    """The numbers of the one line that starts with the label and blanks, without the label's."""
    lines = [line for line in text.splitlines() if re.match(re.escape(label) + r"\s", line)]
    assert len(lines) == 1, f"{len(lines)} lines start with {label!r}"
    return [float(x) for x in NUMBER.findall(lines[0].removeprefix(label))]


def variant(output: str, name: str) -> list[float]:
    """The numbers of a line of part 3: p+ of both images, cross-entropy, me-max, loss."""
    return numbers(part(output, 3), name.ljust(23))


def assert_printed(shown, expected, decimals=3):
    """The numbers shown are the expected ones, rounded."""
    expected = np.concatenate([np.ravel(x) for x in expected])
    np.testing.assert_allclose(shown, expected, rtol=0, atol=0.5001 * 10**-decimals)


def test_the_output_fits_a_page_and_is_the_same_every_time(output):
    """At most 65 lines of at most 80 columns, and the same text in a second run."""
    lines = output.splitlines()
    assert len(lines) <= 65
    assert max(map(len, lines)) <= 80
    assert printed() == output


def test_the_shapes_follow_from_the_sizes_of_images_and_patches(output):
    """Each shape of the three views is what one works out from pixels, patches and mask ratio."""
    whole = (224 // 16) ** 2
    masked = math.floor(whole * 0.85)
    focal = (96 // 16) ** 2
    patch = 3 * 16 * 16

    expected = {
        "pixels          b c height width": [2, 3, 224, 224, 2, 3, 224, 224, 2, 3, 96, 96],
        "patches         b n (c p p)": [2, whole, patch, 2, whole, patch, 2, focal, patch],
        "patches to keep b r (c p p)": [2, whole, patch, 2, masked, patch, 2, focal, patch],
        "class token     b d": [2, 384] * 3,
        "projection      b e": [2, 256] * 3,
        "assignments     b k": [2, 1024] * 3,
    }
    tokens = []
    attention = []
    for kept in (whole, masked, focal):
        tokens += [2, 1 + kept, 384]
        attention += [2, 6, 1 + kept, 1 + kept]
    # The letters of these two hold a number themselves.
    expected["tokens          b (1 + r) d"] = tokens
    expected["attention       b h (1 + r) (1 + r)"] = attention

    shapes = part(output, 1)
    for label, shape in expected.items():
        assert numbers(shapes, label) == shape
    assert f"n = (224 / 16)^2 = {whole}, focal (96 / 16)^2 = {focal}" in shapes
    assert f"r = floor(0.85 n) = {masked}" in shapes


def test_an_untrained_model_guesses(output):
    """The loss of part 1 is near log k, the cross-entropy of a guess among k prototypes."""
    loss, log_k = numbers(part(output, 1), "loss            (v b) k, b k -> 1")
    assert abs(log_k - math.log(1024)) < 0.005
    assert abs(loss - log_k) < 0.5


@pytest.mark.parametrize(("name", "vectors"), [("anchor", ANCHORS), ("target", TARGETS)])
def test_similarities_and_assignments(output, name, vectors):
    """Vectors, cosines, powers of two and p of each view are those of the formula."""
    table = paragraph(part(output, 2), "THE LOSS BY HAND")
    for i in range(2):
        shown = numbers(table, f"{name} {i + 1}")
        assert shown[:3] == vectors[i].tolist()
        assert_printed(shown[3:6], [cosines(vectors)[i]])
        assert_printed(shown[6:9], [2.0 ** (3 * cosines(vectors)[i])])
        assert_printed(shown[9:], [assignments(vectors)[i]])


def test_sharpening(output):
    """The targets' p are squared and divided by the sum of the squares."""
    text = paragraph(part(output, 2), "Sharpen the targets")
    squares = assignments(TARGETS) ** 2
    for i in range(2):
        shown = numbers(text, f"target {i + 1}   p^2")
        assert_printed(shown, [squares[i], squares[i].sum(), squares[i] / squares[i].sum()])


def test_sinkhorn_rounds(output):
    """After none, one, two and three rounds: p+ of both images, sums of columns and of rows."""
    text = paragraph(part(output, 2), "Sinkhorn:")
    rounds = sinkhorn_rounds(normalised(assignments(TARGETS) ** 2), 3)
    table = text.rsplit("\n", 1)[0]  # the last line is one division by hand

    assert_printed(numbers(table, "target 1"), [p[0] for p in rounds], decimals=2)
    assert_printed(numbers(table, "target 2"), [p[1] for p in rounds], decimals=2)
    assert_printed(numbers(table, "column sums"), [p.sum(axis=0) for p in rounds], decimals=2)
    assert_printed(numbers(table, "row sums"), [p.sum(axis=1) for p in rounds], decimals=2)


def test_the_division_by_hand(output):
    """The line that shows the first round divides target 1 by the column sums, then by its own."""
    before, after = sinkhorn_rounds(normalised(assignments(TARGETS) ** 2), 1)
    shown = numbers(paragraph(part(output, 2), "Sinkhorn:"), "target 1, round 1:")
    assert_printed(shown[:6], [np.stack([before[0], before.sum(axis=0)], axis=1)])
    assert_printed(shown[6:], [after[0]], decimals=2)


def test_cross_entropy(output):
    """Factors, products' sum and mean of the cross-entropies of both images."""
    text = paragraph(part(output, 2), "Cross-entropy")
    surprise = -np.log(assignments(ANCHORS))
    p_plus, mean, _, _ = objective(ANCHORS, TARGETS)
    for i in range(2):
        factors = np.stack([p_plus[i], surprise[i]], axis=1)
        assert_printed(numbers(text, f"image {i + 1}"), [factors, p_plus[i] @ surprise[i]])
    assert_printed(numbers(text, "mean"), [mean])


def test_me_max(output):
    """Mean prediction, its entropy and the distance to the largest possible entropy."""
    text = paragraph(part(output, 2), "Me-max")
    mean = assignments(ANCHORS).mean(axis=0)
    factors = np.stack([mean, -np.log(mean)], axis=1)
    _, _, me_max, _ = objective(ANCHORS, TARGETS)
    assert_printed(numbers(text, "mean p"), [mean])
    assert_printed(numbers(text, "H(mean p)"), [factors, entropy(mean)])
    # The minus sign between the two would else be read as that of the second.
    shown = numbers(text.replace(" - ", " "), "me-max")
    assert_printed(shown, [math.log(3), entropy(mean), me_max])


def test_equation_1_is_the_sum_of_its_terms(output):
    """Cross-entropy + 1 x me-max = loss, and with -H in place of me-max it is less by log k."""
    text = paragraph(part(output, 2), "Equation (1)")
    _, cross_entropy, me_max, loss = objective(ANCHORS, TARGETS)
    terms = numbers(text, "Equation (1): cross-entropy + lambda me-max =")
    assert_printed(terms, [cross_entropy, 1, me_max, loss])

    paper = cross_entropy - entropy(assignments(ANCHORS).mean(axis=0))
    assert_printed(numbers(text, "With the paper's -H(mean p) as me-max:"), [paper])


@pytest.mark.parametrize(
    ("name", "anchors", "targets", "changes"),
    [
        ("as above", ANCHORS, TARGETS, {}),
        ("T = 1", ANCHORS, TARGETS, {"sharpening": 1}),
        ("no Sinkhorn", ANCHORS, TARGETS, {"rounds": 0}),
        ("collapse", TOGETHER, TOGETHER, {}),
        ("collapse, no Sinkhorn", TOGETHER, TOGETHER, {"rounds": 0}),
        ("apart, no Sinkhorn", APART, APART, {"rounds": 0}),
    ],
)
def test_variants(output, name, anchors, targets, changes):
    """Each line of part 3 has the numbers of the objective with that one part changed."""
    shown = variant(output, name)
    p_plus, cross_entropy, me_max, loss = objective(anchors, targets, **changes)
    assert_printed(shown[:6], [p_plus], decimals=2)
    assert_printed(shown[6:], [cross_entropy, me_max, loss])


def test_what_part_3_says_of_collapse_is_true(output):
    """Sinkhorn makes equal targets uniform; without it only me-max tells collapse from apart."""
    *_, healthy_cross_entropy, healthy_me_max, _ = variant(output, "as above")
    *p_plus, cross_entropy, me_max, _ = variant(output, "collapse")
    assert len(set(p_plus)) == 1
    assert cross_entropy > healthy_cross_entropy
    assert me_max > healthy_me_max

    *_, together_cross_entropy, together_me_max, _ = variant(output, "collapse, no Sinkhorn")
    *_, apart_cross_entropy, apart_me_max, _ = variant(output, "apart, no Sinkhorn")
    assert together_cross_entropy == apart_cross_entropy
    assert together_me_max > apart_me_max


@pytest.mark.parametrize("rounds", [0, 3])
def test_what_part_3_says_of_sharpening_is_true(rounds):
    """Near 1/3 1/3 1/3, p+ is farther from it than p if T < 1, and not at all farther if T = 1."""
    p = torch.tensor([[0.34, 0.33, 0.33], [0.32, 0.35, 0.33]], dtype=torch.float64)

    def distance(sharpening: float) -> float:
        p_plus = sinkhorn(sharpen(p.log(), sharpening), rounds).exp()
        return (p_plus - 1 / 3).abs().max()

    limit = (p - 1 / 3).abs().max() + 1e-12
    assert distance(1.0) <= limit < distance(0.5)
