"""The memory plan: what it says is what is compiled, and what does not fit is refused."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import summarise_from
from flax import nnx
from stopped_runs import OPTIONS, TEXT, run

from jaxdelta import analyze
from jaxdelta.checkpoint.checkpoint import open_checkpoint
from jaxdelta.checkpoint.weights import InMemoryWeights
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.model.config import Experts, ModelConfig
from jaxdelta.model.decoder import Decoder, abstract_block
from jaxdelta.model.families.registry import config_from_dict
from jaxdelta.run import memory_plan
from jaxdelta.run.memory_plan import FEW_GROUPS, Measurement, MemoryDemand, device_limit
from jaxdelta.spectra.moments.files import load_text
from jaxdelta.sweep.sweep import Blocks, PassPlan, Sweep
from jaxdelta.text.tokens import Tokens

GB = 10**9


def config(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    return config_from_dict(
        {
            "model_type": "qwen3",
            "vocab_size": 151_936,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "dtype": "bfloat16",
        }
    )


SMALL, LARGE = config(28, 1024, 16, 8, 3072), config(64, 5120, 64, 8, 25_600)
EXPERTS = dataclasses.replace(
    config(4, 2048, 32, 4, 6144), experts=Experts(64, 8, 768, renormalise=True, layers=(0, 1, 2, 3))
)


FEWEST = Measurement()
MANY = Measurement(views=4, parts=3, groups=40)  # the default views of a text of many documents


def work(
    model: ModelConfig,
    tokens: tuple[int, int] = (1, 2047),
    dtype: str = "bfloat16",
    resident: bool = False,
    measurement: Measurement = FEWEST,
) -> MemoryDemand:
    abstract = nnx.eval_shape(lambda: Decoder(model, dtype=jnp.bfloat16, rngs=None))
    return MemoryDemand(InMemoryWeights(abstract), tokens, dtype, "float32", resident, measurement)


def test_the_largest_dense_model_streams_through_8_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = work(LARGE).plan(8 * GB)
    assert found.mode == "stream"
    assert found.blocks.place == "device"
    assert found.at_once > 1
    layer = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_block(LARGE)))
    assert found.parts["weights"] == pytest.approx(2 * 2 * layer)
    with pytest.raises(JaxDeltaError, match=r"resident.*too much; .*--memory=stream"):
        work(LARGE, resident=True).plan(8 * GB)


def test_less_memory_means_smaller_blocks_then_states_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    summarise_from(monkeypatch, "rows")
    plans = []
    for limit in np.geomspace(40 * GB, GB, 60):
        try:
            plans.append(work(SMALL, (32, 2048)).plan(int(limit)))
        except JaxDeltaError:
            break
    assert all(found.total <= found.limit for found in plans)
    totals = [found.total for found in plans]
    assert totals == sorted(totals, reverse=True)
    assert plans[0].blocks == Blocks(32, 512)
    assert len({found.blocks.windows for found in plans}) >= 3
    assert [found.blocks.place for found in plans] == sorted(found.blocks.place for found in plans)
    assert plans[-1].blocks.place == "host"


def test_what_is_missing_is_said() -> None:
    with pytest.raises(JaxDeltaError) as error:
        work(LARGE).plan(GB)
    needed = float(str(error.value).split(": ")[1].split(" GB of 1.0 GB")[0])
    missing = float(str(error.value).split(" GB too much")[0].split(": ")[-1])
    assert needed - 1 == pytest.approx(missing, abs=0.11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "queries"), [((1, 295), 295), ((1, 2047), 128), ((4, 512), 64)])
def test_a_layers_workspace_is_what_xla_takes(tokens: tuple[int, int], queries: int, dtype: str) -> None:
    """XLA's own count of what the compiled function needs beside its arguments and results."""
    check_workspace(SMALL, tokens, queries, dtype)


@pytest.mark.parametrize("tokens", [(1, 295), (1, 2047)])
def test_the_workspace_of_experts(tokens: tuple[int, int]) -> None:
    check_workspace(EXPERTS, tokens, 128, "float32")


def check_workspace(model: ModelConfig, tokens: tuple[int, int], queries: int, dtype: str) -> None:
    planned = work(model, tokens, dtype)
    blocks = Blocks(tokens[0], queries)
    sweep = Sweep(planned.weights, Tokens(*np.zeros((2, *tokens), np.int32)), PassPlan(blocks, dtype))
    (traced,) = sweep.trace().values()
    taken = traced.compile().memory_analysis().temp_size_in_bytes
    assert taken <= planned._layer_workspace(blocks) <= 6 * taken


# -------------------------------------------------------------------------------------------- rows or moments


def makers(d: int, measurement: Measurement, backend: str = "cpu") -> list[list[int]]:
    """What layers are summarised from, the best first, for longer and longer texts."""
    own = work(config(28, d, 16, 8, 3 * d), measurement=measurement)
    lengths = np.geomspace(64, 3e6, 400).astype(int).tolist()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "default_backend", lambda: backend)
        return [dataclasses.replace(own, tokens=(1, n + 1))._makers() for n in lengths]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("d", [128, 1024, 5120])
def test_rows_of_a_short_text_and_moments_of_a_long_one(d: int, backend: str) -> None:
    """One switch as the text grows; what is second best stays as a way out."""
    for views, parts in ((1, 1), (4, 3), (12, 3)):
        for groups, visits in ((1, 1), (10, 1), (40, 40)):
            found = makers(d, Measurement(views, parts, groups, visits), backend)
            first = [made[0] for made in found]
            assert first == sorted(first) and {*first} == {0, groups}
            assert all({*made} == {0, groups, min(groups, FEW_GROUPS)} for made in found)


