"""Tests. This is a package, so that every test directory and every rank can import `tests.harness`."""
