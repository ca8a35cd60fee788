"""Pretraining from the command line: `python -m impl.pretrain --help`."""
