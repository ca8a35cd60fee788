"""The harness: runs ranks, compares, explains, shrinks, replays, reports."""
