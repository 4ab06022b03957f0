"""Stages, chains and their policies: what happens to a row. Knows no broker."""
