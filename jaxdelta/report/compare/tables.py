"""The tables of a comparison, for the terminal."""

from collections.abc import Iterator, Sequence

from jaxdelta.report.compare.compare import Comparison, Pair, Part, relative_rank, steadiness
from jaxdelta.report.page_parts import number, spanned, visible

WIDEST = 28  # columns of a label or a fact; the page shows them whole
CELL = 10


def tables(found: Comparison) -> str:
    """All tables of a comparison: settings, figures by depth, directions, phases."""
    sections = (_settings, _bands, _directions, _phases)
    texts = ("\n".join(line.rstrip() for line in section(found)) for section in sections)
    return "\n\n".join(text for text in texts if text)


def _settings(found: Comparison) -> Iterator[str]:
    yield "=== The runs; ≠ where one is not as the first ==="
    rows = [("", ("", *found.labels))]
    rows += [
        ("≠" if any(map(row.other, range(len(row.values)))) else "", (row.name, *row.values))
        for row in found.settings
    ]
    texts = [[_cut(cell) for cell in cells] for _, cells in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for (sign, _), cells in zip(rows, texts, strict=True):
        yield f" {sign:1} " + "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
    for caution in found.cautions:
        yield f" ! {visible(caution)}"


def _bands(found: Comparison) -> Iterator[str]:
    """A line a run, and two for the ends of its intervals."""
    yield f"=== By relative depth (L + 1/2)/N; * interval apart from that of {_cut(found.labels[0])} ==="
    width = max(len("high"), *(len(_cut(label)) for label in found.labels)) + 2
    yield " " * width + "".join(f"{name:>{CELL}}" for name in found.band_names)
    for compared in found.compared:
        yield f" {compared.title}: {compared.measure.axis.label}"
        for label, parts in zip(found.labels, compared.parts, strict=True):
            for name, cells in _lines(_cut(label), parts or (Part(None),) * found.bands):
                yield f"  {name:{width - 2}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _lines(label: str, parts: Sequence[Part]) -> Iterator[tuple[str, list[str]]]:
    yield label, [number(part.value, ".3g") + ("*" if part.apart else "") for part in parts]
    if any(part.interval for part in parts):
        for end, name in enumerate(("low", "high")):
            yield f"  {name}", [number(part.interval and part.interval[end], ".3g") for part in parts]


def _directions(found: Comparison) -> Iterator[str]:
    for pair in found.pairs:
        yield from _pair(found, pair)
    if found.left_out:
        yield f" {visible(found.left_out)}"


def _pair(found: Comparison, pair: Pair) -> Iterator[str]:
    first, other = _cut(found.labels[0]), _cut(found.labels[pair.other])
    yield f"=== Directions of {first} and {other}, layer by layer ==="
    yield (
        f" random directions: |cos| {pair.cos_chance:.3f}, shared part of the first {pair.k} (mean cos² θ) "
        f"{pair.shared_chance:.3f}"
    )
    yield f" {'':4}  |cos| v_L  p(random)   shared  θ first   θ last   v_L over other draws: both"
    steady = [steadiness(found.runs[run]) for run in (0, pair.other)]
    for layer, (angles, p) in enumerate(zip(pair.angles, pair.p, strict=True)):
        own = "  ".join(number(each[layer], ".3f") for each in steady)
        yield (
            f" L={layer:>2}  {pair.cosines[layer, layer]:9.4f}  {p:9.1e}  {pair.shared[layer, layer]:7.4f}  "
            f"{angles[0]:6.1f}°  {angles[-1]:6.1f}°   {own}"
        )


def _phases(found: Comparison) -> Iterator[str]:
    yield "=== Phases and verdicts ==="
    width = max(len(_cut(label)) for label in found.labels)
    head = f"{'|cos| within':>22}  chance  p(drift)  {'rank of v_L / N':>22}"
    yield f" phase  {'':{width}}  {'layers':>8}   N  {head}"
    for phase in found.phases:
        row, label = phase.row, _cut(found.labels[phase.run])
        chance, drift = number(row["intra"].get("null_mean"), ".3f"), number(row.get("gap_p"), ".3f")
        yield (
            f" {visible(row['phase']):>5}  {label:{width}}  {phase.layers:>8}  {row['layers']:>2}  "
            f"{spanned(row['intra']):>22}  {chance:>6}  {drift:>8}  {spanned(relative_rank(row)):>22}"
        )
    for phase in found.phases:
        if phase.row.get("verdict"):
            label, row = _cut(found.labels[phase.run]), phase.row
            yield f" {visible(row['phase']):>5}  {label:{width}}  {row['verdict']} ({row['why']})"


def _cut(text: str) -> str:
    """One line that fits its column."""
    text = visible(text)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
