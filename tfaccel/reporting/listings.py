"""Inspections and differences as text."""

import io
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfaccel.reporting.inspection import Inspection, LayerChange, LayerFacts, ModelDiff

_YES, _NO, _NOT_ASKED = "yes", "-", ""


def render_text(shown: "Inspection | ModelDiff", width: int = 160) -> str:
    """Returns what the terminal would show, without colours."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(shown)
    # Rich pads each line to the width of its table.
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def show_inspection(model: "Inspection") -> Any:
    """Returns a table of the layers and, below, why techniques leave layers alone."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    techniques = list(dict.fromkeys(t for layer in model.layers for t in layer.techniques))
    table = Table(title=model.name, title_justify="left", header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("output")
    for heading in ("parameters", "MACs", "zeros"):
        table.add_column(heading, justify="right")
    for technique in techniques:
        table.add_column(technique, justify="center")
    for layer in model.layers:
        table.add_row(
            layer.name,
            " + ".join([layer.class_name, *layer.transforms]),
            _spell_shape(layer.output_shape),
            *_figures(layer),
            *(_mark(layer, technique) for technique in techniques),
        )
    table.add_section()
    table.add_row("all", "", "", *_figures(model), *(_touched(model, t) for t in techniques))
    return Group(table, *(Text(line) for line in _reasons(model, techniques)))


def show_diff(difference: "ModelDiff") -> Any:
    """Returns a table of the layers that differ, and the totals."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("change")
    table.add_column("what", overflow="fold")
    for heading in ("parameters", "MACs"):
        table.add_column(heading, justify="right")
    for layer in difference.layers:
        if layer.change != "same":
            parts = [part for part in difference.layers if part.part_of == layer.name]
            what = "; ".join([_what(layer), *_together(layer, parts)])
            table.add_row(layer.name, layer.change, what, *_before_after(layer))
    same = sum(layer.change == "same" for layer in difference.layers)
    totals = Table(header_style="bold")
    for heading in ("", "parameters", "MACs", "zeros"):
        totals.add_column(heading, justify="right")
    before, after = difference.before, difference.after
    for model, role in ((before, "before"), (after, "after")):
        totals.add_row(f"{role} ({model.name})", *_figures(model))
    shares = (
        _share(before.parameters, after.parameters),
        _share(before.macs, after.macs),
    )
    totals.add_row("change", *shares, "")
    if same == len(difference.layers):
        return Group(Text(f"All {same} layers are the same."), totals)
    return Group(table, Text(f"{same} layers are the same."), totals)


def _what(layer: "LayerChange") -> str:
    """Says what is different, but for the figures that have columns of their own."""
    notes = [n for n in layer.notes if not n.startswith(("parameters ", "MACs "))]
    described = layer.after or layer.before
    if not notes and described is not None:
        notes = [described.class_name]
    if layer.part_of is not None:
        notes.append(f"for {layer.part_of}")
    return "; ".join(notes)


def _together(layer: "LayerChange", parts: list["LayerChange"]) -> list[str]:
    """Says what a layer costs with those that came with it, against what it cost alone."""
    if not parts or layer.before is None:
        return []
    now = [part.after for part in (*parts, layer) if part.after is not None]
    macs = [facts.macs for facts in now]
    total = None if None in macs else sum(count or 0 for count in macs)
    figures = [
        f"{_count(was)} -> {_count(new)} {unit}"
        for unit, was, new in (
            ("parameters", layer.before.parameters, sum(facts.parameters for facts in now)),
            ("MACs", layer.before.macs, total),
        )
    ]
    return [f"with {', '.join(part.name for part in parts)}: {', '.join(figures)}"]


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _before_after(layer: "LayerChange") -> tuple[str, str]:
    known = [facts for facts in (layer.before, layer.after) if facts is not None]
    return (
        _arrow([_count(facts.parameters) for facts in known], layer.change),
        _arrow([_count(facts.macs) for facts in known], layer.change),
    )


def _arrow(figures: list[str], change: str) -> str:
    if change == "added":
        figures = ["", *figures]
    if change == "removed":
        figures = [*figures, ""]
    return figures[0] if len(set(figures)) == 1 else " -> ".join(figures).strip()


def _share(before: int | None, after: int | None) -> str:
    """Returns the change of a total in percent."""
    if before is None or after is None or not before:
        return ""
    return f"{(after - before) / before:+.1%}"


def _spell_shape(shape: tuple[int | None, ...]) -> str:
    return " x ".join("?" if size is None else str(size) for size in shape) or "one number"


def _figures(item: "Inspection | LayerFacts") -> tuple[str, str, str]:
    return (
        f"{item.parameters:,}" if item.parameters else "",
        "unknown" if item.macs is None else f"{item.macs:,}" if item.macs else "",
        "" if item.sparsity is None else f"{item.sparsity:.1%}",
    )


def _mark(layer: "LayerFacts", technique: str) -> str:
    verdict = layer.techniques.get(technique)
    return _NOT_ASKED if verdict is None else _YES if verdict.touched else _NO


def _touched(model: "Inspection", technique: str) -> str:
    return str(sum(_mark(layer, technique) == _YES for layer in model.layers))


def _reasons(model: "Inspection", techniques: list[str]) -> list[str]:
    lines = []
    for technique in techniques:
        why: dict[str, list[str]] = defaultdict(list)
        for layer in model.layers:
            verdict = layer.techniques.get(technique)
            if verdict is not None and not verdict.touched:
                why[verdict.reason].append(layer.name)
        if why:
            lines += ["", f"{technique} leaves alone:"]
            lines += [f"  {reason}: {_some(names)}" for reason, names in why.items()]
    return lines


def _some(names: list[str], shown: int = 4) -> str:
    listed = ", ".join(names[:shown])
    return f"{listed} and {len(names) - shown} more" if len(names) > shown else listed
