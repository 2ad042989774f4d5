"""Drawing: sheets of pictures, line plots, heat maps, and where the gradient flows.

Nothing here computes anything about a model: train_msn.py and finetune.py say what is drawn, this
file says how. It needs Pillow and its built-in font, which knows Latin letters only. All sizes are
in pixels, large enough for a slide.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitmsn import write_file

COLORS = ("#1f5fa8", "#c8501e", "#2f8a4a", "#7a4fa0", "#8a6d1f", "#555555", "#c02070")
RIGHT = "#2f8a4a"  # frames of pictures whose class is the one that was asked for
WRONG = "#d0312d"
BLACK = "#111111"
GREY = "#666666"
FRAME = "#aaaaaa"
GRID = "#e6e6e6"
MAP_COLOR = (13, 60, 120)  # of a 1 in a heat map; 0 is white

LETTERS = 22  # height of the font
SMALL_LETTERS = 18
GAP = 8  # between pictures


def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    return math.ceil(font_of(size).getlength(text))


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    color: str = BLACK,
    size: int = LETTERS,
    anchor: str = "la",
) -> None:
    """Text at a place. anchor: where the place is in the text, as Pillow names it: "l", "m" or "r"
    (left, middle, right), then "a", "m" or "d" (top, middle, bottom)."""
    draw.text(place, text, fill=color, font=font_of(size), anchor=anchor)


def new_sheet(width: float, height: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture, and the pen that draws on it."""
    sheet = Image.new("RGB", (math.ceil(width), math.ceil(height)), "white")
    return sheet, ImageDraw.Draw(sheet)


def save_png(path: Path, sheet: Image.Image) -> None:
    write_file(path, lambda file: sheet.save(file, "PNG", optimize=True))


# ---- Sheets of pictures --------------------------------------------------------------------------
class Tile(NamedTuple):
    """A picture on a sheet."""

    picture: np.ndarray  # h w 3, uint8
    caption: str = ""  # below it
    color: str = ""  # of its frame and caption; none without


@dataclass
class Line:
    """A line of a sheet: a few words on its left, and its pictures."""

    tiles: list[Tile]
    title: list[str] = field(default_factory=list)  # lines of text


def save_sheet(
    path: Path, lines: list[Line], header: list[str], cell: int = 128, note: str = ""
) -> None:
    """A table of pictures, its columns named. Pictures of one line are to one scale, so that a
    focal view is seen to be smaller. cell: pixels, of the largest picture in each line; note: a
    sentence below the table."""
    titles = [text for line in lines for text in line.title]
    left = max((text_width(text, SMALL_LETTERS) + 2 * GAP for text in titles), default=GAP)
    top = LETTERS + 2 * GAP
    has_captions = any(tile.caption for line in lines for tile in line.tiles)
    line_height = cell + GAP + (SMALL_LETTERS + GAP if has_captions else 0)
    bottom = top + len(lines) * line_height

    columns = column_places(lines, header, cell, left)
    note_width = text_width(note, SMALL_LETTERS) + 2 * GAP
    note_height = LETTERS + GAP if note else 0
    sheet, draw = new_sheet(max(columns[-1], note_width), bottom + note_height)
    for x, title in zip(columns, header, strict=False):  # the last place is where the sheet ends
        write(draw, (x, GAP), title)
    for row, line in enumerate(lines):
        y = top + row * line_height
        for number, text in enumerate(line.title):
            write(draw, (GAP, y + number * (SMALL_LETTERS + 6)), text, size=SMALL_LETTERS)
        for x, tile in zip(columns, line.tiles, strict=False):
            draw_tile(sheet, draw, (x, y), tile, line, cell)
    write(draw, (GAP, bottom), note, GREY, SMALL_LETTERS)
    save_png(path, sheet)


