"""A recipe is one YAML file that says everything about a run: model, method, data, training, output."""

from ranktune.recipe.loading import load_recipe, recipe_text
from ranktune.recipe.schema import DataRecipe, Recipe, TrainRecipe

__all__ = ["DataRecipe", "Recipe", "TrainRecipe", "load_recipe", "recipe_text"]
