"""Property suites, one file for each parallel concept."""
