"""Recipes: a file that says what to train, shrink, export and measure, and what runs it.

Reading a recipe or data needs no TensorFlow, so what runs recipes is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tfaccel.recipes.data import DataError, Split, Splits, load_data
from tfaccel.recipes.reading import load_recipe, parse_recipe
from tfaccel.recipes.schema import Recipe, RecipeError

if TYPE_CHECKING:
    from tfaccel.recipes.results import RunResult, StageResult
    from tfaccel.recipes.runner import RunListener, run_recipe

__all__ = [
    "DataError",
    "Recipe",
    "RecipeError",
    "RunListener",
    "RunResult",
    "Split",
    "Splits",
    "StageResult",
    "load_data",
    "load_recipe",
    "parse_recipe",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("tfaccel.recipes.runner"), name)
    raise AttributeError(f"module 'tfaccel.recipes' has no attribute {name!r}")
