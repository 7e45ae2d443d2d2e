"""Recipe files: YAML in, a recipe or errors that name the line out."""

import os
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from tfaccel.recipes.schema import Place, Recipe, RecipeError, hint_for


def with_workers(recipe: Recipe, workers: int) -> Recipe:
    """Returns the recipe with every train stage on this many workers.

    Raises:
        RecipeError: the workers cannot share a batch evenly, or are fewer than one.
    """
    content = recipe.model_dump()
    for stage in content["stages"]:
        if stage["train"]:
            stage["train"]["workers"] = workers
    return parse_recipe(content, f"recipe {recipe.name!r} with {workers} workers")


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe from a YAML file.

    A relative .npz path in it is looked for beside the file.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: the file is no recipe; the message names every wrong line.
    """
    file = Path(path)
    if file.is_dir():
        raise RecipeError(f"A recipe is a YAML file, but {str(file)!r} is a folder.")
    if not file.exists():
        raise FileNotFoundError(
            f"There is no recipe {str(file)!r} (looked in {str(Path.cwd())!r}). Check the path; "
            "examples/digits.yaml is one to copy."
        )
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(_read_text(file))
        root = loader.get_single_node()
        if root is None:
            raise RecipeError(f"{file} is empty. A recipe needs name, data and stages.")
        # Lines first: constructing the document resolves merge keys in the nodes.
        _note_lines(root, (), lines, str(file))
        content = loader.construct_document(root)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file} is not valid YAML: {error}") from error
    recipe = parse_recipe(content, str(file), lines)
    data = recipe.data
    if data.name.endswith(".npz") and not Path(data.name).is_absolute():
        beside = str((file.parent / data.name).resolve())
        recipe = recipe.model_copy(update={"data": data.model_copy(update={"name": beside})})
    return recipe


def parse_recipe(
    content: Any, source: str = "recipe", lines: dict[Place, int] | None = None
) -> Recipe:
    """Returns the recipe that a mapping describes.

    Args:
        content: what the file says.
        source: what the error calls it.
        lines: line of each place, counted from 1.

    Raises:
        RecipeError: something is wrong in it; the message names every wrong place.
    """
    if not isinstance(content, dict):
        raise RecipeError(
            f"{source}: a recipe is a mapping with name, data and stages, "
            f"but this is {type(content).__name__}."
        )
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            place = (*detail["loc"], *detail.get("ctx", {}).get("place", ()))
            line = _line_of(place, lines or {})
            where = f"line {line}, {_spell(place)}" if line else _spell(place)
            problems.append(f"{source}: {where}: {_wording(dict(detail), place)}")
        raise RecipeError("\n".join(problems)) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.2), not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not a text file, so it is no recipe ({error}).") from error


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int], source: str) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            below = (*place, key.value)
            line = key.start_mark.line + 1
            if below in lines:
                raise RecipeError(
                    f"{source}: line {line}, {_spell(below)}: this key was already given "
                    f"in line {lines[below]}. Keep one of them."
                )
            lines[below] = line
            _note_lines(value, below, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*place, index), lines, source)


def _line_of(place: Place, lines: dict[Place, int]) -> int | None:
    return next(
        (lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in lines), None
    )


def _spell(place: Place) -> str:
    spelled = ""
    for part in place:
        spelled += f"[{part}]" if isinstance(part, int) else f".{part}" if spelled else part
    return spelled or "the file"


def _wording(detail: dict[str, Any], place: Place) -> str:
    if detail["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        hint = hint_for(str(place[-1]), known)
        return f"unknown key {place[-1]!r}.{hint} Known: {', '.join(known)}."
    if detail["type"] == "missing":
        return f"{place[-1]!r} is missing. Write it below {_spell(place[:-1])}."
    if detail["type"] == "recipe":
        return str(detail["msg"])
    message = str(detail["msg"])
    return f"{message[0].lower()}{message[1:]}; got {detail['input']!r}."


def _known_keys(place: Place) -> list[str]:
    part: Any = Recipe
    for step in place:
        if isinstance(step, int):
            part = get_args(part)[0]
        else:
            part = part.model_fields[step].annotation
            if get_origin(part) not in (list, dict):
                part = next((p for p in get_args(part) if p is not type(None)), part)
    return list(part.model_fields)
