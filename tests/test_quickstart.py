"""The quickstart from end to end, shrunk to seconds: everything that it promises to leave is there, and a second start keeps it."""

import importlib.util
import json
from pathlib import Path

import pytest

from vlm_jax.quickstart import quickstart

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_leaves_summary_curves_report_and_export(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("quickstart_config", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke")
    config.data.generated_watches = 12
    assert quickstart(str(tmp_path), config) == 0
    assert "report: " in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["steps"] == 6
        and summary["parameters"] > 100_000
        and summary["seconds"] >= summary["training_seconds"] > 0
    )
    assert 0 <= summary["data_stall"] < 1
    assert set(summary["accuracy"]) == {"weather", "weather_pos", "battery_pos", "time_exact", "battery_exact"}
    assert set(summary["score"]) == {"time", "battery"}
    assert set(summary["chance"]) == set(summary["accuracy"]) | set(summary["score"])
    assert (tmp_path / "loss.png").stat().st_size > 1000 and (tmp_path / "export" / "model.safetensors").is_file()
    before = (tmp_path / "summary.json").read_bytes(), (tmp_path / "report.html").stat().st_mtime
    assert quickstart(str(tmp_path), config) == 0
    assert before == ((tmp_path / "summary.json").read_bytes(), (tmp_path / "report.html").stat().st_mtime)
    assert "report: " in capsys.readouterr().out
