"""Recurrent layers of torch."""

__all__: list[str] = []
