"""Campaigns: the suites over many seeds, on many machines, with one merged report."""
