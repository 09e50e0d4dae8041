"""A sweep file: what is accepted, and that every fault is named at once with its key, its value and what is allowed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from builders import make_sweep
from ruamel.yaml import YAML

from clnp_search.config import AugmentConfig, Sweep, load_sweep, overridden, parse_sweep, planned_with
from clnp_search.errors import InputError
from clnp_search.tasks import SCENARIOS

SWEEPS = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))
SCHEMA = Sweep.model_json_schema()
SMALLEST = "scenario: {name: permuted_digits}\nnetwork: {hidden: [4, 4]}\n"


def written(folder: Path, text: str, name: str = "sweep.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def plain(text: str) -> Any:
    """A YAML text as the data that an editor holds against the schema."""
    return YAML(typ="safe", pure=True).load(text)


def faults(tmp_path: Path, text: str, overrides: list[str] | None = None) -> list[str]:
    """The lines of a faulty sweep's message, the headline first."""
    with pytest.raises(InputError) as caught:
        load_sweep(written(tmp_path, text), overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


def margin_of(value: Any) -> float:
    return make_sweep(forgetting={"margin": value}).forgetting.margin


# What a file holds


def test_a_scenario_and_a_network_are_enough(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, SMALLEST, "my-sweep.yaml"))
    assert sweep.name == "my-sweep"
    assert sweep.network.hidden == (4, 4)
    assert sweep.forgetting.margin == 0.0005


@pytest.mark.parametrize(("scenario", "tasks", "validation"), [("permuted_mnist", 10, 10000), ("split_digits", 5, 60)])
def test_tasks_and_validation_default_to_the_scenarios_own(scenario: str, tasks: int, validation: int) -> None:
    sweep = make_sweep(scenario={"name": scenario})
    assert (sweep.scenario.tasks, sweep.scenario.validation) == (tasks, validation)


def test_a_scenarios_own_defaults_can_be_overridden() -> None:
    sweep = make_sweep(scenario={"name": "permuted_mnist", "tasks": 3, "validation": 77})
    assert (sweep.scenario.tasks, sweep.scenario.validation) == (3, 77)


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "0.000001", "1.0e-6"])
def test_an_exponent_without_a_point_is_a_number(tmp_path: Path, text: str) -> None:
    sweep = load_sweep(written(tmp_path, f"{SMALLEST}search: {{alpha: [{text}], learning_rate: [{text}]}}\n"))
    assert sweep.search.alpha == (1e-6,)
    assert sweep.search.learning_rate == (1e-6,)


def test_an_alpha_is_a_number_or_one_for_each_layer_with_the_head_last(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, f"{SMALLEST}search: {{alpha: [1e-6, [1e-7, 1e-5, 1e-6]]}}\n"))
    assert sweep.search.alpha == (1e-6, (1e-7, 1e-5, 1e-6))
    assert [sweep.layer_alphas(alpha, ("hidden0", "hidden1", "head")) for alpha in sweep.search.alpha] == [
        (1e-6,) * 3,
        (1e-7, 1e-5, 1e-6),
    ]


def test_a_single_value_is_a_grid_of_one(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, f"{SMALLEST}search: {{alpha: 0, learning_rate: 0.1}}\n"))
    assert sweep.search.alpha == (0.0,)
    assert sweep.search.learning_rate == (0.1,)


def test_a_sweep_knows_its_architecture() -> None:
    architecture = make_sweep(head={"kind": "single", "bias": "none"}).architecture((64,))
    assert (architecture.graph.input_shape, architecture.graph.groups) == ((64,), {"hidden0": 4, "hidden1": 4})
    assert (architecture.head, architecture.head_bias, architecture.bias_rule) == ("single", "none", "none")


def test_a_sweep_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_sweep().seed = 1


# The scenario


@pytest.mark.parametrize(
    ("scenario", "tasks", "validation"),
    [
        ({"name": "split_cifar"}, 6, 0.1),
        ({"name": "class_folders"}, 5, 0.1),
        ({"name": "class_folders", "tasks": None, "classes": None, "size": None, "validation": None}, 5, 0.1),
        ({"name": "class_folders", "classes": [["a"], ["b"]]}, 2, 0.1),
        ({"name": "torchvision:KMNIST", "validation": "2.5%"}, 5, 0.025),
        ({"name": "torchvision:KMNIST", "tasks": 2, "validation": 0.5}, 2, 0.5),
        ({"name": "my.module:function", "arguments": {"a": [1]}, "validation": 7}, None, 7),
    ],
)
def test_scenarios_of_images_hold_out_a_share_by_default(
    scenario: dict[str, Any], tasks: int | None, validation: float
) -> None:
    sweep = make_sweep(scenario=scenario)
    assert (sweep.scenario.tasks, sweep.scenario.validation) == (tasks, validation)
    assert parse_sweep(json.loads(sweep.model_dump_json()), "again") == sweep


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "name: split_cifar, tasks: 12",
            "scenario.tasks: 12 tasks cannot share the classes of split_cifar; allowed: 1, 2",
        ),
        ("name: split_mnist, size: [4, 4]", "scenario.size: split_mnist has no such setting; allowed: none of"),
        ("name: 'a:b', classes: [[a]]", "scenario.classes: a:b has no such setting; allowed: arguments"),
        (
            "name: class_folders, arguments: {a: 1}",
            "scenario.arguments: class_folders has no such setting; allowed: cl",
        ),
        ("name: class_folders, classes: [[a], [b, c, b, 1, 1]]", "scenario.classes[1]: 1, b more than once"),
        ("name: class_folders, classes: [[a], [true]]", "scenario.classes[1][0]: True: write this name in quotes"),
        ("name: class_folders, classes: [[a], []]", "scenario.classes[1]: []: "),
        ("name: class_folders, classes: [[a], [b]], tasks: 3", "scenario.tasks: 3; scenario.classes has 2 lists"),
        ("name: class_folders, size: [4]", "scenario.size"),
        ("name: permuted_mnist, augment: {flip: true}", "scenario.augment: the images of permuted_mnist are permuted"),
        ("name: split_cifar, augment: {crop: 4}", "scenario.augment: an mlp sees flat samples; allowed: a network"),
        ("name: split_cifar, augment: {crop: -1}", "scenario.augment.crop: -1: "),
        ("name: split_cifar, augment: {flop: true}", "scenario.augment.flop: unknown key; did you mean 'flip'? Known"),
        (
            "name: class_folders, validation: 0",
            "scenario.validation: 0: write a number of samples, 1 or more, or a share",
        ),
        ("name: class_folders, validation: 1.5", "scenario.validation: 1.5: write a number of samples"),
        ("name: class_folders, validation: 100%", "scenario.validation: '100%': write a number of samples"),
        ("name: class_folders, validation: x%", "scenario.validation: 'x%': write a percentage such as"),
        ("name: class_folders, validation: true", "scenario.validation: True: write a number of samples"),
    ],
)
def test_settings_that_do_not_fit_a_scenario_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    assert faults(tmp_path, f"scenario: {{{text}}}\nnetwork: {{hidden: [4]}}\n")[1].startswith(fault)


