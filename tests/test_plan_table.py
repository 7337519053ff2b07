"""The table of plans: its rows name recipes that exist, finished rows are not made again, and numbers come out as GiB and seconds."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from tests.sharding_dumps import recipe_of
from vlm_jax.planning.chips import topology

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "bench" / "plan_table.py"
spec = importlib.util.spec_from_file_location("plan_table", SCRIPT)
plan_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_table)

PLAN = {
    "topology": "v5e:4x8", "mesh": {"data": 1, "fsdp": 8, "tensor": 4, "seq": 1}, "global_batch": 32, "accum": 2, "remat": "full",
    "fits": True, "peak_bytes": 2**33, "memory_bytes": 2**34, "held_bytes": {"parameters": 2**30, "frozen": 2**29, "optimizer": 2**31},
    "saved_bytes": 2**32, "temporary_bytes": 3 * 2**30,
    "seconds": {"compute": 1.5, "links": 0.25, "memory": 0.125}, "mfu_at_most": 0.75, "compile_seconds": 60.2,
}  # fmt: skip


@pytest.mark.parametrize("row", plan_table.ROWS, ids=lambda r: r.name)
def test_rows_name_recipes_and_slices(row):
    made = recipe_of(row.recipe.replace(".py:", ":"))
    assert topology(row.topology).chip.name in ("v5e", "v6e", "v5p")
    micro = [int(flag.rpartition("=")[2]) for flag in row.flags if "accum" in flag]
    assert made.train.global_batch % (micro[0] if micro else 1) == 0
    assert dataclasses.is_dataclass(made) and row.command()[5].startswith("configs/")


def test_names_of_rows_differ():
    assert len({row.name for row in plan_table.ROWS}) == len(plan_table.ROWS)


def test_rows_are_chosen_by_recipe_and_chip():
    found = list(plan_table.chosen("7b,stage2$", "v5e"))
    assert [row.topology for row in found] == ["v5e:4x8", "2xv5e:4x4"]
    assert {row.topology.split(":")[0] for row in plan_table.chosen("vq16", "v5p,v6e")} == {"v5p", "v6e"}


def test_what_is_there_is_printed_and_not_made_again(tmp_path, monkeypatch, capsys):
    first, second, third = plan_table.ROWS[:3]
    slices = PLAN | {"seconds": PLAN["seconds"] | {"between slices": 0.5}}
    for row, plan in ((first, PLAN), (second, slices), (third, PLAN | {"fits": False})):
        made = plan | {"recipe": row.recipe, "command": " ".join(row.command())}
        (tmp_path / f"{row.name}.json").write_text(json.dumps(made))
    asked = []
    monkeypatch.setattr(plan_table, "make", lambda row, out: asked.append(row) or "")
    monkeypatch.setattr("sys.argv", ["plan_table.py", "--out", str(tmp_path), "--limit", "1"])
    plan_table.main()
    assert asked == [plan_table.ROWS[3]]
    said = capsys.readouterr().out
    assert (
        "| fsdp 8 x tensor 4 | 32, 2, full | 1.50 | 2.00 | 3.00 | 8.00 of 16.00 | 1.500 | 0.250 | 0.125 | 75 % | 60 |"
        in said
    )
    assert (
        "| 1.500 | 0.250, 0.500 between slices | 0.125 |" in said
        and "2.00 | 4.00 | does not fit: 8.00 of 16.00" in said
        and "python -m vlm_jax plan --config configs/" in said
    )
