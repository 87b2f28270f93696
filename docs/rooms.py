"""Draws docs/rooms.svg, the picture of the package's rooms in develop.md, from the imports in the code.

    python docs/rooms.py

A room is a folder of the package. It stands one floor above the highest room that it imports; a room that all
others import is the ground. Arrows show the other imports: straight to the next floor, at the sides to lower
floors.
"""

import ast
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxdelta"
PICTURE = ROOT / "docs" / "rooms.svg"

WIDTH, BOX, HEIGHT, FLOOR, LANE, MARGIN = 700, 150, 50, 80, 22, 10  # pixels
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #fff; text-anchor: middle }
.room { font-weight: 600; font-size: 15px }
rect { fill: #3949ab }
.import { fill: none; stroke: #888; stroke-width: 1.5; stroke-linejoin: round; marker-end: url(#head) }
</style>
<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#888"/></marker>"""

Imports = Mapping[str, set[str]]  # room -> the rooms that it imports


class Box(NamedTuple):
    """A room in the picture; `floor` counts from the ground, which is 0."""

    x: float
    y: float
    width: float
    floor: int

    @property
    def centre(self) -> float:
        """The middle between left and right."""
        return self.x + self.width / 2


def modules(room: str) -> list[Path]:
    """The modules of a room, without __init__.py."""
    return [path for path in sorted((PACKAGE / room).rglob("*.py")) if path.name != "__init__.py"]


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports, also inside functions."""
    rooms = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    named = {room: {name for path in modules(room) for name in _imported(path)} for room in rooms}
    return {room: (names & {*rooms}) - {room} for room, names in named.items()}


def _imported(path: Path) -> Iterator[str]:
    """`a` for `import jaxdelta.a.b`, `from jaxdelta.a import b` and `from jaxdelta import a`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}."))


def picture() -> str:
    """The picture as SVG."""
    rooms = imports()
    ground = [room for room in rooms if all(room in names for other, names in rooms.items() if other != room)]
    above = {room: names.difference(ground) for room, names in rooms.items() if room not in ground}
    boxes = _placed(above)
    height = 2 * MARGIN + HEIGHT + FLOOR * max(box.floor for box in boxes.values())
    base = Box(MARGIN, height - MARGIN - HEIGHT, WIDTH - 2 * MARGIN, 0)
    boxes = {room: box._replace(y=base.y - FLOOR * box.floor) for room, box in boxes.items()}
    drawn = [
        *_arrows(above, boxes),
        *(_drawn(box, room) for room, box in boxes.items()),
        *(_drawn(base, room, ", imported by all rooms") for room in ground),
    ]
    title = "<title>The rooms of the package and their imports</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
    return "\n".join([head, title, STYLE, *drawn, "</svg>\n"])


def _placed(rooms: Imports) -> dict[str, Box]:
    """Every room's box, without its height above the ground; rooms of one floor stand side by side."""
    floors: list[list[str]] = []
    while left := [room for room in sorted(rooms) if not any(room in floor for floor in floors)]:
        below = {room for floor in floors for room in floor}
        floors.append([room for room in left if rooms[room] <= below])
    boxes: dict[str, Box] = {}
    for number, floor in enumerate(floors, start=1):
        first = (WIDTH - BOX * (2 * len(floor) - 1)) / 2
        boxes |= {room: Box(first + 2 * BOX * i, 0, BOX, number) for i, room in enumerate(floor)}
    return boxes


def _arrows(rooms: Imports, boxes: Mapping[str, Box]) -> Iterator[str]:
    """Imports of the next floor straight down; others along a lane at one side, one lane for each target."""
    lanes = {-1: 0, 1: 0}
    exits = Counter[tuple[str, int]]()  # lines that leave a box at a side, from the bottom up
    for name, target in sorted(boxes.items(), key=lambda item: -item[1].floor):
        offset = target.centre - WIDTH / 2
        side = int(math.copysign(1, offset or (-1) ** target.floor))
        sources = sorted((room for room in rooms if name in rooms[room]), key=lambda room: boxes[room].floor)
        far = [room for room in sources if boxes[room].floor > target.floor + 1]
        for room in sorted({*sources}.difference(far)):
            source = boxes[room]
            yield _line(f"M{source.centre} {source.y + HEIGHT} L{target.centre} {target.y}")
        edge = target.centre + side * BOX / 2
        lane = WIDTH / 2 + side * max(abs(offset) + BOX / 2 + LANE, BOX / 2 + LANE * (lanes[side] + 1))
        lanes[side] += bool(far)
        for room in far:
            source, exits[room, side] = boxes[room], exits[room, side] + 1
            y = source.y + HEIGHT - 8 * (exits[room, side] + 1)
            yield _line(f"M{source.centre + side * BOX / 2} {y} H{lane} V{target.y + HEIGHT - 8} H{edge}")


def _line(path: str) -> str:
    return f'<path class="import" d="{path}"/>'


def _drawn(box: Box, room: str, more: str = "") -> str:
    count = len(modules(room))
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{HEIGHT}" rx="6"/>'
        f'<text class="room" x="{box.centre:g}" y="{box.y + 21:g}">{room}</text>'
        f'<text x="{box.centre:g}" y="{box.y + 39:g}">{count} modules{more}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