@pytest.mark.parametrize(
    ("network", "crop", "fault"),
    [
        ({"hidden": [4]}, 1, "scenario.augment: the network sees flat samples"),
        ({"name": "conv", "layers": [4]}, 8, "scenario.augment.crop: 8; allowed: 0 to 7"),
    ],
)
def test_augmentation_that_does_not_fit_the_images_is_refused(network: dict[str, Any], crop: int, fault: str) -> None:
    sweep = make_sweep(scenario={"name": "split_digits"}, network=network)
    scenario = sweep.scenario.model_copy(update={"augment": AugmentConfig(crop=crop)})
    with pytest.raises(InputError, match=fault):
        sweep.model_copy(update={"scenario": scenario}).load_scenario()


def test_your_own_modules_lie_beside_the_sweep_file(tmp_path: Path) -> None:
    assert load_sweep(written(tmp_path, SMALLEST)).modules == (str(tmp_path), ".")
    assert load_sweep(written(tmp_path, f"{SMALLEST}modules: elsewhere\n")).modules == ("elsewhere",)


def test_settings_that_only_one_sweep_has_are_a_difference() -> None:
    one, two = (make_sweep(scenario={"name": "a:b", "arguments": arguments}) for arguments in ({"x": 1}, {"y": [2]}))
    assert one.differences(two) == [
        "scenario.arguments.x: 1 here, None there",
        "scenario.arguments.y: None here, [2] there",
    ]


def test_the_order_of_an_alphas_patterns_is_a_difference() -> None:
    patterns = {"*": 1e-5, "hidden0": 1e-6}
    one, other = (
        make_sweep(search={"alpha": [dict(items)]}) for items in (patterns.items(), [*patterns.items()][::-1])
    )
    assert one.layer_alphas(one.search.alpha[0], one.network.layer_names) != other.layer_alphas(
        other.search.alpha[0], other.network.layer_names
    )
    assert [each.partition(":")[0] for each in one.differences(other)] == ["search.alpha"]
    make_sweep(network={"module": "some:thing"}, search={"alpha": [patterns, dict([*patterns.items()][::-1])]})


# The margin


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0.05%", 0.0005), (" 0.05 % ", 0.0005), (0.0005, 0.0005), ("49%", 0.49), (0, 0.0), ("0%", 0.0), (0.49, 0.49)],
)
def test_a_margin_is_a_percentage_or_a_fraction(value: Any, expected: float) -> None:
    assert margin_of(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0.5, 0.6, 5])
def test_a_bare_number_that_looks_like_percentage_points_is_refused_with_the_reason(value: float) -> None:
    with pytest.raises(InputError) as caught:
        margin_of(value)
    assert f"forgetting.margin: {value}: a bare number is a fraction of 1" in str(caught.value)
    assert f"write '{value}%' if you mean percentage points" in str(caught.value)


@pytest.mark.parametrize("value", ["-1%", "50%", "100%", "150%", "nan%", "five%", "%", -0.1, "much", None, True, [0.1]])
def test_a_margin_that_means_nothing_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"forgetting\.margin: "):
        margin_of(value)


# Faults


def test_a_fault_in_a_section_hides_none_between_the_others(tmp_path: Path) -> None:
    text = """
scenario: {name: permuted_digits}
network: {hidden: [4]}
head: {kind: multi, bias: none}
training: {epoch: 3}
search: {learning_rate: [0.1, 0.1]}
"""
    _, *lines = faults(tmp_path, text)
    keys = [line.partition(":")[0] for line in lines]
    assert keys == ["training.epoch", "head.bias", "search.learning_rate[1]"]


@pytest.mark.parametrize("key", ["notes (mine)", "epochs [x]"])
def test_an_unknown_key_with_brackets_is_named(tmp_path: Path, key: str) -> None:
    _, top = faults(tmp_path, f"{SMALLEST}\n'{key}': 1")
    assert top.startswith(f"{key}: unknown key")
    _, nested = faults(tmp_path, f"{SMALLEST}\ntraining: {{'{key}': 1}}")
    assert nested.startswith(f"training.{key}: unknown key")


def test_an_unknown_key_without_a_value_is_a_fault(tmp_path: Path) -> None:
    _, line = faults(tmp_path, "scenario: {name: permuted_digits, augmnet: null}\nnetwork: {hidden: [4]}")
    assert line.startswith("scenario.augmnet: unknown key; did you mean 'augment'?")


