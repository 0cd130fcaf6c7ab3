"""Tests of kdbench: folders mirror the package; what several of them need is in tests/support."""
