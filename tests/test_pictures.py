"""What is drawn, and where: sheets, axes, heat maps and arrows."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

import train_msn
from train_msn import HeatMap, Panel, Point, Range, Strip, Tile

NUMBERS = st.floats(-1e6, 1e6)


def solid(color: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    """A picture of one colour, h w 3."""
    return np.full((height, width, 3), color, np.uint8)


def area_of(sheet: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the rectangle that one colour fills on a sheet."""
    rows, columns = (sheet == color).all(axis=-1).nonzero()
    height = rows.max() - rows.min() + 1
    width = columns.max() - columns.min() + 1
    assert len(rows) == height * width
    return int(height), int(width)


# -- which pictures --------------------------------------------------------------------------------


@given(count=st.integers(1, 10**11), most=st.integers(2, 20))
def test_an_even_choice_runs_from_the_first_to_the_last(count, most):
    """Of any number of images, also of more than float32 can count: distinct, and evenly spaced."""
    chosen = train_msn.evenly_spaced(count, most)
    assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == min(count, most)
    steps = {after - before for before, after in itertools.pairwise(chosen)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


# -- sheets ----------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    cell=st.sampled_from([32, 80]),
)
def test_pictures_of_a_line_are_all_there_and_to_one_scale(tmp_path_factory, sizes, cell):
    """The longest side of a line fills a cell; other pictures are as much smaller as they are."""
    path = tmp_path_factory.mktemp("sheet") / "a.png"
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)][: len(sizes)]
    tiles = [Tile(solid(color, *size)) for color, size in zip(colors, sizes, strict=True)]
    train_msn.save_sheet(path, [Strip(tiles)], ["x"] * len(tiles), cell)

    sheet = np.asarray(Image.open(path))
    largest = max(max(size) for size in sizes)
    for color, (height, width) in zip(colors, sizes, strict=True):
        expected = (max(1, height * cell // largest), max(1, width * cell // largest))
        assert area_of(sheet, color) == expected


def test_words_beside_and_below_pictures_make_room_for_themselves(tmp_path):
    """Titles, captions and a note make a sheet larger; no picture is covered."""
    red = (255, 0, 0)
    sizes = []
    for number, (title, caption, note) in enumerate(itertools.product(["", "words"], repeat=3)):
        path = tmp_path / f"{number}.png"
        lines = [Strip([Tile(solid(red, 8, 8), caption)], [title] if title else [])] * 2
        train_msn.save_sheet(path, lines, ["title"], 64, note)
        with Image.open(path) as sheet:
            sizes.append((sheet.width, sheet.height))
            pixels = (np.asarray(sheet) == red).all(axis=-1).sum()
        assert pixels == 2 * 64 * 64
    assert sizes[0] < sizes[-1] and sizes[0][1] < sizes[1][1] < sizes[3][1]


# -- axes ------------------------------------------------------------------------------------------


@given(NUMBERS, st.floats(1e-6, 1e6))
def test_ticks_are_a_few_round_numbers_within_the_axis(low, length):
    """Three to eleven of them, a step of 1, 2 or 5 times a power of ten apart."""
    assume(length > 1e-6 * abs(low))
    ticks = list(train_msn.round_ticks(Range(low, low + length)))
    assert 3 <= len(ticks) <= 11
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in ticks)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert f"{step:.0e}"[0] in "125"


@given(st.floats(0.1, 100), st.floats(1.1, 100), st.booleans())
def test_an_axis_runs_from_its_low_to_its_high_end(low, factor, log):
    """The ends are at the ends; on a logarithmic axis the geometric mean is in the middle."""
    of = Range(low, low * factor)
    middle = low * factor**0.5 if log else low * (1 + factor) / 2
    places = [train_msn.place_of(x, of, 100, 300, log) for x in (of.low, middle, of.high)]
    assert places == pytest.approx([100, 200, 300], abs=1e-6)


@given(
    curves=st.dictionaries(
        st.text("ab", min_size=1, max_size=3),
        st.lists(st.tuples(st.floats(1, 100), NUMBERS, st.floats(0, 10)), max_size=4),
        max_size=3,
    ),
    level=NUMBERS,
    log=st.booleans(),
)
def test_every_point_and_level_has_its_place_in_the_panel(curves, level, log):
    """No curve leaves its panel, error bars included, however few points there are."""
    points = {name: [Point(*point) for point in curve] for name, curve in curves.items()}
    panel = Panel("t", "x", points, {"level": level}, log_x=log)
    x_range, y_range = train_msn.ranges_of(panel)
    assert x_range.low < x_range.high and y_range.low < y_range.high
    assert y_range.low <= level <= y_range.high
    for curve in points.values():
        for point in curve:
            assert x_range.low <= point.x <= x_range.high
            assert y_range.low <= point.y - point.error <= point.y + point.error <= y_range.high


def test_a_plot_of_anything_is_drawn(tmp_path):
    """Without curves, with a single point, a flat line, levels alone, error bars, many panels."""
    panels = [
        Panel("nothing", "x", {}),
        Panel("a point", "x", {"a": [Point(3, 4, 1)]}, log_x=True),
        Panel("flat", "x", {"a": [Point(1, 2), Point(2, 2)]}, {"level": 2}),
        Panel("a level", "x", {"a": []}, {"level": 0.5}, y_range=(0, 1)),
    ]
    train_msn.save_plot(tmp_path / "a.png", panels)
    with Image.open(tmp_path / "a.png") as plot:
        assert plot.width == 2 * train_msn.PANEL_WIDTH
        colors = {color for _, color in plot.getcolors(10**6)}
    assert {(31, 95, 168), (200, 80, 30)} <= colors  # of the first curve, and of a level


# -- heat maps and arrows --------------------------------------------------------------------------


def test_words_below_a_heat_map_do_not_reach_the_next_one(tmp_path):
    """However long the name of the columns is, the gap between two maps stays white."""
    maps = [HeatMap("t", np.eye(4), [])] * 2
    train_msn.save_heat_maps(tmp_path / "a.png", maps, "name of the columns " * 3, "rows")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    end_of_first = 20 + train_msn.MAP_SIDE + 2
    assert (pixels[:, end_of_first : end_of_first + 50] == 255).all()


def test_a_heat_map_is_white_at_0_and_dark_at_1(tmp_path):
    """Between them colours are mixed evenly; values out of range are taken for the ends."""
    shown = np.asarray(train_msn.map_colors(np.array([[0.0, 0.5, 1.0, 7.0]])))[0]
    half = (255 + np.array(train_msn.MAP_COLOR)) / 2
    assert shown[0].tolist() == [255, 255, 255]
    assert np.abs(shown[1] - half).max() <= 0.5
    assert shown[2].tolist() == shown[3].tolist() == list(train_msn.MAP_COLOR)

    train_msn.save_heat_maps(tmp_path / "a.png", [HeatMap("t", np.eye(4), ["n"])] * 2, "r", "c")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 2 * train_msn.MAP_SIDE and sheet.height > train_msn.MAP_SIDE


@pytest.mark.parametrize("start, end", train_msn.FORWARD)
def test_arrows_begin_and_end_on_the_edges_of_their_boxes(start, end):
    """Each end is on the edge of its box: neither inside of it nor away from it."""
    nodes = (train_msn.NODES[start], train_msn.NODES[end])
    half = np.array([train_msn.NODE_WIDTH, train_msn.NODE_HEIGHT]) / 2
    for node, place in zip(nodes, train_msn.arrow_between(*nodes)[:2], strict=True):
        from_middle = np.abs(place - [node.x, node.y]) / half
        assert from_middle.max() == pytest.approx(1)


def test_gradients_go_back_only_along_arrows_that_are_not_stopped():
    """Each coloured arrow reverses a grey one, and none of them comes from p+ or its encoder."""
    for start, end, _ in train_msn.BACKWARD:
        assert (end, start) in train_msn.FORWARD
        assert not {start, end} & {"p+", "target encoder", "target view"}
    assert train_msn.STOPPED in train_msn.FORWARD


def test_the_picture_of_gradients_is_drawn_with_zeros_too(tmp_path):
    """A part without gradient, and terms that have none at all, are bars of no height."""
    norms = {"cross-entropy": {"head": 0.0, "prototypes": 0.0}}
    for by_part in (norms["cross-entropy"], {"head": 1e-3, "prototypes": 20.0}):
        norms["me-max"] = by_part
        train_msn.save_gradient_flow(tmp_path / "a.png", norms)
        with Image.open(tmp_path / "a.png") as sheet:
            assert sheet.size == (1360, 940)
