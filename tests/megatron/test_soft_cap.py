"""A model that caps its final logits is refused by name: the loss needs logits that are linear in the hidden state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_popsd.errors import UserError


def test_a_cap_on_final_logits_is_refused_by_name() -> None:
    from nemo_popsd.megatron.student import _refuse_soft_cap

    def model(**fields: Any) -> Any:
        return SimpleNamespace(config=SimpleNamespace(**fields))

    with pytest.raises(UserError, match=r"final_logit_softcapping=30\.0"):
        _refuse_soft_cap(model(final_logit_softcapping=30.0))
    _refuse_soft_cap(model(final_logit_softcapping=None))
    _refuse_soft_cap(model())
