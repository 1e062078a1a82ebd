"""pictures.py draws what table1.py left: from tiny runs, every picture of the README's results."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from support import edges
from experiments import pictures
from experiments import table1
import train
from sample import save_npz


def test_the_best_r_is_the_one_that_the_image_was_mixed_with():
    """x0 = 0.3 x0' + 0.7 x0*, and anything at right angles to x0' - x0* changes nothing (Cas-DM Eqs. 11, 12)."""
    x0_star, x0_hat, other = torch.randn(3, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    towards = x0_hat - x0_star
    other -= (other * towards).sum() / towards.square().sum() * towards
    assert abs(pictures.best_r(0.3 * x0_hat + 0.7 * x0_star + other, x0_star, x0_hat) - 0.3) < 1e-12


def test_without_runs_it_is_one_line_that_says_what_makes_them(tmp_path, capsys):
    assert edges.run(pictures.main, ["--work", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "100.npz does not exist; expected a run's samples, which experiments/table1.py draws" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_picture_is_drawn_from_the_runs_and_their_lines(tmp_path, monkeypatch):
    experiment, lines = table1.Experiment("cpu", tmp_path), []
    save_npz(np.zeros((2, 16, 16, 3), np.uint8), tmp_path / "images.npz")
    for row in {*pictures.ROWS, *pictures.GATED}:
        flags = f"--data {tmp_path}/images.npz --channels 32 --res-blocks 1 --T 100 --iterations 1 --batch-size 2 --sample-every 0"
        assert edges.run(train.main, [*flags.split(), *experiment.rows[row].flags.split(" --metric")[0].split(), "--out", str(experiment.place(row, 0))]) == 0
        save_npz(np.full((20, 16, 16, 3), 128, np.uint8), experiment.place(row, 0) / "100.npz")
    for seed in (0, 1):
        for row, how in experiment.rows.items():
            lines.append({"row": row, "seed": seed} | {str(steps): {"FID-768": 1 + seed + 10 / steps} for steps in how.steps})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_npz(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8), tmp_path / "reference.npz")
    drawn, gate = {}, pictures.draw_gate
    monkeypatch.setattr(pictures, "draw_gate", lambda *how: gate(*how, n=2))
    monkeypatch.setattr(pictures, "save", lambda figure, path: (drawn.update({path.name: figure}), save(figure, path)))
    assert edges.run(pictures.main, ["--work", str(tmp_path), "--results", str(tmp_path / "lines.jsonl"), "--out", str(tmp_path)]) == 0
    for name in ("rows.png", "gate.png", "refined.png", "curves.png"):
        assert min(Image.open(tmp_path / name).size) > 100
    learned, best = ([line for line in drawn["gate.png"].axes[0].lines if line.get_linestyle() == style] for style in ("-", "--"))
    assert [line.get_label() for line in learned] == pictures.GATED and len(best) == len(learned)
    assert all(0.4 < line.get_ydata().min() <= line.get_ydata().max() < 0.6 for line in learned)        # sigmoid of nearly 0
    steps, iterations = (container.lines[0].get_xydata() for axis in drawn["curves.png"].axes for container in axis.containers[:1])
    np.testing.assert_allclose(steps, [[x, 1.5 + 10 / x] for x in (5, 10, 20, 50, 100)])
    assert [label.get_text() for label in drawn["curves.png"].axes[1].get_xticklabels()] == ["1,250", "2,500", "5,000"]
    np.testing.assert_allclose(iterations, [[x, 2.5] for x in (1250, 2500, 5000)])
    (experiment.place(pictures.GATED[-1], 0) / "checkpoint.pt").unlink()        # Table 1 alone was run
    pictures.draw_gate(experiment, tmp_path / "gate.png")
    assert len(drawn["gate.png"].axes[0].lines) == 2 * len(pictures.GATED) - 2


save = pictures.save
