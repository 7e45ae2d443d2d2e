"""A recipe that goes through every verb in seconds."""

from tfaccel.recipes.reading import parse_recipe

_MOBILE = {"architecture": "mobile", "arguments": {"stem": 4, "blocks": [[2, 8, 2]], "last": 8}}

CONTENT = {
    "name": "tiny",
    "data": {"name": "digits", "limit": 64, "augment": {"shift": 1}},
    "batch_size": 32,
    "stages": [
        {
            "name": "teacher",
            "train": {"architecture": "cnn", "arguments": {"filters": [4]}, "epochs": 1},
        },
        {"name": "student", "distill": {**_MOBILE, "teacher": "teacher", "epochs": 1}},
        {"name": "pruned", "prune": {"model": "student", "sparsity": 0.5, "epochs": 1}},
        {"name": "quantized", "quantize_aware": {"model": "pruned", "epochs": 1}},
    ],
    "measure": {"runs": 3, "threads": [1, 2]},
}

# Two stages that need nothing of each other and are trained at once.
QUICK = [
    {"name": name, "train": {"architecture": "cnn", "arguments": {"filters": [2]}, "epochs": 1}}
    for name in ("first", "second")
]


def recipe(stages=None, **changes):
    """Returns the recipe, or its first stages, with keys of the top changed."""
    return parse_recipe({**CONTENT, "stages": CONTENT["stages"][:stages], **changes})
