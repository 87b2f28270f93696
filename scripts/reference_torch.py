"""Measures what every layer of a decoder writes into its residual stream, with PyTorch and NumPy.

An independent check of jaxdelta, without any of its code: the forward pass is Hugging Face's with eager
attention, every statistic a line of NumPy in float32. With h_L (n, d) the state entering layer L of N, and
the first token's row dropped, the statistics describe

    δ_L = h_{L+1} - h_L = U diag(σ) Vᵀ,    v_L = the first row of Vᵀ.

To compare:

    python scripts/delta_svd.py --model=demo --last_state=normed --out=jax.json
    python scripts/reference_torch.py --model=demo --out=torch.json
    python scripts/compare_reference.py --reference=torch.json --candidate=jax.json

OUT.safetensors, next to OUT.json, holds `directions` (N, k, d), `singular_values` (N, r), `top1_cos` (N, N).
The last state is that after the final RMSNorm, as Hugging Face reports it, so the last row is not what layer
N-1 wrote; --last_state=residual takes the state before the norm. `last_layer_normed` is always after it.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags
from safetensors import SafetensorError
from safetensors.numpy import save

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLAGS = flags.FLAGS
DATA = Path(__file__).resolve().parents[1] / "jaxdelta" / "data"
TINY = 1e-8  # lower bound of norms in a denominator
LEAST_SHARE = 1e-12  # shares of the energy below this do not count towards the effective rank
BLOCK_RANK = 8  # size of the basis that the layers of a phase share
PHASES_OF_64 = "A:0-6,B:7-9,C:10-31,D:32-46,E:47-58,tail:59-63"
PHASE_ENDS = (("A", 0.11), ("B", 0.15), ("C", 0.5), ("D", 0.75), ("E", 0.92), ("tail", 1.0))

Report = dict[str, Any]
Arrays = dict[str, np.ndarray]


class UserError(Exception):
    """Unusable input; users see the message only."""


def parse_phases(text: str) -> list[str]:
    """`A:0-1,B:2` -> ["A", "A", "B"]: the phase of every layer from 0; every layer is in one range."""
    phases: dict[int, str] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^:\s]+):(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            raise flags.ValidationError(f"{part!r} is not NAME:FIRST-LAST")
        layers = range(int(match[2]), int(match[3] or match[2]) + 1)
        if not layers or phases.keys() & layers:
            raise flags.ValidationError(f"{part!r} is empty or overlaps another range")
        phases |= dict.fromkeys(layers, match[1])
    if missing := set(range(max(phases))) - set(phases):
        raise flags.ValidationError(f"layer {min(missing)} is in no range")
    return [phases[L] for L in sorted(phases)]


def phase_names(text: str | None, num_layers: int) -> list[str]:
    """The phase of every layer: from the given map, else the reference's map for N = 64, else by L / N."""
    if text is None and num_layers != 64:
        return [next(name for name, end in PHASE_ENDS if L / num_layers < end) for L in range(num_layers)]
    names = parse_phases(text or PHASES_OF_64)
    if len(names) != num_layers:
        raise flags.ValidationError(f"--phases names {len(names)} layers, the model has {num_layers}")
    return names


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns a library's error about unusable input into one line that begins with `what`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what}: {(str(error) or repr(error)).splitlines()[0]}") from error


def pretrained(auto_class: str, source: str, revision: str, **options: Any) -> Any:
    """Loads a class of transformers from a directory or the hub; its errors become one line."""
    import transformers

    if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).is_dir():
        raise UserError(f"there is no directory {source}")
    with one_line(f"cannot load {source}"):
        return getattr(transformers, auto_class).from_pretrained(source, revision=revision, **options)


def load_model(source: str, revision: str, dtype: str, device: str | None) -> "PreTrainedModel":
    """The model with all weights; transformers would fill missing ones with random numbers."""
    import torch

    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("--device=cuda: PyTorch finds no CUDA device")
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    # A weight of a wrong shape is reported by name below.
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = pretrained("AutoModelForCausalLM", source, revision, **options)
    if not (hasattr(model, "model") and hasattr(model.model, "layers") and hasattr(model.model, "norm")):
        raise UserError(f"{source}: a {model.config.model_type!r} model has no model.layers and model.norm")
    for kind in ("missing", "mismatched", "unexpected"):
        if found := sorted(map(str, report[f"{kind}_keys"])):
            raise UserError(f"{source}: {len(found)} {kind} weights, the first is {found[0]}")
    with one_line(f"cannot move {source} to the device"):
        return model.eval().to(device or ("cuda" if has_cuda else "cpu"))


