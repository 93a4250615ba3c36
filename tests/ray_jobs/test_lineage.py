"""Where runs came from: the tree of those that began from others, and in which code and packages they differ."""

import pytest

from perceiver.disk import write_json
from perceiver.provenance import between
from perceiver.runs import Run
from ray_jobs.runs import in_lineage


def rows(**parents: str | None) -> list[dict]:
    return [{"name": name, "parent": parent} for name, parent in parents.items()]


def test_runs_stand_below_those_that_they_began_from():
    found = in_lineage(rows(a=None, b="a@10", c="a@20", d="b@30", e="gone@5", f=None))
    assert [f"{row['branch']}{row['name']}" for row in found] == ["a", "├─ b", "│  └─ d", "└─ c", "e", "f"]


@pytest.mark.parametrize("parents", [{"a": "a@1"}, {"a": "b@1", "b": "a@1"}, {"a": "b@1", "b": "c@1", "c": "b@2", "d": None}])
def test_every_run_is_shown_once_also_where_names_go_round(parents):
    assert sorted(row["name"] for row in in_lineage(rows(**parents))) == sorted(parents)


def test_runs_of_other_code_and_packages_are_told_apart(tmp_path):
    def made(name: str, commit: str = "a" * 40, torch: str = "2.15", diff: bytes = b"") -> Run:
        run = Run(tmp_path / name)
        code = {"package": {"root": "/x", "commit": commit, "changed": bool(diff), "untracked": []}}
        write_json(run.provenance_file, {"code": code, "packages": {"python": "3.11", "torch": torch}})
        if diff:
            run.diff_file("package").write_bytes(diff)
        return run

    base, same, later, dirty, old = (
        made("base"),
        made("same"),
        made("later", "b" * 40),
        made("dirty", diff=b"+x"),
        made("old", torch="2.14"),
    )
    found = between([base, same, later, dirty, old, Run(tmp_path / "none")])
    assert found == {
        "later": ["code of the package at commit bbbbbbbbbbbb, not aaaaaaaaaaaa"],
        "dirty": [f"code of the package with other uncommitted changes ({dirty.diff_file('package')})"],
        "old": ["torch 2.14, not 2.15"],
    }
    assert between([Run(tmp_path / "none"), base]) == {}
