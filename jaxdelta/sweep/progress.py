"""The progress bar of a pass, shown if standard error is a terminal."""

from collections.abc import Iterator

from tqdm import tqdm

from jaxdelta.sweep.sweep import BlockUpdate, Sweep

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left, {rate_fmt}"


def shown(sweep: Sweep, tokens: int, progress: bool) -> Iterator[Iterator[BlockUpdate]]:
    """The sweep's layers, with a bar that moves with every block.

    A block that passes a layer counts as its share of the tokens, so that the rate is that of the text
    through the whole model.

    Args:
        sweep: the pass.
        tokens: number of tokens of the text.
        progress: whether to show the bar.
    """
    layers = sweep.weights.config.num_layers
    share = tokens / (layers * len(sweep.tokens))
    begun = sweep.start * share * len(sweep.tokens)
    # None: only if standard error is a terminal.
    hidden = None if progress else True
    with tqdm(
        total=tokens, initial=begun, unit=" tokens", bar_format=_FORMAT, leave=False, disable=hidden
    ) as bar:
        for layer, blocks in enumerate(sweep, sweep.start):
            bar.set_description_str(f" layer {layer + 1} of {layers}")
            yield _counted(blocks, bar, share)


def _counted(blocks: Iterator[BlockUpdate], bar: "tqdm[None]", share: float) -> Iterator[BlockUpdate]:
    for wrote in blocks:
        yield wrote
        bar.update(share)


def tokens_per_second(sweep: Sweep, tokens: int, seconds: float) -> float:
    """Tokens per second through the whole model; a resumed pass counts only the layers it passed itself."""
    layers = sweep.weights.config.num_layers
    return tokens * (1 - sweep.start / layers) / seconds
