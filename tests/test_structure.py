"""The house: imports only go down a floor, methods do not import each other, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ranktune
from ranktune.cli import app

SOURCE = Path(ranktune.__file__).parent

# Each floor may import its own and the floors before it. A package name stands for everything in it.
FLOORS = [
    {
        "errors",
        "frozen_weight",
        "lowrank",
        "magnitude",
        "schedule",
        "allocation",
        "sensitivity",
        "orthogonality",
        "recompression",
        "mixture",
        "processes",
        "cut_energy",
        "module_order",
        "storage_dtype",
    },
    {"config", "norm_cache", "update", "growing", "nested", "policy", "balance", "gate_usage", "block_gates", "routed"},
    {"methods"},
    {
        "adapter_file",
        "peft_compat",
        "left_out",
        "unmatched",
        "quantised_weight",
        "dequantising",
        "layer",
        "tuner",
        "adapters",
        "quantised_state",
        "optimizer_state",
        "row_rates",
        "restart_warmup",
        "standstill",
        "moves",
        "gradients",
        "attachment",
        "history",
        "controller",
        "compaction",
        "static_mixture",
        "router_health",
        "plain_lora",
        "adapter_format",
        "our_format",
        "stock_format",
        "saved_adapter",
        "foreign_start",
        "rank_setting",
        "rank_budget",
    },
    {
        "baselines",
        "compare",
        "export",
        "exporting",
        "inspection",
        "squeezed_run",
        "squeezing",
        "merging",
        "approximation",
        "verification",
        "integrations",
        "recipe",
        "tasks",
        "run",
        "report",
        "training",
        "evaluation",
        "other_adapter",
        "rank_curve",
        "truncation",
    },
    {"cli", "__main__"},
]
# What pure maths may import besides the standard library.
FLOOR_0_LIBRARIES = {"torch", "ranktune"}


def modules() -> dict[str, Path]:
    """Dotted name below ``ranktune`` to file, without the package's own front door."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Every absolute module name a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
    return names


def floor_of(name: str) -> int:
    """The floor of a module below ``ranktune``."""
    for number, floor in enumerate(FLOORS):
        if name.split(".")[0] in floor:
            return number
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS")


def test_imports_only_go_down():
    for name, path in modules().items():
        for imported in imports(path):
            if imported.startswith("ranktune."):
                below = imported.removeprefix("ranktune.")
                assert floor_of(below) <= floor_of(name), f"{name} imports {imported}, which is above it"


def test_methods_do_not_import_each_other():
    for name, path in modules().items():
        if name.startswith("methods."):
            assert not [i for i in imports(path) if i.startswith("ranktune.methods")], name


def test_a_command_stands_in_the_file_of_its_name_and_imports_no_other():
    commands = {command.callback.__name__: command.callback for command in app.registered_commands}
    for name, function in commands.items():
        assert function.__module__ == f"ranktune.cli.{name}"
    inside = {name: path for name, path in modules().items() if name.startswith("cli.")}
    for name, path in inside.items():
        above = {f"ranktune.cli.{command}" for command in commands} | {"ranktune.cli"}
        assert not imports(path) & above, f"{name} imports a command"


def test_the_ground_floor_is_pure_torch():
    for name in FLOORS[0]:
        for imported in imports(modules()[name]):
            root = imported.split(".")[0]
            assert root in FLOOR_0_LIBRARIES or root in sys.stdlib_module_names, f"{name} imports {imported}"


def test_importing_the_package_is_light():
    """Neither torch nor transformers nor plotting; the public names come on first use."""
    code = (
        "import sys, ranktune; dir(ranktune); "
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'datasets', 'typer'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    for name in ranktune.__all__:
        assert getattr(ranktune, name).__name__ == name
    assert sorted(ranktune.__all__) == ranktune.__all__


def test_registration_works_in_every_import_order():
    """PEFT first, ranktune first, or a module of ours first: the adapter type is known."""
    ours = ("config", "update", "peft_compat", "layer", "adapters")
    for start in ("import peft, ranktune", "import ranktune, peft", *(f"import ranktune.{name}" for name in ours)):
        code = f"{start}; import peft; assert 'RANKTUNE' in peft.PeftType.__members__, 'not registered'"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{start}: {done.stderr}"


def test_registration_waits_for_what_the_tuner_imports():
    """For every module under it that brings PEFT in, itself or through another; `methods` may finish in any order."""
    found = modules()

    def ours(name: str) -> set[str]:
        return {below for i in imports(found[name]) if (below := i.removeprefix("ranktune.")) in found}

    under = ours("tuner")
    while more := {below for name in under for below in ours(name)} - under:
        under |= more
    waiting = {name for name in under if any(i.split(".")[0] == "peft" for i in imports(found[name]))}
    while more := {name for name in under if ours(name) & waiting} - waiting:
        waiting |= more
    expected = {f"ranktune.{name}" for name in waiting if name.split(".")[0] != "methods"}
    assert expected == ranktune._UNDER_THE_TUNER


def test_no_public_name_is_also_a_module():
    """Importing a submodule sets its name on the package, over whatever was there."""
    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(ranktune.__all__)
