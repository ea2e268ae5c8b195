"""The recipes under examples/finetune are runs that the command takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.options import FinetuneOptions

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "finetune").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_taken(recipe):
    found = tyro.cli(FinetuneOptions, args=arguments(["--config", str(recipe)]), config=())
    assert found.dataset
    assert str(recipe.relative_to(recipe.parents[2])) in recipe.read_text()


def test_each_published_case_has_one():
    assert {path.stem for path in RECIPES} >= {"qlora", "full", "dpo"}
