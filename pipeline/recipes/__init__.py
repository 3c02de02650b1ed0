"""The shipped recipes, one YAML file each."""

from pathlib import Path

RECIPES = Path(__file__).parent


def find_recipe(name: str) -> Path:
    """Return the path `name` if there is such a file, else the shipped recipe of that name."""
    shipped = RECIPES / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return shipped if not Path(name).exists() and shipped.exists() else Path(name)