def test_a_network_of_pools_alone_is_refused(tmp_path: Path) -> None:
    _, line = faults(tmp_path, "scenario: {name: split_digits}\nnetwork: {name: conv, layers: [pool]}")
    assert "pools alone have no unit that could be pruned" in line


def test_every_override_that_cannot_be_applied_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SMALLEST)
    with pytest.raises(InputError) as caught:
        load_sweep(tmp_path / "sweep.yaml", ["seed", "head.kind=multi", "head.kind.x=1"])
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == ["--set seed", "--set head.kind.x=1"]


def test_an_override_changes_nothing_that_stood_there_by_an_alias(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "scenario: {name: 'some:tasks', arguments: &same {n: 1}}\nnetwork: {module: 'some:net', arguments: *same}"
    )
    sweep = load_sweep(tmp_path / "sweep.yaml", ["scenario.arguments.n=5"])
    assert (sweep.scenario.arguments, sweep.network.model_dump()["arguments"]) == ({"n": 5}, {"n": 1})


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    text = """
scenario: {name: permuted_dogs}
network: {hidden: [4, 0], activation: swish}
head: {kind: triple}
training: {epochs: many, learning_rate: 0.1}
search: {alpha: [-1], learning_rate: [0]}
forgetting: {margin: 0.5}
resources: {gpu: 1.5}
sed: 3
"""
    headline, *lines = faults(tmp_path, text)
    assert headline.endswith("sweep.yaml: 11 fault(s)")
    keys = [line.partition(":")[0] for line in lines]
    assert sorted(keys) == sorted(
        [
            "scenario.name",
            "network.hidden[1]",
            "network.activation",
            "head.kind",
            "training.epochs",
            "training.learning_rate",
            "search.alpha[0]",
            "search.learning_rate[0]",
            "forgetting.margin",
            "resources",
            "sed",
        ]
    )


def test_a_fault_names_its_value_and_what_is_allowed(tmp_path: Path) -> None:
    lines = faults(tmp_path, SMALLEST.replace("permuted_digits", "permuted_digit"))
    allowed = (*SCENARIOS, "torchvision:NAME", "package.module:function")
    assert lines[1] == (
        f"scenario.name: 'permuted_digit': allowed: {', '.join(allowed)}; did you mean 'permuted_digits'?"
    )


@pytest.mark.parametrize(
    ("section", "hint"),
    [
        ("trainning: {epochs: 3}", "trainning: unknown key; did you mean 'training'? Known here: name, seed, "),
        ("training: {epoch: 3}", "training.epoch: unknown key; did you mean 'epochs'? Known here: epochs, batch_size"),
        ("search: {alphas: 3}", "search.alphas: unknown key; did you mean 'alpha'? Known here: tasks, alpha, "),
        ("head: {zebra: 3}", "head.zebra: unknown key; Known here: kind, bias"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, section: str, hint: str) -> None:
    assert faults(tmp_path, f"{SMALLEST}{section}\n")[1].startswith(hint)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert faults(tmp_path, "seed: 1\n")[1:] == [
        "scenario: missing; it has no default",
        "network: missing; it has no default",
    ]


@pytest.mark.parametrize("alpha", ["[[1e-7, 1e-5]]", "[1e-6, [1, 2, 3, 4]]"])
def test_an_alpha_list_of_the_wrong_length_says_how_many_are_allowed(tmp_path: Path, alpha: str) -> None:
    lines = faults(tmp_path, f"{SMALLEST}search: {{alpha: {alpha}}}\n")
    assert len(lines) == 2
    assert lines[1].startswith("search.alpha[")
    assert lines[1].endswith("allowed: one number, or 3, one for each layer, the head last: hidden0, hidden1, head")


@pytest.mark.parametrize("alpha", ["[text]", "[true]", "[[1, text, 3]]", "[.inf]", "[.nan]", "[[]]", "[]", "[null]"])
def test_an_alpha_that_is_no_number_of_zero_or_more_is_refused(tmp_path: Path, alpha: str) -> None:
    lines = faults(tmp_path, f"{SMALLEST}search: {{alpha: {alpha}}}\n")
    assert all(line.startswith("search.alpha") for line in lines[1:])


def test_more_tasks_than_a_scenario_has_are_refused(tmp_path: Path) -> None:
    text = SMALLEST.replace("permuted_digits", "split_digits, tasks: 6")
    allowed = "scenario.tasks: 6 tasks cannot share the classes of split_digits; allowed: 1, 2, 5"
    assert faults(tmp_path, text)[1:] == [allowed]


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_points_per_trial_is_auto_or_a_whole_number_above_zero(tmp_path: Path, value: str) -> None:
    lines = faults(tmp_path, f"{SMALLEST}search: {{points_per_trial: {value}}}\n")
    assert all(line.startswith("search.points_per_trial: ") for line in lines[1:])


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-dash", "a b", "x" * 101, "a\nb", "ü"])
def test_a_name_that_could_lead_out_of_the_storage_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="name: "):
        make_sweep(name=name)


@pytest.mark.parametrize(
    "text",
    ["", "[1, 2]", "just text", "scenario: {name: [", "a: &x 1\na: *y", "\tkey: 1", "seed: 1\nseed: 2\n"],
)
def test_a_file_that_is_no_sweep_is_refused_by_name(tmp_path: Path, text: str) -> None:
    assert "sweep.yaml" in faults(tmp_path, text)[0]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("scenario=5", "scenario: 5: allowed: a section, with some of name, tasks, "),
        ("tracking=none", "tracking: 'none': allowed: a section, with some of uri, models"),
        ("scenario.augment=5", "scenario.augment: 5: allowed: a section, with some of crop, flip"),
        ("network=5", "network: 5: allowed: name: mlp, conv or zenke, or module"),
        ("network={name: conv, layers: 4, dense: 4}", "network.dense: 4: allowed: a list"),
        ("network.hidden=[]", "network.hidden: []: allowed: a list of 1 or more"),
        ("search.alpha={low: 0, high: 1}", "search.alpha[0].low: 0: input should be greater than 0"),
        ("network={module: 'mynet.Net'}", "network.module: 'mynet.Net': allowed: package.module:name"),
        ("name=a/b", "name: 'a/b': allowed: up to 100 letters, digits, "),
        ("margins=one", "margins[0]: 'one': write a percentage such as 0.05%, or a fraction such as 0.0005"),
    ],
)
def test_a_value_of_the_wrong_form_says_the_right_one(tmp_path: Path, override: str, fault: str) -> None:
    _, only = faults(tmp_path, SMALLEST, [override])
    assert only.startswith(fault)


