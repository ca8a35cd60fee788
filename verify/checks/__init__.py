"""What checks are made of, beside the ones in `verify.property`."""
