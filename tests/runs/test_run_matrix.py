"""The matrix of a sweep: what its file says, and what is refused in it, in a line."""

from pathlib import Path

import pytest
import yaml

from vla_pruner.runs.matrix import read_config, read_matrix

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))


def test_a_file_describes_a_matrix(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        """
policies: [a, b]
suites: toys
episodes: 40
seed: 3
keep: [0.5, 64]
methods:
  none: {episodes: 100}
  vla-pruner: {options: {window: 1, first: nearest}}
  fastv: {keep: 0.125, episodes: 10}
conditions:
  - random@0.5
  - divprune@0.25: 7
"""
    )
    found = read_config(path)
    wanted = [
        ("none", 100),
        ("vla-pruner@0.5:window=1:first=nearest", 40),
        ("vla-pruner@64:window=1:first=nearest", 40),
        ("fastv@0.125", 10),
        ("random@0.5", 40),
        ("divprune@0.25", 7),
    ]
    assert [(cell.condition.name, cell.episodes) for cell in found] == wanted * 2
    assert [cell.policy for cell in found] == ["a"] * 6 + ["b"] * 6
    assert {(cell.suite, cell.first) for cell in found} == {("toys", 3)}


def test_episodes_may_differ_from_suite_to_suite():
    found = read_matrix(
        {
            "policies": ["a"],
            "suites": ["short", "long"],
            "episodes": {"short": 9, "long": 3},
            "methods": {"none": {"episodes": {"long": 5, "short": 20}}},
            "conditions": ["fastv@0.5", {"random@0.5": {"short": 2, "long": 1}}, {"vtw@0.5": 4}],
        }
    )
    assert [(cell.suite, cell.condition.name, cell.episodes) for cell in found] == [
        ("short", "none", 20),
        ("short", "fastv@0.5", 9),
        ("short", "random@0.5", 2),
        ("short", "vtw@0.5", 4),
        ("long", "none", 5),
        ("long", "fastv@0.5", 3),
        ("long", "random@0.5", 1),
        ("long", "vtw@0.5", 4),
    ]


def test_the_matrix_of_the_docs_is_understood():
    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text("utf-8")
    found = read_matrix(yaml.safe_load(page.partition("```yaml")[2].partition("```")[0]))
    assert ("sparsevlm@0.125:count=behind", 40) in [(c.condition.name, c.episodes) for c in found]
    assert ("divprune@64", 20) in [(c.condition.name, c.episodes) for c in found]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_matrices_of_the_experiments_are_understood(path):
    names = {cell.condition.name for cell in read_config(path)}
    # These join episodes of `none` that are there already.
    assert ("none" in names) == (path.stem not in ("methods-2026", "methods-2026-pi0", "smol-oft"))


def matrix(**changes) -> dict:
    return {"policies": ["a"], "suites": ["toys"], "conditions": ["none"], **changes}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected the entries policies"),
        (matrix(worker=2), "unknown entry worker"),
        (matrix(policies=[]), "policies: expected a list of names"),
        (matrix(suites=["a", "a"]), "suites: a name is there twice"),
        (matrix(methods=["none", "none"]), "methods: a name is there twice"),
        (matrix(conditions=[]), "nothing to run"),
        (matrix(conditions=["none", "none"]), "asked for twice"),
        (matrix(conditions=[3]), "conditions: 3 must be a name"),
        (matrix(conditions=["vlapruner@0.5"]), "unknown method"),
        (matrix(conditions=[{"none": 0}]), "episodes: 0 must be a number"),
        (matrix(episodes=True), "episodes: True must be a number"),
        (matrix(episodes={"toys": 0}), "episodes: 0 must be a number"),
        (matrix(episodes={"toy": 3}), "expected a number for each of toys; got {'toy': 3}"),
        (matrix(suites=["toys", "b"], episodes={"b": 3}), "a number for each of toys, b"),
        (matrix(seed=-1), "seed: -1 must be the number"),
        (matrix(methods=["fastv"]), "fastv has no `keep`"),
        (matrix(methods={"fastv": {"ratio": 1}}), "may say keep, episodes and options"),
        (matrix(methods=3), "methods: expected names"),
    ],
)
def test_a_matrix_that_is_not_understood_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_matrix(values)


def test_an_error_in_a_file_names_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("policies: [")
    with pytest.raises(ValueError, match=r"a\.yaml is not YAML"):
        read_config(tmp_path / "a.yaml")
    for twice in ("methods: [a]\nmethods: [b]", "methods: {a: {keep: 0.5}, a: {keep: 0.25}}"):
        (tmp_path / "a.yaml").write_text(f"policies: [x]\n{twice}")
        with pytest.raises(ValueError, match=r"a\.yaml is not YAML: (methods|a) is said twice"):
            read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("policies: [x]")
    with pytest.raises(ValueError, match=r"a\.yaml: suites: expected a list"):
        read_config(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.yaml"):
        read_config(tmp_path / "b.yaml")


BOMB = "\n".join(
    ["x: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
)


@pytest.mark.parametrize("key", ["policies", "suites", "methods", "keep", "conditions", "episodes"])
def test_a_file_that_unfolds_to_gigabytes_is_refused_in_a_line(tmp_path, key):
    rest = {"policies": "[p]", "suites": "[s]", "methods": "[fastv]", "keep": "[0.5]"}
    lines = [f"{name}: {value}" for name, value in rest.items() if name != key]
    # Anchors first, in an entry that is read.
    value = "*i" if key != "keep" else "[*i]"
    (tmp_path / "a.yaml").write_text("\n".join([BOMB, *lines, f"{key}: {value}"]))
    found = yaml.safe_load((tmp_path / "a.yaml").read_text())
    with pytest.raises(ValueError, match=r"\[\[|expected") as caught:
        read_matrix({name: found[name] for name in (*rest, key) if name in found})
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match=r"a\.yaml: unknown entry x, b, c") as caught:
        read_config(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 600


def test_a_deep_file_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("policies: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(ValueError, match=r"a\.yaml is nested too deeply"):
        read_config(tmp_path / "a.yaml")
