"""A small, whole recipe as an example, and the tests that every recipe gets for free."""

from heed_runtime.app import App

APP = App(
    name="heed-example",
    about="One small system, to show how a recipe is written and to test the program.",
    systems={"tokens": "heed_runtime.testing.tokens:TokenRecipe"},
)

__all__ = ["APP"]