def test_a_section_with_nothing_below_it_is_all_defaults(tmp_path: Path) -> None:
    empty = f"{SMALLEST}training:\ntracking:\n"
    assert load_sweep(written(tmp_path, empty)) == load_sweep(written(tmp_path, SMALLEST))
    assert load_sweep(written(tmp_path, empty), ["training.epochs=3"]).training.epochs == 3


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: cannot be read"):
        load_sweep(tmp_path / "absent.yaml")


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.yaml: cannot be read"):
        load_sweep(tmp_path / "binary.yaml")


@pytest.mark.parametrize("key", ["training.epochs", "scenario.tasks", "seed", "search.max_failures", "resources.cpu"])
@pytest.mark.parametrize("value", ["true", "'3'", "2.5"])
def test_a_count_is_a_whole_number_and_nothing_that_could_be_read_as_one(tmp_path: Path, key: str, value: str) -> None:
    lines = faults(tmp_path, SMALLEST, [f"{key}={value}"])
    assert [line.partition(":")[0] for line in lines[1:]] == [key]


@pytest.mark.parametrize("key", ["search.learning_rate", "training.weight_decay", "resources.gpu"])
def test_a_truth_value_is_no_number(tmp_path: Path, key: str) -> None:
    assert "true" in faults(tmp_path, SMALLEST, [f"{key}=true"])[1].lower()


@pytest.mark.parametrize(
    ("search", "fault"),
    [
        ("learning_rate: [0.1, 0.2, 1e-1]", "search.learning_rate[2]: 0.1 is search.learning_rate[0], 0.1, again"),
        ("alpha: [0.0, 1e-6, 0.000001]", "search.alpha[2]: 1e-06 is search.alpha[1], 1e-06, again"),
        (
            "alpha: [1e-6, [1e-6, 1e-6, 1e-6]]",
            "search.alpha[1]: (1e-06, 1e-06, 1e-06) is search.alpha[0], 1e-06, again",
        ),
    ],
)
def test_equal_points_are_refused_and_both_are_named(tmp_path: Path, search: str, fault: str) -> None:
    assert faults(tmp_path, f"{SMALLEST}search: {{{search}}}\n")[1:] == [f"{fault}; allowed: each once"]


# Passwords


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:hidden@bucket/runs",
        "s3://KEY:hid/den@bucket/runs",
        "s3://bucket/runs?endpoint_override=http://user:hidden@host:9000",
        "http://user:hidden@host:5000",
        "postgresql://user:12@hidden@host/db",
        "abfs://:hidden@account/runs",
        "postgresql://user@server:hidden@host/db",
        "postgresql://host/db?user=user&password=hidden",
        "postgresql://host/db?sslpassword=hidden",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BPWD%3Dhidden",
        "abfs://container@account/runs?client_id=1&client_secret=hidden",
        "abfs://container@account/runs?sv=1&sig=hidden",
        "s3://bucket/runs?access_key=KEY&secret_key=hidden",
    ],
)
@pytest.mark.parametrize("key", ["storage", "tracking.uri"])
def test_a_password_in_a_uri_is_refused_and_not_said(tmp_path: Path, key: str, uri: str) -> None:
    [_, said] = faults(tmp_path, SMALLEST, [f"{key}={uri}"])
    assert said.startswith(f"{key}: '{uri[:4]}")
    assert "***" in said
    assert "AWS_SECRET_ACCESS_KEY" in said
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert "hid" not in said


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY@bucket/runs",
        "postgresql://user@host:5432/db@old",
        "http://host:5000/at@home",
        "s3://bucket?endpoint_override=http://127.0.0.1:9000&region=a@b",
        "s3://bucket/a@b?endpoint_override=127.0.0.1:9000",
    ],
)
def test_a_users_name_and_a_port_are_no_password(uri: str) -> None:
    assert make_sweep(storage=uri, tracking={"uri": uri}).storage == uri


@pytest.mark.parametrize(
    "override",
    [
        "storage=[s3://KEY:hidden@bucket]",
        "storage=[s3://KEY:hidden@bucket",
        "name.storage=s3://KEY:hidden@bucket",
        "s3://KEY:hidden@bucket",
        'storage="s3://KEY:hidden\\b@bucket"',
        f"storage=s3://KEY:hidden{'n' * 80}@bucket",
    ],
)
def test_no_fault_says_a_password(tmp_path: Path, override: str) -> None:
    said = "\n".join(faults(tmp_path, f"{SMALLEST}name: sweep\n", [override]))
    assert "s3://KEY:***@bucket" in said
    assert "hidden" not in said