def drawn_size(tile: Tile, line: Line, cell: int) -> tuple[int, int]:
    """Width and height of a tile on the sheet."""
    largest = max(max(other.picture.shape[:2]) for other in line.tiles)
    height, width = tile.picture.shape[:2]
    return max(1, width * cell // largest), max(1, height * cell // largest)


def column_places(lines: list[Line], header: list[str], cell: int, left: int) -> list[int]:
    """Where each column begins, and where the last one ends. A column is as wide as its widest
    picture, or its title."""
    places = [left]
    for column, title in enumerate(header):
        width = text_width(title, LETTERS)
        for line in lines:
            if column < len(line.tiles):
                width = max(width, drawn_size(line.tiles[column], line, cell)[0])
        places.append(places[-1] + width + GAP)
    return places


def draw_tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    tile: Tile,
    line: Line,
    cell: int,
) -> None:
    """A picture, its frame, and its caption below the cell."""
    x, y = corner
    image = Image.fromarray(tile.picture)
    width, height = drawn_size(tile, line, cell)
    # Enlarged pixels stay squares: what a network sees should look as coarse as it is.
    how = Image.Resampling.NEAREST if width > image.width else Image.Resampling.LANCZOS
    sheet.paste(image.resize((width, height), how), corner)

    if tile.color:
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=tile.color, width=5)
    if tile.caption:
        size = fitting_size(tile.caption, width, SMALL_LETTERS)
        write(draw, (x, y + cell + 3), tile.caption, tile.color or BLACK, size)


def fitting_size(text: str, width: int, size: int) -> int:
    """The size of letters, at most `size`, at which a text is no wider than `width`; at least 8."""
    return max(8, min(size, math.floor(size * width / max(1, text_width(text, size)))))


# ---- Line plots ----------------------------------------------------------------------------------
class Point(NamedTuple):
    x: float
    y: float
    error: float = 0.0  # half the length of its error bar


@dataclass
class Panel:
    """A plot: curves, and horizontal lines to compare them with."""

    title: str
    x_label: str
    y_label: str
    curves: dict[str, list[Point]]  # by name
    levels: dict[str, float] = field(default_factory=dict)  # heights of dashed lines, by name
    log_x: bool = False
    x_ticks: dict[float, str] | None = (
        None  # where the axis has numbers and which; None: round ones
    )
    y_range: tuple[float, float] | None = None  # None: from the lowest to the highest


class Box(NamedTuple):
    """Where the curves of a panel go, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


class Range(NamedTuple):
    low: float
    high: float


PANEL_WIDTH = 720
PANEL_HEIGHT = 400  # without the names of the curves
NAME_HEIGHT = LETTERS + 6


def save_plot(path: Path, panels: list[Panel], columns: int = 2) -> None:
    """Line plots, `columns` of them side by side, the names of the curves below each."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    most_names = max(len(panel.curves) + len(panel.levels) for panel in panels)
    height = PANEL_HEIGHT + most_names * NAME_HEIGHT + GAP
    sheet, draw = new_sheet(columns * PANEL_WIDTH, rows * height)
    for number, panel in enumerate(panels):
        x = number % columns * PANEL_WIDTH
        y = number // columns * height
        box = Box(x + 90, y + 50, x + PANEL_WIDTH - 60, y + PANEL_HEIGHT - 70)
        draw_panel(draw, box, panel)
        draw_names(draw, box, panel)
    save_png(path, sheet)


