"""The first 50 losses of a very small model, kept in tests/numerics/golden_loss.txt.

A change of code that moves them is explained in its commit, and writes the file anew:

    GOLDEN=write python -m pytest tests/train/test_golden_loss.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "numerics" / "golden_loss.txt"


def test_golden_loss(train_tiny, tmp_path):
    torch.set_num_threads(1)
    run = train_tiny(tmp_path / "run", "trainer.max_steps=50", "precision=fp32", "seed=0")
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.write_text("".join(f"{loss:.6f}\n" for loss in run.losses))
    # Other processors add in another order; a change of the data order or of the maths is far larger than this.
    np.testing.assert_allclose(run.losses, np.loadtxt(GOLDEN), rtol=1e-4)
    assert np.mean(run.losses[-5:]) < 0.8 * np.mean(run.losses[:5]), "it learns"