def test_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all, rows cost more with each view, moments with each group of a window and each part."""
    monkeypatch.setattr(memory_plan, "SPARE_BYTES", 1e15)

    def short(measurement: Measurement) -> int:
        """The number of lengths at which rows are chosen."""
        return sum(made[0] == 0 for made in makers(1024, measurement))

    assert short(Measurement(12, 3, 10)) < short(Measurement(4, 3, 10)) < short(Measurement(4, 3, 10, 10))
    assert short(Measurement(4, 1, 10)) < short(Measurement(4, 3, 10))


def test_rows_take_little_room_or_less_than_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they would cost less: each window has tokens of all groups."""
    own = Measurement(views=1, parts=1, groups=1, visits=40)
    generous = sum(made[0] == 0 for made in makers(1024, own))
    monkeypatch.setattr(memory_plan, "SPARE_BYTES", 0)
    scarce = makers(1024, own)
    assert 0 < sum(made[0] == 0 for made in scarce) < generous


def test_moments_alone() -> None:
    forced = dataclasses.replace(MANY, moments_only=True)
    assert makers(1024, forced)[0] == makers(1024, forced)[-1] == [40, FEW_GROUPS]


def test_fewer_groups_where_the_moments_of_all_do_not_fit() -> None:
    long = work(SMALL, (64, 2048), measurement=MANY)
    assert long.plan(10 * GB).groups == 40
    few = long.plan(5 * GB // 2)
    assert few.groups == FEW_GROUPS
    assert few.total <= few.limit
    assert long._rows(0)[1] > few.limit


def test_the_least_that_is_missing_is_said() -> None:
    """Of rows and moments, whichever is tried last."""
    for tokens in ((1, 512), (64, 2048)):
        own = work(SMALL, tokens, measurement=MANY)
        with pytest.raises(JaxDeltaError, match=r"MB too much; fewer tokens \(--max_tokens\)") as error:
            own.plan(GB // 10)
        plans = [
            own._plan(blocks, groups, GB // 10)
            for groups in own._makers()
            for blocks in own._divisions(groups)
        ]
        missing = (min(plan.total for plan in plans) - GB // 10) / 1e6
        assert f": {missing:.0f} MB too much" in str(error.value)


def test_a_run_falls_to_fewer_groups(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its documents are merged; `--keep_moments` takes moments of any text."""
    monkeypatch.setattr(MemoryDemand, "_divisions", lambda work, groups: iter([Blocks(*work.tokens)]))
    plans: list[str] = []

    def groups(directory: Path, limit: float | None) -> tuple[int, int]:
        """The number of groups of which moments are kept, and the bytes that were planned."""
        found, _ = run(tiny_checkpoint, None, keep_moments=str(directory), device_memory_gb=limit)
        assert all(row["intervals"] for row in found.per_layer)
        return int(load_text(directory)[1].max()) + 1, sum(found.run["memory"]["bytes"].values())

    many, planned = groups(tmp_path / "many", None)
    assert many == 13
    assert groups(tmp_path / "few", (planned - 1e5) / 1e9)[0] == FEW_GROUPS
    for options in ({}, {"keep_moments": str(tmp_path / "kept")}):
        analyze(str(tiny_checkpoint), TEXT, **OPTIONS, **options, listener=plans.append)
    assert [", moments: " in line for line in plans if line.startswith(" plan")] == [False, True]


def test_plan_is_kept_in_the_run(tiny_checkpoint: Path) -> None:
    lines: list[str] = []
    facts = analyze(
        str(tiny_checkpoint), ["some text"] * 4, top_k=2, device_memory_gb=0.5, listener=lines.append
    ).run
    (line,) = [line for line in lines if line.startswith(" plan")]
    assert "stream: " in line
    assert "of 500 MB" in line
    assert facts["memory"]["limit"] == 500_000_000
    assert facts["memory"]["mode"] == "stream"
    assert set(facts["memory"]) == {"mode", "windows", "queries", "place", "bytes", "limit"}


def test_modes_give_the_same_numbers(tiny_checkpoint: Path) -> None:
    text = ["some text to be measured"] * 4
    stream, resident = (analyze(str(tiny_checkpoint), text, memory=mode) for mode in ("stream", "resident"))
    assert resident.run["memory"]["mode"] == "resident"
    assert stream.per_layer == resident.per_layer
    np.testing.assert_array_equal(stream.directions, resident.directions)
    assert "load" in resident.run["seconds"]


def test_too_little_memory_reads_no_weights(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("jaxdelta.checkpoint.checkpoint.Checkpoint.layer", never)
    with pytest.raises(JaxDeltaError, match=r"too much; fewer tokens \(--max_tokens\)"):
        analyze(str(tiny_checkpoint), ["some text"] * 4, top_k=2, device_memory_gb=1e-4)


def test_a_loaded_model_cannot_be_streamed(tiny_checkpoint: Path) -> None:
    model = open_checkpoint(str(tiny_checkpoint)).load()
    with pytest.raises(UsageError, match="memory=stream"):
        analyze(model, memory="stream")


def test_limit_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**8 < device_limit() < 10**15
    assert device_limit(0.25) == 250_000_000

    class Device:
        @staticmethod
        def memory_stats() -> dict[str, int]:
            return {"bytes_limit": 10**10}

    monkeypatch.setattr(memory_plan.jax, "local_devices", lambda: [Device])
    assert device_limit() == 9 * 10**9
    assert device_limit(100.0) == 9 * 10**9
