"""The layer-major pass: its numbers do not depend on how the work is divided."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from families import next_token_loss

from jaxdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.model.decoder import residual_stream
from jaxdelta.sweep import sweep
from jaxdelta.sweep.sweep import Blocks, PassPlan, PassResult, Sweep, Update, concatenate_blocks
from jaxdelta.text.tokens import PADDING, Tokens

IDS = np.random.default_rng(5).integers(0, 256, (6, 70)).astype(np.int32)
TOKENS = Tokens(IDS, np.zeros_like(IDS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Checkpoint:
    """Layers with and without a window."""
    options = {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("windows"), **options)))


def passed(
    weights: Weights, blocks: Blocks | None, dtype: str = "float32"
) -> tuple[PassResult, list[Update]]:
    sweep = Sweep(weights, TOKENS, PassPlan(blocks, dtype, dtype))
    updates = [Update(*map(np.asarray, update)) for update in concatenate_blocks(sweep)]
    return sweep.finish(), updates


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> tuple[PassResult, list[Update]]:
    return passed(checkpoint, Blocks(6, 70))


def assert_same(
    found: tuple[PassResult, list[Update]], wanted: tuple[PassResult, list[Update]], tolerance: float
) -> None:
    for update, other in zip(found[1], wanted[1], strict=True):
        whole = np.linalg.norm(other.delta)  # a sublayer's part may be small beside it
        for part, same in ((update.attention, other.attention), (update.mlp, other.mlp)):
            assert np.linalg.norm(part - same) <= tolerance * whole
        assert np.linalg.norm(update.delta - other.delta) <= tolerance * whole
        assert np.linalg.norm(update.h - other.h) <= tolerance * np.linalg.norm(other.h)
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=tolerance or 1e-15)
    assert found[0].closure_error == pytest.approx(wanted[0].closure_error, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("windows", [1, 2, 3])
@pytest.mark.parametrize("place", ["device", "host"])
def test_blocks_of_windows(
    checkpoint: Checkpoint, whole: tuple[PassResult, list[Update]], windows: int, place: str
) -> None:
    assert_same(passed(checkpoint, Blocks(windows, 70, place)), whole, 1e-6)


@pytest.mark.parametrize("queries", [1, 9, 35, 69])
def test_blocks_of_queries(
    checkpoint: Checkpoint, whole: tuple[PassResult, list[Update]], queries: int
) -> None:
    """A last block that is full, and one that is filled up."""
    assert_same(passed(checkpoint, Blocks(6, queries)), whole, 1e-6)


def test_states_on_the_host_change_no_bit(checkpoint: Checkpoint) -> None:
    for dtype in ("float32", "bfloat16"):
        assert_same(
            passed(checkpoint, Blocks(2, 70, "host"), dtype), passed(checkpoint, Blocks(2, 70), dtype), 0
        )


def test_the_loss_of_a_long_text_is_that_of_its_beginning(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many tokens as are needed, however many windows a block has; the windows' first have no loss."""
    model = checkpoint.load()
    losses = next_token_loss(model, model.norm(residual_stream(model, IDS).states[-1]), IDS).ravel()

    def loss(windows: int, probed: int, all_tokens: bool) -> float:
        monkeypatch.setattr(sweep, "PROBED", probed)
        passing = Sweep(checkpoint, TOKENS, PassPlan(Blocks(windows, 70), all_tokens=all_tokens))
        for _ in concatenate_blocks(passing):
            pass
        return passing.finish().loss

    for probed in (5, 69, 100, 1000):
        for windows, whole in ((1, False), (2, True), (3, False), (4, False), (6, True)):
            assert loss(windows, probed, whole) == pytest.approx(losses[:probed].mean(), rel=1e-5)
    assert abs(losses[:5].mean() - losses.mean()) > 1e-3


def test_resident_weights_change_no_bit(
    checkpoint: Checkpoint, whole: tuple[PassResult, list[Update]]
) -> None:
    assert_same(passed(InMemoryWeights(checkpoint.load()), None), whole, 0)


def test_pass_and_scan_agree(checkpoint: Checkpoint, whole: tuple[PassResult, list[Update]]) -> None:
    stream = residual_stream(checkpoint.load(), IDS)
    for i, update in enumerate(whole[1][:-1]):
        for part, same in zip(update, (stream.attention[i], stream.mlp[i], stream.states[i]), strict=True):
            same = np.asarray(same)[:, 1:].reshape(part.shape)
            assert np.linalg.norm(part - same) <= 1e-6 * np.linalg.norm(same)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_packed_windows(checkpoint: Checkpoint, windows: int) -> None:
    """Segments stay apart, and only the tokens that count come out, however many a block has."""
    rng = np.random.default_rng(6)
    starts = rng.random((5, 40)) < 0.1
    starts[:, 0] = True
    places = np.arange(40)
    positions = (places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)).astype(np.int32)
    documents = np.where(places < 35, np.cumsum(starts).reshape(starts.shape), PADDING).astype(np.int32)
    tokens = Tokens(rng.integers(0, 256, (5, 40)).astype(np.int32), documents, positions=positions)
    stream = residual_stream(checkpoint.load(), tokens.ids, positions)
    sweep = Sweep(checkpoint, tokens, PassPlan(Blocks(windows, 40)))
    updates = list(concatenate_blocks(sweep))
    assert sweep.shape == updates[0].h.shape == (tokens.counted.sum(), 48)
    for i, update in enumerate(updates[:-1]):
        for part, same in zip(update, (stream.attention[i], stream.mlp[i], stream.states[i]), strict=True):
            np.testing.assert_allclose(part, np.asarray(same)[tokens.counted], rtol=0, atol=1e-5)


def test_shape(checkpoint: Checkpoint) -> None:
    assert Sweep(checkpoint, TOKENS, PassPlan(Blocks(2, 70))).shape == (6 * 69, 48)
    assert Sweep(checkpoint, TOKENS, PassPlan(compute_dtype=jnp.bfloat16)).blocks == Blocks(6, 70)


def test_a_pass_ends_before_it_is_finished(checkpoint: Checkpoint) -> None:
    passing = Sweep(checkpoint, TOKENS)
    next(iter(passing))
    with pytest.raises(RuntimeError, match="must follow the last layer"):
        passing.finish()
