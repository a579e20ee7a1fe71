from __future__ import annotations

import pytest
import torch

from vistallm.model.weights import check_keys, fold


def test_names_that_differ_in_their_first_number_are_one():
    names = ["a.0.x", "a.2.x", "b", "a.1.x", "a.7.y", "c.4.d.2.e", "c.5.d.2.e", "a.9.x", "last.3"]
    assert fold(names) == ["a.{0..2,9}.x", "b", "a.7.y", "c.{4..5}.d.2.e", "last.3"]


def test_every_key_is_named():
    own = {name: torch.zeros(2, 3) for name in ("a", "b", "rows", "l.0.w", "l.1.w")}
    state = own | {"rows": torch.zeros(9, 3), "l.0.w": torch.zeros(3), "l.1.w": torch.zeros(3), "c": torch.zeros(1)}
    del state["a"]
    with pytest.raises(ValueError, match="weights") as error:
        check_keys(own, state, "x.pt", "do this", free_rows="rows")
    assert str(error.value).splitlines() == [
        "x.pt: weights of another model (1 keys missing, 1 keys unexpected, 2 keys of another shape); do this",
        "  missing: a",
        "  unexpected: c",
        "  of another shape: l.{0..1}.w (3,) in the file, (2, 3) here",
    ]
    check_keys(own, own | {"rows": torch.zeros(9, 3)}, "x.pt", "", free_rows="rows")
