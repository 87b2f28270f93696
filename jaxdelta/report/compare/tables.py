"""The tables of a comparison on the terminal."""

from collections.abc import Iterator, Sequence

from jaxdelta.report.compare.compare import Comparison, Pair, Part, steadiness
from jaxdelta.report.page_parts import number, spanned, visible
from jaxdelta.statistics.across_layers.verdict import relative_rank

WIDEST = 28  # characters of a label or a setting
CELL = 10


def tables(comparison: Comparison) -> str:
    """All tables of a comparison: settings, statistics by depth, directions, phases."""
    sections = (_settings, _bands, _directions, _phases)
    texts = ("\n".join(line.rstrip() for line in section(comparison)) for section in sections)
    return "\n\n".join(text for text in texts if text)


def _settings(comparison: Comparison) -> Iterator[str]:
    yield "=== The runs; ≠ differs from the first run ==="
    rows = [("", ("", *comparison.labels))]
    rows += [
        ("≠" if any(map(row.other, range(len(row.values)))) else "", (row.name, *row.values))
        for row in comparison.settings
    ]
    texts = [[_cut(cell) for cell in cells] for _, cells in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for (sign, _), cells in zip(rows, texts, strict=True):
        yield f" {sign:1} " + "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
    for caution in comparison.cautions:
        yield f" ! {visible(caution)}"


def _bands(comparison: Comparison) -> Iterator[str]:
    """One line per run, and two for the ends of its intervals."""
    first = _cut(comparison.labels[0])
    yield f"=== By relative depth (L + 1/2)/N; * interval does not overlap that of {first} ==="
    width = max(len("high"), *(len(_cut(label)) for label in comparison.labels)) + 2
    yield " " * width + "".join(f"{name:>{CELL}}" for name in comparison.band_names)
    for compared in comparison.compared:
        yield f" {compared.title}: {compared.measure.axis.label}"
        for label, parts in zip(comparison.labels, compared.parts, strict=True):
            for name, cells in _lines(_cut(label), parts or (Part(None),) * comparison.bands):
                yield f"  {name:{width - 2}}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def _lines(label: str, parts: Sequence[Part]) -> Iterator[tuple[str, list[str]]]:
    yield label, [number(part.value, ".3g") + ("*" if part.apart else "") for part in parts]
    if any(part.interval for part in parts):
        for end, name in enumerate(("low", "high")):
            yield f"  {name}", [number(part.interval and part.interval[end], ".3g") for part in parts]


def _directions(comparison: Comparison) -> Iterator[str]:
    for pair in comparison.pairs:
        yield from _pair(comparison, pair)
    if comparison.left_out:
        yield f" {visible(comparison.left_out)}"


def _pair(comparison: Comparison, pair: Pair) -> Iterator[str]:
    first, other = _cut(comparison.labels[0]), _cut(comparison.labels[pair.other])
    yield f"=== Directions of {first} and {other}, layer by layer ==="
    yield (
        f" random directions: |cos| {pair.cos_chance:.3f}, shared part of the first {pair.k} (mean cos² θ) "
        f"{pair.shared_chance:.3f}"
    )
    yield f" {'':4}  |cos| v_L  p(random)   shared  θ first   θ last   v_L over other draws: both"
    steady = [steadiness(comparison.runs[run]) for run in (0, pair.other)]
    for layer, (angles, p) in enumerate(zip(pair.angles, pair.p, strict=True)):
        medians = "  ".join(number(of_run[layer], ".3f") for of_run in steady)
        yield (
            f" L={layer:>2}  {pair.cosines[layer, layer]:9.4f}  {p:9.1e}  {pair.shared[layer, layer]:7.4f}  "
            f"{angles[0]:6.1f}°  {angles[-1]:6.1f}°   {medians}"
        )


def _phases(comparison: Comparison) -> Iterator[str]:
    yield "=== Phases and verdicts ==="
    width = max(len(_cut(label)) for label in comparison.labels)
    head = f"{'|cos| within':>22}  chance  p(drift)  {'rank of v_L / N':>22}"
    yield f" phase  {'':{width}}  {'layers':>8}   N  {head}"
    for phase in comparison.phases:
        row, label = phase.row, _cut(comparison.labels[phase.run])
        chance, drift = number(row["intra"].get("null_mean"), ".3f"), number(row.get("gap_p"), ".3f")
        yield (
            f" {visible(row['phase']):>5}  {label:{width}}  {phase.layers:>8}  {row['layers']:>2}  "
            f"{spanned(row['intra']):>22}  {chance:>6}  {drift:>8}  {spanned(relative_rank(row)):>22}"
        )
    for phase in comparison.phases:
        if phase.row.get("verdict"):
            label, row = _cut(comparison.labels[phase.run]), phase.row
            yield f" {visible(row['phase']):>5}  {label:{width}}  {row['verdict']} ({row['why']})"


def _cut(text: str) -> str:
    """One line that fits its column."""
    text = visible(text)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