def draw_panel(draw: ImageDraw.ImageDraw, box: Box, panel: Panel) -> None:
    """Axes with their names and numbers, then levels, then curves with their error bars."""
    x_range, y_range = ranges_of(panel)
    write(draw, (box.left, box.top - 14), panel.title, anchor="ld")
    write(draw, (box.right, box.bottom + 36), panel.x_label, GREY, SMALL_LETTERS, "ra")
    write(draw, (box.right, box.top - 14), panel.y_label, GREY, SMALL_LETTERS, "rd")

    for y, text in round_ticks(y_range).items():
        at_y = place_of(y, y_range, box.bottom, box.top)
        draw.line((box.left, at_y, box.right, at_y), fill=GRID, width=1)
        write(draw, (box.left - 8, at_y), text, GREY, SMALL_LETTERS, "rm")
    x_ticks = round_ticks(x_range) if panel.x_ticks is None else panel.x_ticks
    for x, text in x_ticks.items():
        at_x = place_of(x, x_range, box.left, box.right, panel.log_x)
        draw.line((at_x, box.bottom, at_x, box.bottom + 6), fill=FRAME, width=2)
        write(draw, (at_x, box.bottom + 10), text, GREY, SMALL_LETTERS, "ma")
    draw.rectangle(box, outline=FRAME, width=2)

    for number, level in enumerate(panel.levels.values(), len(panel.curves)):
        at_y = place_of(level, y_range, box.bottom, box.top)
        draw_dashes(draw, box.left, box.right, at_y, color_of(number))
    for number, curve in enumerate(panel.curves.values()):
        draw_curve(draw, box, x_range, y_range, curve, color_of(number), panel.log_x)


def color_of(number: int) -> str:
    """Of a curve or level of a panel."""
    return COLORS[number % len(COLORS)]


def ranges_of(panel: Panel) -> tuple[Range, Range]:
    """What the two axes of a panel show: all points and levels, with some room above and below."""
    x = [point.x for curve in panel.curves.values() for point in curve]
    x_range = not_empty(min(x, default=0.0) if panel.log_x else 0.0, max(x, default=1.0))
    if panel.y_range:
        return x_range, Range(*panel.y_range)

    y = list(panel.levels.values())
    for curve in panel.curves.values():
        for point in curve:
            y += [point.y - point.error, point.y + point.error]
    y_range = not_empty(min(y, default=0.0), max(y, default=1.0))
    room = (y_range.high - y_range.low) * 0.06
    low = y_range.low - room
    if y_range.low >= 0:
        low = max(low, 0.0)
    return x_range, Range(low, y_range.high + room)


def not_empty(low: float, high: float) -> Range:
    return Range(low, high if high > low else low + 1)


def place_of(value: float, of: Range, start: float, end: float, log: bool = False) -> float:
    """Where a value is between two places, in pixels."""
    if log:
        value = math.log(value)
        of = Range(math.log(of.low), math.log(of.high))
    return start + (end - start) * (value - of.low) / (of.high - of.low)


def round_ticks(of: Range) -> dict[float, str]:
    """Four to nine round numbers in a range, with their texts."""
    rough = (of.high - of.low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = max(size * power for size in (1, 2, 5) if size * power <= rough)
    first = math.ceil(of.low / step - 1e-9)
    last = math.floor(of.high / step + 1e-9)
    return {number * step: f"{number * step:.6g}" for number in range(first, last + 1)}


def draw_dashes(draw: ImageDraw.ImageDraw, left: float, right: float, y: float, color: str) -> None:
    for x in range(round(left), round(right) - 10, 20):
        draw.line((x, y, x + 10, y), fill=color, width=3)


def draw_curve(
    draw: ImageDraw.ImageDraw,
    box: Box,
    x_range: Range,
    y_range: Range,
    curve: list[Point],
    color: str,
    log_x: bool,
) -> None:
    """A line from point to point, a dot at each if they are few, and error bars."""
    dots = []
    for point in curve:
        x = place_of(point.x, x_range, box.left, box.right, log_x)
        y = place_of(point.y, y_range, box.bottom, box.top)
        dots.append((x, y))
        if point.error:
            low = place_of(point.y - point.error, y_range, box.bottom, box.top)
            high = place_of(point.y + point.error, y_range, box.bottom, box.top)
            draw.line((x, low, x, high), fill=color, width=2)
            draw.line((x - 6, low, x + 6, low), fill=color, width=2)
            draw.line((x - 6, high, x + 6, high), fill=color, width=2)
    draw.line(dots, fill=color, width=3, joint="curve")
    if len(dots) <= 20:
        for x, y in dots:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=color)


