"""What tests share and is no test itself; importable as ``support`` (tests/conftest.py sees to it)."""