def test_a_file_that_is_no_yaml_is_refused_without_its_password(tmp_path: Path) -> None:
    said = "\n".join(faults(tmp_path, f"{SMALLEST}tracking: {{uri: postgresql://user:hidden@host/db, models: ]}}\n"))
    assert "not a YAML file" in said
    assert "user:***@host" in said
    assert "hidden" not in said


# Overrides


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=7", {"seed": 7}),
        ("training.epochs=3", {"training": {"epochs": 3}}),
        ("search.alpha=[1e-6, [1, 2, 3]]", {"search": {"alpha": (1e-6, (1.0, 2.0, 3.0))}}),
        ("search.learning_rate=1e-2", {"search": {"learning_rate": (0.01,)}}),
        ("forgetting.margin=0.1%", {"forgetting": {"margin": pytest.approx(0.001)}}),
        (" training.schedule = constant", {"training": {"schedule": "constant"}}),
        ("network={hidden: [9]}", {"network": {"hidden": (9,)}}),
        ("tracking.uri=postgresql://u@h/db?a=b", {"tracking": {"uri": "postgresql://u@h/db?a=b"}}),
    ],
)
def test_an_override_replaces_one_value(tmp_path: Path, override: str, changed: dict[str, Any]) -> None:
    dump = load_sweep(written(tmp_path, SMALLEST), [override]).model_dump()
    for section, values in changed.items():
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            assert (dump[section] if key is None else dump[section][key]) == value


def test_the_last_of_two_overrides_of_a_key_wins(tmp_path: Path) -> None:
    assert load_sweep(written(tmp_path, SMALLEST), ["seed=1", "seed=2"]).seed == 2


def test_an_override_leaves_its_sections_other_keys_as_they_are(tmp_path: Path) -> None:
    path = written(tmp_path, f"{SMALLEST}training: {{epochs: 3, batch_size: 5}}\n")
    assert load_sweep(path, ["training.epochs=4"]).training.batch_size == 5


@pytest.mark.parametrize("override", ["seed", "=3", "seed.deep=1", "training.epochs=[", "network.hidden.0=3"])
def test_an_override_that_cannot_be_applied_is_refused_by_name(tmp_path: Path, override: str) -> None:
    assert faults(tmp_path, f"seed: 1\n{SMALLEST}", [override])[0].startswith(f"--set {override}: ")


def test_a_fault_in_an_override_is_one_of_the_sweeps(tmp_path: Path) -> None:
    assert faults(tmp_path, SMALLEST, ["training.epochs=0"])[1].startswith("training.epochs: 0: ")


# There and back


def test_a_resolved_sweep_reads_back_as_itself(tmp_path: Path) -> None:
    sweep = make_sweep(
        name="a.b-c",
        seed=2**62,
        search={"alpha": [1e-6, [1e-7, 0, 1.5]], "learning_rate": [1e-12], "points_per_trial": 3},
        forgetting={"margin": "0.05%", "theta": "per_layer"},
        storage="s3://bucket/with space #1",
    )
    assert load_sweep(written(tmp_path, sweep.to_yaml())) == sweep


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_that_ships_loads_and_reads_back(path: Path, tmp_path: Path) -> None:
    sweep = load_sweep(path)
    assert load_sweep(written(tmp_path, sweep.to_yaml())) == sweep


def test_a_resolved_sweep_writes_every_default_out() -> None:
    text = make_sweep().to_yaml()
    assert all(f"{key}:" in text for key in ("seed", "batch_size", "on_depletion", "validation", "uri", "gpu"))


def test_the_schema_describes_every_key() -> None:
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    undescribed = [key for section in sections for key, value in section["properties"].items() if not value]
    assert not undescribed
    assert SCHEMA["$defs"]["TrainingConfig"]["properties"]["epochs"]["description"] == "Passes over the training split."


def test_the_schema_has_no_keyword_that_json_schema_does_not_know() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    known = jsonschema.Draft202012Validator.VALIDATORS.keys() | {"title", "description", "default", "$defs", "$ref"}

    def keywords(schema: Any) -> Iterator[str]:
        for key, value in schema.items():
            yield key
            inner = value.values() if key in {"properties", "$defs"} else value if key == "anyOf" else [value]
            for each in inner if key in {"properties", "$defs", "anyOf", "items"} else []:
                yield from keywords(each)

    assert {*keywords(SCHEMA)} - known == set()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_the_schema_takes_every_sweep_that_ships_and_its_resolved_form(path: Path) -> None:
    jsonschema.validate(plain(path.read_text(encoding="utf-8")), SCHEMA)
    jsonschema.validate(plain(load_sweep(path).to_yaml()), SCHEMA)


