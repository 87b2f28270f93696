"""The progress bar of a pass, shown if standard error is a terminal."""

from collections.abc import Iterator

from tqdm import tqdm

from jaxdelta.sweep.sweep import BlockUpdate, Sweep

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left, {rate_fmt}"


def shown(sweep: Sweep, tokens: int, progress: bool) -> Iterator[Iterator[BlockUpdate]]:
    """The layers of the sweep, with a bar if `progress`.

    Each block of each layer counts as its share of the text's `tokens`, so that the rate is tokens per second
    through the whole model.
    """
    layers = sweep.weights.config.num_layers
    share = tokens / (layers * len(sweep.tokens))
    begun = sweep.start * share * len(sweep.tokens)
    disable = None if progress else True  # None: shown only if standard error is a terminal
    with tqdm(
        total=tokens, initial=begun, unit=" tokens", bar_format=_FORMAT, leave=False, disable=disable
    ) as bar:
        for layer, blocks in enumerate(sweep, sweep.start):
            bar.set_description_str(f" layer {layer + 1} of {layers}")
            yield _counted(blocks, bar, share)


def _counted(blocks: Iterator[BlockUpdate], bar: "tqdm[None]", share: float) -> Iterator[BlockUpdate]:
    for block in blocks:
        yield block
        bar.update(share)


def tokens_per_second(sweep: Sweep, tokens: int, seconds: float) -> float:
    """Tokens per second through the whole model; a resumed pass counts only its own layers."""
    return tokens * (1 - sweep.start / sweep.weights.config.num_layers) / seconds