def read_calibration(path: Path) -> str:
    """A text file as it is, or a JSON list of prompts joined by blank lines."""
    if path.suffix not in (".txt", ".json"):
        raise flags.ValidationError(f"--calibration: {path} is neither .txt nor .json")
    with one_line(f"cannot read {path}"):
        text = path.read_bytes().decode("utf-8")
        if path.suffix == ".txt":
            return text
        prompts = json.loads(text)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{path} is not a JSON list of strings")
    return "\n\n".join(prompts)


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str, max_tokens: int) -> list[int]:
    """The text as one stream of at most `max_tokens` ids: no chat template, no token added."""
    if tokenizer.vocab_size < 2:  # transformers 5 returns this for a directory without a tokenizer
        raise UserError("there is no tokenizer with the model, name one with --tokenizer")
    ids = tokenizer(text, add_special_tokens=False).input_ids[:max_tokens]
    if len(ids) < 2:
        raise UserError(f"the calibration text has {len(ids)} tokens, at least 2 are needed")
    return ids


def forward(model: "PreTrainedModel", tokens: list[int]) -> tuple[list[np.ndarray], np.ndarray, float]:
    """One pass: the states h_0 ... h_N (n, d) before the final norm, h_N after it, the loss per token."""
    import torch

    ids = torch.tensor([tokens], device=model.device)
    around_norm: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda _, args, out: around_norm.extend((args[0], out)))
    with torch.inference_mode(), one_line("the forward pass failed"):
        output = model(ids, output_hidden_states=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    # The last of `hidden_states` is after the norm; all others are the residual stream itself.
    *states, normed = (h[0].float().cpu().numpy() for h in (*output.hidden_states[:-1], *around_norm))
    for L, state in enumerate([*states, normed]):
        if not np.isfinite(state).all():
            raise UserError(f"state {L} of the residual stream holds NaN or infinity")
    return states, normed, loss.item()


def effective_rank(share: np.ndarray) -> float:
    """exp(-Σ p ln p) over the shares of the energy p > 1e-12; 0 for a zero matrix."""
    share = share[share > LEAST_SHARE]
    return float(np.exp(-np.sum(share * np.log(share)))) if share.size else 0.0


def describe(after: np.ndarray, before: np.ndarray, k: int) -> tuple[Report, np.ndarray, np.ndarray]:
    """What one layer wrote, δ = after - before, without the first token's row.

    Args:
        after: h_{L+1} (n, d).
        before: h_L (n, d).
        k: number of singular values and directions to keep.

    Returns:
        The layer's statistics, all singular values (r,) and the k leading right singular vectors (k, d).
    """
    delta, state = (after - before)[1:], before[1:]
    delta_norm, state_norm = np.linalg.norm(delta, axis=1), np.linalg.norm(state, axis=1)
    step = delta_norm / np.maximum(state_norm, TINY)
    cosine = np.sum(delta * state, axis=1) / np.maximum(delta_norm * state_norm, TINY)
    _, sigma, directions = np.linalg.svd(delta, full_matrices=False)
    share = np.square(sigma) / (np.square(sigma).sum() or 1)
    figures = {
        "frob": float(np.linalg.norm(delta)),
        "token_norm_mean": float(delta_norm.mean()),
        "token_norm_std": float(delta_norm.std()),
        "h_norm_mean": float(state_norm.mean()),
        "rel_step_mean": float(step.mean()),
        "rel_step_std": float(step.std()),
        "parallel_frac": float(np.abs(cosine).mean()),
        "cos_delta_h_mean": float(cosine.mean()),
        "top_singvals": sigma[:k].tolist(),
        "eff_rank": effective_rank(share),
    }
    figures |= {f"top{m}_frac": float(share[:m].sum()) for m in (1, 3, 10)}
    return figures, sigma, directions[:k]


def describe_layers(states: list[np.ndarray], phases: list[str], k: int) -> tuple[list[Report], Arrays]:
    """Every layer's row, printed when computed, and the arrays of all layers."""
    rows, spectra = [], []
    for L, phase in enumerate(phases):
        row, *spectrum = describe(states[L + 1], states[L], k)
        rows.append({"L": L, "phase": phase, **row})
        spectra.append(spectrum)
        print(
            f" L={L:2d} phase={phase:>4} ||h||={row['h_norm_mean']:7.1f} ||δ||={row['token_norm_mean']:7.2f} "
            f"rel={row['rel_step_mean']:.4f} ‖parallel‖={row['parallel_frac']:.4f} "
            f"eff_rank={row['eff_rank']:6.2f}",
            flush=True,
        )
    sigma, directions = (np.stack(part) for part in zip(*spectra, strict=True))
    top1_cos = directions[:, 0] @ directions[:, 0].T
    return rows, {"directions": directions, "singular_values": sigma, "top1_cos": top1_cos}


def phase_overlap(top1_cos: np.ndarray, phases: list[str]) -> list[Report]:
    """Mean |<v_i, v_j>| over the pairs inside each phase, and between its layers and all others."""
    overlap, labels = np.abs(top1_cos), np.array(phases)
    table = []
    for phase in dict.fromkeys(phases):
        inside = labels == phase
        pairs = overlap[np.ix_(inside, inside)][np.triu_indices(inside.sum(), 1)]
        across = overlap[np.ix_(inside, ~inside)]
        row = {"phase": phase, "layers": int(inside.sum())}
        row |= {"intra_cos_mean": float(pairs.mean()) if pairs.size else 1.0}
        table.append(row | {"cross_cos_mean": float(across.mean()) if across.size else 0.0})
    return table


def block_capture(directions: np.ndarray, phases: list[str]) -> list[Report]:
    """capture_L = ‖B v_L‖², B (8, d) the leading right singular vectors of a phase's stacked directions."""
    labels, table = np.array(phases), []
    for phase in dict.fromkeys(phases):
        layers = np.flatnonzero(labels == phase)
        if layers.size < 2:
            continue
        stack = directions[layers].reshape(-1, directions.shape[-1])
        basis = np.linalg.svd(stack, full_matrices=False)[2][:BLOCK_RANK]
        for L in layers.tolist():
            capture = float(np.sum(np.square(basis @ directions[L, 0])))
            table.append({"phase": phase, "L": L, "capture": capture})
    return table


def print_tables(report: Report) -> None:
    """Prints the cross-layer statistics in the original's layout."""
    print("\n=== Pairwise top-1 cos-sim (adjacent) ===")
    for L, cosine in enumerate(report["top1_cos_adjacent"]):
        print(f" L={L:2d}→{L + 1:2d} phase={report['per_layer'][L]['phase']:>4} |cos|={abs(cosine):.4f}")
    print("\n=== Per-phase top-1 direction overlap ===")
    print(f"{'phase':>7} {'N':>3} intra_cos_mean cross_cos_mean")
    for row in report["phase_overlap"]:
        print("{phase:>7} {layers:>3} {intra_cos_mean:14.4f} {cross_cos_mean:14.4f}".format_map(row))
    print("\n=== Block-shared subspace (rank-8) capture fraction per layer ===")
    for row in report["block_capture"]:
        print(" phase={phase:>4} L={L:2d} v1 captured by block top-8: {capture:.4f}".format_map(row))


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Records the seconds of a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def write_together(files: dict[Path, bytes]) -> None:
    """Writes all files or none: first under temporary names in the same directory, then renamed."""
    unfinished = [path.with_name(f".{path.name}.{os.getpid()}") for path in files]
    try:
        with one_line("cannot write"):
            for temporary, content in zip(unfinished, files.values(), strict=True):
                temporary.write_bytes(content)
            for temporary, path in zip(unfinished, files, strict=True):
                os.replace(temporary, path)
    finally:
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)


