"""The registry of families: each is there under transformers' names; nothing else tells one by its name."""

import ast
from pathlib import Path

import pytest

import jaxdelta
from jaxdelta.model.families.registry import MODULES, find_family

PACKAGE = Path(jaxdelta.__file__).parent
FAMILIES = PACKAGE / "model" / "families"


@pytest.mark.parametrize("model_type", MODULES)
def test_a_family_has_transformers_names(model_type: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert find_family(model_type).architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def test_every_file_is_in_the_registry() -> None:
    files = {path.stem for path in FAMILIES.glob("*.py") if not path.stem.endswith("keys")}
    assert files - {"__init__", "registry", "values", "quantisation"} == set(MODULES.values())


def test_no_other_module_compares_a_model_type() -> None:
    comparisons = [
        f"{path}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if FAMILIES not in path.parents and path.name != "gguf_config.py"  # it translates their names
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and "model_type" in ast.unparse(node)
    ]
    assert comparisons == []
