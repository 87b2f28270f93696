"""The bar that shows how far the pass has come, where standard error is a terminal."""

from collections.abc import Iterator

from tqdm import tqdm

from jaxdelta.sweep.sweep import Sweep, Wrote

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left, {rate_fmt}"


def shown(sweep: Sweep, tokens: int, progress: bool) -> Iterator[Iterator[Wrote]]:
    """The sweep's layers, their blocks counted as they come: the bar moves within a layer, too.

    It counts in `tokens`, those of the text. A block that passes a layer is its share of them, so that the
    rate is that of the text through the whole model.
    """
    layers = sweep.weights.config.num_layers
    share = tokens / (layers * len(sweep.tokens))
    begun = sweep.start * share * len(sweep.tokens)
    # None: only where standard error is a terminal.
    hidden = None if progress else True
    with tqdm(
        total=tokens, initial=begun, unit=" tokens", bar_format=_FORMAT, leave=False, disable=hidden
    ) as bar:
        for layer, blocks in enumerate(sweep, sweep.start):
            bar.set_description_str(f" layer {layer + 1} of {layers}")
            yield _counted(blocks, bar, share)


def _counted(blocks: Iterator[Wrote], bar: "tqdm[None]", share: float) -> Iterator[Wrote]:
    for wrote in blocks:
        yield wrote
        bar.update(share)


def tokens_per_second(sweep: Sweep, tokens: int, seconds: float) -> float:
    """Of the text through the whole model. A run that goes on from a checkpoint has some layers less."""
    layers = sweep.weights.config.num_layers
    return tokens * (1 - sweep.start / layers) / seconds