def test_the_schema_takes_the_readmes_example_and_so_does_the_parser(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```yaml\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert examples
    for text in examples:
        jsonschema.validate(plain(text), SCHEMA)
        load_sweep(written(tmp_path, text))


@pytest.mark.parametrize(
    ("section", "taken"),
    [
        ("forgetting: {margin: 1%}", True),
        ("forgetting: {margin: ' 0.05 % '}", True),
        ("forgetting: {margin: 1e-1%}", True),
        ("forgetting: {margin: 0.01}", True),
        ("forgetting: {margin: 0}", True),
        ("forgetting: {margin: 0.5}", False),
        ("forgetting: {margin: five%}", False),
        ("forgetting: {margin: true}", False),
        ("search: {alpha: 0}", True),
        ("search: {alpha: [1e-6, [1e-7, 1e-5, 1e-6]]}", True),
        ("search: {alpha: []}", False),
        ("search: {alpha: [[]]}", False),
        ("search: {alpha: text}", False),
        ("search: {alpha: -1}", False),
        ("search: {alpha: [true]}", False),
        ("search: {learning_rate: 0.1}", True),
        ("search: {learning_rate: 0}", False),
        ("search: {points_per_trial: 0}", False),
        ("training: {epochs: true}", False),
        ("training: {epochs: '3'}", False),
        ("training: {epoch: 3}", False),
        ("training:", True),
        ("margins: 1%", True),
        ("margins: []", True),
        ("margins: one", False),
        ("network: {hidden: 4}", True),
        ("network: {hidden: []}", False),
        ("search: {algorithm: optuna, alpha: {low: 1e-6, high: 1}, learning_rate: 1, objectives: accuracy}", True),
        ("seed: -1", False),
        ("storage: ''", False),
        ("scenario: {name: permuted_dogs}", False),
    ],
)
def test_the_schema_takes_what_the_parser_takes(section: str, taken: bool) -> None:
    raw = plain(SMALLEST) | plain(section)
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(raw) == taken
    with nullcontext() if taken else pytest.raises(InputError):
        parse_sweep(raw, "test")


# Differences


def test_equal_sweeps_have_no_differences() -> None:
    assert make_sweep().differences(make_sweep()) == []


def test_a_difference_names_the_key_and_both_values() -> None:
    mine, other = make_sweep(training={"epochs": 3}), make_sweep(training={"epochs": 4}, seed=5)
    assert mine.differences(other) == ["seed: 0 here, 5 there", "training.epochs: 3 here, 4 there"]


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"storage": "elsewhere"},
        {"tracking": {"uri": "none"}},
        {"resources": {"cpu": 2}},
        {"modules": "elsewhere"},
        {"scenario": {"name": "permuted_digits", "tasks": 2, "root": "elsewhere"}},
    ],
)
def test_where_and_how_a_sweep_runs_is_no_difference(sections: dict[str, Any]) -> None:
    assert make_sweep().differences(make_sweep(**sections)) == []


def test_a_run_may_be_given_more_tasks_but_not_fewer() -> None:
    two, three = (make_sweep(scenario={"name": "permuted_digits", "tasks": tasks}) for tasks in (2, 3))
    assert three.differences(two) == []
    assert two.differences(three) == [
        "scenario.tasks: 2 here, 3 there (a run can be given more tasks, not fewer)",
    ]


def test_a_split_scenario_of_another_length_has_other_tasks() -> None:
    two, five = (make_sweep(scenario={"name": "split_digits", "tasks": tasks}) for tasks in (2, 5))
    assert five.differences(two) == ["scenario.tasks: 5 here, 2 there (the tasks so far would be others)"]
    assert two.differences(five) == ["scenario.tasks: 2 here, 5 there (the tasks so far would be others)"]


def test_what_decides_a_task_includes_their_number_only_where_it_changes_them() -> None:
    permuted, split = (make_sweep(scenario={"name": name, "tasks": 2}) for name in ("permuted_digits", "split_digits"))
    assert "scenario.tasks" not in permuted.settings
    assert split.settings["scenario.tasks"] == 2


def test_plain_data_give_the_same_sweep_as_a_file(tmp_path: Path) -> None:
    raw = {
        "name": "sweep",
        "modules": [str(tmp_path), "."],
        "scenario": {"name": "permuted_digits"},
        "network": {"hidden": [4, 4]},
    }
    assert parse_sweep(raw, "test") == load_sweep(written(tmp_path, SMALLEST))


# Networks

NAMES = "network: {hidden: [4, 4]}"
OWN = """
import random

import numpy
import torch


class Small(torch.nn.Module):
    def __init__(self, channels, bias=True):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, channels, 3)
        with torch.no_grad():
            self.conv.bias.fill_(numpy.random.rand() + random.random())
        self.head = torch.nn.Linear(channels * 36, 10, bias=bias)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


def broken():
    raise RuntimeError("no luck")
"""


def with_network(tmp_path: Path, network: str, search: str = "{}") -> Sweep:
    """A sweep with a network, beside a Python module `own` of the user's."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    text = SMALLEST.replace(NAMES, f"network: {network}") + f"search: {search}\n"
    return load_sweep(written(tmp_path, text))


@pytest.mark.parametrize(
    ("network", "groups"),
    [
        ("{hidden: [3]}", {"hidden0": 3}),
        ("{name: conv, layers: [2, pool, valid 3], dense: [5]}", {"conv0": 2, "conv1": 3, "dense0": 5}),
        ("{name: conv, layers: [2], batch_norm: true, dropout: 0.2, activation: tanh}", {"conv0": 2}),
        ("{name: zenke, width: 0.125}", {"conv0": 4, "conv1": 4, "conv2": 8, "conv3": 8, "dense0": 64}),
        ("{module: 'own:Small', arguments: {channels: 3}}", {"conv": 3}),
    ],
)
def test_a_network_of_each_kind_becomes_a_graph(tmp_path: Path, network: str, groups: dict[str, int]) -> None:
    sweep = with_network(tmp_path, network)
    graph = sweep.graph((64,) if sweep.network.flatten else (1, 16, 16) if "zenke" in network else (1, 8, 8))
    assert graph.groups == groups
    assert sweep.network.layer_names in ((), graph.layers)
    assert parse_sweep(json.loads(sweep.model_dump_json()), "dumped") == sweep


@pytest.mark.parametrize(
    ("network", "fault"),
    [
        (
            "{name: cnn, layers: [3]}",
            "network.name: 'cnn': allowed: name: mlp, conv or zenke, or module: package.module",
        ),
        ("{name: conv, layers: [3, pol]}", "network.layers[1]: 'pol': write a number of channels, `valid N`"),
        ("{name: conv, layers: [0]}", "network.layers[0]: 0: write a number of channels"),
        ("{name: conv, layers: [valid 0]}", "network.layers[0]: 'valid 0': write a number of channels"),
        ("{name: conv, hidden: [3]}", "network.layers: missing; it has no default"),
        ("{name: zenke, widht: 2}", "network.widht: unknown key; did you mean 'width'? Known here: name, width"),
        ("{module: 'own:Small', name: mlp}", "network.name: unknown key; Known here: module, arguments"),
        ("{module: own.Small}", "network.module: 'own.Small': "),
        ("{hidden: [4], width: 2}", "network.width: unknown key; Known here: name, hidden, activation"),
        ("[4]", "network: [4]: allowed: name: mlp, conv or zenke, or module"),
    ],
)
def test_a_faulty_network_is_named_by_its_kinds_own_keys(tmp_path: Path, network: str, fault: str) -> None:
    assert any(line.startswith(fault) for line in faults(tmp_path, SMALLEST.replace(NAMES, f"network: {network}")))


@pytest.mark.parametrize(
    ("module", "arguments", "fault"),
    [
        ("absent:Small", "{}", "no module 'absent'"),
        ("own:Smal", "{}", "has no 'Smal'; did you mean 'Small'?"),
        ("own:Small", "{}", "called with {}, it raised TypeError"),
        ("own:broken", "{}", "it raised RuntimeError: no luck"),
        ("own:torch.zeros", "{size: [2]}", "gives a Tensor; wanted is a torch.nn.Module"),
        ("own:Small", "{channels: 2}", "refused for 1 reason(s)"),
    ],
)
def test_a_module_that_cannot_be_made_or_trained_is_named(
    tmp_path: Path, module: str, arguments: str, fault: str
) -> None:
    sweep = with_network(tmp_path, f"{{module: '{module}', arguments: {arguments}}}")
    with pytest.raises(InputError, match=r"^network\.module: ") as caught:
        sweep.architecture((3, 8, 8))
    assert fault in str(caught.value)


def test_a_network_that_does_not_take_the_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^network: does not take samples of shape \(1, 2, 2\): "):
        with_network(tmp_path, "{name: zenke}").graph((1, 2, 2))


def test_a_modules_head_has_no_bias_where_the_sweep_says_so(tmp_path: Path) -> None:
    sweep = with_network(tmp_path, "{module: 'own:Small', arguments: {channels: 3}}")
    assert "bias" in sweep.graph((1, 8, 8)).shapes(sweep.graph((1, 8, 8)).by_name["head"])
    bare = sweep.model_copy(update={"head": make_sweep(head={"kind": "single", "bias": "none"}).head})
    graph, drawn = bare.graph((1, 8, 8)), bare.draw((1, 8, 8), 0)
    assert drawn is not None
    assert list(graph.shapes(graph.by_name["head"])) == list(drawn["head"]) == ["weight"]


def test_a_module_draws_the_same_under_the_same_seed_and_leaves_other_draws_alone(tmp_path: Path) -> None:
    sweep = with_network(tmp_path, "{module: 'own:Small', arguments: {channels: 3}}")
    before, pythons = torch.get_rng_state(), random.getstate()
    first, again, other = (sweep.draw((1, 8, 8), seed) for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    for name in ("weight", "bias"):
        assert torch.equal(first["conv"][name], again["conv"][name])
        assert not torch.equal(first["conv"][name], other["conv"][name])
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == pythons
    assert make_sweep().draw((64,), 1) is None


# Alphas by pattern


def test_an_alpha_by_pattern_takes_the_first_match() -> None:
    alpha = {"layer1.*": 1e-6, "*.bn": 0, "*": 1e-5}
    sweep = make_sweep(search={"alpha": [alpha]}, network={"module": "own:Small"})
    assert sweep.layer_alphas(sweep.search.alpha[0], ("layer1.bn", "layer2.bn", "fc")) == (1e-6, 0, 1e-5)


def test_alphas_that_do_not_fit_the_layers_are_all_named() -> None:
    alphas = [1e-6, [1, 2], {"layer1.*": 1, "nothing*": 2}]
    sweep = make_sweep(search={"alpha": alphas}, network={"module": "own:Small"})
    with pytest.raises(InputError) as caught:
        sweep.layer_alphas(sweep.search.alpha[0], ("layer1.conv", "layer2.conv", "fc"))
    assert str(caught.value).splitlines() == [
        "search.alpha[1]: [1.0, 2.0] has 2 values; allowed: one number, or 3, one for each layer, the head last: "
        "layer1.conv, layer2.conv, fc",
        "search.alpha[2]: 'nothing*' matches no layer; there are layer1.conv, layer2.conv, fc",
        "search.alpha[2]: no pattern matches layer2.conv, fc; a last pattern '*' takes the rest",
    ]


def test_patterns_for_a_network_of_ours_are_checked_with_the_file(tmp_path: Path) -> None:
    text = f"{SMALLEST}search: {{alpha: {{'conv*': 1, '*': 2}}}}\n"
    assert faults(tmp_path, text)[1:] == ["search.alpha[0]: 'conv*' matches no layer; there are hidden0, hidden1, head"]


def test_a_sweep_of_margins_and_repetitions_is_a_sequence_for_each() -> None:
    sweep = make_sweep(seed=3, repetitions=2, margins=["1%", 0.0005])
    members = sweep.members("run")
    assert list(members) == ["run-s3-m1", "run-s3-m0.05", "run-s4-m1", "run-s4-m0.05"]
    assert [(each.seed, each.forgetting.margin) for each in members.values()] == [
        (3, 0.01),
        (3, 0.0005),
        (4, 0.01),
        (4, 0.0005),
    ]
    assert all(each.members("one") == {"one": each} for each in members.values())
    assert list(make_sweep(repetitions=2).members("run")) == ["run-s0", "run-s1"]
    assert list(make_sweep(margins=["2%"]).members("run")) == ["run-m2"]


def test_auto_chooses_from_margins_up_to_its_limit() -> None:
    default, less, more, fixed = (
        make_sweep(forgetting=forgetting)
        for forgetting in (
            {"margin": "auto"},
            {"margin": "auto", "auto_limit": "0.3%"},
            {"margin": "auto", "auto_limit": "12%"},
            {"margin": "1%"},
        )
    )
    assert less.forgetting.margins == (0.0, 0.0005, 0.001, 0.002, 0.003)
    assert default.forgetting.margins[-2:] == (0.03, 0.05)
    assert more.forgetting.margins == (*default.forgetting.margins, 0.08, 0.12)
    assert fixed.forgetting.margins == (0.01,)
    assert more.settings["forgetting.auto_limit"] == 0.12
    for sweep in (default, fixed):
        assert "forgetting.auto_limit" not in sweep.settings  # a run of before there was one goes on
    assert planned_with(more, default.settings).forgetting == default.forgetting


def test_a_fork_may_draw_points_after_tasks_that_had_a_grid() -> None:
    grid = make_sweep()
    drawn = overridden(
        grid,
        [
            "search.algorithm=random",
            "search.points=2",
            "search.alpha={low: 1e-6, high: 1e-4}",
            "search.learning_rate=0.01",
        ],
    )
    assert planned_with(drawn, grid.settings).search == grid.search
    assert planned_with(grid, drawn.settings).search == drawn.search


def test_a_single_margin_is_a_run_with_that_margin() -> None:
    ((name, member),) = make_sweep(margins=["20%"]).members("run").items()
    assert (name, member.forgetting.margin, member.margins) == ("run-m20", 0.2, ())


@pytest.mark.parametrize("margins", [["1%", 0.01], ["1%", "1.0000001%"]])
def test_margins_that_would_be_runs_of_one_name_are_refused(margins: list[Any]) -> None:
    with pytest.raises(InputError, match="a value is there twice"):
        make_sweep(margins=margins)


@pytest.mark.parametrize("values", [{"margins": ["1%", "1%"]}, {"margins": ["120%"]}, {"repetitions": 0}])
def test_margins_and_repetitions_that_are_none_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        make_sweep(**values)


# Ranges


RANGE = "{low: 1e-6, high: 1e-3}"


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
@pytest.mark.parametrize("alpha", [RANGE, f"[{RANGE}]", f"[[{RANGE}, 1e-5, 0]]", f"{{hidden0: {RANGE}, '*': 1e-5}}"])
def test_a_sweep_with_ranges_is_written_and_read_back_the_same(tmp_path: Path, alpha: str, algorithm: str) -> None:
    sweep = load_sweep(
        written(tmp_path, f"{SMALLEST}search: {{algorithm: {algorithm}, alpha: {alpha}, learning_rate: 0.01}}\n")
    )
    assert parse_sweep(plain(sweep.to_yaml()), "again") == sweep
    assert [(each.low, each.high) for each in sweep.search.ranges.values()] == [(1e-6, 1e-3)]


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (f"alpha: {RANGE}", "search.alpha[0]: a range; allowed with algorithm: random or optuna"),
        (
            f"learning_rate: [0.1, {RANGE}]",
            "search.learning_rate[1]: a range; allowed with algorithm: random or optuna",
        ),
        (f"algorithm: random, alpha: [{RANGE}, 0.1], learning_rate: 0.1", "search.alpha: 2 values; allowed with "),
        (f"algorithm: random, alpha: {RANGE}", "search.learning_rate: 2 values; allowed with algorithm: random: one"),
        ("algorithm: optuna, alpha: 0, learning_rate: 0.1", "search.alpha: no range to draw from; allowed with "),
        ("points: 12", "search.points: 12; allowed with algorithm: random or optuna, not with grid"),
        (
            f"algorithm: random, alpha: {RANGE}, learning_rate: 1, batch: 2",
            "search.batch: 2; allowed with algorithm: op",
        ),
        ("sampler: gp", "search.sampler: gp; allowed with algorithm: optuna, not with grid"),
        ("objectives: accuracy", "search.objectives: accuracy; allowed with algorithm: optuna, not with grid"),
        (
            "alpha: {low: 1e-3, high: 1e-6}",
            "search.alpha[0]: {'low': 0.001, 'high': 1e-06}: low: 0.001 is not below high: 1e-06",
        ),
        ("alpha: {low: 0, high: 1e-6}", "search.alpha[0].low: 0: input should be greater than 0"),
        ("learning_rate: {low: 1, high: 2e-3}", "search.learning_rate[0]: {'low': 1, 'high': 0.002}: low: 1 is not "),
        ("objectives: [speed]", "search.objectives[0]: "),
    ],
)
def test_a_search_that_cannot_draw_is_refused(tmp_path: Path, search: str, said: str) -> None:
    assert faults(tmp_path, f"{SMALLEST}search: {{{search}}}\n")[1].startswith(said)


def test_a_bias_rule_of_a_single_head_is_refused_for_several(tmp_path: Path) -> None:
    assert faults(tmp_path, f"{SMALLEST}head: {{kind: multi, bias: none}}\n")[1].startswith(
        "head.bias: none: heads of "
    )


def test_what_the_algorithm_does_not_use_is_no_setting_that_decides(tmp_path: Path) -> None:
    grid = load_sweep(written(tmp_path, SMALLEST))
    assert not {"search.algorithm", "search.points", "search.sampler"} & grid.settings.keys()
    random = load_sweep(
        written(tmp_path, f"{SMALLEST}search: {{algorithm: random, alpha: {RANGE}, learning_rate: 0.01}}\n")
    )
    assert random.settings["search.algorithm"] == "random"
    assert "search.sampler" not in random.settings
