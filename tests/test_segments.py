"""Attention and positions confined to segments: several documents in one window equal each by itself."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, write_tokenizer

from jaxdelta.checkpoint.checkpoint import load_model
from jaxdelta.model import attention, decoder
from jaxdelta.model.attention import causal_mask
from jaxdelta.model.decoder import Decoder, residual_stream
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta.text.tokens import PADDING, Tokens
from jaxdelta.text.windows import tokenize

TOLERANCE = 1e-5
SIZES = [90, 64, 33, 32, 17, 9, 150, 2, 3, 5, 1, 77]
SLIDING = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
CASES = {
    "grouped heads, yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "one key for all heads, biases, sliding windows": {
        "num_key_value_heads": 1,
        "attention_bias": True,
        **SLIDING,
    },
    "experts": EXPERTS,
}


def packed(directory: Path, seq_len: int = 128) -> Tokens:
    """Documents of `SIZES` random letters in windows."""
    rng = np.random.default_rng(0)
    documents = ["".join(map(chr, rng.integers(33, 127, size))) for size in SIZES]
    encode = load_encoder(write_tokenizer(directory))
    return tokenize(documents, encode, vocab_size=256, layout="packed", seq_len=seq_len)


def segments(tokens: Tokens) -> list[tuple[int, slice]]:
    """(window, places) of every segment that is not padding."""
    found = []
    for window, (positions, documents) in enumerate(zip(tokens.positions, tokens.documents, strict=True)):
        bounds = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
        spans = map(slice, bounds[:-1], bounds[1:])
        found += [(window, span) for span in spans if documents[span.start] != PADDING]
    return found


def assert_alike(model: Decoder, tokens: Tokens) -> None:
    """Each segment beside the same tokens at the beginning of a row of their own."""
    spans = segments(tokens)
    rows = np.zeros((len(spans), tokens.ids.shape[1]), np.int32)
    for row, (window, span) in zip(rows, spans, strict=True):
        row[: span.stop - span.start] = tokens.ids[window, span]
    alone = residual_stream(model, rows)
    together = residual_stream(model, tokens.ids, tokens.positions)
    for name in ("states", "attention", "mlp"):
        for index, (window, span) in enumerate(spans):
            found = getattr(together, name)[:, window, span]
            wanted = getattr(alone, name)[:, index, : span.stop - span.start]
            errors = np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
            assert errors.max() <= TOLERANCE, (name, window, span, errors)


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_each_by_itself(
    case: str, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    tokens = packed(tmp_path)
    assert tokens.segmented
    assert len(segments(tokens)) == 12  # 150 letters make two pieces, one letter makes none
    assert_alike(load_model(str(make_checkpoint(tmp_path, **CASES[case]))), tokens)


@pytest.mark.parametrize("block", [7, 50])
def test_blocks_of_queries(
    block: int, tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "query_block", lambda config, length: block)
    monkeypatch.setattr(attention, "score_bytes", lambda: 1)
    directory = make_checkpoint(tmp_path, num_hidden_layers=2, **SLIDING)
    # A length of its own for each: what was compiled for another block must not be met again.
    assert_alike(load_model(str(directory)), packed(tmp_path, 128 + block))


def test_positions_of_whole_windows_change_nothing(tiny_checkpoint: Path) -> None:
    model = load_model(str(tiny_checkpoint))
    ids = np.random.default_rng(1).integers(0, 256, (2, 40), np.int32)
    tokens = Tokens(ids, np.zeros_like(ids))
    plain, placed = residual_stream(model, ids), residual_stream(model, ids, tokens.positions)
    np.testing.assert_allclose(placed.states, plain.states, rtol=0, atol=1e-5)


def test_padding_and_neighbours_have_no_influence(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model, tokens = load_model(str(tiny_checkpoint)), packed(tmp_path)
    padding = tokens.documents == PADDING
    assert padding.any()
    before = residual_stream(model, tokens.ids, tokens.positions).states
    other = np.random.default_rng(2).integers(0, 256, tokens.ids.shape, np.int32)
    after = residual_stream(model, np.where(padding, other, tokens.ids), tokens.positions).states
    np.testing.assert_array_equal(after[:, ~padding], before[:, ~padding])
    assert np.isfinite(after).all()
    window, span = segments(tokens)[1]
    changed = tokens.ids.copy()
    changed[window, span] = other[window, span]
    after = residual_stream(model, changed, tokens.positions).states
    same = np.ones(tokens.ids.shape, bool)
    same[window, span] = False
    np.testing.assert_array_equal(after[:, same], before[:, same])


def test_mask_of_segments() -> None:
    def seen(*positions: int) -> list[list[int]]:
        visible = causal_mask(jnp.arange(5), 5, 2, jnp.array(positions, jnp.int32))
        return [np.flatnonzero(row).tolist() for row in visible]

    assert seen(0, 1, 2, 0, 1) == [[0], [0, 1], [1, 2], [3], [3, 4]]
    assert seen(0, 1, 2, 3, 4) == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
