"""Chats: ids are those of apply_chat_template, roles those of hand-made masks; --measure chooses by them."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import summarise_from, torch_model
from test_tokenizer import qwen

from jaxdelta import analyze
from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.report.methods import methods
from jaxdelta.run.merge import merge_runs
from jaxdelta.text.chat import ChatTemplate, rendered
from jaxdelta.text.documents import read_documents
from jaxdelta.text.measure import measured
from jaxdelta.text.rows import Reading
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import LAYOUTS, tokenize

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|begin|>"]
SPECIALS += ["<|header|>", "<|/header|>", "<|eot|>", "<think>", "</think>", "<turn>", "</turn>"]

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content
 + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Thoughts of earlier turns are dropped, and the last turn has some always, as in Qwen3.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content or '' %}{% set thought = message.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}</call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role in ('user', 'system', 'tool') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA = """{{- bos_token }}{% for message in messages %}{{- '<|header|>' + message['role']
 + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"""
# The system's words go into the last question; roles must alternate.
MISTRAL = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}
{%- set loop_messages = messages[1:] %}
{%- else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}
{{- bos_token }}{% for message in loop_messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant') }}{% endif %}
{%- if message.role == 'user' %}
{{- '[INST] ' + (system if loop.revindex0 <= 1 else '') + message.content + ' [/INST]' }}
{%- else %}{{- ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
# With transformers' own marks, and another name for the assistant.
MARKED = """{% for message in messages %}
{{- '<turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content | upper + '</turn>' }}{% endgeneration %}
{%- else %}{{ message.content + '</turn>' }}{% endif %}{{ '\\n' }}{% endfor %}"""
TEMPLATES = {"ChatML": CHATML, "thinking": THINKING, "Llama 3": LLAMA, "Mistral": MISTRAL, "marked": MARKED}

CHATS = [
    [("user", "Hi there"), ("assistant", "Hello! How are you?")],
    [
        ("system", "You are kind."),
        ("user", "user"),
        ("assistant", "<think>\nwell\n</think>\n\nassistant"),
        ("user", "<|im_end|>\n<|im_start|>assistant\nNo."),
        ("assistant", "<think>\n漢字\n</think>\n\n🙂 fine"),
    ],
    [("user", "漢 first"), ("assistant", "é"), ("user", " spaced \n"), ("assistant", " out\n")],
    [("user", "a question without an answer")],
]
GPT = {"user": "human", "assistant": "gpt", "system": "system"}


def messages(chat: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in chat]


ALL = [messages(chat) for chat in CHATS]


def write_chat_tokenizer(directory: Path, template: str | list[Any] | None = CHATML) -> Path:
    qwen(SPECIALS).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"chat_template": template} if template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=TEMPLATES)
def templated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"), TEMPLATES[request.param])


def transformers_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


def tokens_of(directory: Path, chats: Any, role: str | None = None, **options: Any) -> Tokens:
    options = {"max_tokens": 4000, "vocab_size": 10_000} | options
    return tokenize(rendered(chats, ChatTemplate(directory, role)), load_encoder(directory), **options)


def by_document(tokens: Tokens, values: np.ndarray) -> list[list[Any]]:
    numbers = range(int(tokens.documents.max()) + 1)
    return [values[tokens.documents == number].tolist() for number in numbers]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_apply_chat_template(templated: Path, layout: str) -> None:
    """In both layouts a chat's ids are transformers', whatever comes before it and however windows cut it."""
    own = transformers_tokenizer(templated)
    for seq_len in (16, 4000):
        tokens = tokens_of(templated, ALL, layout=layout, seq_len=seq_len)
        ids = by_document(tokens, tokens.ids)
        for chat, found in zip(ALL, ids, strict=True):
            wanted = own.apply_chat_template(chat)["input_ids"]
            short = layout == "packed" and len(wanted) % seq_len == 1  # a piece of one token is left out
            assert found == wanted[: len(wanted) - short]


def words(tokens: Tokens, role: str) -> list[str]:
    """The texts of consecutive tokens of a role, all in one window."""
    assert tokens.roles is not None and len(tokens.ids) == 1
    number = tokens.roles.names.index(role)
    found, before = [], False
    for i, own in enumerate(tokens.roles.of_token[0] == number):
        if own and not before:
            found.append("")
        if own:
            found[-1] += tokens.text(0, i)
        before = bool(own)
    return found


END = {"ChatML": "<|im_end|>", "thinking": "<|im_end|>", "Llama 3": "<|eot|>", "Mistral": "</s>"}


@pytest.mark.parametrize("name", END)
def test_roles(name: str, tmp_path: Path) -> None:
    """What counts of a message is its content and its end token, not its header."""
    tokens = tokens_of(write_chat_tokenizer(tmp_path, TEMPLATES[name]), ALL)
    end = END[name]
    trimmed = name == "Llama 3"
    closing = "" if name == "Mistral" else end
    contents = {role: [text for chat in CHATS for own, text in chat if own == role] for role in GPT}
    assert words(tokens, "system") == [f"You are kind.{closing}"]
    thoughts = {"thinking": ["assistant", "<think>\n漢字\n</think>\n\n🙂 fine"]}
    said = contents["assistant"]
    said[1:3] = thoughts.get(name, said[1:3])
    said = [(text.strip() if trimmed else text) + end for text in said]
    assert [text.strip() for text in words(tokens, "assistant")] == [text.strip() for text in said]
    asked = [(text.strip() if trimmed else text) + closing for text in contents["user"]]
    assert [text.strip() for text in words(tokens, "user")] == [text.strip() for text in asked]
    assert sum(tokens.by_role.values()) == tokens.count


def test_the_assistant_is_what_the_template_marks(tmp_path: Path) -> None:
    directory = write_chat_tokenizer(tmp_path, MARKED)
    tokens = measured(tokens_of(directory, ALL[:3], "assistant", layout="packed"), "assistant")
    own = transformers_tokenizer(directory)
    for chat, mask in zip(ALL, by_document(tokens, np.asarray(tokens.measured)), strict=False):
        encoded = own.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert [int(chosen) for chosen in mask] == encoded["assistant_masks"]


def test_rewritten_messages_are_not_guessed(tmp_path: Path) -> None:
    """This template writes in capitals and marks only the assistant."""
    directory = write_chat_tokenizer(tmp_path, MARKED)
    with pytest.raises(JaxDeltaError, match=r"document 1: .*--measure=user are unknown"):
        tokens_of(directory, ALL, "user")
    template = ChatTemplate(directory)
    list(rendered(ALL, template))
    assert "the roles of 3 chats are unknown" in template.notes[-1]


def test_tool_calls_and_reasoning_are_the_assistants(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 'a "b"'}}}
    chat = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"seen": 1}'},
        {"role": "assistant", "reasoning_content": "one", "content": "One."},
    ]
    directory = write_chat_tokenizer(tmp_path, THINKING)
    tokens = tokens_of(directory, [chat])
    assert tokens.ids[0].tolist() == transformers_tokenizer(directory).apply_chat_template(chat)["input_ids"]
    asked, answered = words(tokens, "assistant")
    assert asked.startswith("<think>\n\n</think>\n\n\n<call>{") and asked.endswith("}</call><|im_end|>")
    assert answered == "<think>\none\n</think>\n\nOne.<|im_end|>"
    assert words(tokens, "tool") == ['{"seen": 1}<|im_end|>']


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_of_a_row(as_json: bool, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    template = "{% if tools %}{{ tools | tojson }}<|eot|>{% endif %}" + CHATML
    directory = write_chat_tokenizer(tmp_path, template)
    tokens = tokens_of(directory, [{"messages": ALL[0], "tools": json.dumps(tools) if as_json else tools}])
    own = transformers_tokenizer(directory).apply_chat_template(ALL[0], tools=tools)
    assert tokens.ids[0].tolist() == own["input_ids"]
    with pytest.raises(JaxDeltaError, match="'tools' must be a list of JSON schemas"):
        tokens_of(directory, [{"messages": ALL[0], "tools": "5"}])


def test_a_role_that_the_template_leaves_out_is_said(tmp_path: Path) -> None:
    template = ChatTemplate(write_chat_tokenizer(tmp_path, THINKING))
    list(rendered([[{"role": "developer", "content": "Be brief."}, *ALL[0]]], template))
    assert "the chat template leaves out 1 messages of the role developer" in template.notes


def rows() -> list[dict[str, Any]]:
    return [{"id": i, "messages": chat} for i, chat in enumerate(ALL)]


def shared() -> list[dict[str, Any]]:
    return [{"conversations": [{"from": GPT[role], "value": text} for role, text in chat]} for chat in CHATS]


def write_source(directory: Path, kind: str) -> Path:
    path = directory / f"chats.{kind.split()[0]}"
    if kind in ("jsonl", "jsonl shared"):
        lines = rows() if kind == "jsonl" else shared()
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    elif kind.startswith("json"):
        path.write_text(json.dumps(ALL if kind == "json lists" else rows()), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows()), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows()).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl shared", "json lists", "json rows", "parquet", "saved"])
def test_chats_of_every_source(kind: str, tmp_path: Path) -> None:
    directory = write_chat_tokenizer(tmp_path)
    source = write_source(tmp_path, kind)
    tokens = tokens_of(directory, read_documents(source))
    assert tokens.ids.tolist() == tokens_of(directory, ALL).ids.tolist()
    with pytest.raises(JaxDeltaError, match=r"is a chat .*--chat=off does not read"):
        list(rendered(read_documents(source), None))


def test_a_text_column_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "plain", "messages": ALL[0]}) + "\n")
    assert list(read_documents(path)) == ["plain"]
    (chat,) = read_documents(path, text_key="messages")
    assert not isinstance(chat, str) and list(chat.messages) == ALL[0]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "user"}], "message 1: 'content' must be text, not nothing"),
        ([{"content": "x"}], "message 1: has no 'role', only content"),
        ([{"role": 5, "content": "x"}], "message 1: has no 'role'"),
        ([*messages(CHATS[0]), {"role": "user", "content": 5}], "message 3: 'content' must be text, not int"),
        ([{"from": "nobody", "value": "x"}], "message 1: 'from' is 'nobody'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: has a part of type image"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "refuses the chat"),
        ([{"role": "assistant", "content": "x"}], "refuses the chat .Roles must alternate"),
    ],
)
def test_bad_chats_are_named(chat: list[Any], message: str, tmp_path: Path) -> None:
    directory = write_chat_tokenizer(tmp_path, MISTRAL)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": ALL[0]}) + "\n" + json.dumps({"messages": chat}) + "\n")
    with pytest.raises(JaxDeltaError, match=f"line 2.*{message}") as raised:
        tokens_of(directory, read_documents(path))
    assert len(str(raised.value)) < 800


def test_content_in_parts(tmp_path: Path) -> None:
    """Joined if the template joins them; what prints a list as Python does is refused."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    joining = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}<|im_end|>"
    (tmp_path / "a").mkdir()
    directory = write_chat_tokenizer(tmp_path / "a", joining)
    tokens = tokens_of(directory, [parts])
    assert tokens.ids[0].tolist() == transformers_tokenizer(directory).apply_chat_template(parts)["input_ids"]
    assert words(tokens, "user") == ["onetwo<|im_end|>"]
    directory = write_chat_tokenizer(tmp_path, LLAMA)
    with pytest.raises(JaxDeltaError, match="document 1: the chat template reads no content in parts"):
        tokens_of(directory, [parts])


def test_what_is_no_list_of_chats(tmp_path: Path) -> None:
    directory = write_chat_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="give a list of chats"):
        tokens_of(directory, ALL[0])
    with pytest.raises(JaxDeltaError, match="document 2: chats and plain texts cannot be read together"):
        tokens_of(directory, [ALL[0], "plain"])


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(JaxDeltaError, match="has no chat template"):
        tokens_of(write_chat_tokenizer(tmp_path, None), ALL)


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "named"])
def test_where_templates_are(place: str, tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]
    directory = write_chat_tokenizer(tmp_path, named if place == "named" else None)
    if place != "named":
        content = json.dumps({"chat_template": CHATML}) if place.endswith("json") else CHATML
        (directory / place).write_text(content)
    found = tokens_of(directory, ALL)
    (tmp_path / "plain").mkdir()
    plain = tokens_of(write_chat_tokenizer(tmp_path / "plain"), ALL)
    assert found.ids.tolist() == plain.ids.tolist()
    assert found.roles and plain.roles and found.roles.template == plain.roles.template


def test_damaged_templates(tmp_path: Path) -> None:
    for template in ("{% if", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{% include 'x' %}"):
        with pytest.raises(JaxDeltaError, match="the chat template refuses the chat"):
            tokens_of(write_chat_tokenizer(tmp_path, template), ALL)


TEXT = Tokens(
    np.arange(12, dtype=np.int32).reshape(2, 6),
    np.array([[0, 0, 0, 0, 1, 1], [1, 1, 1, 2, -1, -1]], np.int32),
)


@pytest.mark.parametrize(
    ("measure", "places"),
    [
        ("2:", [2, 3, 6, 7, 8]),
        ("1:3", [1, 2, 5, 6]),
        (":-1", [0, 1, 2, 4, 5, 6, 7]),
        ("-2:", [2, 3, 7, 8, 9]),
        ("0:", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_ranges_are_positions_in_each_document(measure: str, places: list[int]) -> None:
    chosen = measured(TEXT, measure)
    assert np.flatnonzero(np.asarray(chosen.measured)).tolist() == places
    # The first token of a window and padding never count.
    assert np.flatnonzero(chosen.counted).tolist() == [i for i in places if i % 6]
    assert chosen.fingerprint != TEXT.fingerprint


def test_ranges_of_packed_documents(tmp_path: Path) -> None:
    directory = write_chat_tokenizer(tmp_path)
    tokens = tokens_of(directory, ["one two three " * 20, "four five six " * 3], layout="packed", seq_len=16)
    chosen = measured(tokens, "3:20")
    assert chosen.measured is not None
    for ids, mask in zip(by_document(tokens, tokens.ids), by_document(tokens, chosen.measured), strict=True):
        assert np.flatnonzero(mask).tolist() == list(range(3, min(20, len(ids))))


def test_what_measure_refuses(tmp_path: Path) -> None:
    with pytest.raises(JaxDeltaError, match="leaves 0 of 10 tokens"):
        measured(TEXT, "100:")
    with pytest.raises(JaxDeltaError, match="needs chats"):
        measured(TEXT, "assistant")
    tokens = tokens_of(write_chat_tokenizer(tmp_path), ALL)
    with pytest.raises(JaxDeltaError, match=r"the roles are template \(\d+ tokens\), user"):
        measured(tokens, "narrator")
    for wrong in ("", "5", ":", "1:2:3", "a b", "10-20"):
        with pytest.raises(UsageError, match="measure must be all, a role"):
            analyze("demo", measure=wrong)
    with pytest.raises(UsageError, match="chat must be one of auto, off"):
        analyze("demo", chat="on")


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint of two layers with a chat template."""
    directory = tmp_path_factory.mktemp("chatting")
    make_checkpoint(directory, num_hidden_layers=2, vocab_size=700)
    return write_chat_tokenizer(directory)


OPTIONS: dict[str, Any] = {"top_k": 3, "bootstrap": 20, "null_draws": 20, "views": "masked"}


def updates(tokens: Tokens) -> Iterator[np.ndarray]:
    """What transformers' layers write into the one window's counted tokens."""
    import torch

    with torch.no_grad():
        given = torch.from_numpy(tokens.ids.astype(np.int64))
        model = torch_model(num_hidden_layers=2, vocab_size=700)
        model.model.norm = torch.nn.Identity()
        states = model(given, output_hidden_states=True).hidden_states
    for before, after in pairwise(states):
        yield (after - before)[0].numpy()[tokens.counted[0]].astype(np.float64)


@pytest.mark.parametrize("measure", ["assistant", "user", "5:-2"])
def test_statistics_count_the_chosen_tokens(chatting: Path, measure: str) -> None:
    """Against transformers: all tokens pass the model, and the chosen ones are in the statistics."""
    run = analyze(str(chatting), ALL, measure=measure, **OPTIONS)
    tokens = measured(tokens_of(chatting, ALL), measure)
    assert run.n_calib_tokens == tokens.count > tokens.counted.sum() == run.run["text"]["counted"]
    for row, delta in zip(run.per_layer, updates(tokens), strict=True):
        singular = np.linalg.svd(delta, compute_uv=False)
        assert row["n"] == len(delta)
        np.testing.assert_allclose(row["top_singvals"], singular[:3], rtol=1e-4)
        np.testing.assert_allclose(row["frob"], np.linalg.norm(delta), rtol=1e-5)
    assert run.run["text"]["roles"] == tokens.by_role
    assert run.run["flags"]["measure"] == measure
    assert f"the {tokens.counted.sum()} tokens that --measure={measure} chooses" in methods(run)
    assert any("model's template" in note for note in run.run["notes"])


def test_the_templates_hash(chatting: Path) -> None:
    import hashlib

    run = analyze(str(chatting), ALL, **OPTIONS)
    assert run.run["text"]["chat_template_sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
    plain = analyze(str(chatting), ["no chat at all, just text"], **OPTIONS)
    assert not {"roles", "chat_template_sha256"} & plain.run["text"].keys()


def test_too_few_for_top_k(chatting: Path) -> None:
    with pytest.raises(UsageError, match=r"top_k=20 is larger .*: \d+ tokens count with measure=system"):
        analyze(str(chatting), ALL, measure="system", top_k=20)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_moments_agree(chatting: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first windows have nothing that counts."""
    options = OPTIONS | {"measure": "60:", "layout": layout, "seq_len": 16}
    found = []
    for maker in ("rows", "moments"):
        summarise_from(monkeypatch, maker)
        monkeypatch.setattr("jaxdelta.run.memory_plan.block_tokens", lambda: 16)
        found.append(analyze(str(chatting), ALL, **options))
    for row, other in zip(found[0].per_layer, found[1].per_layer, strict=True):
        for key in ("n", "frob", "eff_rank"):
            assert row[key] == pytest.approx(other[key], rel=1e-5)
        np.testing.assert_allclose(row["top_singvals"], other["top_singvals"], rtol=1e-5)


def test_on_a_mesh(chatting: Path) -> None:
    options = OPTIONS | {"measure": "assistant", "layout": "packed", "seq_len": 16}
    one, two = (analyze(str(chatting), ALL, mesh=mesh, **options) for mesh in ("data:2", "model:2"))
    tokens = tokens_of(chatting, ALL, layout="packed", seq_len=16)
    assert one.per_layer[0]["n"] == measured(tokens, "assistant").counted.sum()
    for row, other in zip(one.per_layer, two.per_layer, strict=True):
        assert row["n"] == other["n"]
        assert row["frob"] == pytest.approx(other["frob"], rel=1e-5)


def test_merged_runs_count_what_each_counted(chatting: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"measure": "assistant", "layout": "packed"}
    for name, chats in (("a", ALL[:2]), ("b", ALL[2:])):
        analyze(str(chatting), chats, keep_moments=str(tmp_path / name), **options)
    merged = merge_runs([tmp_path / "a", tmp_path / "b"])
    whole = analyze(str(chatting), ALL, **options)
    assert merged.n_calib_tokens == whole.n_calib_tokens
    for row, other in zip(merged.per_layer, whole.per_layer, strict=True):
        assert row["n"] == other["n"] == whole.run["text"]["counted"]
        assert row["frob"] == pytest.approx(other["frob"], rel=1e-5)
    analyze(str(chatting), ALL[2:], keep_moments=str(tmp_path / "c"), **options | {"measure": "user"})
    with pytest.raises(JaxDeltaError, match=r"measure is user, not assistant"):
        merge_runs([tmp_path / "a", tmp_path / "c"])


def test_a_changed_measure_is_noticed(chatting: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"checkpoint_dir": str(tmp_path)}
    analyze(str(chatting), ALL, keep_checkpoint=True, measure="user", **options)
    with pytest.raises(JaxDeltaError, match='is of another run: --measure was "user"'):
        analyze(str(chatting), ALL, measure="assistant", **options)
    analyze(str(chatting), ALL, measure="user", **options)


def test_a_row_has_a_system_prompt_of_its_own(tmp_path: Path) -> None:
    """As ShareGPT's rows have; without it the model would read another chat."""

    def read(**row: Any) -> Any:
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"conversations": turns} | row) + "\n")
        (found,) = read_documents(path)
        return found

    assert [message["role"] for message in read().messages] == ["user", "assistant"]
    assert [message["role"] for message in read(system=None).messages] == ["user", "assistant"]
    first = {"role": "system", "content": "Be kind."}
    assert read(system="Be kind.").messages[0] == first
    turns = [first, {"role": "user", "content": "Hi"}]
    assert list(read(system="Be kind.", conversations=turns).messages) == turns
    for row, said in (
        ({"system": "Be rude.", "conversations": turns}, "disagree"),
        ({"system": 3}, "'content' must be text, not int"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs, which are not applied"),
    ):
        with pytest.raises(JaxDeltaError, match=said):
            read(**row)


def test_chats_without_messages_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"messages": []}, {"messages": [{"role": "user", "content": "Hi"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading()
    assert len(list(read_documents(path, reading=reading))) == 1
    assert reading.notes == ("1 empty row of the text skipped",)


def test_json_lines_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(JaxDeltaError, match=r"name it \.jsonl if each line is an object"):
        list(read_documents(path))
