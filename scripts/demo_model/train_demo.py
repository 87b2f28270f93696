"""Trains the demo model that ships with the package: a Qwen3 of 28 layers and 5 M parameters, on a CPU.

    python scripts/demo_model/demo_corpus.py --out=demo_work/corpus
    python scripts/demo_model/train_demo.py --corpus_dir=demo_work/corpus --work_dir=demo_work --steps=STEPS

The number of steps, their time and the expected held-out loss are in the model card,
jaxdelta/data/demo/README.md. A restarted run continues from its last checkpoint, even with another number of
steps if the decay has not begun. The same seed, text and steps give the same weights, up to rounding on
another machine.

Recipe. Embeddings start as a factorisation of the bigram counts (demo_teacher.py). Part of the targets is a
trigram model's distribution, with a decreasing share, until the learning rate decays to zero over the last
`DECAY` of the steps. Sequences have 128 tokens until then, 256 during the decay; a step has 1024 tokens. Muon
(Jordan et al., 2024) for the matrices of each layer, AdamW for embedding and norms. Everything is float32,
rounded to bfloat16 once, at export.

glibc returns the memory of every step to the system, and allocating it again takes a third of the time. If
`MALLOC_*` are not set, the script sets them and restarts itself.
"""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from demo_baselines import baselines
from demo_teacher import Teacher, bigram_embeddings
from demo_tokens import CORPUS_DIR, VOCAB, WORK_DIR, prepare
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from jaxdelta.checkpoint.checkpoint import save_model
from jaxdelta.model.decoder import Decoder, logits
from jaxdelta.model.families.registry import config_from_dict

