"""What `clnp-search network` shows: the layers and unit groups of a network, or why it is refused."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from clnp_search.cli.console import INPUT_WRONG, count, out, print_json
from clnp_search.cli.options import AsJson, Overrides, SweepFile, located

if TYPE_CHECKING:
    from clnp_search.clnp.graph import Graph


def network(sweep_file: SweepFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show the network's layers and unit groups, its parameters and operations; or every reason why it is refused."""
    from clnp_search.clnp.trace import NetworkRefused
    from clnp_search.config import load_sweep

    sweep = located(load_sweep(sweep_file, overrides), None, None)
    scenario = sweep.load_scenario()
    classes = scenario.num_classes(0)
    try:
        graph = sweep.graph(scenario.input_shape)
    except NetworkRefused as error:
        if as_json:
            print_json({"refused": [asdict(each) for each in error.refused]})
        else:
            out.print(f"[red]refused[/] for {count(len(error.refused), 'reason')}")
            for each in error.refused:
                out.print(f"  [bold]{each.module}[/]: ", end="")
                out.print(each.reason, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(INPUT_WRONG) from None
    document = _document(graph, classes)
    if as_json:
        print_json(document)
        return
    for table in _tables(graph, document, classes):
        out.print(table)
    out.print(
        f"{count(len(graph.groups), 'group')} of {sum(graph.groups.values()):,} units, "
        f"{document['parameters']:,} parameters, {document['flop_per_sample']:,} operations a sample of "
        f"{' x '.join(map(str, scenario.input_shape))}"
    )


def _document(graph: Graph, classes: int) -> dict[str, Any]:
    """A network with a head for so many classes. A layer's parameters include those of its normalisation."""
    from clnp_search.clnp.ops import Reader

    parameters = graph.parameters(classes)
    readers = [graph.by_name[name] for name in graph.layers if isinstance(graph.by_name[name].op, Reader)]
    return {
        "layers": [
            {"name": name, "group": ", ".join(graph.by_name[name].groups), "parameters": parameters[name]}
            for name in graph.layers
        ],
        "groups": {
            group: {
                "units": units,
                "writers": [node.name for node in readers if group in node.groups],
                "readers": [node.name for node in readers if group in graph.source(node).groups],
            }
            for group, units in graph.groups.items()
        },
        "parameters": sum(parameters.values()),
        "flop_per_sample": sum(graph.flop(classes=classes).values()),
    }


def _tables(graph: Graph, document: dict[str, Any], classes: int) -> tuple[Table, Table]:
    """The layers, and the groups, of a network for people."""
    layers = Table("layer", "operation", "group", "parameters", "operations", header_style="bold")
    flop = graph.flop(classes=classes)
    for layer in document["layers"]:
        name = layer["name"]
        operation = type(graph.by_name[name].op).__name__.lower()
        layers.add_row(name, operation, layer["group"], f"{layer['parameters']:,}", f"{flop[name]:,}")
    groups = Table("group", "units", "written by", "read by", header_style="bold")
    for name, group in document["groups"].items():
        listed = (shorten(", ".join(group[key]), 60, placeholder="...") for key in ("writers", "readers"))
        groups.add_row(name, f"{group['units']:,}", *listed)
    return layers, groups
