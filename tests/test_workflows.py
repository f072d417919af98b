"""Checks of the files in .github/workflows, which cannot run here."""

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(SETTINGS["project"]["classifiers"]))


def test_the_workflows():
    assert set(WORKFLOWS) == {"docs", "lint", "tests", "wheels"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_only_read_and_its_actions_have_a_major_version(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step.get("uses", "a/b@v1"))
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_only_a_tag_publishes():
    jobs = WORKFLOWS["wheels"]["jobs"]
    writers = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert writers == {"pypi": {"id-token": "write"}, "release": {"contents": "write"}}
    assert all(jobs[name]["if"] == "github.ref_type == 'tag'" for name in writers)


def test_the_pythons_are_those_of_the_classifiers():
    assert SETTINGS["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert WORKFLOWS["tests"]["jobs"]["pytest"]["strategy"]["matrix"]["python"] == PYTHONS
    wheels = WORKFLOWS["wheels"]["jobs"]["wheels"]["strategy"]["matrix"]["python"]
    assert wheels == [python.replace(".", "") for python in PYTHONS]


def test_the_oldest_torch_is_tested():
    (torch,) = (need for need in SETTINGS["project"]["dependencies"] if need.startswith("torch"))
    tested = torch.replace(">=", "==") + ".*"
    assert WORKFLOWS["tests"]["jobs"]["pytest"]["strategy"]["matrix"]["torch"] == [tested, "torch"]
    assert tested in SETTINGS["tool"]["cibuildwheel"]["before-test"]


def test_wheels_bring_no_openmp():
    assert "--exclude libgomp.so.1" in SETTINGS["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