_OUT = flags.DEFINE_string("out", "jaxdelta/data/demo", "Folder of the exported model.")
_STEPS = flags.DEFINE_integer("steps", None, "Number of steps.", required=True, lower_bound=100)
_EXPORT_MINUTES = flags.DEFINE_float("export_minutes", 25, "Minutes between exports during training.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial weights and of the order of the text.")

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
LENGTH, ROWS, EVAL_ROWS = 256, 4, 8  # tokens of a segment; segments per step, and per scored batch
SHORT = 128  # sequences before the decay: half segments
WARMUP = 25  # steps
DECAY = 0.4  # share of the steps over which the learning rate falls
TRUST, TRUST_FADES = 0.5, 500  # share of the teacher at first, and the steps that halve it
MUON_RATE, ADAM_RATE, WEIGHT_DECAY, EMBEDDING_STD = 0.02, 3e-3, 0.05, 0.03
LOG_EVERY, SAVE_EVERY = 10, 100  # steps
HELD_NOW = 2**13 + 2  # held-out tokens scored during training
GENERATION = {"eos_token_id": 0, "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "100000000000")
MALLOC |= {"MALLOC_TOP_PAD_": "268435456", "MALLOC_ARENA_MAX": "1"}

Params = dict[str, jax.Array]


@dataclasses.dataclass
class Plan:
    """The progress of the run, and the schedule for the next step."""

    steps: int
    step: int = 0
    seconds: float = 0.0  # of training so far

    @property
    def decay_at(self) -> int:
        """The first step of the decay."""
        return round((1 - DECAY) * self.steps)

    @property
    def decays(self) -> bool:
        """Whether the decay has begun."""
        return self.step >= self.decay_at

    def rate(self) -> float:
        """The factor of the learning rate: up over `WARMUP` steps, 1, then down to 0.

        The decay is 1 - √(share of the decay that is over), after Hägele et al., 2024.
        """
        if not self.decays:
            return min((self.step + 1) / WARMUP, 1.0)
        return 1 - ((self.step - self.decay_at) / (self.steps - self.decay_at)) ** 0.5

    def trust(self) -> float:
        """The teacher's share of the targets: decreasing, and none during the decay."""
        return 0.0 if self.decays else TRUST / (1 + self.step / TRUST_FADES)


class Demo:
    """The model as named arrays for the optimizer, and the way back to the module."""

    def __init__(self, seed: int):
        self.graph, state = nnx.split(Decoder(config_from_dict(CONFIG), rngs=nnx.Rngs(seed)))
        leaves, self.tree = jax.tree_util.tree_flatten_with_path(state)
        paths = [path for path, _ in leaves]
        self.names = [".".join(part.key for part in path if hasattr(part, "key")) for path in paths]
        # Projections into the residual stream start small (Radford et al., 2019).
        scale = (2 * CONFIG["num_hidden_layers"]) ** -0.5
        self.params: Params = {
            name: leaf * scale if "o_proj" in name or "down_proj" in name else leaf
            for name, (_, leaf) in zip(self.names, leaves, strict=True)
        }
        self.score = jax.jit(self.token_losses)

    def module(self, params: Params) -> Decoder:
        """The Flax model that holds these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, [params[name] for name in self.names]))

    def token_losses(self, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """-log p(target | inputs up to it) in nats, (B, T)."""
        return optax.softmax_cross_entropy_with_integer_labels(logits(self.module(params), inputs), targets)


def make_optimizer(params: Params) -> optax.GradientTransformation:
    """Muon for the stacked matrices (layer, out, in), one layer at a time; AdamW for the rest.

    Both learning rates are the full ones: the caller scales the updates by the schedule.
    """
    matrix = MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    numbers = {name: matrix if value.ndim == 3 else None for name, value in params.items()}
    return muon(
        MUON_RATE,
        ns_steps=3,
        preconditioning="aol",  # as good in 3 iterations as the usual scaling in 5 (arXiv 2512.04632)
        weight_decay=WEIGHT_DECAY,
        adam_learning_rate=ADAM_RATE,
        adam_b2=0.98,
        adam_weight_decay=0.0,
        muon_weight_dimension_numbers=numbers,
    )


def make_step(demo: Demo, optimizer: optax.GradientTransformation) -> Any:
    """One step, compiled: (params, state, rate, inputs, targets[, lesson]) -> (params, state, loss).

    A lesson is a teacher's soft targets, its bigram table, and how much to trust it.

    With it the gradient is that of (1 - trust) · loss + trust · soft loss; the loss returned is plain.
    """

    def objective(params: Params, inputs: jax.Array, targets: jax.Array, *lesson: Any) -> Any:
        log_p = jax.nn.log_softmax(logits(demo.module(params), inputs).reshape(-1, VOCAB))
        loss = -jnp.take_along_axis(log_p, targets.reshape(-1, 1), axis=-1).mean()
        if not lesson:
            return loss, loss
        soft, bigram, trust = lesson
        return (1 - trust) * loss + trust * soft.loss(log_p, bigram).mean(), loss

    def step(params: Params, state: Any, rate: jax.Array, *batch: Any) -> Any:
        grads, loss = jax.grad(objective, has_aux=True)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batch(tokens: np.ndarray, step: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of one step, a function of the step alone: every segment once per epoch."""
    segments = (len(tokens) - 1) // LENGTH
    epoch, first = divmod(step, segments // ROWS)
    order = np.random.default_rng([seed, epoch]).permutation(segments)
    starts = LENGTH * order[first * ROWS : (first + 1) * ROWS]
    rows = tokens[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    return rows[:, :-1].reshape(-1, length), rows[:, 1:].reshape(-1, length)


def held_out_loss(demo: Demo, params: Params, tokens: np.ndarray) -> float:
    """Mean loss of tokens[2:], in windows of `LENGTH` that see only the last token of the window before."""
    stream = tokens[1:].astype(np.int32)
    total, count, rows = 0.0, len(stream) - 1, (EVAL_ROWS, LENGTH)
    for start in range(0, count, EVAL_ROWS * LENGTH):
        part = stream[start : start + EVAL_ROWS * LENGTH + 1]
        scored = len(part) - 1
        part = np.pad(part, (0, EVAL_ROWS * LENGTH - scored))
        losses = demo.score(params, part[:-1].reshape(rows), part[1:].reshape(rows))
        total += float(np.asarray(losses, np.float64).reshape(-1)[:scored].sum())
    return total / count


@dataclasses.dataclass
class Run:
    """The state of the training run."""

    plan: Plan
    demo: Demo
    params: Params
    state: Any
    curve: list[tuple]
    step_fn: Any

    @classmethod
    def begin(cls, work_dir: pathlib.Path, tokens: np.ndarray) -> "Run":
        """The run from its last checkpoint, or a new one."""
        plan, curve = saved_plan(work_dir)
        demo = Demo(_SEED.value)
        embeddings = bigram_embeddings(tokens, CONFIG["hidden_size"], EMBEDDING_STD)
        params = demo.params | {"embed_tokens.weight": jnp.asarray(embeddings)}
        optimizer = make_optimizer(params)
        run = cls(plan, demo, params, optimizer.init(params), curve, make_step(demo, optimizer))
        if plan.step:
            leaves, tree = jax.tree.flatten((run.params, run.state))
            with np.load(work_dir / "checkpoint.npz") as saved:
                leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(leaves))]
            run.params, run.state = jax.tree.unflatten(tree, leaves)
        return run

    def advance(self, tokens: np.ndarray, teacher: Teacher) -> float:
        """One step; returns the loss before it."""
        plan, start = self.plan, time.time()
        length = LENGTH if plan.decays else SHORT
        inputs, targets = batch(tokens, plan.step, length, _SEED.value)
        lesson = (teacher(inputs), teacher.bigram, np.float32(plan.trust())) if plan.trust() else ()
        arrays = (np.float32(plan.rate()), inputs, targets, *lesson)
        self.params, self.state, loss = self.step_fn(self.params, self.state, *arrays)
        loss = float(loss)  # waits for the end of the step
        plan.step, plan.seconds = plan.step + 1, plan.seconds + time.time() - start
        return loss

    def save(self, work_dir: pathlib.Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        leaves = jax.tree.leaves((self.params, self.state))
        about = np.array(json.dumps({"plan": dataclasses.asdict(self.plan), "curve": self.curve}))
        part = work_dir / "checkpoint.part.npz"
        arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        np.savez(part, about=about, **arrays)
        part.replace(work_dir / "checkpoint.npz")


def saved_plan(work_dir: pathlib.Path) -> tuple[Plan, list[tuple]]:
    """Plan and loss curve of the last checkpoint, or of a new run."""
    stored, plan = work_dir / "checkpoint.npz", Plan(_STEPS.value)
    if not stored.exists():
        return plan, []
    with np.load(stored) as saved:
        about = json.loads(str(saved["about"]))
    was = Plan(**about["plan"])
    if was.steps != plan.steps and was.step > min(was.decay_at, plan.decay_at):
        raise app.UsageError(f"the decay of a run of {was.steps} steps has begun; finish it with that many")
    return dataclasses.replace(was, steps=plan.steps), [tuple(row) for row in about["curve"]]


def export(run: Run, tokens: np.ndarray, held: np.ndarray) -> None:
    """Rounds to bfloat16, scores the result, and writes model, tokenizer, curve and card to --out."""
    work_dir, out = pathlib.Path(WORK_DIR.value), pathlib.Path(_OUT.value)
    folder = work_dir / "export"
    shutil.rmtree(folder, ignore_errors=True)
    rounded = {name: value.astype(jnp.bfloat16) for name, value in run.params.items()}
    save_model(run.demo.module(rounded), folder)
    shutil.copytree(work_dir / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    write_curve(folder / "loss_curve.csv", run.curve)
    loss = held_out_loss(run.demo, {n: value.astype(jnp.float32) for n, value in rounded.items()}, held)
    logging.info("step %d: held-out loss of the export %.4f", run.plan.step, loss)
    sizes = {"tokens_a_step": LENGTH * ROWS, "held_tokens": len(held) - 2, "train_tokens": len(tokens)}
    facts = {"held_out_loss": loss, "seed": _SEED.value, **sizes, **dataclasses.asdict(run.plan)}
    facts["decay_at"] = run.plan.decay_at
    (work_dir / "facts.json").write_text(json.dumps(facts, indent=2))
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, part := out / f".{file.name}.part")
        part.replace(out / file.name)
    card = [sys.executable, str(pathlib.Path(__file__).with_name("demo_card.py")), f"--model={out}"]
    subprocess.run([*card, f"--work_dir={work_dir}", f"--corpus_dir={CORPUS_DIR.value}"], check=True)


def write_curve(path: pathlib.Path, curve: list[tuple], rows: int = 300) -> None:
    """Writes every row of the loss curve with a held-out loss, and others, about `rows` in total."""
    stride = max(1, len(curve) // rows)
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "tokens", "train_loss", "rate", "held_out_loss"])
        for i, (step, loss, rate, held) in enumerate(curve):
            if held is not None or i % stride == 0:
                row = [step, step * LENGTH * ROWS, f"{loss:.4f}", f"{rate:.4f}"]
                table.writerow([*row, "" if held is None else f"{held:.4f}"])


def train(tokens: np.ndarray, held: np.ndarray) -> None:
    """Trains; a line of the curve every `LOG_EVERY` steps, a checkpoint every `SAVE_EVERY`, timed exports."""
    work_dir, exported, losses = pathlib.Path(WORK_DIR.value), time.time(), []
    run, teacher = Run.begin(work_dir, tokens), Teacher(tokens)
    plan = run.plan
    while plan.step < plan.steps:
        start = time.time()
        losses.append((run.advance(tokens, teacher), time.time() - start))
        if plan.step % LOG_EVERY == 0:
            held_now = (
                held_out_loss(run.demo, run.params, held[:HELD_NOW]) if plan.step % SAVE_EVERY == 0 else None
            )
            loss, pace = np.mean(losses[-LOG_EVERY:], axis=0)
            run.curve.append((plan.step, float(loss), plan.rate(), held_now))
            logging.info("step %d loss %.4f held-out %s, %.2f s a step", plan.step, loss, held_now, pace)
        if plan.step % SAVE_EVERY == 0:
            run.save(work_dir)
        if time.time() - exported > 60 * _EXPORT_MINUTES.value:
            export(run, tokens, held)
            exported = time.time()
    run.save(work_dir)
    export(run, tokens, held)


def main(_: list[str]) -> None:
    """Prepares the tokens, logs the baselines and trains; restarts if malloc's settings are missing."""
    if any(name not in os.environ for name in MALLOC):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    corpus_dir, work_dir = pathlib.Path(CORPUS_DIR.value), pathlib.Path(WORK_DIR.value)
    tokens, held = prepare(corpus_dir, work_dir)
    for name, loss in baselines(corpus_dir, work_dir).items():
        logging.info("%s: %.4f nats per held-out token", name, loss)
    train(tokens, held)


if __name__ == "__main__":
    app.run(main)
