"""The number of positions of a model, which bounds the longest sequence."""

from __future__ import annotations

from nemo_popsd.errors import UserError


def refuse_beyond_positions(positions: int | None, longest: int, settings: str) -> None:
    """Refuse sequences that are longer than the model's number of positions.

    Args:
        positions: `max_position_embeddings` of the model; None skips the check.
        longest: number of tokens of the longest context, response included.
        settings: names of the settings that limit `longest`.

    Raises:
        UserError: `longest` exceeds `positions`.
    """
    if positions is not None and longest > positions:
        raise UserError(
            "sequence length",
            got=f"contexts of up to {longest} tokens, response included",
            need=f"at most the model's {positions} positions (max_position_embeddings in its config.json)",
            fix=f"set {settings}",
        )