def draw_names(draw: ImageDraw.ImageDraw, box: Box, panel: Panel) -> None:
    """The names of curves and levels, each beside a piece of its line."""
    y = box.bottom + 74
    for number, name in enumerate([*panel.curves, *panel.levels]):
        color = color_of(number)
        if name in panel.curves:
            draw.line((box.left, y, box.left + 40, y), fill=color, width=3)
        else:
            draw_dashes(draw, box.left, box.left + 50, y, color)
        write(draw, (box.left + 52, y), name, color, SMALL_LETTERS, "lm")
        y += NAME_HEIGHT


# ---- Heat maps -----------------------------------------------------------------------------------
@dataclass
class HeatMap:
    """A matrix of numbers from 0 to 1, with the sums of its columns as bars below it."""

    title: str
    values: np.ndarray  # rows columns
    notes: list[str]  # lines of text below


MAP_SIDE = 448
BARS = 110  # height of the bars below a map


def save_heat_maps(path: Path, maps: list[HeatMap], row_name: str, column_name: str) -> None:
    """Heat maps side by side, all to one scale: 0 is white, 1 is dark. Bars to one scale, too."""
    highest = max(heat_map.values.sum(axis=0).max() for heat_map in maps)
    most_notes = max(len(heat_map.notes) for heat_map in maps)
    left = 50
    pitch = MAP_SIDE + 60
    top = LETTERS + 4 * GAP
    notes_top = top + MAP_SIDE + BARS + 56
    height = notes_top + most_notes * NAME_HEIGHT + GAP
    sheet, draw = new_sheet(left + len(maps) * pitch, height)
    write_upright(sheet, (GAP, top + MAP_SIDE // 2), row_name)

    for number, heat_map in enumerate(maps):
        x = left + number * pitch
        write(draw, (x, 2 * GAP), heat_map.title)
        sheet.paste(colored(heat_map.values).resize((MAP_SIDE, MAP_SIDE), 0), (x, top))
        draw.rectangle((x, top, x + MAP_SIDE - 1, top + MAP_SIDE - 1), outline=FRAME)
        write(draw, (x, top + MAP_SIDE + 4), column_name, GREY, SMALL_LETTERS)
        bars = Box(x, top + MAP_SIDE + 36, x + MAP_SIDE, top + MAP_SIDE + 36 + BARS)
        draw_bars(draw, bars, heat_map.values.sum(axis=0), highest)
        for line, note in enumerate(heat_map.notes):
            write(draw, (x, notes_top + line * NAME_HEIGHT), note, GREY, SMALL_LETTERS)
    save_png(path, sheet)


def colored(values: np.ndarray) -> Image.Image:
    """Numbers from 0 to 1 as colours from white to MAP_COLOR."""
    white = np.array([255.0, 255.0, 255.0])
    pixels = white + np.clip(values, 0, 1)[..., None] * (np.array(MAP_COLOR) - white)
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_bars(draw: ImageDraw.ImageDraw, box: Box, heights: np.ndarray, highest: float) -> None:
    """A bar for each number, on a line at 0, and a dashed line at their mean."""
    width = (box.right - box.left) / len(heights)
    for number, height in enumerate(heights):
        left = box.left + number * width
        top = place_of(height, Range(0, highest), box.bottom, box.top)
        draw.rectangle((left, top, left + max(1, width - 1), box.bottom), fill=MAP_COLOR)
    mean = place_of(float(np.mean(heights)), Range(0, highest), box.bottom, box.top)
    draw_dashes(draw, box.left, box.right, mean, COLORS[1])


def write_upright(sheet: Image.Image, middle: tuple[int, int], text: str) -> None:
    """Text that runs from bottom to top; middle: of its left edge."""
    size = (text_width(text, SMALL_LETTERS), SMALL_LETTERS + 6)
    flat, draw = new_sheet(*size)
    write(draw, (0, 0), text, GREY, SMALL_LETTERS)
    x, y = middle
    sheet.paste(flat.rotate(90, expand=True), (x, y - size[0] // 2))


# ---- Where the gradient flows --------------------------------------------------------------------
class Node(NamedTuple):
    """A box of the diagram."""

    x: int  # its middle
    y: int
    text: str
    more: str
    color: str = BLACK


NODE_WIDTH = 240
NODE_HEIGHT = 84
CROSS_ENTROPY_COLOR = COLORS[1]
ME_MAX_COLOR = COLORS[0]
BOTH_COLOR = COLORS[3]
NODES = {
    "anchor views": Node(150, 130, "anchor views", "masked, or small crops"),
    "anchor encoder": Node(500, 130, "anchor encoder", "learns"),
    "p": Node(850, 130, "assignments p", "softmax(cosines / tau)"),
    "me-max": Node(1200, 130, "me-max", "log k - H(mean p)", ME_MAX_COLOR),
    "prototypes": Node(850, 300, "prototypes", "learn"),
    "cross-entropy": Node(1200, 300, "cross-entropy", "H(p+, p)", CROSS_ENTROPY_COLOR),
    "target view": Node(150, 470, "target view", "whole"),
    "target encoder": Node(500, 470, "target encoder", "does not learn"),
    "p+": Node(850, 470, "assignments p+", "sharpened, Sinkhorn"),
}
FORWARD = (
    ("anchor views", "anchor encoder"),
    ("anchor encoder", "p"),
    ("p", "me-max"),
    ("prototypes", "p"),
    ("p", "cross-entropy"),
    ("target view", "target encoder"),
    ("target encoder", "p+"),
    ("prototypes", "p+"),
    ("p+", "cross-entropy"),
)
BACKWARD = (  # from, to, color of the term whose gradient it is
    ("me-max", "p", ME_MAX_COLOR),
    ("cross-entropy", "p", CROSS_ENTROPY_COLOR),
    ("p", "prototypes", BOTH_COLOR),
    ("p", "anchor encoder", BOTH_COLOR),
)
STOPPED = ("p+", "cross-entropy")  # the forward arrow along which no gradient comes back

Norms = dict[str, dict[str, float]]  # term of the loss -> part of the model -> norm of gradient


def save_gradient_flow(path: Path, norms: Norms) -> None:
    """The way of the gradient as a diagram, and how large it is in each part of the model."""
    sheet, draw = new_sheet(1360, 940)
    write(draw, (30, 20), "Where the gradient flows: forward in grey, backward in colour")
    for start, end in FORWARD:
        draw_arrow(draw, NODES[start], NODES[end], GREY)
    for start, end, color in BACKWARD:
        draw_arrow(draw, NODES[start], NODES[end], color)
    draw_stop(draw, NODES[STOPPED[0]], NODES[STOPPED[1]])

    # The moving average is no way for the gradient: weights are copied down, and nothing goes up.
    draw_arrow(draw, NODES["anchor encoder"], NODES["target encoder"], GREY, dashed=True)
    write(draw, (675, 95), "of both", BOTH_COLOR, SMALL_LETTERS, "mm")
    write(draw, (530, 290), "moving average", GREY, SMALL_LETTERS, "lm")
    write(draw, (530, 314), "of the weights", GREY, SMALL_LETTERS, "lm")
    for node in NODES.values():
        draw_node(draw, node)
    draw_norms(draw, Box(100, 620, 1320, 830), norms)
    save_png(path, sheet)


def draw_node(draw: ImageDraw.ImageDraw, node: Node) -> None:
    """A box with two lines of text."""
    left = node.x - NODE_WIDTH // 2
    top = node.y - NODE_HEIGHT // 2
    box = (left, top, left + NODE_WIDTH, top + NODE_HEIGHT)
    draw.rounded_rectangle(box, radius=10, fill="white", outline=node.color, width=3)
    write(draw, (node.x, node.y - 14), node.text, node.color, anchor="mm")
    write(draw, (node.x, node.y + 18), node.more, GREY, SMALL_LETTERS, "mm")


def ends_of(start: Node, end: Node) -> tuple[np.ndarray, np.ndarray]:
    """Where an arrow between two boxes begins and ends: on their edges, a little to its right, so
    that an arrow of the other direction has its place beside it."""
    a = np.array([start.x, start.y], float)
    b = np.array([end.x, end.y], float)
    along = (b - a) / np.linalg.norm(b - a)
    aside = np.array([-along[1], along[0]]) * 10
    return a + aside + way_out(along, aside) * along, b + aside - way_out(-along, aside) * along


def way_out(along: np.ndarray, inside: np.ndarray) -> float:
    """How far it is from a point in a box to its edge in a direction. inside: from the middle."""
    half = np.array([NODE_WIDTH, NODE_HEIGHT]) / 2
    to_edge = half - np.sign(along) * inside
    return float(np.min(to_edge / np.maximum(np.abs(along), 1e-9)))


def draw_arrow(
    draw: ImageDraw.ImageDraw, start: Node, end: Node, color: str, dashed: bool = False
) -> None:
    """An arrow from the edge of a box to the edge of another."""
    a, b = ends_of(start, end)
    length = np.linalg.norm(b - a)
    along = (b - a) / length
    aside = np.array([-along[1], along[0]])
    neck = b - 16 * along
    step = 20 if dashed else length
    for at in np.arange(0, length - 16, step):
        piece_end = min(at + 10, length - 16) if dashed else length - 16
        draw.line([*(a + at * along), *(a + piece_end * along)], fill=color, width=4)
    draw.polygon([*b, *(neck + 8 * aside), *(neck - 8 * aside)], fill=color)


def draw_stop(draw: ImageDraw.ImageDraw, start: Node, end: Node) -> None:
    """A bar across the arrow between two boxes: no gradient comes back along it."""
    a, b = ends_of(start, end)
    middle = (a + b) / 2
    along = (b - a) / np.linalg.norm(b - a)
    aside = np.array([-along[1], along[0]])
    draw.line([*(middle - 24 * aside), *(middle + 24 * aside)], fill=WRONG, width=8)
    write(draw, (middle[0] + 34, middle[1] + 26), "no gradient (stopped)", WRONG, SMALL_LETTERS)


def draw_norms(draw: ImageDraw.ImageDraw, box: Box, norms: Norms) -> None:
    """Bars: a group for each part of the model, a bar for each term of the loss."""
    colors = dict(zip(norms, (CROSS_ENTROPY_COLOR, ME_MAX_COLOR), strict=True))
    parts = list(next(iter(norms.values())))
    y_range = Range(0, 1.1 * max(max(by_part.values()) for by_part in norms.values()) or 1.0)
    write(draw, (box.left, box.top - 12), "norm of the gradient of one batch", anchor="ld")
    for y, text in round_ticks(y_range).items():
        at_y = place_of(y, y_range, box.bottom, box.top)
        draw.line((box.left, at_y, box.right, at_y), fill=GRID)
        write(draw, (box.left - 8, at_y), text, GREY, SMALL_LETTERS, "rm")

    pitch = (box.right - box.left) / len(parts)
    width = pitch * 0.7 / len(norms)
    for group, part in enumerate(parts):
        left = box.left + (group + 0.15) * pitch
        for number, (term, by_part) in enumerate(norms.items()):
            x = left + number * width
            top = place_of(by_part[part], y_range, box.bottom, box.top)
            draw.rectangle((x, top, x + width - 4, box.bottom), fill=colors[term])
            label = f"{by_part[part]:.2g}"
            size = fitting_size(label, round(width), SMALL_LETTERS)
            write(draw, (x + width / 2 - 2, top - 4), label, colors[term], size, "md")
        size = fitting_size(part, round(pitch - 8), SMALL_LETTERS)
        write(draw, (left + pitch * 0.35, box.bottom + 10), part, BLACK, size, "ma")
    for number, (term, color) in enumerate(colors.items()):
        write(draw, (box.left + 300 * number, box.bottom + 56), f"of {term}", color)