def run_record(seconds: dict[str, float], loss: float) -> Report:
    """What is needed to reproduce the numbers, and the model's loss on the text."""
    return {
        "seconds": seconds,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        "dtype": FLAGS.dtype,
        "flags": {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(sys.argv[0])},
        "last_state": FLAGS.last_state,
        "calibration_loss": loss,
    }


def load() -> tuple["PreTrainedModel", list[int], list[str]]:
    """The model, the tokens of the calibration text, the phase of each layer. Loads the weights last."""
    text = read_calibration(Path(FLAGS.calibration or DATA / "calibration_prompts.json").expanduser())
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    source = str(DATA / "demo") if FLAGS.model == "demo" else FLAGS.model
    config = pretrained("AutoConfig", source, FLAGS.revision)
    phases = phase_names(FLAGS.phases, config.num_hidden_layers)
    # The revision is the model's; a separate tokenizer has its own.
    origin = (FLAGS.tokenizer, "main") if FLAGS.tokenizer else (source, FLAGS.revision)
    tokens = tokenize(pretrained("AutoTokenizer", *origin), text, FLAGS.max_tokens)
    if max(tokens) >= config.vocab_size:
        raise UserError(f"token {max(tokens)} is not among the model's {config.vocab_size}")
    return load_model(source, FLAGS.revision, FLAGS.dtype, FLAGS.device), tokens, phases


