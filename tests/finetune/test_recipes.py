"""The recipes under examples are runs that the command takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.options import FinetuneOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [
    path for name in ("finetune", "tiny") for path in sorted((EXAMPLES / name).glob("*.toml"))
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_taken(recipe):
    found = tyro.cli(FinetuneOptions, args=arguments(["--config", str(recipe)]), config=())
    assert found.dataset
    assert str(recipe.relative_to(recipe.parents[2])) in recipe.read_text()


def test_each_published_case_has_one():
    assert {path.stem for path in RECIPES} >= {"qlora", "full", "dpo", "recipe"}