def analyze(states: list[np.ndarray], normed: np.ndarray, phases: list[str], k: int) -> tuple[Report, Arrays]:
    """The report and the arrays; `normed` (n, d) is the last state after the final norm."""
    rows, arrays = describe_layers(states, phases, k)
    report = {
        "num_layers": len(phases),
        "hidden": normed.shape[1],
        "n_calib_tokens": normed.shape[0],
        "per_layer": rows,
        "top1_cos_adjacent": np.diagonal(arrays["top1_cos"], 1).tolist(),
        "phase_overlap": phase_overlap(arrays["top1_cos"], phases),
        "block_capture": block_capture(arrays["directions"], phases),
        "last_layer_normed": {**rows[-1], **describe(normed, states[-2], k)[0]},
    }
    return report, arrays


def run(out: Path) -> None:
    """Reads model and text, prints tables, and writes two files."""
    seconds: dict[str, float] = {}
    print(f"Loading {FLAGS.model} ...", flush=True)
    with timed(seconds, "load"):
        model, tokens, phases = load()
    print(f" L={len(phases)}, hidden={model.config.hidden_size}\n calibration tokens: {len(tokens)}")
    with timed(seconds, "forward"):
        states, normed, loss = forward(model, tokens)
    print(f" hidden_states count: {len(states)} (expect {len(phases) + 1})")
    with timed(seconds, "analysis"):
        if FLAGS.last_state == "normed":
            states[-1] = normed
        report, arrays = analyze(states, normed, phases, FLAGS.top_k)
    seconds["total"] = sum(seconds.values())
    print_tables(report)
    report = {"schema_version": 1, "model": FLAGS.model, **report, "run": run_record(seconds, loss)}
    text = json.dumps(report, indent=1, allow_nan=False)
    # The JSON is written last, so that the arrays exist if it does.
    write_together({out.with_suffix(".safetensors"): save(arrays), out: text.encode()})
    print(f"\nSaved: {out}")


def define_flags() -> None:
    """Defines the flags; called only when run as a script, so that tests can import several scripts."""
    flags.DEFINE_string("model", None, "hub id, local directory, or `demo`", required=True)
    flags.DEFINE_string("revision", "main", "branch, tag or commit of a hub id")
    flags.DEFINE_string("tokenizer", None, "hub id or directory of the tokenizer (default: the model's own)")
    flags.DEFINE_string("out", None, "JSON file to write; .safetensors goes next to it", required=True)
    flags.DEFINE_integer("top_k", 8, "singular values and directions kept per layer", lower_bound=1)
    flags.DEFINE_string("calibration", None, ".txt, or .json with a list of prompts (default: 25 prompts)")
    flags.DEFINE_integer("max_tokens", 2048, "maximum number of tokens", lower_bound=2)
    # In bfloat16 the third digit depends on the machine's kernels: too coarse for a check.
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "dtype of the weights and the forward pass"
    )
    flags.DEFINE_enum("device", None, ["cpu", "cuda"], "device (default: cuda if there is one)")
    flags.DEFINE_string("phases", None, "layers of each phase, such as A:0-6,B:7-9 (default: by depth)")
    flags.DEFINE_enum(
        "last_state", "normed", ["residual", "normed"], "the last state: before the final norm, or after it"
    )
    flags.register_validator("out", lambda path: path.endswith(".json"), "must end in .json")
    flags.register_validator("phases", lambda text: text is None or bool(parse_phases(text)))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake ends in one line and status 2, instead of absl's page of help and 1."""
    try:
        if rest := FLAGS(argv)[1:]:
            raise flags.Error(f"unexpected argument {rest[0]!r}")
    except flags.Error as error:
        print(f"reference_torch: {error}", file=sys.stderr)
        sys.exit(2)
    return argv


def main(_: Sequence[str]) -> int:
    """Returns the exit status: 0 if both files are written, 1 for unusable input, 2 for a bad flag."""
    out = Path(FLAGS.out).expanduser()
    try:
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise UserError(f"cannot write {out}")
        run(out)
    except (UserError, flags.Error) as error:
        print(f"reference_torch: {error}", file=sys.stderr)
        return 2 if isinstance(error, flags.Error) else 1
    return 0


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
